"""Chunks in the object store: found, read, written, and dropped when they take too much room.

A store that fails is left alone for a while (`health.py`), so that no request waits for it twice; whoever
asked for a save or a restore is told instead.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from numoe.engine.cache.claims import REMOVES_WITHIN_S, Claims
from numoe.engine.cache.health import Health
from numoe.engine.cache.lineage import STEP_S, beginnings_last
from numoe.engine.cache.manifests import Chain
from numoe.engine.errors import NotFoundError, NumoeError, ResourceError, UnavailableError
from numoe.engine.store import Store
from numoe.engine.store.chunks import FIXED_BYTES, UNKNOWN_KEY, Provenance
from numoe.engine.store.keys import CHUNKS, chunk_path

if TYPE_CHECKING:
    from typing_extensions import Buffer

_ROOM: Final = 0.9  # of the limit, after making room
_SHARE: Final = 32
"""Another server may write this part of the limit before it is noticed: as much stays free for it."""
_BATCH: Final = 1024
_DELETERS: Final = 16
"""Chunks removed after one announcement, and how many of them at a time."""
_PEEKERS: Final = 16
_PEEKS_FOR_S: Final = 5.0
"""How many objects are asked at a time which chunk is in front of theirs, and for how long when room is made."""
_NO_ROOM: Final = "snapshots take up the {limit} bytes for chunks: remove some, or raise --cache-store-limit"
_SLOW: Final = "store {url}: no room is made in it, as it takes longer than {bound:g} s to look what is needed"


@dataclass
class _Known:
    """What is known of a chunk.

    listed: all of it from a listing, `used` being the time when it was written. before: the chunk in front,
    UNKNOWN_KEY if there is none or nobody can tell, None if that was not asked.
    """

    nbytes: int
    used: float
    learned: float
    listed: bool = True
    before: bytes | None = None


class StoreTier:
    """The chunks of a store; thread-safe.

    limit: bytes of chunks, None for no limit. pinned: the keys that must stay, whatever the limit.
    chains: conversations, of which some chunks may never have been used by this server.
    reading, writing: whether that works.
    """

    def __init__(self, store: Store, limit: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.store, self.limit = store, limit
        self.pinned: Callable[[], set[bytes]] = set
        self.chains: Callable[[], Iterable[Chain]] = tuple
        self.claims = Claims(store)
        self.reading, self.writing = Health("reading from", clock), Health("writing to", clock)
        self._lock = threading.Lock()
        self._making_room = threading.Lock()
        self._known: dict[bytes, _Known] = {}
        self._bytes = 0
        self._reserved = 0
        self._listed, self._written = False, 0  # bytes since the last listing

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks that this server knows of."""
        return self._bytes

    @property
    def error(self) -> str:
        """Why the store is left alone, or empty."""
        return self.writing.error or self.reading.error

    # --- looking ----------------------------------------------------------------------------------

    def look_again(self) -> None:
        """If the store was never seen, or has not answered for a while: see what is there; errors as `Store.list`."""
        if not self._listed or self.reading.error or self.writing.unreachable:
            self.list_chunks()
            if self.writing.unreachable:
                self.writing.recover()

    def list_chunks(self) -> None:
        """Learn which chunks there are, and when they were written."""
        start, written = time.monotonic(), self._written
        with self.reading.watch():
            entries = self.store.list(CHUNKS)
        self._listed, self._written = True, self._written - written
        found = dict[bytes, tuple[int, float]]()
        for entry in entries:
            with contextlib.suppress(ValueError):
                found[bytes.fromhex(entry.key.rsplit("/", 1)[-1])] = entry.size, entry.modified
        for key in [key for key, known in self._known.copy().items() if key not in found and known.learned < start]:
            self.forget(key)
        for key, (nbytes, modified) in found.items():
            self._learn(key, nbytes, modified, listed=True)

    def knows(self, key: bytes) -> bool:
        """Whether a chunk was there when this server looked last."""
        return key in self._known

    def has(self, key: bytes) -> bool:
        """Whether a prompt may count on a chunk; False as well while the store is left alone."""
        if self.reading.seconds_to_wait:
            return False
        if key in self._known:
            return True
        try:
            with self.reading.watch():
                nbytes = self.store.head(chunk_path(key))
        except NumoeError:
            return False
        self._learn(key, nbytes, time.time())
        return True

    def exists(self, key: bytes, nbytes: int) -> bool:
        """Ask the store itself whether a chunk of `nbytes` bytes is there; one of another size is removed."""
        with self.writing.watch():
            try:
                found = self.store.head(chunk_path(key))
            except NotFoundError:
                self.forget(key)
                return False
            if found != nbytes:
                self.forget(key)
                self.store.delete(chunk_path(key))
                return False
        self._learn(key, nbytes, time.time())
        return True

    def touch(self, keys: Iterable[bytes]) -> None:
        """Count the chunks of a prompt as used now, its beginning last."""
        now = time.time()
        with self._lock:
            for number, key in enumerate(keys):
                if (known := self._known.get(key)) is not None:
                    known.used, known.listed = now - STEP_S * number, False

    # --- reading and writing ----------------------------------------------------------------------

    def read(self, key: bytes) -> memoryview:
        """The object of a chunk; errors as `Store.get`."""
        try:
            with self.reading.watch():
                data = self.store.get(chunk_path(key))
        except NotFoundError:
            self.forget(key)
            raise
        self._learn(key, data.nbytes, time.time())
        return data

    def write(self, key: bytes, data: Buffer) -> bool:
        """Write a chunk unless it is there; whether it was not. ResourceError if the limit leaves no room."""
        nbytes = memoryview(data).nbytes
        with self.writing.watch(), self._room_for(nbytes):
            try:
                new = self.store.put_new(chunk_path(key), data)
            except NotFoundError as error:  # of the folder or bucket
                raise UnavailableError(str(error)) from error
            self._learn(key, nbytes, time.time())
            self._written += nbytes
        return new

    def remove(self, key: bytes) -> None:
        """Remove a damaged chunk, so that it can be written again."""
        self.forget(key)
        with contextlib.suppress(NumoeError), self.writing.watch():
            self.store.delete(chunk_path(key))

    def forget(self, key: bytes) -> None:
        """Note that a chunk is not there."""
        with self._lock:
            if (known := self._known.pop(key, None)) is not None:
                self._bytes -= known.nbytes

    def _learn(self, key: bytes, nbytes: int, used: float, *, listed: bool = False) -> None:
        with self._lock:
            known = self._known.setdefault(key, _Known(0, used, 0.0))
            self._bytes += nbytes - known.nbytes
            known.nbytes, known.used, known.learned = nbytes, max(known.used, used), time.monotonic()
            known.listed = known.listed and listed

    # --- the limit --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _room_for(self, nbytes: int) -> Iterator[None]:
        """Keep `nbytes` of the limit free for a chunk that is being written."""
        if self.limit is None:
            yield
            return
        with self._making_room:
            if not self._listed or self._written > self.limit // _SHARE:
                self.list_chunks()
            if self._bytes + self._reserved + nbytes > self.limit - self.limit // _SHARE:
                self._make_room(nbytes, self.limit)
            self._reserved += nbytes
        try:
            yield
        finally:
            with self._making_room:
                self._reserved -= nbytes

    def _make_room(self, nbytes: int, limit: int) -> None:
        """Remove the chunks used longest ago that no snapshot needs, until `nbytes` more fit."""
        self.list_chunks()  # others may have made room already
        self._order_known()
        needed, spared = nbytes + self._reserved, self.pinned()
        self._order_listed(self._oldest(spared))
        while self._bytes + needed > limit - limit // _SHARE:
            victims, left = [], self._bytes + needed - int(_ROOM * limit)
            for key in self._oldest(spared)[:_BATCH]:
                if left <= 0:
                    break
                victims.append(key)
                left -= self._size(key)
            if not victims:
                raise ResourceError(_NO_ROOM.format(limit=limit))
            spared |= self._remove(victims)

    def _oldest(self, spared: set[bytes]) -> list[bytes]:
        """All chunks but those that are spared, the one used longest ago first."""
        with self._lock:
            return [key for _, key in sorted((k.used, key) for key, k in self._known.items() if key not in spared)]

    def _size(self, key: bytes) -> int:
        known = self._known.get(key)
        return 0 if known is None else known.nbytes

    def _order_known(self) -> None:
        """Say when chunks were used that were only listed, but that conversations in the store name."""
        used, before = dict[bytes, float](), dict[bytes, bytes]()
        for chain in self.chains():
            before.update(zip(chain.keys, (UNKNOWN_KEY, *chain.keys), strict=False))
            for number, key in enumerate(chain.keys):
                used[key] = max(used.get(key, 0.0), chain.used - STEP_S * number)
        with self._lock:
            for key, at in used.items():
                if (known := self._known.get(key)) is not None:
                    known.before = before[key]
                    if known.listed:
                        known.used = at

    def _order_listed(self, oldest: Sequence[bytes]) -> None:
        """Let the ends of conversations go first, although their beginnings were written first.

        oldest: those of which it is to be known what is in front of them. Each object is asked once only; where there
        is no time for all of them, the others come next time, and until then may go or stay as if nothing were behind.
        """
        with self._lock:
            found = [(key, self._known.get(key)) for key in oldest]
        unasked = [key for key, known in found if known is not None and known.listed and known.before is None]
        until = time.monotonic() + _PEEKS_FOR_S
        if unasked:
            with ThreadPoolExecutor(_PEEKERS, "cache-peek") as pool:
                for start in range(0, len(unasked), _BATCH):
                    if time.monotonic() < until:
                        list(pool.map(self._peek, unasked[start : start + _BATCH]))
        with self._lock:
            before = {key: known.before for key, known in self._known.items() if known.before}
            used = {key: known.used for key, known in self._known.items()}
        later = beginnings_last(used, before)  # of many chunks, this takes longer than others may wait
        with self._lock:
            for key, at in later.items():
                if (known := self._known.get(key)) is not None:
                    known.used = max(known.used, at)

    def _peek(self, key: bytes) -> None:
        """Learn from the object of a chunk what is in front of it; errors as `Store.get_first`, none if it is gone."""
        found: Provenance | None = None
        if self._size(key) >= FIXED_BYTES:
            try:
                found = Provenance.peek(self.store.get_first(chunk_path(key), FIXED_BYTES))
            except NotFoundError:
                self.forget(key)
        with self._lock:
            if (known := self._known.get(key)) is not None:
                known.before = found.before if found is not None else UNKNOWN_KEY

    def _remove(self, victims: list[bytes]) -> set[bytes]:
        """Remove chunks, but for those that snapshots need or are about to; these.

        UnavailableError if none is removed or needed, as the store was too slow.
        """
        until = time.monotonic() + REMOVES_WITHIN_S

        def remove(key: bytes) -> bool:
            if time.monotonic() >= until:
                return False
            self.store.delete(chunk_path(key))
            self.forget(key)
            return True

        with self.claims.removing(victims) as needed, ThreadPoolExecutor(_DELETERS, "cache-remove") as pool:
            needed |= self.pinned()
            removed = any(list(pool.map(remove, [key for key in victims if key not in needed])))
        spared = needed.intersection(victims)
        if not removed and not spared:
            raise UnavailableError(_SLOW.format(url=self.store.url, bound=REMOVES_WITHIN_S))
        return spared
