"""Routes the worker's events to the calls that wait for them.

The worker pushes the events of all requests once per step; everything here runs in the gateway's
event loop and nothing blocks it.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from numoe.actors.gateway.errors import RequestIdInUseError, SlowReaderError
from numoe.engine.errors import NumoeError, ResourceError, UnavailableError
from numoe.engine.requests import (
    Event,
    Finished,
    GenerationRequest,
    PrefillProgress,
    SlotProgress,
    Started,
    TokenGenerated,
)

_PROGRESS = (PrefillProgress, SlotProgress)
MAX_FRUITLESS = 8
"""Workers in a row that may die over a request without a token of it."""


class RequestStream:
    """The events of one request, between the worker that makes them and the call that sends them.

    At most `backlog` events wait. When one more comes, all are dropped, the reader will see
    SlowReaderError, and `on_overflow` is called once.

    What has come is counted, so that another worker can go on with the request (`remainder`).
    """

    def __init__(self, request_id: str, backlog: int, on_overflow: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._backlog = backlog
        self._on_overflow = on_overflow
        self._events: deque[Event] = deque()
        self._failure: NumoeError | None = None
        self._changed = asyncio.Event()
        self._request: GenerationRequest | None = None
        self._generated: list[int] = []
        self._started = self._finished = False
        self._foreign: tuple[int, ...] | None = None
        self._fruitless = 0

    def submitted(self, request: GenerationRequest) -> None:
        """Note what the worker is asked for."""
        self._request = request

    def remainder(self) -> GenerationRequest | None:
        """The request as another worker has to go on with it, None if there is nothing left to do.

        Fails the stream, so that a request that kills every worker comes to an end, when several in a row
        have not got any further with it.
        """
        request = self._request
        if request is None or self._finished or self._failure is not None:
            return None
        if len(request.generated) == len(self._generated):
            self._fruitless += 1
            if self._fruitless > MAX_FRUITLESS:
                self.fail(UnavailableError(f"{self._fruitless} workers in a row have died over this request"))
                return None
        else:
            self._fruitless = 0
        has_slot = request.slot is not None and (self._started or request.slot_deadline is None)
        self._request = msgspec.structs.replace(
            request,
            generated=tuple(self._generated),
            foreign=self._foreign,
            slot_deadline=math.inf if has_slot else request.slot_deadline,
        )
        return self._request

    def push(self, event: Event) -> None:
        """Add an event for the reader."""
        if self._failure is not None:
            return
        if isinstance(event, TokenGenerated):
            self._generated.append(event.token_id)
        if isinstance(event, Started) and not self._started:
            self._started, self._foreign = True, event.foreign
        self._finished = self._finished or isinstance(event, Finished)
        if isinstance(event, _PROGRESS) and self._events and type(self._events[-1]) is type(event):
            self._events.pop()  # only the latest progress is of interest
        if len(self._events) >= self._backlog:
            self._events.clear()
            self.fail(
                SlowReaderError(
                    f"{self._backlog} events wait to be read: read the stream faster or ask for less"
                )
            )
            self._on_overflow(self.request_id)
            return
        self._events.append(event)
        self._changed.set()

    def close(self) -> None:
        """Nobody reads it any more, so no worker need go on."""
        self._request = None

    def fail(self, error: NumoeError) -> None:
        """Let the reader see `error` after the events that already wait."""
        if self._failure is None:
            self._failure = error
        self._changed.set()

    async def next_events(self) -> list[Event]:
        """Wait for events and take all that are there; raises the failure when none is left."""
        while not self._events:
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            await self._changed.wait()
        events = list(self._events)
        self._events.clear()
        return events


class RequestStreams:
    """All open streams of a gateway.

    max_streams: more are refused; backlog: see `RequestStream`.
    """

    def __init__(self, *, max_streams: int = 1024, backlog: int = 8192) -> None:
        self._streams: dict[str, RequestStream] = {}
        self._max_streams = max_streams
        self._backlog = backlog
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._streams)

    def __getitem__(self, request_id: str) -> RequestStream:
        return self._streams[request_id]

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._streams

    @contextmanager
    def open(self, request_id: str, on_overflow: Callable[[str], None]) -> Iterator[RequestStream]:
        """Receive the events of a request inside the `with` block.

        Raises RequestIdInUseError, and ResourceError when too many streams are open.
        """
        if request_id in self._streams:
            raise RequestIdInUseError(f"request_id {request_id!r} is running: choose another")
        if len(self._streams) >= self._max_streams:
            raise ResourceError(f"{self._max_streams} streams are open, the most that this server takes")
        stream = self._streams[request_id] = RequestStream(request_id, self._backlog, on_overflow)
        self._idle.clear()
        try:
            yield stream
        finally:
            stream.close()
            del self._streams[request_id]
            if not self._streams:
                self._idle.set()

    def deliver(self, events: Sequence[Event]) -> None:
        """Route the events of one step; those of unknown requests (ended, cancelled) are dropped."""
        for event in events:
            if (stream := self._streams.get(event.request_id)) is not None:
                stream.push(event)

    def __iter__(self) -> Iterator[RequestStream]:
        """The open streams, in the order that they were opened in."""
        return iter(list(self._streams.values()))

    def fail_all(self, message: str) -> None:
        """End every open stream with UnavailableError, for when the worker is gone."""
        for stream in self._streams.values():
            stream.fail(UnavailableError(message))

    async def wait_idle(self) -> None:
        """Wait until no stream is open."""
        await self._idle.wait()
