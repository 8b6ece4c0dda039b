"""Counting bytes while something loads, for a progress bar elsewhere."""

from __future__ import annotations

import threading
import time
from typing import Any


class Progress:
    """Bytes done of bytes to do; safe to advance from many threads. `note` says what happens besides."""

    def __init__(self, total: int) -> None:
        self.total, self._done, self.note = total, 0, ""
        self._lock, self._start = threading.Lock(), time.monotonic()
        self._end = 0.0

    def advance(self, nbytes: int) -> None:
        """Count bytes that are loaded."""
        with self._lock:
            self._done += nbytes
            if self._done >= self.total:
                self._end = time.monotonic()

    def finish(self) -> None:
        """Everything is loaded, whatever was counted."""
        with self._lock:
            self._done, self._end = self.total, time.monotonic()

    def skip(self) -> None:
        """Everything was there before: it took no time."""
        with self._lock:
            self._done, self._end = self.total, self._start

    def report(self) -> dict[str, Any]:
        """All of it by name: done, total, seconds, note."""
        done, total, seconds = self.snapshot()
        return {"done": done, "total": total, "seconds": seconds, "note": self.note}

    def tell(self, note: str) -> None:
        """Say what happens besides; "" for nothing."""
        self.note = note

    def snapshot(self) -> tuple[int, int, float]:
        """Bytes done, bytes to do, seconds since the start (until the end, once there)."""
        with self._lock:
            return self._done, self.total, (self._end or time.monotonic()) - self._start
