"""The step loop: one batch at a time through the forward pass, whoever waits outside."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from numoe.engine.cache import RamTier, StoreTier
from numoe.engine.errors import InputError, NumoeError, UnavailableError
from numoe.engine.experts.mailbox import LateShardError
from numoe.engine.kv.pages import pages_for
from numoe.engine.requests import Event, FinishReason, GenerationRequest, WorkerStatus
from numoe.engine.sampling import StepLogits
from numoe.engine.scheduler import Batch, Scheduler
from numoe.engine.store.chunks import UNKNOWN_ROUNDING
from numoe.engine.store.manifest import Origin
from numoe.engine.worker.caching import Caching
from numoe.engine.worker.options import Forward
from numoe.engine.worker.pulse import Pulse
from numoe.engine.worker.slots import SlotOperations

logger = logging.getLogger(__name__)
_REMEMBERED = 1024  # requests
_DEADLINES_S = 0.1  # how exactly deadlines are kept while nothing can run
_RETURN_S = 60.0  # in which a shard must be there again
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Measurement:
    """What a piece of work took: tokens, seconds, and milliseconds by the parts of a step, "other" being the rest."""

    tokens: int
    seconds: float
    parts_ms: dict[str, float]


class Engine:
    """Scheduler and forward pass together; `run` is the loop, everything else may be called beside it.

    emit is called with the events of one step, for all requests at once, and with those of `slots`.
    ram, tier, origin, rounding: of the prompt cache behind the pages, see `Caching`.
    """

    def __init__(
        self, scheduler: Scheduler, forward: Forward, emit: Callable[[list[Event]], None], *,
        ram: RamTier | None = None, tier: StoreTier | None = None, origin: Origin | None = None,
        rounding: bytes = UNKNOWN_ROUNDING,
    ) -> None:  # fmt: skip
        self._scheduler, self._forward, self._emit = scheduler, forward, emit
        self._changed = threading.Condition()
        self._caching = Caching(scheduler, self._changed, forward.pages, ram, tier, origin, rounding)
        self.slots = SlotOperations(scheduler, self._changed, self._caching, emit)
        self._stepping, self._pulse = False, Pulse()
        self._written: list[int] = []  # pages, by the step under way
        self._unsent: list[Event] = []
        self._stopping = False
        self._overtaken: dict[str, FinishReason] = {}
        self._submitted: dict[str, None] = {}
        self._steps, self._step_ms = 0, {"total": 0.0}

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request; ResourceError when the queue is full, InputError when it can never run."""
        vocab, ids = self._forward.config.vocab, (*request.token_ids, *request.generated)
        if ids and not 0 <= min(ids) <= max(ids) < vocab:
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

    def abandon(self) -> None:
        """End every request and tell nobody: who asked for them is gone."""
        with self._changed:
            self._scheduler.fail_all("", "cancelled")
            self._scheduler.drain_events()
            self._unsent = []
            self._changed.notify_all()

    def settle(self) -> None:
        """Every request that a worker before has left has come again, or will not."""
        with self._changed:
            self._scheduler.ledger.kept.forget()
            self._changed.notify_all()

    def status(self) -> WorkerStatus:
        """What is running, what waits, and where the last step's time went."""
        with self._changed:
            return self._scheduler.status(self._steps, dict(self._step_ms), self._caching.status())

    def why_stuck(self) -> str:
        """Why the loop is to be taken for hung, empty if it is not.

        Where nobody answers at all, somebody has kept the lock.
        """
        with self._changed:
            return self._pulse.why_stuck()

    def resume(self) -> None:
        """Offer the conversations again that an earlier server left in the store, later if it is slow or away.

        From here on those that are idle for a while are written to it: whatever ends the process, they can be offered.
        """
        self._caching.resume()

    def stop(self, why: str = "") -> None:
        """Make `run` return after the step under way; requests still there end with "unavailable", and why.

        Returns when no step is under way any more.
        """
        with self._changed:
            self._stopping = True
            self._scheduler.fail_all(why or "the server is stopping", "unavailable")
            self._changed.notify_all()
            while self._stepping:
                self._changed.wait()

    def close(self, save_until: float | None = None) -> str:
        """End the background of the prompt cache, after `stop`.

        Given save_until (`time.monotonic()`), all conversations are written to the store before, as far
        as that works by then: what could not be, and why, empty if all were.
        """
        lost = "" if save_until is None else self._caching.save_all(save_until)
        self._caching.close()
        return lost

    def run(self) -> None:
        """Run steps while there is work, sleep while there is none, until `stop`."""
        while True:
            with self._changed:
                while not self._stopping and not self._scheduler.has_work:
                    self._send()
                    self._caching.collect()
                    self._changed.wait()
                if self._stopping:
                    break
                batch = self._scheduler.schedule(time.time())
                self._caching.collect(starved=self._scheduler.starved)
                self._unsent += self._scheduler.drain_events()
                self._stepping = batch is not None
                if batch is not None:
                    self._written = self._scheduler.ledger.keep_written(batch)
                else:  # until something is found, loaded or saved, or a deadline may have come
                    self._send()
                    self._changed.wait(_DEADLINES_S)
                    continue
            try:
                self._step(batch)
            finally:  # `stop` waits for this, whatever went wrong
                self._pulse.end()
                with self._changed:
                    self._stepping = False
                    self._changed.notify_all()
        self._send()

    def _send(self) -> None:
        """Emit what has happened since the last time; the steps' thread alone does that."""
        with self._changed:
            events, self._unsent = [*self._unsent, *self._scheduler.drain_events()], []
        if events:
            self._emit(events)

    def _step(self, batch: Batch) -> None:
        """Run a batch, and send meanwhile what the step before has given."""
        start = time.perf_counter()
        try:
            try:
                done = self._run(batch)
            finally:
                with self._changed:
                    self._scheduler.ledger.give_back(self._written)
            if done is None:
                return
            batch, logits = done
            sampling = time.perf_counter()
            sampled = self._scheduler.sample(batch, logits)
        except NumoeError as error:
            with self._changed:
                self._scheduler.fail_all(str(error), "unavailable" if isinstance(error, UnavailableError) else "error")
                return
        end = time.perf_counter()
        with self._changed:
            self._scheduler.postprocess(batch, sampled)
            self._steps += 1
            self._step_ms = self._forward.times_ms() | {
                "sampling": 1e3 * (end - sampling),
                "total": 1e3 * (end - start),
            }

    def _run(self, batch: Batch) -> tuple[Batch, StepLogits] | None:
        """The logits of a batch, and what of it was still wanted; None if nothing was.

        It is run again while a shard is late: another may take its place. LateShardError if none does.
        """
        until = time.monotonic() + _RETURN_S
        while True:
            self._pulse.begin(len(batch.token_ids))
            try:
                return batch, self._forward.run(batch, self._send)
            except LateShardError as error:
                logger.warning("%s; the step is run again", error)
                with self._changed:
                    if self._stopping or time.monotonic() > until:
                        raise
                    left = self._scheduler.again(batch)
            self._send()
            if left is None:
                return None
            batch = left

    def logits(self, token_ids: Sequence[int], chunk: int) -> Iterator[npt.NDArray[np.float32]]:
        """The logits of every position of a sequence, float32 [up to `chunk`, vocab] at a time.

        For an engine without requests, before or instead of `run`. The arrays are copies.
        """
        self._check_sequence(token_ids, 0, len(token_ids))
        for start in range(0, len(token_ids), chunk):
            part = token_ids[start : start + chunk]
            yield np.array(self._pass(part, start, len(part)))

    def measure_prefill(self, token_ids: Sequence[int], start: int, chunk: int) -> Measurement:
        """Time a prompt of `token_ids` behind `start` tokens that are there already, `chunk` tokens a step.

        The last step computes the logits of the last token. As `logits`, for an engine without requests.
        """
        self._check_sequence(token_ids, start, len(token_ids))
        steps = [(token_ids[at : at + chunk], start + at) for at in range(0, len(token_ids), chunk)]
        parts, begin = Counter[str](), time.perf_counter()
        for number, (part, at) in enumerate(steps, 1):
            self._pass(part, at, int(number == len(steps)))
            parts.update(self._forward.times_ms())
        return _measurement(len(token_ids), time.perf_counter() - begin, parts)

    def measure_decode(self, token_id: int, start: int, count: int) -> Measurement:
        """Time `count` steps of one token each, the first being `token_id` at position `start`.

        Each step takes the likeliest token of the one before. The loop is here, so that what is timed
        holds everything that a step of one row takes in the worker, and no call of Ray or gRPC. The rows
        stay in the KV pool until others are written at their positions.
        """
        self._check_sequence([token_id], start, count)
        parts, begin = Counter[str](), time.perf_counter()
        for position in range(start, start + count):
            token_id, _ = self._pass([token_id], position, 1).likeliest(0)
            parts.update(self._forward.times_ms())
        return _measurement(count, time.perf_counter() - begin, parts)

    def _check_sequence(self, token_ids: Sequence[int], start: int, count: int) -> None:
        """Raise InputError unless `count` tokens, these being the first of them, fit from `start` on."""
        context, vocab = self._forward.options.context, self._forward.config.vocab
        if start < 0 or not 0 < count <= context - start:
            raise InputError(f"{start + count} tokens do not fit: give from 1 to {context} (--ctx-size)")
        if min(token_ids) < 0 or max(token_ids) >= vocab:
            raise InputError(f"token ids must be from 0 to {vocab - 1}")

    def _pass(self, token_ids: Sequence[int], start: int, n_logits: int) -> StepLogits:
        """One step over tokens of a single sequence from position `start` on; the last `n_logits` rows' logits."""
        rows = np.arange(len(token_ids), dtype=np.int32)
        return self._forward.run(
            Batch(
                token_ids=np.array(token_ids, np.int32),
                positions=rows + np.int32(start),
                slots=np.zeros_like(rows),
                logit_rows=rows[len(rows) - n_logits :],
                page_tables=np.arange(pages_for(self._forward.options.context), dtype=np.int32)[None, :],
            )
        )


def _measurement(tokens: int, seconds: float, parts: Counter[str]) -> Measurement:
    """The sum of some steps, with what no part of them accounts for."""
    return Measurement(tokens, seconds, {**parts, "other": 1e3 * seconds - sum(parts.values())})


def _remember(table: dict[str, _Value], key: str, value: _Value) -> None:
    """Add an entry, and forget the oldest of too many."""
    table.pop(key, None)
    table[key] = value
    while len(table) > _REMEMBERED:
        del table[next(iter(table))]
