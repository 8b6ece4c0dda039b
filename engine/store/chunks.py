r"""The object of a chunk: keys and values of up to 256 tokens in all layers, with checksums.

    magic "numoeKV\n", version u32, header bytes u32, tokens u32, layers u32, bytes of a layer u64
    key [32], KV type [32] padded with zeros, key of the chunk in front [32], rounding [16]
    blake3 of each layer [layers, 32]
    blake3 of all of the above [32]
    the layers' canonical bytes (`portable.py`), one after the other

All integers are little-endian. Every byte of an object is covered by a checksum. Zeros stand for what whoever
wrote the chunk did not know of the last two fields: they say what a chunk is, but make it no other one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from numoe.engine.errors import DataLossError, UnsupportedError
from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.store.keys import FORMAT_VERSION, KEY_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MAGIC: Final = b"numoeKV\n"
_FIXED: Final = struct.Struct("<8s4IQ32s32s32s16s")
_CHECKSUM: Final = 32
ROUNDING_BYTES: Final = 16
UNKNOWN_KEY: Final = bytes(KEY_BYTES)
UNKNOWN_ROUNDING: Final = bytes(ROUNDING_BYTES)
FIXED_BYTES: Final = _FIXED.size
"""At the beginning of an object: all that `Provenance.peek` has to see."""
_CURE: Final = "what it held is computed again when a prompt needs it"


@dataclass(frozen=True)
class ChunkShape:
    """What an object must hold: `kv_type` as `kv_type_name`, `layer_bytes` as `portable_bytes` of `tokens`."""

    kv_type: str
    layers: int
    layer_bytes: int
    tokens: int = PAGE_TOKENS

    @property
    def object_bytes(self) -> int:
        """Bytes of the whole object."""
        return _header_bytes(self.layers) + self.layers * self.layer_bytes


class Provenance(NamedTuple):
    """Where a chunk comes from.

    before: the key of the chunk in front. rounding: a digest of all that decides how
    sums are rounded where it was computed (`rounding_of`): the same tokens have the same bits where it is the same.
    """

    before: bytes = UNKNOWN_KEY
    rounding: bytes = UNKNOWN_ROUNDING

    @classmethod
    def peek(cls, data: Buffer) -> Self | None:
        """What the first FIXED_BYTES of an object say, unverified; None for anything else, or another format."""
        view = memoryview(data).cast("B")
        if view.nbytes < FIXED_BYTES:
            return None
        magic, version, *_, before, rounding = _FIXED.unpack(view[:FIXED_BYTES])
        return cls(before, rounding) if magic == _MAGIC and version == FORMAT_VERSION else None


def rounding_of(*parts: object) -> bytes:
    """The digest of all that decides how sums are rounded."""
    return blake3("\n".join(map(str, parts)).encode()).digest(ROUNDING_BYTES)


def encode_chunk(
    key: bytes, kv_type: str, layers: Sequence[Buffer], tokens: int = PAGE_TOKENS,
    provenance: Provenance = Provenance(),  # noqa: B008 - immutable
) -> memoryview:  # fmt: skip
    """The object of chunk `key`. layers: the canonical bytes of each layer, all of one size."""
    rows = [np.frombuffer(memoryview(layer), np.uint8) for layer in layers]
    sizes = {row.size for row in rows}
    if len(sizes) != 1:
        raise ValueError(f"the layers of a chunk must be of one size, not {sorted(sizes)}")
    shape = ChunkShape(kv_type, len(rows), sizes.pop(), tokens)
    return build_chunk(key, shape, lambda out: np.concatenate(rows, out=out), provenance)


def build_chunk(
    key: bytes, shape: ChunkShape, fill: Callable[[npt.NDArray[np.uint8]], object],
    provenance: Provenance = Provenance(),  # noqa: B008 - immutable
) -> memoryview:  # fmt: skip
    """The same without a copy: `fill` writes the layers, one after the other, to uint8 [layers * layer_bytes]."""
    name = shape.kv_type.encode()
    if len(key) != KEY_BYTES or len(name) > 32 or not 1 <= shape.tokens <= PAGE_TOKENS:
        raise ValueError(f"no chunk has a key of {len(key)} bytes, KV type {shape.kv_type} and {shape.tokens} tokens")
    data, start = np.empty(shape.object_bytes, np.uint8), _header_bytes(shape.layers)
    fill(data[start:])
    layers = data[start:].reshape(shape.layers, shape.layer_bytes)
    sizes = start, shape.tokens, shape.layers, shape.layer_bytes
    fixed = _FIXED.pack(_MAGIC, FORMAT_VERSION, *sizes, key, name, *provenance)
    header = fixed + b"".join(blake3(layer.data).digest() for layer in layers)
    data[:start] = np.frombuffer(header + blake3(header).digest(), np.uint8)
    return data.data.toreadonly()


def decode_chunk(data: Buffer, key: bytes, shape: ChunkShape) -> list[memoryview]:
    """The layers of chunk `key`: views of `data`, one for each layer, all checksums verified.

    Raises DataLossError, which names the chunk and the layer, for anything that is damaged,
    truncated or another chunk, and UnsupportedError for another format.
    """
    view = memoryview(data).cast("B").toreadonly()
    header = _Header.read(view, key)
    header.check(key, shape)
    if view.nbytes != shape.object_bytes:
        cut = max(0, view.nbytes - _header_bytes(shape.layers)) // shape.layer_bytes
        where = f"layer {cut}" if cut < shape.layers else "its end"
        raise _damaged(key, f"has {view.nbytes} bytes where {shape.object_bytes} are due, from {where} on")
    start = _header_bytes(shape.layers)
    layers = [view[start + i * shape.layer_bytes :][: shape.layer_bytes] for i in range(shape.layers)]
    for number, (layer, checksum) in enumerate(zip(layers, header.checksums, strict=True)):
        if blake3(layer).digest() != checksum:
            raise _damaged(key, f"fails the checksum of layer {number}")
    return layers


@dataclass(frozen=True)
class _Header:
    key: bytes
    kv_type: str
    tokens: int
    layers: int
    layer_bytes: int
    checksums: tuple[bytes, ...]

    @classmethod
    def read(cls, view: memoryview, key: bytes) -> Self:
        """Verify and read a header; `key` is for messages."""
        if view.nbytes < _FIXED.size:
            raise _damaged(key, f"ends after {view.nbytes} bytes, in its header")
        magic, version, size, tokens, layers, layer_bytes, own_key, kv_type, _, _ = _FIXED.unpack(view[: _FIXED.size])
        if magic != _MAGIC:
            raise _damaged(key, f"starts with {bytes(magic)!r}, not {_MAGIC!r}")
        if not _FIXED.size + _CHECKSUM <= size <= view.nbytes:
            raise _damaged(key, f"ends after {view.nbytes} bytes, in a header of {size}")
        if blake3(view[: size - _CHECKSUM]).digest() != view[size - _CHECKSUM : size]:
            raise _damaged(key, "fails the checksum of its header")
        if version != FORMAT_VERSION:
            cure = "use a newer numoe" if version > FORMAT_VERSION else _CURE
            raise UnsupportedError(
                f"KV chunk {key.hex()} has format {version}, where {FORMAT_VERSION} is read; {cure}"
            )
        table = bytes(view[_FIXED.size : size - _CHECKSUM])
        checksums = tuple(table[at : at + _CHECKSUM] for at in range(0, len(table), _CHECKSUM))
        return cls(own_key, kv_type.rstrip(b"\0").decode(errors="replace"), tokens, layers, layer_bytes, checksums)

    def check(self, key: bytes, shape: ChunkShape) -> None:
        """Raise DataLossError unless this is the header of chunk `key` of the expected shape."""
        if self.key != key:
            raise _damaged(key, f"holds chunk {self.key.hex()}")
        for what in ("kv_type", "tokens", "layers", "layer_bytes"):
            found, due = getattr(self, what), getattr(shape, what)
            if found != due:
                raise _damaged(key, f"has {what} {found} where {due} is due")


def _header_bytes(layers: int) -> int:
    return _FIXED.size + _CHECKSUM * (layers + 1)


def _damaged(key: bytes, how: str) -> DataLossError:
    return DataLossError(f"KV chunk {key.hex()} is damaged: it {how}; {_CURE}")
