"""The chunk keys of a sequence: what its full pages hold, by name (`store/keys.py` says how they are made)."""

from __future__ import annotations

from collections.abc import Sequence

from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.store.keys import chunk_key


class ChunkKeys:
    """The keys of one sequence's chunks, computed as it grows; `root` is the key before the first."""

    def __init__(self, root: bytes) -> None:
        self.root = root
        self._keys = [root]

    def of(self, tokens: Sequence[int], count: int) -> list[bytes]:
        """The keys of the first `count` chunks of `tokens`, which only ever grow from call to call."""
        for number in range(len(self._keys) - 1, count):
            chunk = tokens[number * PAGE_TOKENS : (number + 1) * PAGE_TOKENS]
            self._keys.append(chunk_key(self._keys[-1], chunk))
        return self._keys[1 : count + 1]
