"""Conversations with their chunks, and snapshots of them in a store, without the engine that computed them.

The chunks of `Talk` are an engine's own bytes (a `--prompt-cache` file) under the keys of any salt, so
that one engine's work makes as many different conversations as a test needs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from numoe.engine.cache import PromptCache, RamTier, Snapshots, StoreTier
from numoe.engine.cache.archive import NAME
from numoe.engine.cache.snapshots import conversation_of
from numoe.engine.scheduler.conversation import Conversation
from numoe.engine.store import Store
from numoe.engine.store.chunks import UNKNOWN_KEY, ChunkShape, Provenance, decode_chunk, encode_chunk
from numoe.engine.store.manifest import Manifest, Origin, decode_manifest


class NoPages:
    """Nothing is in pages: whatever is saved comes from host memory. Knows the shape of chunks."""

    def __init__(self, kv_type: str, layers: int, token_bytes: int) -> None:
        self._kv_type, self._layers, self._token_bytes = kv_type, layers, token_bytes

    def shape(self, tokens: int) -> ChunkShape:
        return ChunkShape(self._kv_type, self._layers, tokens * self._token_bytes, tokens)

    def import_page(self, *_: object) -> None:
        pass

    def borrow(self, *_: object) -> None:
        return None

    def saved(self, *_: object) -> None:
        pass

    def in_slot(self, *_: object) -> bool:
        return False


@dataclass(frozen=True)
class Talk:
    """What an engine computed of a conversation: its manifest, and the layers of each chunk."""

    manifest: Manifest
    layers: tuple[tuple[bytes, ...], ...]
    pages: NoPages

    @classmethod
    def read(cls, path: Path) -> Talk:
        """From a `--prompt-cache` file."""
        data = memoryview(path.read_bytes())[8:]
        parts = []
        while data:
            size = int.from_bytes(data[:8], "little")
            parts.append(data[8 : 8 + size])
            data = data[8 + size :]
        manifest = decode_manifest(parts[0], NAME)
        conversation, first = conversation_of(manifest), parts[1]
        tokens = len(conversation.chunk(0))
        layers, layer_bytes = (int.from_bytes(first[at : at + n], "little") for at, n in ((20, 4), (24, 8)))
        pages = NoPages(manifest.origin.kv_type, layers, layer_bytes // tokens)
        chunks = [
            decode_chunk(part, key, pages.shape(len(conversation.chunk(number))))
            for number, (part, key) in enumerate(zip(parts[1:], conversation.all_keys, strict=True))
        ]
        return cls(manifest, tuple(tuple(bytes(layer) for layer in chunk) for chunk in chunks), pages)

    @property
    def origin(self) -> Origin:
        return self.manifest.origin

    def salted(self, salt: bytes) -> tuple[Conversation, dict[bytes, memoryview]]:
        """The same conversation under another salt, and its chunks' objects."""
        conversation = conversation_of(msgspec.structs.replace(self.manifest, salt=salt))
        kv_type, before, objects = self.origin.kv_type, UNKNOWN_KEY, dict[bytes, memoryview]()
        for number, (key, layers) in enumerate(zip(conversation.all_keys, self.layers, strict=True)):
            objects[key] = encode_chunk(key, kv_type, layers, len(conversation.chunk(number)), Provenance(before))
            before = key
        return conversation, objects


class Saver:
    """A server's snapshots, its chunks in host memory only."""

    def __init__(self, store: Store, pages: NoPages, origin: Origin, limit: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(4)
        self.tier = StoreTier(store, limit)
        self.cache = PromptCache(pages, pages, self._pool, self._pool, RamTier(None), self.tier)
        self.snapshots = Snapshots(self.cache, origin)

    def hold(self, objects: dict[bytes, memoryview]) -> None:
        """Have chunks in host memory."""
        for key, data in objects.items():
            self.cache.ram.put(key, data, waits=False)

    def close(self) -> None:
        self.cache.close()
        self._pool.shutdown()


class Interrupted:
    """A store where something happens before one of the uses of an operation, or before each."""

    def __init__(
        self, store: Store, operation: str, number: int = 0, happens: Callable[[], object] = lambda: None,
        each: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self._store, self._operation, self._left, self._happens, self._each = store, operation, number, happens, each

    def __getattr__(self, name: str) -> object:
        found = getattr(self._store, name)
        if name != self._operation:
            return found

        def call(*arguments: object) -> object:
            self._each()
            self._left -= 1
            if self._left == 0:
                self._happens()
            return found(*arguments)

        return call
