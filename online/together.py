"""What only rank 0 may do, with its outcome, good or bad, known to every rank, so that none waits for ever."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from tiltopt.errors import TiltoptError
from tiltopt.online.team import Team

T = TypeVar("T")


class PeerError(TiltoptError, RuntimeError):
    """Another process of the run stopped; the cause is in its message or in that process's own output."""


def on_main(team: Team, action: Callable[[], T]) -> T:
    """Rank 0's `action()`, on every rank. Collective.

    Raises:
        PeerError: on the other ranks, when `action` raised on rank 0 (where the error itself is raised).
    """
    if team.size == 1:
        return action()
    if team.is_main:
        try:
            result = action()
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # the others may be gone; the error itself is what matters
                team.broadcast(("error", f"{type(error).__name__}: {error}"))
            raise
        with_peers(team, lambda: team.broadcast(("ok", result)))
        return result
    told: tuple[str, Any] = with_peers(team, lambda: team.broadcast(None))
    status, value = told
    if status == "error":
        raise PeerError(f"rank 0 stopped: {value}")
    return value


def with_peers(team: Team, collective: Callable[[], T]) -> T:
    """`collective()`, with the loss of another process told in words.

    Raises:
        PeerError: the connection to another process broke.
    """
    if team.size == 1:
        return collective()
    try:
        return collective()
    except RuntimeError as error:
        text = str(error).splitlines()[0] if str(error) else ""
        if isinstance(error, TiltoptError) or not any(word in text.lower() for word in _LOST):
            raise
        raise PeerError(
            f"rank {team.rank} lost another process of the run ({text[:200]}). Nothing answered is lost: see that "
            "process's output, then resume the run."
        ) from error


_LOST = ("connection closed", "connection reset", "connect", "gloo", "nccl", "timed out", "broken pipe", "store")
