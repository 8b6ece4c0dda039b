"""The scheduler: requests join and leave between steps."""

from __future__ import annotations

import dataclasses
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
from numoe.engine.scheduler.conversation import Conversation, TailIndex
from numoe.engine.scheduler.load import Load, Tail
from numoe.engine.scheduler.sequence import Sequence
from numoe.engine.scheduler.slots import Slots, busy
from numoe.engine.store.keys import root_key


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Bounds of the scheduler.

    slots: requests that run at once. context: tokens of a request at most. chunk_tokens: prompt
    tokens of a step at most. queue_limit: requests that may wait. n_pages: KV pages. fingerprint,
    kv_type: what keys and values depend on besides tokens, see `store.keys.root_key`. caches: whether
    there is a prompt cache beyond the pages: then it is asked what it has of every prompt, and saves
    what is published. keep: tokens of the beginning that stay when the context is full and half of the
    others make room (-1: the prompt); None ends the answer there.
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

    def __post_init__(self) -> None:
        if self.n_pages < pages_for(self.context):
            raise InputError(f"{self.n_pages} KV pages cannot hold one request of {self.context} tokens")


class Scheduler:
    """Decides step by step; not thread-safe.

    A step is `schedule`, the forward pass, `sample`, `postprocess`. A step whose forward pass
    failed may be run again with the same batch. Events gather until `drain_events`.

    Chunks come from the prompt cache beside the steps. Whoever runs the scheduler asks the cache for
    each of `drain_lookups` and answers with `looked_up`; brings what `drain_loads` lists into the
    pages and answers with `loaded`; and hands on what is published (`drain_published`) and what lost
    its slot (`drain_parked`). Where the last `schedule` was `starved`, pages come free once
    `unsaved_keys` are saved.
    """

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        self._allocator = PageAllocator(config.n_pages, saves=config.caches)
        self._waiting: deque[Sequence] = deque()
        self.slots = Slots(config.slots)
        self._tails = TailIndex()
        self._borrowed: Counter[int] = Counter()
        self._loading: dict[Load, Sequence] = {}
        self._lookups: list[Sequence] = []
        self._loads: list[Load] = []
        self._published: list[bytes] = []
        self._parked: list[Conversation] = []
        self._superseded: list[str] = []
        self._page_tables = np.zeros((config.slots, pages_for(config.context)), np.int32)
        self._events: list[Event] = []
        self._numbers, self._now = count(), 0.0
        self.starved = False

    # --- requests ---------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises ResourceError when the queue is full, InputError for a prompt that leaves no room for
        a token, an id that is in use, a slot that there is not, or sampling parameters that make no
        sense, PreconditionError for a slot that is in use when it is not to be waited for.
        """
        if len(self._waiting) >= self.config.queue_limit + self.slots.n_free:
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
        sampler = Sampler(request.sampling, logprobs=request.logprobs)
        keys = None if request.bypass_cache else ChunkKeys(self.root(request.cache_salt))
        sequence = Sequence(request, sampler, PageTable(self._allocator), next(self._numbers), self._clock(), keys)
        self._waiting.append(sequence)
        self._look_up(sequence)

    def root(self, salt: bytes = b"") -> bytes:
        """The chunk key before the first token."""
        return root_key(self.config.fingerprint, self.config.kv_type, salt)

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
        self._admit()
        ready = [s for s in self.slots.running() if s.load is None]
        chosen = [(s, 1) for s in ready if s.is_decoding and self._make_room(s, len(s.tokens))]
        budget = self.config.chunk_tokens
        for sequence in ready:
            rows = 0 if sequence.slot is None or sequence.is_decoding else min(budget, sequence.pending)
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
            if self.config.caches:
                self._published += keys[before:full]

    def _append(self, sequence: Sequence, token: SampledToken) -> None:
        request = sequence.request
        if sequence.first_token is None:
            sequence.first_token = self._clock()
        if token.token_id in request.stop_ids:
            self._finish(sequence, "stop")
            return
        sequence.tokens.append(token.token_id)
        sequence.generated += 1
        self._events.append(TokenGenerated(request.request_id, token.token_id, token.logprob, token.top_logprobs))
        if sequence.generated >= request.max_tokens:
            self._finish(sequence, "length")
        elif len(sequence.tokens) >= self.config.context:
            if self.config.keep is None:
                self._finish(sequence, "length")
            else:
                self._drop_middle(sequence, self.config.keep)

    def _drop_middle(self, sequence: Sequence, keep: int) -> None:
        """Make room in a full context: of what follows the first `keep` tokens, the older half goes."""
        tokens = sequence.tokens
        keep = min(sequence.prompt_tokens if keep < 0 else keep, len(tokens) - 2)
        del tokens[keep : keep + (len(tokens) - keep) // 2]
        if sequence.keys is not None:
            sequence.keys = ChunkKeys(sequence.keys.root)
        sequence.table.release()
        sequence.computed = 0
        self._adopt(sequence)

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
            if sequence.loadable is None or (slot := self.slots.choose(sequence)) is None:
                continue
            if not self._first_page(sequence):
                return
            self._waiting.remove(sequence)
            sequence.slot, self.slots.sequences[slot] = slot, sequence
            held = self.slots.conversations[slot]
            if held is not None and (sequence.keys is None or not _continues(held, sequence)):
                self.replace_conversation(slot, None)
            if sequence.admitted is None:
                sequence.admitted = self._clock()
            self._adopt(sequence)

    def _first_page(self, sequence: Sequence) -> bool:
        """Whether a waiting request can begin: a younger one, which had not to wait for its slot, makes room."""
        while self._allocator.n_available == 0:
            running = self.slots.running()
            self.starved = self.starved or self.waits_for_cache
            if self.starved or not running or running[-1].number < sequence.number:
                return False
            self._preempt(running[-1])
        return True

    def _look_up(self, sequence: Sequence) -> None:
        """Have the prompt cache asked how much it has of the tokens."""
        if self.config.caches and sequence.keys is not None and len(sequence.tokens) > 1:
            sequence.loadable = None
            self._lookups.append(sequence)

    def _adopt(self, sequence: Sequence) -> None:
        """Begin with what is cached of the tokens, but compute at least the last one, for its logits."""
        if sequence.keys is not None:
            usable = len(sequence.tokens) - 1
            keys = sequence.keys.of(sequence.tokens, usable // PAGE_TOKENS)
            sequence.computed = sequence.table.adopt(keys)
            first = len(sequence.table.pages)
            wanted = keys[first : max(first, sequence.loadable or 0)]
            taken = wanted[: self._allocator.n_available]
            sequence.table.ensure((first + len(taken)) * PAGE_TOKENS)
            tail = self._tail(sequence, usable) if len(taken) == len(wanted) else None
            if taken or tail is not None:
                pages = sequence.table.pages[first : first + len(taken)]
                self._begin_load(sequence, Load(first, tuple(taken), tuple(pages), tail))
        if sequence.slot is not None:
            self._page_tables[sequence.slot, : len(sequence.table.pages)] = sequence.table.pages
        if sequence.load is None:
            self._announce(sequence)

    def _tail(self, sequence: Sequence, usable: int) -> Tail | None:
        """The chunk that agrees longest with the tokens behind those of the pages, its page allocated and held."""
        keys, number = sequence.keys, len(sequence.table.pages)
        if keys is None or number * PAGE_TOKENS >= usable or self._allocator.n_available == 0:
            return None
        before = [keys.root, *keys.of(sequence.tokens, number)][-1]
        rest = np.array(sequence.tokens[number * PAGE_TOKENS : min(usable, (number + 1) * PAGE_TOKENS)], np.int32)
        found = dict(self._tails.after(before))
        for held in self.slots.conversations:
            if held is not None and held.computed > number * PAGE_TOKENS and held.key_before(number) == before:
                found[held.all_keys[number]] = held.chunk(number)
        agreeing = {key: _common(rest, tokens) for key, tokens in found.items()}
        # What is in a page already goes before what agrees as long and has to be read.
        key = max(agreeing, key=lambda key: (agreeing[key], key in self._allocator), default=None)
        if key is None or not agreeing[key] or (key not in self._allocator and not self.config.caches):
            return None
        source = self.borrow(key)
        try:
            sequence.table.ensure((number + 1) * PAGE_TOKENS)
        except ResourceError:
            self.give_back([] if source is None else [source])
            return None
        return Tail(key, len(found[key]), agreeing[key], source, sequence.table.pages[-1])

    def _begin_load(self, sequence: Sequence, load: Load) -> None:
        sequence.load = load
        own = [*load.pages, *([load.tail.page] if load.tail else [])]  # the tail's source is borrowed already
        self._allocator.share(own)
        self._borrowed.update(own)
        self._loading[load] = sequence
        self._loads.append(load)

    def _announce(self, sequence: Sequence) -> None:
        if not sequence.announced:
            sequence.announced = True
            self._events.append(Started(sequence.request.request_id, sequence.prompt_tokens, sequence.computed))

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
                self.starved = self.starved or self.waits_for_cache
                if youngest is sequence or self.starved:
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
        self._look_up(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
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
            self._keep_conversation(sequence, sequence.slot)
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

    # --- conversations ----------------------------------------------------------------------------

    def _keep_conversation(self, sequence: Sequence, slot: int) -> None:
        """Leave what a sequence computed in its slot, unless it came less far than what was there."""
        held = self.slots.conversations[slot]
        if sequence.keys is None or sequence.computed < max(1, held.computed if held else 0):
            return
        request = sequence.request
        kept = Conversation.of(
            sequence.keys, sequence.tokens, sequence.computed, salt=request.cache_salt, sampling=request.sampling,
            prompt_tokens=min(sequence.prompt_tokens, len(sequence.tokens)), last_used=self._now,
            named=request.slot is not None or bool(held and held.named),
        )  # fmt: skip
        if kept.tail is not None:
            sequence.table.publish(len(kept.keys), kept.tail, kept.computed % PAGE_TOKENS)
        if held is not None:  # this one goes on from there
            self._tails.remove(held)
            self._superseded += [held.resumable] if held.resumable else []
        self.slots.conversations[slot] = kept
        self._tails.add(kept)

    def replace_conversation(self, slot: int, conversation: Conversation | None) -> None:
        """Give a slot another conversation, or none; the one it had is parked: it can still come back."""
        held = self.slots.conversations[slot]
        self.slots.conversations[slot] = conversation
        if conversation is not None:
            self._tails.add(conversation)
        if held is not None and not any(held is other for other in self.slots.conversations):
            self._parked.append(held)

    def forget_conversation(self, slot: int) -> None:
        """Empty a slot for good."""
        if (held := self.slots.conversations[slot]) is not None:
            self.slots.conversations[slot] = None
            self._tails.remove(held)
            self._superseded += [held.resumable] if held.resumable else []

    def note_conversation(self, slot: int, before: Conversation, **changes: str | bool) -> None:
        """Note something about a slot's conversation, if it is still `before`."""
        if self.slots.conversations[slot] is before:
            self.slots.conversations[slot] = dataclasses.replace(before, **changes)  # type: ignore[arg-type]

    def offer(self, conversation: Conversation) -> None:
        """Let a conversation come back by itself: in an empty slot, or when a prompt goes on from it."""
        self._tails.add(conversation)
        for slot, held in enumerate(self.slots.conversations):
            if held is None and self.slots.is_free(slot):
                self.slots.conversations[slot] = conversation
                return

    # --- the prompt cache -------------------------------------------------------------------------

    @property
    def waits_for_cache(self) -> bool:
        """Whether pages come free when what is being saved or loaded is done with."""
        return self._allocator.n_unsaved > 0 or any(
            self._allocator.references(page) == times for page, times in self._borrowed.items()
        )

    def unsaved_keys(self) -> list[bytes]:
        """Of published pages that nobody holds and that cannot be used before they are saved."""
        return self._allocator.unsaved_keys()

    def saved(self, key: bytes) -> None:
        """Answer to `drain_published` and `unsaved_keys`: nobody needs the page of `key` any more."""
        self._allocator.mark_saved(key)

    def borrow(self, key: bytes) -> int | None:
        """The page that is published under `key`, which stays as it is until `give_back`."""
        pages = self._allocator.adopt([key])
        self._borrowed.update(pages)
        return pages[0] if pages else None

    def tokens_of(self, key: bytes) -> int:
        """Tokens in the page that is published under `key`."""
        return self._allocator.tokens_of(key)

    def give_back(self, pages: Seq[int]) -> None:
        """Let go of borrowed pages."""
        self._borrowed.subtract(pages)
        self._borrowed = +self._borrowed
        self._allocator.free(pages)

    def spare_pages(self, keys: Seq[bytes]) -> list[tuple[bytes, int, bool]]:
        """Borrow a page for each of `keys`: key, page, and whether it is published, so that nothing need be read.

        ResourceError, and nothing is borrowed, if there are too few.
        """
        pages = [(key, self.borrow(key)) for key in keys]
        try:
            fresh = self._allocator.allocate(sum(page is None for _, page in pages))
        except ResourceError:
            self.give_back([page for _, page in pages if page is not None])
            raise
        self._borrowed.update(fresh)
        return [(key, fresh.pop(), False) if page is None else (key, page, True) for key, page in pages]

    def publish_spare(self, key: bytes, page: int, tokens: int) -> None:
        """What was read into a borrowed page can be found now."""
        self._allocator.publish(page, key, tokens)
        self._allocator.mark_saved(key)

    def looked_up(self, sequence: Sequence, chunks: int) -> None:
        """Answer to `drain_lookups`: the prompt cache has the first `chunks` chunks."""
        sequence.loadable = chunks

    def loaded(self, load: Load, chunks: int, *, tail: bool) -> None:
        """Answer to `drain_loads`: the first `chunks` of the load's chunks are in their pages, and perhaps the tail."""
        sequence = self._loading.pop(load)
        if not load.cancelled:
            sequence.load = None
            for number in range(chunks):
                sequence.table.publish(load.first + number, load.keys[number])
                self._allocator.mark_saved(load.keys[number])
            sequence.computed = (load.first + chunks) * PAGE_TOKENS
            if tail and load.tail is not None and chunks == len(load.keys):
                sequence.computed += load.tail.tokens
            self._announce(sequence)
        self.give_back(load.held)

    def drain_lookups(self) -> list[tuple[Sequence, list[bytes]]]:
        """Sequences and the keys of their chunks, of which the cache should say how many it has."""
        lookups, self._lookups = self._lookups, []
        return [(s, s.keys.of(s.tokens, (len(s.tokens) - 1) // PAGE_TOKENS)) for s in lookups if s.keys is not None]

    def drain_loads(self) -> list[Load]:
        """Loads to be begun."""
        loads, self._loads = self._loads, []
        return loads

    def drain_published(self) -> list[bytes]:
        """Keys of full pages that are to be saved."""
        published, self._published = self._published, []
        return published

    def drain_parked(self) -> list[Conversation]:
        """Conversations that lost their slot."""
        parked, self._parked = self._parked, []
        return parked

    def drain_superseded(self) -> list[str]:
        """Names (`Conversation.resumable`) of conversations that went on or were erased."""
        superseded, self._superseded = self._superseded, []
        return superseded

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
            slots=tuple(self.slots.status(slot, self._cached(slot)) for slot in range(len(self.slots))),
            queued=len(self._waiting),
            queue_limit=self.config.queue_limit,
            kv_pages_used=self._allocator.n_used,
            kv_pages_cached=self._allocator.n_idle,
            kv_pages_total=self._allocator.n_pages,
            steps=steps,
            step_ms=step_ms,
            cache=cache or CacheStatus(),
        )

    def _cached(self, slot: int) -> int:
        """Tokens of a slot's conversation whose keys and values are in pages."""
        held = self.slots.conversations[slot]
        keys = held.all_keys if held else ()
        return sum(len(held.chunk(number)) for number, key in enumerate(keys) if held and key in self._allocator)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless slots, pages and queue fit together."""
        self._allocator.check_integrity()
        running = self.slots.running()
        held = Counter(page for sequence in running for page in sequence.table.pages) + self._borrowed
        if len(held) != self._allocator.n_used:
            raise RuntimeError(f"sequences hold {len(held)} KV pages, the allocator gave out {self._allocator.n_used}")
        for page, times in held.items():
            if (counted := self._allocator.references(page)) != times:
                raise RuntimeError(f"{times} sequences hold KV page {page}, {counted} are counted")
        for slot, sequence in enumerate(self.slots.sequences):
            if sequence is not None and (sequence.slot != slot or sequence.table.capacity < sequence.computed):
                raise RuntimeError(f"slot {slot} and its sequence disagree")
        if any(sequence.slot is not None or sequence.table.pages for sequence in self._waiting):
            raise RuntimeError("a waiting sequence holds a slot or pages")
        if {s.load for s in running if s.load} != {load for load in self._loading if not load.cancelled}:
            raise RuntimeError("sequences and loads under way disagree")

    def _find(self, request_id: str) -> Sequence | None:
        for sequence in [*self.slots.running(), *self._waiting]:
            if sequence.request.request_id == request_id:
                return sequence
        return None


def _continues(held: Conversation, sequence: Sequence) -> bool:
    """Whether a sequence goes on from the whole of a conversation."""
    return sequence.keys is not None and held.root == sequence.keys.root and held.begins(sequence.tokens)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens agree from the first on."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length
