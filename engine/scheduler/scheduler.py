"""The scheduler: requests join and leave between steps."""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import count
from typing import Final

from numoe.engine.errors import InputError, NumoeError, ResourceError
from numoe.engine.kv.journal import PageJournal
from numoe.engine.kv.pages import PageTable, pages_for
from numoe.engine.kv.prefix import ChunkKeys
from numoe.engine.requests import (
    CacheStatus,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    PrefillProgress,
    Started,
    TokenGenerated,
    WorkerStatus,
)
from numoe.engine.sampling import SampledToken, Sampler, StepLogits
from numoe.engine.scheduler.batch import Batch, Part
from numoe.engine.scheduler.choosing import Chooser
from numoe.engine.scheduler.conversation import Conversation
from numoe.engine.scheduler.ledger import Ledger
from numoe.engine.scheduler.load import Load
from numoe.engine.scheduler.sequence import Sequence
from numoe.engine.scheduler.slots import Slots, busy

LOOKUP_S: Final = 2.0
"""How long a request waits to know what the prompt cache has of it."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Bounds of the scheduler.

    slots: requests that run at once. context: tokens of a request at most. chunk_tokens: prompt
    tokens of a step at most. queue_limit: requests that may wait. n_pages: KV pages. fingerprint,
    kv_type: what keys and values depend on besides tokens, see `store.keys.root_key`. caches: whether
    there is a prompt cache beyond the pages: then it is asked what it has of every prompt, and saves
    what is published. keep: tokens of the beginning that stay when the context is full and half of the
    others make room (-1: the prompt); None ends the answer there. few_rows: see `Forward.few_rows`; if not 0,
    answers are computed in steps of at most so many rows, and prompts in other steps, each in its own, but for
    their last token: so an answer does not depend on who else asks, nor on whether a part of it is computed again.
    """

    slots: int
    context: int
    chunk_tokens: int
    queue_limit: int
    n_pages: int
    fingerprint: bytes = b""
    kv_type: str = ""
    caches: bool = False
    keep: int | None = None
    few_rows: int = 0

    def __post_init__(self) -> None:
        if self.n_pages < pages_for(self.context):
            raise InputError(f"{self.n_pages} KV pages cannot hold one request of {self.context} tokens")


