"""The scheduler: requests join and leave between steps."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import count

import numpy as np

from numoe.engine.errors import InputError, NumoeError, ResourceError
from numoe.engine.kv.pages import PAGE_TOKENS, PageAllocator, PageTable, pages_for
from numoe.engine.kv.prefix import ChunkKeys
from numoe.engine.requests import (
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    PrefillProgress,
    SlotStatus,
    Started,
    TokenGenerated,
    WorkerStatus,
)
from numoe.engine.sampling import SampledToken, Sampler, StepLogits
from numoe.engine.scheduler.batch import Batch, Part
from numoe.engine.scheduler.sequence import Sequence
from numoe.engine.store.keys import root_key


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Bounds of the scheduler.

    slots: requests that run at once. context: tokens of a request at most. chunk_tokens: prompt
    tokens of a step at most. queue_limit: requests that may wait. n_pages: KV pages. fingerprint,
    kv_type: what keys and values depend on besides tokens, see `store.keys.root_key`.
    """

    slots: int
    context: int
    chunk_tokens: int
    queue_limit: int
    n_pages: int
    fingerprint: bytes = b""
    kv_type: str = ""

    def __post_init__(self) -> None:
        if self.n_pages < pages_for(self.context):
            raise InputError(f"{self.n_pages} KV pages cannot hold one request of {self.context} tokens")


