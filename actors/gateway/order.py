"""Puts the worker's pushes back in order.

Ray runs the calls of one caller on an asyncio actor in the order they become ready, which under load
is not the order they were made in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from numoe.engine.requests import Event


class PushOrder:
    """Pushes are numbered from 0; one that comes early waits for those before it."""

    def __init__(self) -> None:
        self._next = 0
        self._early: dict[int, Sequence[Event]] = {}

    def accept(self, number: int, events: Sequence[Event]) -> Iterator[Sequence[Event]]:
        """Yield what may be delivered now that push `number` is there."""
        self._early[number] = events
        while self._next in self._early:
            yield self._early.pop(self._next)
            self._next += 1
