"""Whether the step loop gets on."""

from __future__ import annotations

import time

_LONGEST_S, _LONGEST_ROW_S = 60.0, 0.5
"""A step may take so long, and so long for each of its rows: the slowest of hosts are faster."""


class Pulse:
    """Since when a step has been running."""

    def __init__(self) -> None:
        self._step: tuple[float, int] | None = None

    def begin(self, rows: int) -> None:
        """A step of so many rows begins, or is tried again."""
        self._step = time.monotonic(), rows

    def end(self) -> None:
        """It has ended."""
        self._step = None

    def why_stuck(self) -> str:
        """What takes longer than it ever should, empty if nothing does."""
        step = self._step
        if step is None:
            return ""
        (begun, rows), now = step, time.monotonic()
        if now - begun <= _LONGEST_S + _LONGEST_ROW_S * rows:
            return ""
        return f"has not come to the end of a step of {rows} rows for {now - begun:.0f} s"
