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
    def from_gguf(cls, gguf: GgufFile, *, threads: int | None = None, cache: Path | None = None) -> Self:
        """The fingerprint of an open model.

        Reads every tensor once, several GB/s, with as many threads as there are processors unless
        told otherwise, and remembers the digests in the folder `cache` (by default in the user's
        cache folder) for as long as the files keep their device, inode, size and time.
        Raises as `ModelConfig.from_gguf`.
        """
        digests = _digests(gguf, threads or len(os.sched_getaffinity(0)), DigestCache(cache))
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


def _digests(gguf: GgufFile, threads: int, cache: DigestCache) -> dict[str, bytes]:
    """The blake3 digest of every tensor's bytes, by name."""
    digests: dict[str, bytes] = {}
    for path in gguf.paths:
        names = {name for name, tensor in gguf.tensors.items() if tensor.path == path}
        before = path.stat()
        known = cache.load(before)
        if known is None or known.keys() != names:
            known = _hash_tensors(gguf, sorted(names, key=lambda name: gguf.tensors[name].offset), threads)
            cache.save(before, path.stat(), known)
        digests |= known
    return digests


def _hash_tensors(gguf: GgufFile, names: list[str], threads: int) -> dict[str, bytes]:
    with ThreadPoolExecutor(threads) as pool:
        hashed = pool.map(lambda name: blake3(gguf.read(name).data.cast("B")).digest(), names)
        return dict(zip(names, hashed, strict=True))
