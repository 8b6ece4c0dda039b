"""Ray calls whose errors are numoe's own."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError

from numoe.engine.errors import NumoeError, UnavailableError


def get(references: Any, timeout_s: float | None = None, *, restarts: bool = False) -> Any:
    """ray.get that raises numoe's own errors as they were raised, and others as UnavailableError.

    restarts: of an actor that Ray starts again; while it does, ActorUnavailableError is raised.
    """
    try:
        return ray.get(references, timeout=timeout_s)
    except GetTimeoutError as error:
        raise UnavailableError(f"an actor did not answer for {timeout_s:g} s") from error
    except RayError as error:
        if restarts and isinstance(error, ActorUnavailableError):
            raise
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, NumoeError):
            raise cause from None
        raise UnavailableError(f"an actor failed ({first_line(cause)}); its log is in Ray's session folder") from error


def first_line(error: BaseException) -> str:
    """What an error says first, its name if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