class Scheduler:
    """Decides step by step; not thread-safe.

    A step is `schedule`, the forward pass, `sample`, `postprocess`. A step whose forward pass
    failed may be run again with the same batch. Events gather until `drain_events`.

    Cached chunks come beside the steps, see `ledger`. Where the last `schedule` was `starved`, pages
    come free once the ledger's `unsaved_keys` are saved.

    journal: is told what the pages hold. What it says already was computed by a worker that died: requests that come
    again go on from there, until the ledger's `kept.forget`.
    """

    def __init__(
        self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic, journal: PageJournal | None = None
    ) -> None:
        self.config = config
        self._clock = clock
        self._waiting: deque[Sequence] = deque()  # the oldest first
        self.slots = Slots(config.slots)
        self._journal = journal or PageJournal(config.n_pages, config.slots, config.context)
        self.ledger = Ledger(config, self.slots, self._journal)
        self._page_tables = self._journal.page_tables
        self._events: list[Event] = []
        self._numbers, self._now = count(), 0.0
        self._chooser = Chooser(config.chunk_tokens, config.few_rows, self._make_room)
        self.starved = False

    # --- requests ---------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises ResourceError when the queue is full, InputError for a prompt that leaves no room for a
        token, an id that is in use, or sampling parameters that make no sense, NotFoundError for a slot
        that there is not, PreconditionError for one that is in use when it is not to be waited for.
        """
        self._check(request)
        sampler = Sampler(request.sampling, logprobs=request.logprobs)
        keys = None if request.bypass_cache else ChunkKeys(self.ledger.root(request.cache_salt))
        table = PageTable(self.ledger.allocator)
        sequence = Sequence(request, sampler, table, next(self._numbers), self._clock(), keys)
        self._waiting.append(sequence)
        for token_id in request.generated:
            if self._is_complete(sequence):
                break
            self._extend(sequence, token_id)
        if self._is_complete(sequence):
            self._finish(sequence, "length")
        elif not self._go_on(sequence):
            self.ledger.look_up(sequence, self._clock())

    def _check(self, request: GenerationRequest) -> None:
        """Raise what `submit` says."""
        if len(self._waiting) >= self.config.queue_limit + self.slots.n_free + len(self.slots.reserved):
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
        if request.slot is not None:
            self.slots.check(request.slot)
            taken = not self.slots.is_free(request.slot) or any(s.request.slot == request.slot for s in self._waiting)
            if taken and request.slot_deadline is None:
                raise busy(request.slot)

    def abort(self, request_id: str, reason: FinishReason = "cancelled") -> bool:
        """End a request; its slot and pages are free when this returns. Whether there was one."""
        sequence = self._find(request_id)
        if sequence is not None:
            self._finish(sequence, reason)
        return sequence is not None

    def fail_all(self, error: str, reason: FinishReason = "error") -> None:
        """End every request with this reason."""
        for sequence in [*self.slots.running(), *self._waiting]:
            self._finish(sequence, reason, error)

    # --- a step -----------------------------------------------------------------------------------

    def schedule(self, now: float | None = None) -> Batch | None:
        """The next step's rows, or None if there is nothing to run before a lookup, a load or a save has ended.

        now: `time.time()`, for deadlines. Tokens of running answers come first; then at most
        `chunk_tokens` prompt tokens, first come first served.
        """
        self._now, self.starved = time.time() if now is None else now, False
        self._expire(self._now)
        if self._waiting:
            self._reserve()
            self._admit()
        ready = [s for s in self.slots.running() if s.load is None]
        chosen = self._chooser.choose(ready)
        # Whoever was preempted for another is out of this step.
        parts, logits = [], 0
        for sequence, rows in chosen:
            if sequence.slot is not None:
                ends = rows == sequence.pending
                parts.append(Part(sequence, sequence.computed, rows, logits if ends else None))
                logits += ends
        return Batch.of(parts, self._page_tables) if parts else None

    def _reserve(self) -> None:
        """Give those who run the pages that they need next: who joined with these had to give way, and join again."""
        for sequence in self.slots.running():
            if sequence.load is None:
                self._make_room(sequence, sequence.computed + min(self.config.chunk_tokens, sequence.pending))

    def again(self, batch: Batch) -> Batch | None:
        """A batch whose forward pass failed, without the requests that have ended meanwhile; None if all have.

        Deadlines count while a batch waits to be run again, too.
        """
        self._expire(time.time())
        parts, logits = [], 0
        for part in batch.parts:
            if part.sequence.slot is not None:
                wanted = part.logit_row is not None
                parts.append(replace(part, logit_row=logits if wanted else None))
                logits += wanted
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
            self.ledger.advance(sequence, part.start + part.rows)
            self._note(sequence, part.start)
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

    def _note(self, sequence: Sequence, start: int) -> None:
        """Tell the journal that a sequence's tokens are computed, from `start` on since it was told last."""
        if sequence.slot is not None:
            name, pages = sequence.request.request_id, sequence.table.pages
            self._journal.note(sequence.slot, name, sequence.tokens, pages, start, sequence.computed)

    def _append(self, sequence: Sequence, token: SampledToken) -> None:
        request = sequence.request
        if sequence.first_token is None:
            sequence.first_token = self._clock()
        if token.token_id in request.stop_ids:
            self._finish(sequence, "stop")
            return
        shortened = self._extend(sequence, token.token_id)
        self._events.append(TokenGenerated(request.request_id, token.token_id, token.logprob, token.top_logprobs))
        if self._is_complete(sequence):
            self._finish(sequence, "length")
        elif shortened:
            if sequence.keys is not None:
                sequence.keys = ChunkKeys(sequence.keys.root)
            if sequence.slot is not None:
                self._journal.clear(sequence.slot)
            sequence.table.release()
            sequence.computed = sequence.loadable = 0
            self._adopt(sequence)

    def _extend(self, sequence: Sequence, token_id: int) -> bool:
        """Add a token of the answer; whether the context was full, and the middle of the tokens dropped.

        Of what follows the first tokens, which are kept, the older half goes.
        """
        tokens, keep = sequence.tokens, self.config.keep
        tokens.append(token_id)
        sequence.generated += 1
        if keep is None or len(tokens) < self.config.context or self._is_complete(sequence):
            return False
        keep = min(sequence.prompt_tokens if keep < 0 else keep, len(tokens) - 2)
        del tokens[keep : keep + (len(tokens) - keep) // 2]
        sequence.read = len(tokens) - 1
        return True

    def _is_complete(self, sequence: Sequence) -> bool:
        """Whether an answer is as long as it may be."""
        if sequence.generated >= sequence.request.max_tokens:
            return True
        return self.config.keep is None and len(sequence.tokens) >= self.config.context

    # --- slots and pages --------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        for sequence in [*self.slots.running(), *self._waiting]:
            request = sequence.request
            if request.deadline is not None and now >= request.deadline:
                self._finish(sequence, "deadline")
            elif sequence.admitted is None and request.slot_deadline is not None and now >= request.slot_deadline:
                self._finish(sequence, "slot_busy", str(busy(request.slot or 0)))

    def _admit(self) -> None:
        """Move waiting requests into slots that suit them while the first page of each can be had."""
        for sequence in list(self._waiting):
            if not self.slots.n_free:
                return
            wanted = {older.request.slot for older in self._waiting if older.number < sequence.number}
            if not self._is_looked_up(sequence) or (slot := self.slots.choose(sequence, wanted)) is None:
                continue
            if not self._first_page(sequence):
                return
            self._clear(slot, sequence)
            if self.ledger.pages_come(sequence):
                self.starved = True
                return
            self._enter(slot, sequence)
            self._adopt(sequence)

    def _go_on(self, sequence: Sequence) -> bool:
        """Have a request go on in its slot from what it had when the worker before died; whether it had anything."""
        if (run := self.ledger.kept.take(sequence)) is None:
            return False
        self._clear(run.slot, sequence)
        self._enter(run.slot, sequence)
        self.ledger.go_on(sequence, run)
        self._note(sequence, 0)
        self._announce(sequence)
        return True

    def _clear(self, slot: int, sequence: Sequence) -> None:
        """Have a slot keep its conversation only if a sequence goes on with it."""
        held = self.slots.conversations[slot]
        if held is not None and (sequence.keys is None or not _continues(held, sequence)):
            self.ledger.replace_conversation(slot, None)

    def _enter(self, slot: int, sequence: Sequence) -> None:
        """Move a waiting sequence into a slot."""
        self._waiting.remove(sequence)
        sequence.slot, self.slots.sequences[slot] = slot, sequence
        if sequence.admitted is None:
            sequence.admitted = self._clock()

    def _first_page(self, sequence: Sequence) -> bool:
        """Whether a waiting request can begin: a younger one, which had not to wait for its slot, makes room."""
        while self.ledger.allocator.n_available == 0:
            running = self.slots.running()
            self.starved = self.starved or self.ledger.waits_for_cache
            if self.starved or not running or running[-1].number < sequence.number:
                return False
            self._preempt(running[-1])
        return True

    def _is_looked_up(self, sequence: Sequence) -> bool:
        """Whether it is known what can be loaded; of a prompt cache that does not answer in time, nothing can."""
        if sequence.loadable is None and self._clock() - sequence.asked > LOOKUP_S:
            sequence.loadable = 0
        return sequence.loadable is not None

    def _adopt(self, sequence: Sequence) -> None:
        """Begin with what is cached of a sequence in a slot."""
        if sequence.slot is not None:
            self._journal.clear(sequence.slot)
        self.ledger.adopt(sequence)
        if sequence.slot is not None:
            self._page_tables[sequence.slot, : len(sequence.table.pages)] = sequence.table.pages
        if sequence.load is None:
            self._announce(sequence)

    def loaded(self, load: Load, chunks: int, *, tail: bool, foreign: frozenset[bytes] = frozenset()) -> None:
        """Answer to a load: the first `chunks` of its chunks are in their pages, and perhaps the tail.

        foreign: the keys of those that were computed where sums are rounded otherwise.
        """
        if (sequence := self.ledger.loaded(load, chunks, tail=tail, foreign=foreign)) is not None:
            self._announce(sequence)

    def _announce(self, sequence: Sequence) -> None:
        if not sequence.announced:
            sequence.announced = True
            foreign, name = tuple(sorted(sequence.foreign)), sequence.request.request_id
            cached = min(sequence.computed, sequence.prompt_tokens)
            self._events.append(Started(name, sequence.prompt_tokens, cached, foreign))

    def _make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for `tokens` tokens of a running sequence, taken from younger ones if need be.

        False if there are none to be had in this step: the oldest always gets on, at the latest when
        what the prompt cache saves or loads is done with.
        """
        while sequence.slot is not None:
            try:
                sequence.table.ensure(tokens)
            except ResourceError:
                youngest = self.slots.running()[-1]
                self.starved = self.starved or self.ledger.waits_for_cache
                if youngest is sequence or self.starved:
                    return False
                self._preempt(youngest)
            else:
                pages = sequence.table.pages
                self._page_tables[sequence.slot, : len(pages)] = pages
                return True
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's pages; it waits before younger ones, and prefills again what is not cached any more."""
        self._vacate(sequence)
        sequence.computed = 0
        bisect.insort(self._waiting, sequence, key=lambda waiting: waiting.number)
        self.ledger.look_up(sequence, self._clock())

    def _vacate(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._journal.clear(sequence.slot)
            self.slots.sequences[sequence.slot] = None
            sequence.slot = None
        if sequence.load is not None:
            sequence.load.cancelled = True
            sequence.load = None
        sequence.table.release()

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str = "") -> None:
        if sequence.slot is None:
            self._waiting.remove(sequence)
        else:
            self.ledger.keep_conversation(sequence, sequence.slot, self._now)
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
        return bool(self._waiting) or any(self.slots.sequences)

    def drain_events(self) -> list[Event]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def status(self, steps: int, step_ms: dict[str, float], cache: CacheStatus | None = None) -> WorkerStatus:
        """The slots, the queue and the pages."""
        return WorkerStatus(
            slots=tuple(self.slots.status(slot, self.ledger.cached_tokens(slot)) for slot in range(len(self.slots))),
            queued=len(self._waiting),
            queue_limit=self.config.queue_limit,
            kv_pages_used=self.ledger.allocator.n_used,
            kv_pages_cached=self.ledger.allocator.n_idle,
            kv_pages_total=self.ledger.allocator.n_pages,
            steps=steps,
            step_ms=step_ms,
            cache=cache or CacheStatus(),
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError unless slots, pages and queue fit together."""
        self.ledger.check_integrity(self.slots.running())
        for slot, sequence in enumerate(self.slots.sequences):
            if sequence is not None and (sequence.slot != slot or sequence.table.capacity < sequence.computed):
                raise RuntimeError(f"slot {slot} and its sequence disagree")
        if any(sequence.slot is not None or sequence.table.pages for sequence in self._waiting):
            raise RuntimeError("a waiting sequence holds a slot or pages")

    def _find(self, request_id: str) -> Sequence | None:
        for sequence in [*self.slots.running(), *self._waiting]:
            if sequence.request.request_id == request_id:
                return sequence
        return None


def _continues(held: Conversation, sequence: Sequence) -> bool:
    """Whether a sequence goes on from the whole of a conversation."""
    return sequence.keys is not None and held.root == sequence.keys.root and held.begins(sequence.tokens)
