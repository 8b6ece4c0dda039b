"""Ray calls whose errors are numoe's own."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from numoe.engine.errors import NumoeError, UnavailableError


def get(references: Any, timeout_s: float | None = None) -> Any:
    """ray.get that raises numoe's own errors as they were raised, and others as UnavailableError."""
    try:
        return ray.get(references, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, NumoeError):
            raise error.cause from None
        raise UnavailableError(f"an actor failed while starting: {error.cause}") from error
    except RayActorError as error:
        raise UnavailableError(f"an actor died while starting: {error}") from error
    except GetTimeoutError as error:
        raise UnavailableError(f"an actor did not answer for {timeout_s:g} s") from error
