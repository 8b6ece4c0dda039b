"""Which chunk comes before which: a chunk is of no use without those in front of it, so they go last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

_REMEMBERED: Final = 1 << 16  # chunks: 16 M tokens


class Lineage:
    """The chunk in front of each of the chunks that were used last; thread-safe."""

    def __init__(self) -> None:
        self._before: OrderedDict[bytes, bytes | None] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, keys: Sequence[bytes]) -> None:
        """Remember the chunks of a prompt, from its first on."""
        with self._lock:
            for before, key in zip((None, *keys), keys, strict=False):
                self._before[key] = before
                self._before.move_to_end(key)
            while len(self._before) > _REMEMBERED:
                self._before.popitem(last=False)

    def before(self, key: bytes) -> bytes | None:
        """The chunk in front of one, None for a first one, and where that is not remembered."""
        return self._before.get(key)

    def chain(self, key: bytes) -> list[bytes]:
        """A prompt's chunks from the first that is remembered to `key`."""
        chain: list[bytes] = []
        at: bytes | None = key
        with self._lock:
            while at is not None:
                chain.append(at)
                at = self._before.get(at)
        return chain[::-1]
