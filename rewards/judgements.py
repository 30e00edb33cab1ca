"""Reading what a vision-language model said: a grade, a verdict, or a failed answer; never a guess."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tiltopt.rewards.base import Answer
from tiltopt.rewards.remote import RemoteError

WORTH = {"first": 1.0, "tie": 0.5, "second": 0.0}
FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


def read_completion(completion: Any) -> str | Answer:
    """The text of a chat completion, or a failed answer for a refusal or a reply cut short.

    Raises:
        RemoteError: it is no chat completion.
    """
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        raise RemoteError(f"expected a chat completion, got {str(completion)[:200]!r}")
    message, reason = choices[0].message, choices[0].finish_reason
    refusal, content = getattr(message, "refusal", None), message.content
    if refusal:
        return Answer.failure(f"the model refused: {str(refusal)[:200]}", raw=str(refusal))
    if reason in ("length", "content_filter"):
        return Answer.failure(f"the reply was cut short ({reason})", raw=content)
    if not isinstance(content, str) or not content.strip():
        return Answer.failure("the reply is empty", raw=content)
    return content


def read_score(said: str) -> Answer:
    """{"reason": text, "score": 0 to 10}, optionally in a code fence; anything else is a failed answer."""
    found = _object(said)
    if found is None or not isinstance(found.get("reason"), str):
        return Answer.failure('expected {"reason": …, "score": …}, got something else', raw=said)
    score = found.get("score")
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        return Answer.failure(f"expected a number as `score`, got {str(score)[:60]!r}", raw=said)
    if not 0 <= score <= 10:
        return Answer.failure(f"expected a score from 0 to 10, got {score}", raw=said)
    return Answer(float(score), raw=said)


def read_verdict(said: str) -> Answer:
    """{"reason": text, "better": "first" | "second" | "tie"}; anything else is a failed answer."""
    found = _object(said)
    better = found.get("better") if found is not None and isinstance(found.get("reason"), str) else None
    if not isinstance(better, str) or better not in WORTH:
        return Answer.failure('expected {"reason": …, "better": "first", "second" or "tie"}', raw=said)
    return Answer(WORTH[better], raw=said)


def _object(said: str) -> dict[str, Any] | None:
    """The one JSON object in the text, which may stand in a code fence."""
    fenced = FENCE.fullmatch(said.strip())
    try:
        found = json.loads(fenced[1] if fenced else said)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def turned(verdict: Answer) -> Answer:
    """The verdict as seen from the other image."""
    return Answer(1.0 - verdict.value, error=verdict.error, raw=verdict.raw)


def average(verdicts: Sequence[Answer]) -> Answer:
    """Their mean; failed as soon as one failed."""
    raw = [verdict.raw for verdict in verdicts]
    for verdict in verdicts:
        if verdict.failed:
            return Answer.failure(str(verdict.error), raw=raw)
    return Answer(sum(verdict.value for verdict in verdicts) / len(verdicts), raw=raw)
