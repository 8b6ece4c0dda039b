"""The ledger of the KV pages: who holds which, what is on its way, and what can come back.

Between the scheduler and the prompt cache. Whoever runs them asks the cache how much it has for each
of `drain_lookups` and answers with `looked_up`, soon or the prompt begins without it; brings what
`drain_loads` lists into the pages and answers through `Scheduler.loaded`; saves what `drain_published`
lists and says `saved`; keeps conversations that lost their slot (`drain_parked`) and says `end_read`;
and forgets those that were erased (`drain_erased`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

import numpy as np

from numoe.engine.errors import ResourceError
from numoe.engine.kv.journal import KeptRun, PageJournal
from numoe.engine.kv.pages import PAGE_TOKENS, PageAllocator
from numoe.engine.scheduler.batch import Batch
from numoe.engine.scheduler.conversation import Conversation, Parked, ParkedIndex, TailIndex
from numoe.engine.scheduler.kept import KeptRuns
from numoe.engine.scheduler.load import Load, Tail
from numoe.engine.scheduler.sequence import Sequence
from numoe.engine.scheduler.slots import Slots
from numoe.engine.store.keys import root_key

if TYPE_CHECKING:
    from numoe.engine.scheduler.scheduler import SchedulerConfig


class Ledger:
    """Pages, the conversations that they hold, and the prompt cache's business with them; not thread-safe.

    kept: what requests had when the worker before died.
    """

    def __init__(self, config: SchedulerConfig, slots: Slots, journal: PageJournal) -> None:
        self._config, self._slots, self._journal = config, slots, journal
        self.allocator = PageAllocator(config.n_pages, saves=config.caches, journal=journal)
        self._tails, self._away = TailIndex(), ParkedIndex()
        self.kept = KeptRuns(journal, slots, self.give_back)
        self._borrowed: Counter[int] = Counter(self.kept.pages)
        self.allocator.take(self._borrowed.elements())
        self._loading: dict[Load, Sequence] = {}
        self._lookups: list[Sequence] = []
        self._loads: list[Load] = []
        self._published: list[tuple[Seq[bytes], Seq[bytes]]] = []
        self._parked: list[Parked] = []
        self._erased: list[str] = []
        for slot, encoded in journal.conversations():
            held = Conversation.decode(encoded)
            slots.conversations[slot] = held
            self._tails.add(held)
            if config.caches:
                self._published += [(held.keys, held.keys), ((), held.all_keys)]

    # --- pages of a sequence ---------------------------------------------------------------------------

    def root(self, salt: bytes = b"") -> bytes:
        """The chunk key before the first token."""
        return root_key(self._config.fingerprint, self._config.kv_type, salt)

    def go_on(self, sequence: Sequence, run: KeptRun) -> None:
        """Begin with the pages of a run of `kept`: what is in them is not computed again, but for the last token."""
        for page in run.pages:
            sequence.table.append(page)
        self.give_back(run.pages)
        if sequence.request.foreign is None:  # the worker before has told nobody
            pages = enumerate(run.pages)
            sequence.foreign = {number for number, page in pages if self.allocator.is_foreign_page(page)}
        self.advance(sequence, min(run.computed, len(sequence.tokens) - 1))

    def look_up(self, sequence: Sequence, now: float) -> None:
        """Have the prompt cache asked how much it has of the tokens."""
        if self._config.caches and sequence.keys is not None and len(sequence.tokens) > 1:
            sequence.loadable, sequence.asked = None, now
            self._lookups.append(sequence)

    def adopt(self, sequence: Sequence) -> None:
        """Begin with what is cached of the tokens, but compute at least the last one, for its logits.

        What has to be read or copied for that becomes the sequence's load.
        """
        if sequence.keys is None:
            return
        usable = len(sequence.tokens) - 1
        keys = sequence.keys.of(sequence.tokens, usable // PAGE_TOKENS)
        foreign = [number for number, key in enumerate(keys) if self.allocator.is_foreign(key)]
        keys = keys[: next((number for number in foreign if not sequence.takes(number)), len(keys))]
        sequence.computed = sequence.table.adopt(keys)
        first = len(sequence.table.pages)
        if not sequence.has_begun:
            sequence.foreign = {number for number in foreign if number < first}
        wanted = keys[first : max(first, sequence.loadable or 0)]
        taken = wanted[: self.allocator.n_available]
        sequence.table.ensure((first + len(taken)) * PAGE_TOKENS)
        tail = self._tail(sequence, usable) if len(taken) == len(wanted) else None
        if taken or tail is not None:
            pages = sequence.table.pages[first : first + len(taken)]
            coming = enumerate([*taken, *([tail.key] if tail is not None else [])], first)
            own = frozenset(key for number, key in coming if not sequence.takes(number))
            self._begin_load(sequence, Load(tuple(keys[:first]), tuple(taken), tuple(pages), tail, own))

    def pages_come(self, sequence: Sequence) -> bool:
        """Whether more of what is cached of a sequence can be loaded when pages that are saved come free."""
        if sequence.keys is None or not self.allocator.n_busy:
            return False
        keys = sequence.keys.of(sequence.tokens, (len(sequence.tokens) - 1) // PAGE_TOKENS)
        there = list(itertools.takewhile(lambda key: key in self.allocator, keys))
        wanted = max(0, (sequence.loadable or 0) - len(there)) + 2  # a tail's page, and the one it is copied from
        return wanted > self.allocator.available_beside(there)

    def _tail(self, sequence: Sequence, usable: int) -> Tail | None:
        """The chunk that agrees longest with the tokens behind those of the pages, its page allocated and held.

        Where no page is free for a copy of it, the sequence goes on in the very page, if nobody else needs that;
        else None: then at most a page's tokens are computed again.
        """
        keys, number = sequence.keys, len(sequence.table.pages)
        if keys is None or number * PAGE_TOKENS >= usable or self.allocator.n_available == 0:
            return None
        before = [keys.root, *keys.of(sequence.tokens, number)][-1]
        rest = np.array(sequence.tokens[number * PAGE_TOKENS : min(usable, (number + 1) * PAGE_TOKENS)], np.int32)
        found = dict(self._tails.after(before))
        for held in self._slots.conversations:
            if held is not None and held.computed > number * PAGE_TOKENS and held.key_before(number) == before:
                found[held.all_keys[number]] = held.chunk(number)
        if not sequence.takes(number):
            found = {key: tokens for key, tokens in found.items() if not self.allocator.is_foreign(key)}
        agreeing = {key: _common(rest, tokens) for key, tokens in found.items()}
        # What is in a page already goes before what agrees as long and has to be read.
        key = max(agreeing, key=lambda key: (agreeing[key], key in self.allocator), default=None)
        if key is None or not agreeing[key] or (key not in self.allocator and not self._config.caches):
            return None
        source = self.borrow(key)
        try:
            sequence.table.ensure((number + 1) * PAGE_TOKENS)
        except ResourceError:
            if source is None:
                return None
            if not self.allocator.withdraw(source):
                self.give_back([source])
                return None
            sequence.table.append(source)
        if not sequence.has_begun and self.allocator.is_foreign(key):
            sequence.foreign.add(number)
        return Tail(key, len(found[key]), agreeing[key], source, sequence.table.pages[-1])

    def _begin_load(self, sequence: Sequence, load: Load) -> None:
        sequence.load = load
        own = [*load.pages, *([load.tail.page] if load.tail else [])]  # the tail's source is borrowed already
        self.allocator.share(own)
        self._borrowed.update(own)
        self._loading[load] = sequence
        self._loads.append(load)

    def loaded(
        self, load: Load, chunks: int, *, tail: bool, foreign: frozenset[bytes] = frozenset()
    ) -> Sequence | None:
        """Take in the first `chunks` of a load's chunks, and perhaps the tail; the sequence, unless it is gone.

        foreign: the keys of those that were computed where sums are rounded otherwise.
        """
        sequence = self._loading.pop(load)
        if not load.cancelled:
            sequence.load = None
            for number in range(chunks):
                key = load.keys[number]
                sequence.table.publish(load.first + number, key, foreign=key in foreign)
                self.allocator.mark_saved(key)
            sequence.computed = (load.first + chunks) * PAGE_TOKENS
            if tail and load.tail is not None and chunks == len(load.keys):
                sequence.computed += load.tail.tokens
            if not sequence.has_begun:
                coming = enumerate([*load.keys[:chunks], *([load.tail.key] if load.tail else [])], load.first)
                sequence.foreign |= {number for number, key in coming if key in foreign}
        self.give_back(load.held)
        return None if load.cancelled else sequence

    def advance(self, sequence: Sequence, computed: int) -> None:
        """Note that a sequence's first `computed` tokens are in the cache; full pages are published."""
        before, sequence.computed = sequence.computed // PAGE_TOKENS, computed
        full = computed // PAGE_TOKENS
        if sequence.keys is not None and full > before:
            keys = sequence.keys.of(sequence.tokens, full)
            for number in range(before, full):
                sequence.table.publish(number, keys[number], foreign=number in sequence.foreign)
            if self._config.caches:
                self._published.append((keys[before:full], keys))

    # --- conversations ---------------------------------------------------------------------------------

    def _hold(self, slot: int, conversation: Conversation | None) -> None:
        """Have a slot hold a conversation, or none, also when a worker takes this one's place."""
        self._slots.conversations[slot] = conversation
        self._journal.hold(slot, conversation.encode() if conversation else b"")

    def keep_conversation(self, sequence: Sequence, slot: int, now: float) -> None:
        """Leave what a sequence computed in its slot, unless it came less far than what was there."""
        held = self._slots.conversations[slot]
        if sequence.keys is None or sequence.computed < max(1, held.computed if held else 0):
            return
        request = sequence.request
        kept = Conversation.of(
            sequence.keys, sequence.tokens, sequence.computed, salt=request.cache_salt, sampling=request.sampling,
            prompt_tokens=min(sequence.prompt_tokens, len(sequence.tokens)), last_used=now,
            named=request.slot is not None or bool(held and held.named),
        )  # fmt: skip
        if kept.tail is not None:
            number = len(kept.keys)
            sequence.table.publish(
                number, kept.tail, kept.computed % PAGE_TOKENS, foreign=number in sequence.foreign
            )
        if held is not None:  # this one goes on from there
            self._tails.remove(held)
        kept = dataclasses.replace(kept, stored=(*(held.stored if held else ()), *self._away.take(kept)))
        self._hold(slot, kept)
        self._tails.add(kept)
        if self._config.caches:
            self._published.append(((), kept.all_keys))

    def replace_conversation(self, slot: int, conversation: Conversation | None) -> None:
        """Give a slot another conversation, or none; the one it had is parked: it can still come back."""
        held = self._slots.conversations[slot]
        if conversation is not None:
            stored = (*conversation.stored, *self._away.take(conversation))
            conversation = dataclasses.replace(conversation, stored=stored)
            self._tails.add(conversation)
        self._hold(slot, conversation)
        if self._config.caches and held is not None and not any(held is other for other in self._slots.conversations):
            pages = {key: page for key in held.all_keys if (page := self.begin_read(key)) is not None}
            self._parked.append(Parked(held, pages))
            self._away.add(held, self._parked[-1].name)

    def forget_conversation(self, slot: int) -> None:
        """Empty a slot for good."""
        if (held := self._slots.conversations[slot]) is not None:
            self._hold(slot, None)
            self._tails.remove(held)
            self._erased += held.stored

    def note_conversation(self, slot: int, before: Conversation, **changes: Any) -> None:
        """Note something about a slot's conversation, if it is still `before`."""
        if self._slots.conversations[slot] is before:
            self._hold(slot, dataclasses.replace(before, **changes))

    def offer(self, parked: Seq[Parked]) -> None:
        """Let conversations come back by themselves: in their slots, in empty ones, or when prompts go on from them.

        The first ones get slots first. What a slot has gone on with already is not offered beside it.
        """
        parked = [one for one in parked if not self._gone_on(one.conversation)]
        for one in parked:
            self._tails.add(one.conversation)
        empty = [n for n, held in enumerate(self._slots.conversations) if held is None and self._slots.is_free(n)]
        for one in sorted(parked, key=lambda one: one.slot not in empty):
            if one.slot in empty:
                slot = one.slot
            elif empty:
                slot = empty[0]
            else:
                for name in one.conversation.stored:
                    self._away.add(one.conversation, name)
                continue
            empty.remove(slot)
            self._hold(slot, one.conversation)

    def _gone_on(self, parked: Conversation) -> bool:
        """Whether a slot's conversation goes on from one that is in the store; it takes its place there then."""
        for slot, held in enumerate(self._slots.conversations):
            if held is not None and held.root == parked.root and parked.begins(held.tokens):
                self.note_conversation(slot, held, stored=(*held.stored, *parked.stored))
                return True
        return False

    def cached_tokens(self, slot: int) -> int:
        """Tokens of a slot's conversation whose keys and values are in pages."""
        held = self._slots.conversations[slot]
        keys = held.all_keys if held else ()
        return sum(len(held.chunk(number)) for number, key in enumerate(keys) if held and key in self.allocator)

    # --- pages for the prompt cache --------------------------------------------------------------------

    @property
    def waits_for_cache(self) -> bool:
        """Whether pages come free when what is being saved or loaded is done with."""
        return self.allocator.n_busy > 0 or any(
            self.allocator.references(page) == times for page, times in self._borrowed.items()
        )

    def in_slot(self, key: bytes) -> bool:
        """Whether a conversation in a slot has the chunk `key`."""
        return any(held is not None and key in held.all_keys for held in self._slots.conversations)

    def unsaved_keys(self) -> list[bytes]:
        """Of published pages that nobody holds and that cannot be used before they are saved."""
        return self.allocator.unsaved_keys()

    def saved(self, key: bytes) -> None:
        """Answer to `drain_published` and `unsaved_keys`: nobody needs the page of `key` any more."""
        self.allocator.mark_saved(key)

    def begin_read(self, key: bytes) -> int | None:
        """The page that is published under `key`, to be read for the prompt cache; it stays there until `end_read`."""
        return self.allocator.begin_read(key)

    def end_read(self, pages: Seq[int]) -> None:
        """Pages are read."""
        self.allocator.end_read(pages)

    def borrow(self, key: bytes) -> int | None:
        """The page that is published under `key`, to be used; it stays there until `give_back`."""
        pages = self.allocator.adopt([key])
        self._borrowed.update(pages)
        return pages[0] if pages else None

    def tokens_of(self, key: bytes) -> int:
        """Tokens in the page that is published under `key`."""
        return self.allocator.tokens_of(key)

    def keep_written(self, batch: Batch) -> list[int]:
        """Borrow the pages that a step writes: given up in its midst, they must not be handed out before its end."""
        pages: list[int] = np.unique(batch.page_tables[batch.slots, batch.positions // PAGE_TOKENS]).tolist()
        self.allocator.share(pages)
        self._borrowed.update(pages)
        return pages

    def give_back(self, pages: Seq[int]) -> None:
        """Let go of borrowed pages."""
        self._borrowed.subtract(pages)
        self._borrowed = +self._borrowed
        self.allocator.free(pages)

    def spare_pages(self, keys: Seq[bytes]) -> list[tuple[bytes, int, bool]]:
        """Borrow a page for each of `keys`: key, page, and whether it is published, so that nothing need be read.

        ResourceError, and nothing is borrowed, if there are too few.
        """
        pages = [(key, self.borrow(key)) for key in keys]
        try:
            fresh = self.allocator.allocate(sum(page is None for _, page in pages))
        except ResourceError:
            self.give_back([page for _, page in pages if page is not None])
            raise
        self._borrowed.update(fresh)
        return [(key, fresh.pop(), False) if page is None else (key, page, True) for key, page in pages]

    def publish_spare(self, key: bytes, page: int, tokens: int, *, saved: bool, foreign: bool) -> None:
        """What was read into a borrowed page can be found now; saved: it is in the prompt cache, too."""
        self.allocator.publish(page, key, tokens, foreign=foreign)
        if saved:
            self.allocator.mark_saved(key)

    # --- what the prompt cache is asked and told -------------------------------------------------------

    def looked_up(self, sequence: Sequence, chunks: int) -> None:
        """Answer to `drain_lookups`: the prompt cache has the first `chunks` chunks."""
        if sequence.loadable is None:
            sequence.loadable = chunks

    def drain_lookups(self) -> list[tuple[Sequence, list[bytes]]]:
        """Sequences and the keys of their chunks, of which the cache should say how many it has."""
        lookups, self._lookups = self._lookups, []
        return [(s, s.keys.of(s.tokens, (len(s.tokens) - 1) // PAGE_TOKENS)) for s in lookups if s.keys is not None]

    def drain_loads(self) -> list[Load]:
        """Loads to be begun."""
        loads, self._loads = self._loads, []
        return loads

    def drain_published(self) -> list[tuple[Seq[bytes], Seq[bytes]]]:
        """Keys of full pages that are to be saved, each time with all keys of their prompt."""
        published, self._published = self._published, []
        return published

    def drain_parked(self) -> list[Parked]:
        """Conversations that lost their slot."""
        parked, self._parked = self._parked, []
        return parked

    def drain_erased(self) -> list[str]:
        """Names (`Conversation.stored`) of conversations that were erased."""
        erased, self._erased = self._erased, []
        return erased

    def check_integrity(self, running: Seq[Sequence]) -> None:
        """Raise RuntimeError unless the pages that are given out are those of `running` and the borrowed ones."""
        self.allocator.check_integrity()
        held = Counter(page for sequence in running for page in sequence.table.pages) + self._borrowed
        if len(held) != self.allocator.n_used:
            raise RuntimeError(f"sequences hold {len(held)} KV pages, the allocator gave out {self.allocator.n_used}")
        for page, times in held.items():
            if (counted := self.allocator.references(page)) != times:
                raise RuntimeError(f"{times} sequences hold KV page {page}, {counted} are counted")
        if {s.load for s in running if s.load} != {load for load in self._loading if not load.cancelled}:
            raise RuntimeError("sequences and loads under way disagree")


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens agree from the first on."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length
