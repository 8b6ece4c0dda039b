"""Puts the worker's pushes back in order.

Ray runs the calls of one caller on an asyncio actor in the order they become ready, which under load
is not the order they were made in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from numoe.engine.requests import Event


class Connections:
    """The pushes of one worker after the other, each with the number of its connection.

    What carries a later number than the current connection's comes before the gateway has been told of it, and waits.
    """

    def __init__(self) -> None:
        self._current, self._order = 0, PushOrder()
        self._waiting: dict[int, list[tuple[int, Sequence[Event]]]] = {}

    def attach(self, connection: int) -> Iterator[Sequence[Event]]:
        """Make a connection the current one; yield what has come of it already."""
        self._current, self._order = connection, PushOrder()
        arrived = self._waiting.pop(connection, [])
        self._waiting = {number: pushes for number, pushes in self._waiting.items() if number > connection}
        for number, events in arrived:
            yield from self._order.accept(number, events)

    def accept(self, connection: int, number: int, events: Sequence[Event]) -> Iterator[Sequence[Event]]:
        """Yield what may be delivered now; nothing of an earlier worker, which comes too late."""
        if connection == self._current:
            yield from self._order.accept(number, events)
        elif connection > self._current:
            self._waiting.setdefault(connection, []).append((number, events))


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
