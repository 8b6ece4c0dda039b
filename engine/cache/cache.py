"""`PromptCache`: chunks beyond the KV pages. Prompts find them again, and new ones are saved beside the steps."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from numoe.engine.cache.health import OUTAGES
from numoe.engine.cache.lineage import Lineage
from numoe.engine.cache.ram import RamTier
from numoe.engine.cache.store_tier import StoreTier
from numoe.engine.errors import DataLossError, NotFoundError, NumoeError, PreconditionError, UnavailableError
from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.requests import CacheStatus
from numoe.engine.store.chunks import UNKNOWN_KEY, UNKNOWN_ROUNDING, Provenance, build_chunk, decode_chunk

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from numoe.engine.kv.port import PagePort
    from numoe.engine.scheduler.load import Load

logger = logging.getLogger(__name__)
_LOOKS_S: Final = 1.0  # between two looks whether the store is back


class Layers(NamedTuple):
    """What a chunk holds, and the bytes read from the store for it.

    foreign: its sums were rounded otherwise than they are here (`Provenance.rounding`).
    """

    layers: list[memoryview]
    moved: int
    foreign: bool = False


class Loaded(NamedTuple):
    """How many of a load's chunks came, from the first on, whether the tail did, and the keys of the foreign ones."""

    chunks: int = 0
    tail: bool = False
    foreign: frozenset[bytes] = frozenset()


class PageBroker(Protocol):
    """Lends pages that hold what is published, from any thread."""

    def borrow(self, key: bytes) -> tuple[int, int, bool] | None:
        """The page under `key`, the tokens in it and whether it is foreign (`Layers`); None if there is none.

        Nobody changes it until `give_back`.
        """

    def give_back(self, page: int) -> None:
        """Let go of a borrowed page."""

    def saved(self, key: bytes) -> None:
        """What is published under `key` need not be kept in its page for this cache's sake."""

    def in_slot(self, key: bytes) -> bool:
        """Whether a slot's conversation has this chunk."""


