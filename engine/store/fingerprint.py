"""What makes two model files the same model: everything that changes results, and no name or path."""

from __future__ import annotations

import dataclasses
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

from blake3 import blake3

from numoe.engine.gguf import GgufFile, TensorInfo
from numoe.engine.models.config import ModelConfig
from numoe.engine.store.digests import DigestCache
from numoe.engine.weights import ContentSum

_LONG: Final = 200
"""Characters of a value that a part repeats; of longer ones it holds the hash."""


@dataclass(frozen=True)
class ModelFingerprint:
    """A model by what it computes: named `parts`, to tell where two differ, and their `digest`.

    The parts are architecture, every metadata key under its name (`qwen3moe.block_count`, …), RoPE
    as numoe reads it, and of all tensors together the types, the shapes and the contents.
    Tokenizer, chat template, names, authors and how the file is split are none of them: keys and
    values depend on token ids.
    """

    parts: Mapping[str, str]

    @classmethod
    def from_gguf(
        cls, gguf: GgufFile, *, read: Mapping[str, ContentSum] = MappingProxyType({}), threads: int | None = None,
        cache: Path | None = None,
    ) -> Self:  # fmt: skip
        """The fingerprint of an open model.

        read: what is known of tensors by name, as they were read for something else; the others are read, several
        GB/s, with as many threads as there are processors unless told otherwise. The digests are remembered in the
        folder `cache` (by default in the user's cache folder) for as long as the files keep their device, inode,
        size and time. Raises as `ModelConfig.from_gguf`.
        """
        digests = _digests(gguf, read, threads or len(os.sched_getaffinity(0)), DigestCache(cache))
        return cls(MappingProxyType(dict(_parts(gguf, digests))))

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that are equal for equal parts only."""
        whole = blake3(b"numoe model")
        for name, value in sorted(self.parts.items()):
            for text in (name.encode(), value.encode()):
                whole.update(struct.pack("<Q", len(text)))
                whole.update(text)
        return whole.digest()


def _parts(gguf: GgufFile, digests: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    yield "architecture", gguf.architecture
    for key, value in sorted(gguf.metadata.items()):
        if key.startswith(f"{gguf.architecture}."):
            yield key, _short(repr(value))
    for field, value in dataclasses.asdict(ModelConfig.from_gguf(gguf).rope).items():
        yield f"rope {field}", _short(repr(value))
    tensors = sorted(gguf.tensors.values(), key=lambda tensor: tensor.name)
    yield "tensor types", _types(tensors)
    yield "tensor shapes", _hash(f"{tensor.name} {tensor.shape}" for tensor in tensors)
    yield "tensor contents", _hash(f"{tensor.name} {digests[tensor.name].hex()}" for tensor in tensors)


def _types(tensors: list[TensorInfo]) -> str:
    """How many tensors there are of each type, and the hash of which."""
    counts = Counter(tensor.qtype.name for tensor in tensors)
    listed = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return f"{listed} ({_hash(f'{tensor.name} {tensor.qtype.name}' for tensor in tensors)[:16]})"


def _short(text: str) -> str:
    return text if len(text) <= _LONG else f"hash {_hash([text])}"


def _hash(lines: Any) -> str:
    return blake3("\n".join(lines).encode()).hexdigest()


def _digests(
    gguf: GgufFile, read: Mapping[str, ContentSum], threads: int, cache: DigestCache
) -> dict[str, bytes]:
    """The digest of every tensor's bytes, by name."""
    digests: dict[str, bytes] = {}
    for path in gguf.paths:
        names = {name for name, tensor in gguf.tensors.items() if tensor.path == path}
        before = path.stat()
        known = cache.load(before)
        if known is None or known.keys() != names:
            known = _content_digests([gguf.tensors[name] for name in names], read)
            unread = sorted(names - known.keys(), key=lambda name: gguf.tensors[name].offset)
            known |= _content_digests([gguf.tensors[name] for name in unread], _read(gguf, unread, threads))
            cache.save(before, path.stat(), known)
        digests |= known
    return digests


def _content_digests(tensors: list[TensorInfo], read: Mapping[str, ContentSum]) -> dict[str, bytes]:
    """The digests of those tensors that were read as a whole."""
    found = [(tensor.name, read.get(tensor.name, ContentSum()).digest(tensor)) for tensor in tensors]
    return {name: digest for name, digest in found if digest is not None}


def _read(gguf: GgufFile, names: list[str], threads: int) -> dict[str, ContentSum]:
    def read(name: str) -> ContentSum:
        tensor = gguf.tensors[name]
        return ContentSum.of(tensor, 0, gguf.read(name).reshape(tensor.rows, tensor.row_bytes))

    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))
