"""Chunks in host memory: a bounded table from which what was used longest ago is dropped first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass
class _Entry:
    data: memoryview
    waits: bool


class RamTier:
    """Encoded chunks (`store/chunks.py`) by key, at most `limit` bytes (None: no limit); thread-safe.

    Chunks that wait to be written to the store are not dropped. reserve: bytes of those that may be
    here however small the limit is, or nothing could be written at all. What `touch` named last goes last.
    """

    def __init__(self, limit: int | None, reserve: int = 0) -> None:
        self.limit, self.reserve = limit, reserve
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks."""
        return self._bytes

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def put(self, key: bytes, data: Buffer, *, waits: bool) -> bool:
        """Keep a chunk; whether there was room. waits: it has to be written to the store."""
        view = memoryview(data).cast("B")
        with self._lock:
            if (entry := self._entries.get(key)) is not None:
                entry.waits = entry.waits or waits
                return True
            if self.limit is not None:
                bound = max(self.limit, self.reserve) if waits else self.limit
                if self._bytes + view.nbytes > bound:
                    if self._waiting + view.nbytes > bound:
                        return False
                    self._drop_until(bound - view.nbytes)
            self._entries[key] = _Entry(view, waits)
            self._bytes += view.nbytes
            return True

    def get(self, key: bytes) -> memoryview | None:
        """A chunk, or None."""
        with self._lock:
            entry = self._entries.get(key)
            return None if entry is None else entry.data

    def written(self, key: bytes) -> None:
        """Note that a chunk need not wait any more."""
        with self._lock:
            if (entry := self._entries.get(key)) is not None:
                entry.waits = False
                if self.limit is not None:
                    self._drop_until(self.limit)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Count the chunks of a prompt as used, its beginning last: the tail is of no use without it."""
        with self._lock:
            for key in reversed(keys):
                if key in self._entries:
                    self._entries.move_to_end(key)

    @property
    def _waiting(self) -> int:
        """Bytes that cannot be dropped."""
        return sum(entry.data.nbytes for entry in self._entries.values() if entry.waits)

    def _drop_until(self, target: int) -> None:
        while self._bytes > target:
            key = next((key for key, entry in self._entries.items() if not entry.waits), None)
            if key is None:
                return
            self._bytes -= self._entries.pop(key).data.nbytes
