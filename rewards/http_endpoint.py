"""`http`: a black box behind a user's own address. The schema is in docs/rewards.md."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tiltopt.rewards.base import Answer, Options, check_counts, require
from tiltopt.rewards.remote import (
    RemoteError,
    check_url,
    check_variable,
    need,
    png,
    png_base64,
    raise_for_status,
    scrub,
    secret,
)
from tiltopt.rewards.remote import client as make_client
from tiltopt.rewards.replies import known_spread

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class HttpOptions(Options):
    """Args:
    url: where images are POSTed.
    token_env: environment variable that holds a bearer token, or None.
    request_timeout_s: seconds without a byte from the server after which a request is given up.
    unit: of the values, for reports.
    """

    url: str
    token_env: str | None = None
    request_timeout_s: float = 300.0
    batch_size: int = 1
    unit: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_url("url", self.url)
        check_variable("token_env", self.token_env)
        require(
            self.request_timeout_s > 0, f"`request_timeout_s` must be > 0, got {self.request_timeout_s}; change it."
        )


class HttpReward:
    """POSTs images and prompts as JSON and reads the answers; one request per call.

    Args:
        options: checked options.
        client: an `httpx.Client`; by default one that reads short replies and follows no redirect.

    Raises:
        RewardError: httpx is not installed.
    """

    name = "http"

    def __init__(self, options: HttpOptions, client: Any = None) -> None:
        self._httpx = need("httpx", "http")
        self.options, self.unit, self.batch_size = options, options.unit, options.batch_size
        self._token = secret(options.token_env)
        self._client = client or make_client("http", options.request_timeout_s)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Answer]:
        """Answers in order. An image that the endpoint does not mention, or calls an error, is a failed answer.

        Raises:
            RemoteError, Retry: the request failed in a way that may pass.
            RewardError: the endpoint cannot be used (refused token, wrong address).
        """
        check_counts(self.name, images, prompts)
        ids = request_ids(images, prompts)
        body = {
            "version": VERSION,
            "items": [
                {"id": id_, "prompt": prompt, "image": {"format": "png", "base64": png_base64(image)}}
                for id_, prompt, image in zip(ids, prompts, images, strict=True)
            ],
        }
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        try:
            response = self._client.post(self.options.url, json=body, headers=headers)
        except self._httpx.HTTPError as error:
            raise RemoteError(scrub(f"{type(error).__name__}: {error}", self._token)) from None
        if response.status_code >= 300:
            return self._refused(response, len(ids))
        try:
            payload = response.json()
        except ValueError:
            raise RemoteError(f"the reply is not JSON: {scrub(response.text, self._token)!r}") from None
        return read_answers(payload, ids)

    def _refused(self, response: Any, count: int) -> list[Answer]:
        """An error status; 4xx about one image fails that image, about a batch it is tried again in smaller parts."""
        said = scrub(response.text.strip(), self._token)
        remedy = "check `url` and the token in the variable that `token_env` names."
        raise_for_status(response.status_code, response.headers, said, f"reward `http`: {remedy}")
        text = f"HTTP {response.status_code}: {said}"
        if count > 1:
            raise RemoteError(text)
        return [Answer.failure(text)]


def request_ids(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
    """32 hexadecimal digits of the image and its prompt, so that an endpoint recognises a repeated request.

    A second equal pair in the same call gets "-2" appended, a third "-3".
    """
    ids: list[str] = []
    for image, prompt in zip(images, prompts, strict=True):
        digest = hashlib.sha256(png(image) + b"\0" + prompt.encode()).hexdigest()[:32]
        copies = sum(known.split("-")[0] == digest for known in ids)
        ids.append(f"{digest}-{copies + 1}" if copies else digest)
    return ids


def read_answers(payload: Any, ids: Sequence[str]) -> list[Answer]:
    """Answers for `ids`, in order, from {"answers": [{"id", "value", "sem"?, "error"?}, …]}.

    Raises:
        RemoteError: the payload has another form, or answers what was not asked.
    """
    entries = payload.get("answers") if isinstance(payload, dict) else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get("id"), str) for e in entries):
        raise RemoteError(f'expected {{"answers": [{{"id": …, "value": …}}, …]}}, got {str(payload)[:200]!r}')
    found = {entry["id"]: entry for entry in entries}
    if len(found) < len(entries) or not set(found) <= set(ids):
        strange = sorted(set(found) - set(ids)) or "an id twice"
        raise RemoteError(f"expected one answer per id that was asked, got {str(strange)[:200]}")
    return [_read_answer(found.get(id_)) for id_ in ids]


def _read_answer(entry: dict[str, Any] | None) -> Answer:
    """One entry of the reply."""
    if entry is None:
        return Answer.failure("the endpoint gave no answer for this image")
    value, sem, error = entry.get("value"), entry.get("sem"), entry.get("error")
    if error:
        return Answer.failure(str(error)[:300], raw=entry)
    if not _is_number(value):
        return Answer.failure(f"expected a number as `value`, got {str(value)[:80]!r}", raw=entry)
    return Answer(value, sem=known_spread(sem), raw=entry)  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
