"""Chunks in the object store: found, read, written, and dropped when they take too much room.

A store that fails is left alone for a while, which grows from failure to failure, so that no request
waits for it twice; whoever asked for a save or a restore is told instead.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from numoe.engine.errors import AccessError, NotFoundError, NumoeError, ResourceError, UnavailableError
from numoe.engine.store import Store
from numoe.engine.store.keys import CHUNKS, chunk_path

if TYPE_CHECKING:
    from typing_extensions import Buffer

logger = logging.getLogger(__name__)
OUTAGES: Final = (UnavailableError, AccessError, ResourceError)
"""What a store raises that may work later."""
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0
_ROOM: Final = 0.9  # of the limit, after making room
_NO_ROOM: Final = "snapshots take up the {limit} bytes for chunks: remove some, or raise --cache-store-limit"


@dataclass
class _Known:
    nbytes: int
    used: float


class StoreTier:
    """The chunks of a store; thread-safe.

    limit: bytes of chunks, None for no limit. pinned: the keys that must stay, whatever the limit.
    """

    def __init__(self, store: Store, limit: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.store, self.limit = store, limit
        self.pinned: Callable[[], set[bytes]] = set
        self._clock = clock
        self._lock = threading.Lock()
        self._room = threading.Lock()
        self._known: dict[bytes, _Known] = {}
        self._bytes = 0
        self._error, self._pause, self._until = "", 0.0, 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks that this server knows of."""
        return self._bytes

    @property
    def error(self) -> str:
        """Why the store is left alone, or empty."""
        return self._error

    @property
    def seconds_to_wait(self) -> float:
        """Until the store is tried again; 0 while it works."""
        return max(0.0, self._until - self._clock())

    def list_chunks(self) -> None:
        """Learn which chunks there are, and when they were written."""
        with self._watched():
            for entry in self.store.list(CHUNKS):
                with contextlib.suppress(ValueError):
                    self._learn(bytes.fromhex(entry.key.rsplit("/", 1)[-1]), entry.size, entry.modified)

    def has(self, key: bytes) -> bool:
        """Whether a chunk is there; False as well while the store is left alone."""
        if key in self._known:
            return True
        if self.seconds_to_wait:
            return False
        try:
            with self._watched():
                nbytes = self.store.head(chunk_path(key))
        except NumoeError:
            return False
        self._learn(key, nbytes, time.time())
        return True

    def exists(self, key: bytes) -> bool:
        """Ask the store itself whether a chunk is there."""
        with self._watched():
            if self.store.exists(chunk_path(key)):
                return True
        self.forget(key)
        return False

    def read(self, key: bytes) -> memoryview:
        """The object of a chunk; errors as `Store.get`."""
        try:
            with self._watched():
                data = self.store.get(chunk_path(key))
        except NotFoundError:
            self.forget(key)
            raise
        self._learn(key, data.nbytes, time.time())
        return data

    def write(self, key: bytes, data: Buffer) -> bool:
        """Write a chunk unless it is there; whether it was not. ResourceError if the limit leaves no room."""
        nbytes = memoryview(data).nbytes
        if self.limit is not None and self._bytes + nbytes > self.limit:
            self._make_room(nbytes)
        with self._watched():
            new = self.store.put_new(chunk_path(key), data)
        self._learn(key, nbytes, time.time())
        return new

    def remove(self, key: bytes) -> None:
        """Remove a damaged chunk, so that it can be written again."""
        self.forget(key)
        with contextlib.suppress(NumoeError), self._watched():
            self.store.delete(chunk_path(key))

    def forget(self, key: bytes) -> None:
        """Note that a chunk is not there."""
        with self._lock:
            if (known := self._known.pop(key, None)) is not None:
                self._bytes -= known.nbytes

    def touch(self, keys: Iterable[bytes]) -> None:
        """Count the chunks of a prompt as used now, its beginning last."""
        now = time.time()
        with self._lock:
            for number, key in enumerate(keys):
                if (known := self._known.get(key)) is not None:
                    known.used = now - 1e-4 * number

    def _learn(self, key: bytes, nbytes: int, used: float) -> None:
        with self._lock:
            known = self._known.setdefault(key, _Known(0, used))
            self._bytes += nbytes - known.nbytes
            known.nbytes, known.used = nbytes, max(known.used, used)

    def _make_room(self, nbytes: int) -> None:
        """Remove the chunks used longest ago that no snapshot needs, until `nbytes` more fit."""
        with self._room:  # whoever saves a snapshot holds it as well: nothing goes that it has seen there
            if self.limit is None or self._bytes + nbytes <= self.limit:
                return
            pinned = self.pinned()
            with self._lock:
                oldest = sorted((known.used, key) for key, known in self._known.items() if key not in pinned)
            for _, key in oldest:
                if self._bytes + nbytes <= _ROOM * self.limit:
                    return
                with self._watched():
                    self.store.delete(chunk_path(key))
                self.forget(key)
            if self._bytes + nbytes > self.limit:
                with self._watched():
                    raise ResourceError(_NO_ROOM.format(limit=self.limit))

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Nothing is removed to make room meanwhile."""
        with self._room:
            yield

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Note whether the store works."""
        try:
            yield
        except OUTAGES as error:
            if not self._error:
                logger.warning("the prompt cache goes on without its store: %s", error)
            self._pause = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * self._pause))
            self._error, self._until = str(error), self._clock() + self._pause
            raise
        if self._error:
            logger.warning("the store %s works again", self.store.url)
            self._error, self._pause, self._until = "", 0.0, 0.0
