"""What Ray has to say to the process that has joined it."""

from __future__ import annotations

import sys
import threading
from typing import Any

from ray._private import worker as ray_worker

_ON_DEATHS = "A worker died or was killed"
_NOTHING_NEW_S = 1.0


def redirect() -> None:
    """Have it printed to stderr: on stdout numoe's commands print results."""
    ray_worker.print_to_stdstream = _print_to_stderr


def _print_to_stderr(data: dict[str, Any], **_: Any) -> None:
    """Print lines that Ray has for the driver, but its long words about each death: `Server.wait` tells of those."""
    for line in data["lines"]:
        if not line.startswith(_ON_DEATHS):
            print(f"ray: {line}", file=sys.stderr, flush=True)


def wait_patiently() -> None:
    """Have Ray's thread that asks its head for errors pause when there are none.

    Where the head is dead, it would ask again at once, and take a core from those who compute.
    """
    joined = ray_worker.global_worker
    joined.gcs_error_subscriber = _Patient(joined.gcs_error_subscriber, joined.threads_stopped)


class _Patient:
    """A subscriber that does not answer at once if it has nothing, until `stopped` is set."""

    def __init__(self, subscriber: Any, stopped: threading.Event) -> None:
        self._subscriber, self._stopped = subscriber, stopped

    def poll(self, *args: Any, **options: Any) -> tuple[bytes | None, dict[str, Any] | None]:
        """As Ray's: whom an error concerns, and the error."""
        found: tuple[bytes | None, dict[str, Any] | None] = self._subscriber.poll(*args, **options)
        if found[1] is None:
            self._stopped.wait(_NOTHING_NEW_S)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subscriber, name)