class Scheduler:
    """Decides step by step; not thread-safe.

    A step is `schedule`, the forward pass, `sample`, `postprocess`. A step whose forward pass
    failed may be run again with the same batch. Events gather until `drain_events`.
    """

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        self._allocator = PageAllocator(config.n_pages)
        self._waiting: deque[Sequence] = deque()
        self._slots: list[Sequence | None] = [None] * config.slots
        self._page_tables = np.zeros((config.slots, pages_for(config.context)), np.int32)
        self._events: list[Event] = []
        self._numbers = count()

    # --- requests ---------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises ResourceError when the queue is full, InputError for a prompt that leaves no room for
        a token, an id that is in use, or sampling parameters that make no sense.
        """
        if len(self._waiting) >= self.config.queue_limit + self._slots.count(None):
            raise ResourceError(
                f"the queue is full: {self.config.queue_limit} requests wait already (--queue); try again later"
            )
        if not request.token_ids or request.max_tokens < 1:
            raise InputError("a request needs at least one prompt token and max_tokens of at least 1")
        if len(request.token_ids) >= self.config.context:
            raise InputError(
                f"the prompt has {len(request.token_ids)} tokens and the context holds {self.config.context}, "
                "one of them for the answer: shorten the prompt or raise --ctx-size"
            )
        if self._find(request.request_id) is not None:
            raise InputError(f"request_id {request.request_id!r} is in use: choose another")
        sampler = Sampler(request.sampling, logprobs=request.logprobs)
        keys = None
        if not request.bypass_cache:
            keys = ChunkKeys(root_key(self.config.fingerprint, self.config.kv_type, request.cache_salt))
        table = PageTable(self._allocator)
        self._waiting.append(Sequence(request, sampler, table, next(self._numbers), self._clock(), keys))

    def abort(self, request_id: str, reason: FinishReason = "cancelled") -> bool:
        """End a request; its slot and pages are free when this returns. Whether there was one."""
        sequence = self._find(request_id)
        if sequence is not None:
            self._finish(sequence, reason)
        return sequence is not None

    def fail_all(self, error: str, reason: FinishReason = "error") -> None:
        """End every request with this reason."""
        for sequence in [*self._running(), *self._waiting]:
            self._finish(sequence, reason, error)

    # --- a step -----------------------------------------------------------------------------------

    def schedule(self, now: float | None = None) -> Batch | None:
        """The next step's rows, or None if there is nothing to run.

        now: `time.time()`, for deadlines. Tokens of running answers come first; then at most
        `chunk_tokens` prompt tokens, first come first served.
        """
        self._expire(time.time() if now is None else now)
        self._admit()
        chosen = [(s, 1) for s in self._running() if s.is_decoding and self._make_room(s, len(s.tokens))]
        budget = self.config.chunk_tokens
        for sequence in self._running():
            rows = 0 if sequence.is_decoding else min(budget, sequence.pending)
            if rows and self._make_room(sequence, sequence.computed + rows):
                chosen.append((sequence, rows))
                budget -= rows
        # Whoever was preempted for another is out of this step.
        parts, logits = [], 0
        for sequence, rows in chosen:
            if sequence.slot is not None:
                ends = rows == sequence.pending
                parts.append(Part(sequence, sequence.computed, rows, logits if ends else None))
                logits += ends
        return Batch.of(parts, self._page_tables) if parts else None

    def sample(self, batch: Batch, logits: StepLogits) -> list[SampledToken | NumoeError]:
        """Choose a token for each row of `logits` [len(batch.logit_rows), vocab].

        An error in place of a token ends that request only.
        """
        sampled: list[SampledToken | NumoeError] = []
        for part in batch.parts:
            if part.logit_row is not None:
                try:
                    sampled.append(part.sequence.sampler.choose_row(logits, part.logit_row, part.sequence.tokens))
                except NumoeError as error:
                    sampled.append(error)
        return sampled

    def postprocess(self, batch: Batch, sampled: Seq[SampledToken | NumoeError]) -> None:
        """Take in a step's tokens; sequences that ended meanwhile are passed over."""
        for part in batch.parts:
            sequence = part.sequence
            if sequence.slot is None:
                continue
            self._advance(sequence, part.start + part.rows)
            if sequence.generated == 0:
                done, name = min(sequence.computed, sequence.prompt_tokens), sequence.request.request_id
                self._events.append(PrefillProgress(name, done, sequence.prompt_tokens))
            if part.logit_row is None:
                continue
            token = sampled[part.logit_row]
            if isinstance(token, NumoeError):
                self._finish(sequence, "error", str(token))
            else:
                self._append(sequence, token)

    def _advance(self, sequence: Sequence, computed: int) -> None:
        """Note that a sequence's first `computed` tokens are in the cache; full pages are published."""
        before, sequence.computed = sequence.computed // PAGE_TOKENS, computed
        full = computed // PAGE_TOKENS
        if sequence.keys is not None and full > before:
            keys = sequence.keys.of(sequence.tokens, full)
            for number in range(before, full):
                sequence.table.publish(number, keys[number])

    def _append(self, sequence: Sequence, token: SampledToken) -> None:
        request = sequence.request
        if sequence.first_token is None:
            sequence.first_token = self._clock()
        if token.token_id in request.stop_ids:
            self._finish(sequence, "stop")
            return
        sequence.tokens.append(token.token_id)
        self._events.append(TokenGenerated(request.request_id, token.token_id, token.logprob, token.top_logprobs))
        if sequence.generated >= request.max_tokens or len(sequence.tokens) >= self.config.context:
            self._finish(sequence, "length")

    # --- slots and pages --------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        for sequence in [*self._running(), *self._waiting]:
            deadline = sequence.request.deadline
            if deadline is not None and now >= deadline:
                self._finish(sequence, "deadline")

    def _admit(self) -> None:
        """Move waiting requests into free slots while the first page of each can be had."""
        for slot, holder in enumerate(self._slots):
            if holder is not None or not self._waiting or self._allocator.n_free == 0:
                continue
            sequence = self._waiting.popleft()
            sequence.slot, self._slots[slot] = slot, sequence
            self._adopt(sequence)
            if sequence.admitted is None:
                sequence.admitted = self._clock()
                self._events.append(Started(sequence.request.request_id, sequence.prompt_tokens, sequence.computed))

    def _adopt(self, sequence: Sequence) -> None:
        """Begin with what cached pages hold of the tokens, but compute at least the last one, for its logits."""
        if sequence.keys is not None and sequence.slot is not None:
            chunks = (len(sequence.tokens) - 1) // PAGE_TOKENS
            sequence.computed = sequence.table.adopt(sequence.keys.of(sequence.tokens, chunks))
            pages = sequence.table.pages
            self._page_tables[sequence.slot, : len(pages)] = pages

    def _make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for `tokens` tokens of a running sequence, taken from younger ones if need be.

        False if there are none to be had in this step: the oldest always gets on.
        """
        while sequence.slot is not None:
            try:
                sequence.table.ensure(tokens)
            except ResourceError:
                youngest = self._running()[-1]
                if youngest is sequence:
                    return False
                self._preempt(youngest)
            else:
                pages = sequence.table.pages
                self._page_tables[sequence.slot, : len(pages)] = pages
                return True
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's pages; it waits first in line, and what is not cached any more is prefilled again then."""
        self._vacate(sequence)
        sequence.computed = 0
        self._waiting.appendleft(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._slots[sequence.slot] = None
            sequence.slot = None
        sequence.table.release()

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str = "") -> None:
        if sequence.slot is None:
            self._waiting.remove(sequence)
        self._vacate(sequence)
        self._events.append(
            Finished(
                sequence.request.request_id,
                reason,
                sequence.generated,
                sequence.timings(self._clock()),
                error,
            )
        )

    # --- looking ----------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether there is a request."""
        return bool(self._waiting) or any(self._slots)

    def drain_events(self) -> list[Event]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def status(self, steps: int, step_ms: dict[str, float]) -> WorkerStatus:
        """The slots, the queue and the pages."""
        return WorkerStatus(
            slots=tuple(_slot_status(i, sequence) for i, sequence in enumerate(self._slots)),
            queued=len(self._waiting),
            queue_limit=self.config.queue_limit,
            kv_pages_used=self._allocator.n_used,
            kv_pages_cached=self._allocator.n_idle,
            kv_pages_total=self._allocator.n_pages,
            steps=steps,
            step_ms=step_ms,
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError unless slots, pages and queue fit together."""
        self._allocator.check_integrity()
        held = Counter(page for sequence in self._running() for page in sequence.table.pages)
        if len(held) != self._allocator.n_used:
            raise RuntimeError(f"sequences hold {len(held)} KV pages, the allocator gave out {self._allocator.n_used}")
        for page, times in held.items():
            if (counted := self._allocator.references(page)) != times:
                raise RuntimeError(f"{times} sequences hold KV page {page}, {counted} are counted")
        for slot, sequence in enumerate(self._slots):
            if sequence is not None and (sequence.slot != slot or sequence.table.capacity < sequence.computed):
                raise RuntimeError(f"slot {slot} and its sequence disagree")
        if any(sequence.slot is not None or sequence.table.pages for sequence in self._waiting):
            raise RuntimeError("a waiting sequence holds a slot or pages")

    def _running(self) -> list[Sequence]:
        """The sequences in slots, oldest first."""
        return sorted((s for s in self._slots if s is not None), key=lambda s: s.number)

    def _find(self, request_id: str) -> Sequence | None:
        for sequence in [*self._running(), *self._waiting]:
            if sequence.request.request_id == request_id:
                return sequence
        return None


def _slot_status(slot: int, sequence: Sequence | None) -> SlotStatus:
    if sequence is None:
        return SlotStatus(slot=slot, state="idle")
    state = "decode" if sequence.is_decoding else "prefill"
    return SlotStatus(
        slot=slot, state=state, request_id=sequence.request.request_id, tokens=len(sequence.tokens)
    )
