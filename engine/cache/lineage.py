"""Which chunk comes before which: a chunk is of no use without those in front of it, so they go last."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Final

_REMEMBERED: Final = 1 << 16  # chunks: 16 M tokens
STEP_S: Final = 1e-4
"""By which a chunk counts as used after the one behind it."""


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


def beginnings_last(used: Mapping[bytes, float], before: Mapping[bytes, bytes]) -> dict[bytes, float]:
    """Those of `used` that count as used later: each chunk was used after all behind it, as they are of no use without.

    used: when chunks were, in seconds. before: the chunk in front of some of them. Takes a time that grows as
    their number does; chunks that claim to be in front of each other, as none can be, stay as they are.
    """
    behind = Counter(front for key, front in before.items() if key in used and front in used)
    ends = [key for key in used if not behind[key]]
    later = dict[bytes, float]()
    while ends:
        key = ends.pop()
        front = before.get(key)
        if front is None or front not in used:
            continue
        at = later.get(key, used[key]) + STEP_S
        if at > later.get(front, used[front]):
            later[front] = at
        behind[front] -= 1
        if not behind[front]:
            ends.append(front)
    return later
