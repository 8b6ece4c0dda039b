"""The step loop: one batch at a time through the forward pass, whoever waits outside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from numoe.engine.errors import InputError, NumoeError, UnavailableError
from numoe.engine.kv.pages import pages_for
from numoe.engine.requests import Event, FinishReason, GenerationRequest, WorkerStatus
from numoe.engine.scheduler import Batch, Scheduler
from numoe.engine.worker.forward import CpuForward

_REMEMBERED = 1024  # requests
_Value = TypeVar("_Value")


class Engine:
    """Scheduler and forward pass together; `run` is the loop, everything else may be called beside it.

    emit is called from the loop with the events of one step, for all requests at once.
    """

    def __init__(self, scheduler: Scheduler, forward: CpuForward, emit: Callable[[list[Event]], None]) -> None:
        self._scheduler, self._forward, self._emit = scheduler, forward, emit
        self._changed = threading.Condition()
        self._stepping = False
        self._stopping = False
        self._overtaken: dict[str, FinishReason] = {}
        self._submitted: dict[str, None] = {}
        self._steps, self._step_ms = 0, {"total": 0.0}

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request; ResourceError when the queue is full, InputError when it can never run."""
        vocab = self._forward.config.vocab
        if request.token_ids and not 0 <= min(request.token_ids) <= max(request.token_ids) < vocab:
            raise InputError(f"token ids must be from 0 to {vocab - 1}")
        with self._changed:
            if self._stopping:
                raise UnavailableError("the server is stopping and takes no new requests")
            self._scheduler.submit(request)
            _remember(self._submitted, request.request_id, None)
            if (reason := self._overtaken.pop(request.request_id, None)) is not None:
                self._scheduler.abort(request.request_id, reason)
            self._changed.notify()

    def abort(self, request_id: str, reason: FinishReason = "cancelled") -> None:
        """End a request: its slot is free when this returns, its Finished event follows."""
        with self._changed:
            if not self._scheduler.abort(request_id, reason) and request_id not in self._submitted:
                # The call may have overtaken the request's own: remember it for `submit`. (It may
                # also have come after the end, and then must not hit a later request of that id.)
                _remember(self._overtaken, request_id, reason)
            self._changed.notify()

    def status(self) -> WorkerStatus:
        """What is running, what waits, and where the last step's time went."""
        with self._changed:
            return self._scheduler.status(steps=self._steps, step_ms=dict(self._step_ms))

    def stop(self) -> None:
        """Make `run` return after the step under way; requests still there end with "unavailable".

        Returns when no step is under way any more.
        """
        with self._changed:
            self._stopping = True
            self._scheduler.fail_all("the server is stopping", "unavailable")
            self._changed.notify_all()
            while self._stepping:
                self._changed.wait()

    def run(self) -> None:
        """Run steps while there is work, sleep while there is none, until `stop`."""
        while True:
            with self._changed:
                while not self._stopping and not self._scheduler.has_work:
                    self._send(self._scheduler.drain_events())
                    self._changed.wait()
                if self._stopping:
                    break
                batch = self._scheduler.schedule(time.time())
                events = self._scheduler.drain_events()
                self._stepping = batch is not None
            try:
                self._send(events)
                events = [] if batch is None else self._step(batch)
            finally:  # `stop` waits for this, whatever went wrong
                with self._changed:
                    self._stepping = False
                    self._changed.notify_all()
            self._send(events)
        self._send(self._scheduler.drain_events())

    def _send(self, events: list[Event]) -> None:
        if events:
            self._emit(events)

    def _step(self, batch: Batch) -> list[Event]:
        start = time.perf_counter()
        try:
            logits = self._forward.run(batch)
            sampling = time.perf_counter()
            sampled = self._scheduler.sample(batch, logits)
        except NumoeError as error:
            with self._changed:
                self._scheduler.fail_all(str(error), "unavailable" if isinstance(error, UnavailableError) else "error")
                return self._scheduler.drain_events()
        end = time.perf_counter()
        with self._changed:
            self._scheduler.postprocess(batch, sampled)
            self._steps += 1
            self._step_ms = self._forward.times_ms() | {
                "sampling": 1e3 * (end - sampling),
                "total": 1e3 * (end - start),
            }
            return self._scheduler.drain_events()

    def logits(self, token_ids: Sequence[int], chunk: int) -> Iterator[npt.NDArray[np.float32]]:
        """The logits of every position of a sequence, float32 [up to `chunk`, vocab] at a time.

        For an engine without requests, before or instead of `run`. The arrays are copies.
        """
        options, vocab = self._forward.options, self._forward.config.vocab
        if not 0 < len(token_ids) <= options.context:
            raise InputError(f"{len(token_ids)} tokens do not fit: give from 1 to {options.context} (--ctx-size)")
        if min(token_ids) < 0 or max(token_ids) >= vocab:
            raise InputError(f"token ids must be from 0 to {vocab - 1}")
        pages = np.arange(pages_for(options.context), dtype=np.int32)[None, :]
        for start in range(0, len(token_ids), chunk):
            part = np.array(token_ids[start : start + chunk], np.int32)
            rows = np.arange(len(part), dtype=np.int32)
            yield self._forward.run(
                Batch(
                    token_ids=part,
                    positions=rows + np.int32(start),
                    slots=np.zeros_like(rows),
                    logit_rows=rows,
                    page_tables=pages,
                )
            ).copy()


def _remember(table: dict[str, _Value], key: str, value: _Value) -> None:
    """Add an entry, and forget the oldest of too many."""
    table.pop(key, None)
    table[key] = value
    while len(table) > _REMEMBERED:
        del table[next(iter(table))]