class PromptCache:
    """Host memory, and behind it the store, None without one; every method may be called from any thread.

    readers, writers: threads that read chunks, and that write those that somebody waits for. rounding: how sums
    are rounded here (`Provenance`). Two more threads work in the background: one copies published pages to host
    memory, one writes what is there to the store. Neither holds up a step: what finds no room is dropped and
    counted, unless a slot needs it.
    """

    def __init__(
        self, pages: PagePort, broker: PageBroker, readers: Executor, writers: Executor, ram: RamTier,
        tier: StoreTier | None, rounding: bytes = UNKNOWN_ROUNDING,
    ) -> None:  # fmt: skip
        self._rounding = rounding
        self.pages, self.readers, self.writers, self.ram, self.tier = pages, readers, writers, ram, tier
        self._broker = broker
        self._lineage = Lineage()
        self._changed = threading.Condition()
        self._exports: deque[bytes] = deque()
        self._wanted: set[bytes] = set()  # of them, those whose pages somebody waits for
        self._writes: deque[bytes] = deque()
        self._busy = 0
        self._closed = False
        self._dropped = 0
        self._hits = {"ram": 0, "store": 0, "pages": 0}
        self._misses = 0
        self._threads = [threading.Thread(target=self._export_pages, name="cache-export", daemon=True)]
        if tier is not None:
            self._threads.append(threading.Thread(target=self._write_chunks, name="cache-write", daemon=True))
            self._threads.append(threading.Thread(target=self._watch_store, name="cache-watch", daemon=True))
        for thread in self._threads:
            thread.start()

    # --- reading ----------------------------------------------------------------------------------

    def find(self, keys: Sequence[bytes]) -> int:
        """How many of a prompt's chunks can be read, from the first on.

        The store is asked about a few of them only: as ends leave it before beginnings, a chunk that is there
        stands for those in front. Where one of them is missing all the same, reading it ends the load there.
        """
        tier = self.tier if self.tier is not None and not self.tier.reading.seconds_to_wait else None
        found = next((n for n, key in enumerate(keys) if key not in self.ram and not (tier and tier.knows(key))), None)
        if found is None:
            found = len(keys)
        elif tier is not None and tier.has(keys[found]):
            rest = keys[found:]  # mostly all is there, or nothing was
            found += len(rest) if tier.has(rest[-1]) else bisect_left(rest, 0, 1, key=lambda key: -int(tier.has(key)))
        self.use(keys)
        return found

    def use(self, keys: Sequence[bytes]) -> None:
        """Count a conversation's chunks, from the first on, as used now."""
        self._lineage.note(keys)
        self.ram.touch(keys)
        if self.tier is not None:
            self.tier.touch(keys)

    def read(self, key: bytes, tokens: int, *, patient: bool = True) -> Layers:
        """The layers' canonical bytes of a chunk of `tokens` tokens, verified.

        What is damaged in the store is removed, so that it can be written anew. patient: ask a store, too,
        that is left alone for a while. Raises NotFoundError, DataLossError, which names the chunk, and
        what the store raises.
        """
        shape = self.pages.shape(tokens)
        if (data := self.ram.get(key)) is not None:
            self._hits["ram"] += 1
            return Layers(decode_chunk(data, key, shape), 0, self._is_foreign(data))
        if self.tier is None:
            raise NotFoundError(f"KV chunk {key.hex()} is in no cache; it is computed again")
        if not patient and self.tier.reading.seconds_to_wait:
            raise UnavailableError(self.tier.reading.error)
        data = self.tier.read(key)
        try:
            layers = decode_chunk(data, key, shape)
        except DataLossError:  # on the way here, or there?
            data = self.tier.read(key)
            try:
                layers = decode_chunk(data, key, shape)
            except DataLossError:
                self.tier.remove(key)
                raise
        self._hits["store"] += 1
        self._keep(key, data, waits=False)
        return Layers(layers, data.nbytes, self._is_foreign(data))

    def _is_foreign(self, data: Buffer) -> bool:
        found = Provenance.peek(data)
        return found is not None and found.rounding != self._rounding

    def _keep(self, key: bytes, data: Buffer, *, waits: bool) -> bool:
        """Put a chunk into host memory, older than those in front of it; whether there was room."""
        kept = self.ram.put(key, data, waits=waits)
        self.ram.touch(self._lineage.chain(key))
        return kept

    def load(self, load: Load) -> Loaded:
        """Bring what a load names into its pages."""
        failed, foreign = threading.Event(), set[bytes]()

        def bring(key: bytes, page: int, tokens: int) -> bool:
            if load.cancelled or failed.is_set():
                return False
            try:
                found = self.read(key, tokens, patient=False)
                if found.foreign:
                    load.check_takes(key)
                    foreign.add(key)
                self.pages.import_page(page, found.layers, tokens)
            except Exception as error:  # all must have ended when this returns: they write to pages
                level = logging.INFO if isinstance(error, NumoeError) else logging.ERROR
                logger.log(level, "chunk %s is computed again: %s", key.hex(), error, exc_info=level == logging.ERROR)
                self._misses += 1
                failed.set()
                return False
            return True

        came = list(self.readers.map(bring, load.keys, load.pages, [PAGE_TOKENS] * len(load.keys)))
        done = next((number for number, good in enumerate(came) if not good), len(came))
        tail, used = load.tail, (*load.before, *load.keys[:done])
        tail_came = False
        if tail is not None and done == len(load.keys) and not load.cancelled:
            used = (*used, tail.key)
            if tail.source is not None:
                self._hits["pages"] += 1
                if tail.source != tail.page:
                    self.pages.copy_page(tail.source, tail.page)
                tail_came = True
            else:
                tail_came = bring(tail.key, tail.page, tail.chunk_tokens)
        self.use(used)  # reading has counted the beginning as used first
        return Loaded(done, tail_came, frozenset(foreign))

    # --- saving -----------------------------------------------------------------------------------

    def save_soon(self, keys: Sequence[bytes], chain: Sequence[bytes] = (), *, first: bool = False) -> None:
        """Save published pages in the background.

        chain: all chunks of their prompt, from its first on. first: before others, as somebody waits for the pages.
        """
        self._lineage.note(chain)
        with self._changed:
            waiting = set(self._exports)
            for key in keys:
                if key not in waiting:
                    (self._exports.appendleft if first else self._exports.append)(key)
            if first:
                self._wanted.update(keys)
            self._changed.notify_all()

    def encode(self, key: bytes) -> Buffer | None:
        """The object of a chunk that is in host memory or in a page, or None."""
        if (data := self.ram.get(key)) is not None:
            return data
        if (lent := self._broker.borrow(key)) is None:
            return None
        page, tokens, foreign = lent
        before = self._lineage.before(key) or UNKNOWN_KEY
        provenance = Provenance(before, UNKNOWN_ROUNDING if foreign else self._rounding)
        try:
            return build_chunk(
                key, self.pages.shape(tokens), lambda out: self.pages.export_page(page, tokens, out), provenance
            )
        finally:
            self._broker.give_back(page)

    def store_now(self, key: bytes, nbytes: int) -> int | None:
        """Write a chunk of `nbytes` bytes to the store unless it is there.

        Gives the bytes written, None if nobody has the chunk any more. Raises what the store raises.
        """
        if self.tier is None:
            raise PreconditionError("this server has no store: start it with --store URL")
        if self.tier.exists(key, nbytes):
            return 0
        if (data := self.encode(key)) is None:
            return None
        return self._store(key, data)

    def _store(self, key: bytes, data: Buffer) -> int:
        assert self.tier is not None
        new = self.tier.write(key, data)
        self.tier.touch(self._lineage.chain(key))
        self.ram.written(key)
        return memoryview(data).nbytes if new else 0

    def flush(self, deadline: float) -> bool:
        """Wait until nothing is left to be saved, at most until `time.monotonic()` is `deadline`; whether it is so."""
        with self._changed:
            while self._exports or self._writes or self._busy:
                if (left := deadline - time.monotonic()) <= 0 or (self.tier and self.tier.error):
                    return False
                self._changed.wait(min(left, 0.2))
        return True

    def close(self) -> None:
        """Stop the threads; what was not written is lost, and computed again when it is needed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def status(self) -> CacheStatus:
        """How full it is and what it was good for."""
        tier = self.tier
        return CacheStatus(
            ram_bytes=self.ram.nbytes,
            ram_limit=-1 if self.ram.limit is None else self.ram.limit,
            store_url=tier.store.url if tier else "",
            store_bytes=tier.nbytes if tier else 0,
            store_limit=(tier.limit or 0) if tier else 0,
            pending=len(self._exports) + len(self._writes),
            dropped=self._dropped,
            hits_pages=self._hits["pages"],
            hits_ram=self._hits["ram"],
            hits_store=self._hits["store"],
            misses=self._misses,
            store_error=tier.error if tier else "",
        )

    # --- the background ---------------------------------------------------------------------------

    def _watch_store(self) -> None:
        """See what is in the store, at the start and after outages."""
        assert self.tier is not None
        while not self._closed:
            with contextlib.suppress(NumoeError):  # it has been noted
                self.tier.look_again()
            with self._changed:
                if not self._closed:
                    self._changed.wait(max(_LOOKS_S, self.tier.reading.seconds_to_wait))

    def _export_pages(self) -> None:
        self._work(self._exports, self._export_page)

    def _export_page(self, key: bytes) -> None:
        done = True
        try:
            done = self._export(key)
        finally:
            if done:
                self._broker.saved(key)

    def _export(self, key: bytes) -> bool:
        """Copy a page to host memory; False if it stays where it is, as there is no room and nobody wants the page."""
        with self._changed:
            wanted = key in self._wanted
            self._wanted.discard(key)
        if key in self.ram or (self.tier is not None and self.tier.knows(key)):
            return True
        if (data := self.encode(key)) is None:
            return True
        if self._keep(key, data, waits=self.tier is not None):
            if self.tier is not None:
                with self._changed:
                    self._writes.append(key)
                    self._changed.notify_all()
            return True
        # Host memory is full of what waits for the store: what a slot needs is written past it.
        if self.tier is not None and not self.tier.writing.seconds_to_wait and self._broker.in_slot(key):
            with contextlib.suppress(*OUTAGES):
                self._store(key, data)
                return True
        self._dropped += wanted
        return wanted

    def _write_chunks(self) -> None:
        self._work(self._writes, self._write_chunk)

    def _write_chunk(self, key: bytes) -> None:
        assert self.tier is not None
        with self._changed:
            while not self._closed and (pause := self.tier.writing.seconds_to_wait):
                self._changed.wait(pause)
            if self._closed:
                return
        if (data := self.ram.get(key)) is None:
            return
        try:
            if self.tier.exists(key, data.nbytes):
                self.ram.written(key)
            else:
                self._store(key, data)
        except OUTAGES as error:
            logger.info("chunk %s is written later: %s", key.hex(), error)
            with self._changed:
                self._writes.appendleft(key)
        except BaseException:
            self.ram.written(key)  # it cannot be written: it need not wait
            raise

    def _work(self, queue: deque[bytes], do: Callable[[bytes], None]) -> None:
        """Do the work of a queue until `close`."""
        while True:
            with self._changed:
                while not queue and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                key = queue.popleft()
                self._busy += 1
            try:
                do(key)
            except Exception:  # a page that is not saved must not end the saving of others
                logger.exception("chunk %s could not be saved", key.hex())
                self._dropped += 1
            finally:
                with self._changed:
                    self._busy -= 1
                    self._changed.notify_all()
