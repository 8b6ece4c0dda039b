"""Between the scheduler and the prompt cache: what one asks for, the other does, beside the steps."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from numoe.engine.cache import PromptCache, RamTier, Snapshots, StoreTier
from numoe.engine.cache.cache import Loaded
from numoe.engine.cache.health import OUTAGES
from numoe.engine.errors import NumoeError
from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.requests import CacheStatus
from numoe.engine.scheduler import Scheduler
from numoe.engine.scheduler.conversation import Parked
from numoe.engine.scheduler.load import Load
from numoe.engine.store.chunks import UNKNOWN_ROUNDING, encode_chunk
from numoe.engine.store.manifest import Origin
from numoe.engine.worker.idle import LOOKS_S, IdleSlots
from numoe.engine.worker.parking import Parking

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from numoe.engine.kv.port import PagePort
    from numoe.engine.scheduler import Sequence as Request
    from numoe.engine.scheduler.conversation import Conversation

logger = logging.getLogger(__name__)
RESUMES_WITHIN_S: Final = 2.0
"""Longer does nobody wait at the start for the conversations that are offered again."""
_JOBS: Final = 8
_LOOKUPS: Final = 4
_READERS: Final = 4
_WRITERS: Final = 4
_WRITE_BUFFER: Final = 4  # chunks that may wait for the store however little host memory is to be used


class LostChunkError(NumoeError):
    """Nobody has chunk `number` of a conversation any more."""

    def __init__(self, number: int) -> None:
        super().__init__(f"chunk {number} of the conversation is in no cache any more")
        self.number = number


class Caching:
    """Serves a scheduler's lookups, loads and saves.

    changed: the engine's lock; whoever waits for it is told when something has come.
    pages: of the forward pass. rounding: how it rounds sums (`Provenance`). cache, snapshots: None if there is
    nothing beyond the pages.
    """

    def __init__(
        self, scheduler: Scheduler, changed: threading.Condition, pages: PagePort,
        ram: RamTier | None = None, tier: StoreTier | None = None, origin: Origin | None = None,
        rounding: bytes = UNKNOWN_ROUNDING,
    ) -> None:  # fmt: skip
        self._scheduler, self._changed, self.pages = scheduler, changed, pages
        # Pools of their own, as a store that does not answer holds up whoever writes to it for long.
        self.readers = ThreadPoolExecutor(_READERS, "cache-read")
        self._writers = ThreadPoolExecutor(_WRITERS, "cache-save")
        self._lookups = ThreadPoolExecutor(_LOOKUPS, "cache-find")
        self.cache: PromptCache | None = None
        self.snapshots: Snapshots | None = None
        self._parking: Parking | None = None
        self._idle = IdleSlots(scheduler)
        self._leaving: dict[bytes, list[int]] = {}  # pages of conversations that are being parked, by chunk
        self._closed = threading.Event()
        self._jobs = ThreadPoolExecutor(_JOBS, "cache-job")
        self.origin = origin or Origin(fingerprint=b"", parts={}, kv_type="")
        if origin is not None and (ram is not None or tier is not None):
            ram = ram or RamTier(0)
            if tier is not None:
                ram.reserve = _WRITE_BUFFER * pages.shape(PAGE_TOKENS).object_bytes
            self.cache = PromptCache(pages, self, self.readers, self._writers, ram, tier, rounding)
            self.snapshots = Snapshots(self.cache, origin)
            if tier is not None:
                self._parking = Parking(self.snapshots, tier, self._parked)

    # --- the engine's side, its lock held ---------------------------------------------------------

    def collect(self, *, starved: bool = False) -> None:
        """Begin what the scheduler has asked for; starved: it waits for pages to be saved."""
        for load in self._scheduler.ledger.drain_loads():
            self._jobs.submit(self._load, load)
        lookups, parked = self._scheduler.ledger.drain_lookups(), self._scheduler.ledger.drain_parked()
        erased, published = self._scheduler.ledger.drain_erased(), self._scheduler.ledger.drain_published()
        for park in parked:
            self._park(park)
        if self._parking is not None:
            for name in erased:
                self._parking.unpark(name)
        if self.cache is None:
            return
        for sequence, keys in lookups:
            self._lookups.submit(self._find, self.cache, sequence, keys)
        for new, chain in published:
            self.cache.save_soon(new, chain)
        if starved:
            self.cache.save_soon(self._scheduler.ledger.unsaved_keys(), first=True)

    def status(self) -> CacheStatus:
        """Of the prompt cache."""
        return self.cache.status() if self.cache is not None else CacheStatus()

    # --- start and stop ---------------------------------------------------------------------------

    def resume(self) -> None:
        """Offer the conversations again that are in the store, and write idle ones to it from here on.

        They are offered later if it does not answer soon.
        """
        if self.snapshots is not None and self.cache is not None and self.cache.tier is not None:
            offering = threading.Thread(
                target=self._offer, args=(self.snapshots, self.cache.tier), name="cache-resume", daemon=True
            )
            offering.start()
            offering.join(RESUMES_WITHIN_S)
        if self._parking is not None:
            threading.Thread(target=self._keep_idle, args=(self._parking,), name="cache-idle", daemon=True).start()

    def _keep_idle(self, parking: Parking) -> None:
        """Have conversations written that have been idle for a while: then no kill loses them."""
        while not self._closed.wait(LOOKS_S):
            with self._changed:
                idle = self._idle.due(time.monotonic())
            if idle:
                parking.keep(idle)

    def _offer(self, snapshots: Snapshots, tier: StoreTier) -> None:
        while not self._closed.is_set():
            try:
                with tier.reading.watch():
                    parked = snapshots.resumable()
            except OUTAGES as error:
                logger.warning("earlier conversations are offered later: %s", error)
                self._closed.wait(tier.reading.seconds_to_wait)
            except NumoeError as error:
                logger.warning("earlier conversations are not offered: %s", error)
                return
            else:
                with self._changed:
                    self._scheduler.ledger.offer(parked)
                return

    def save_all(self, until: float) -> str:
        """Write the conversations of all slots, until `time.monotonic()` is `until`.

        How many could not be written, and why; empty if all were.
        """
        if self._parking is None or self.cache is None or self.cache.tier is None:
            return ""
        before = self._parking.lost
        with self._changed:
            self.collect()
            for slot, conversation in enumerate(self._scheduler.slots.conversations):
                if conversation is not None:
                    self._parking.park(Parked(conversation, slot=slot))
        lost = self._parking.flush(until) + self._parking.lost - before
        self.cache.flush(until)
        why = self.cache.tier.writing.error or self._parking.failure or "it took too long"
        return f"of the slots' conversations {lost} could not be saved: {why}" if lost else ""

    def close(self) -> None:
        """Stop the background."""
        self._closed.set()
        for pool in (self._jobs, self._lookups, self.readers, self._writers):
            pool.shutdown(wait=False, cancel_futures=True)
        if self._parking is not None:
            self._parking.close()
        if self.cache is not None:
            self.cache.close()

    # --- pages for the cache ----------------------------------------------------------------------

    def borrow(self, key: bytes) -> tuple[int, int, bool] | None:
        """See `PageBroker`."""
        with self._changed:
            ledger = self._scheduler.ledger
            page = ledger.begin_read(key)
            return None if page is None else (page, ledger.tokens_of(key), ledger.allocator.is_foreign(key))

    def give_back(self, page: int) -> None:
        """See `PageBroker`."""
        self._end_read([page])

    def _end_read(self, pages: Sequence[int]) -> None:
        with self._changed:
            self._scheduler.ledger.end_read(pages)
            self._changed.notify_all()

    def saved(self, key: bytes) -> None:
        """See `PageBroker`."""
        with self._changed:
            self._scheduler.ledger.saved(key)
            if self._is_in_ram(key):
                self._leave([key])
            self._changed.notify_all()

    def _is_in_ram(self, key: bytes) -> bool:
        """Whether a chunk is in host memory, which drops none that is not in the store."""
        return self.cache is not None and key in self.cache.ram

    def _park(self, parked: Parked) -> None:
        """Keep a conversation that lost its slot, and its pages as long as nothing else has what is in them."""
        for key, page in parked.pages.items():
            self._leaving.setdefault(key, []).append(page)
        if self._parking is None:
            self._leave(parked.pages)
        else:
            self._leave(key for key in parked.pages if self._is_in_ram(key))
            self._parking.park(parked)

    def _parked(self, parked: Parked, written: bool) -> None:  # noqa: FBT001
        with self._changed:
            self._leave(parked.pages)
            if written:
                self._idle.written(parked)
            self._changed.notify_all()

    def _leave(self, keys: Iterable[bytes]) -> None:
        """Let others have the pages of chunks that conversations leave behind."""
        for key in keys:
            self._scheduler.ledger.end_read(self._leaving.pop(key, ()))

    def in_slot(self, key: bytes) -> bool:
        """See `PageBroker`."""
        with self._changed:
            return self._scheduler.ledger.in_slot(key)

    def chunks(self, conversation: Conversation, held: Conversation) -> Iterator[Buffer]:
        """The objects of a conversation's chunks; `held`: the one that it is the beginning of.

        Raises LostChunkError at the first that nobody has.
        """
        for number, key in enumerate(conversation.all_keys):
            tokens = len(conversation.chunk(number))
            layers = self._layers(held.all_keys[number], tokens, len(held.chunk(number)))
            if layers is None:
                raise LostChunkError(number)
            yield encode_chunk(key, self.pages.shape(tokens).kv_type, layers, tokens)

    def _layers(self, key: bytes, tokens: int, held_tokens: int) -> Sequence[Buffer] | None:
        """The first `tokens` tokens of a chunk, or None if nobody has it."""
        if (lent := self.borrow(key)) is not None:
            try:
                return [layer.data for layer in self.pages.export_page(lent[0], tokens)]
            finally:
                self.give_back(lent[0])
        if self.cache is None or tokens != held_tokens:  # what is computed again is not much
            return None
        with contextlib.suppress(NumoeError):
            return self.cache.read(key, tokens).layers
        return None

    # --- jobs -------------------------------------------------------------------------------------

    def _load(self, load: Load) -> None:
        came = Loaded()
        try:
            if self.cache is not None:
                came = self.cache.load(load)
            elif load.tail is not None and load.tail.source is not None:
                if load.tail.source != load.tail.page:
                    self.pages.copy_page(load.tail.source, load.tail.page)
                came = Loaded(tail=True)
        except Exception:  # the sequence goes on without it
            logger.exception("cached keys and values could not be used; they are computed again")
        with self._changed:
            self._scheduler.loaded(load, came.chunks, tail=came.tail, foreign=came.foreign)
            self._changed.notify_all()

    def _find(self, cache: PromptCache, sequence: Request, keys: Sequence[bytes]) -> None:
        found = 0
        try:
            found = cache.find(keys)
        except Exception:
            logger.exception("the prompt cache could not be searched")
        with self._changed:
            self._scheduler.ledger.looked_up(sequence, found)
            self._changed.notify_all()
