"""The first 4096 bytes of a slice's file: what it holds, and whether all of it is there.

    0     magic
    8     complete (uint32): 1 once everything else is written
    12    bytes of the body (uint32)
    16    blake3 of the body
    48    the body, a `SliceHeader` in MessagePack

Then come the packed weights, then the table of pieces: for each its first byte and its bytes (uint64),
and the blake3 of its packed weights; then the table of contents (`contents.py`), of what was read for them.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from numoe.engine.weights.contents import CONTENT

HEADER_BYTES: Final = 4096
PIECE = np.dtype([("offset", "<u8"), ("nbytes", "<u8"), ("digest", "u1", 32)])
"""A row of the table of pieces."""

_MAGIC: Final = b"numoeW01"
_FIXED: Final = struct.Struct("<8sII32s")
_COMPLETE_AT: Final = 8


class SliceHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a slice is: which part of which source, how it is laid out, and the checksum of the tables.

    source: its fingerprint. cut: the part. layout: the identity of the packed layout. nodes: see
    `SliceKey`. medium: the kind of memory. read_bytes: of the source's files, in `seconds`.
    model: the path it was loaded from, for people.
    """

    source: str
    cut: str
    layout: str
    nbytes: int
    pieces: int
    tensors: int
    checksum: bytes
    nodes: tuple[int, ...]
    medium: str
    model: str
    read_bytes: int
    seconds: float

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file, before it is filled up to a page."""
        return file_bytes(self.nbytes, self.pieces, self.tensors)


def file_bytes(nbytes: int, pieces: int, tensors: int) -> int:
    """Bytes of a file with so many bytes of weights in so many pieces of so many tensors."""
    return HEADER_BYTES + nbytes + pieces * PIECE.itemsize + tensors * CONTENT.itemsize


def write_header(area: npt.NDArray[np.uint8], header: SliceHeader) -> None:
    """Write the header, and when it is there the complete flag."""
    body = msgspec.msgpack.encode(header)
    fixed = _FIXED.pack(_MAGIC, 0, len(body), blake3(body).digest())
    if len(fixed) + len(body) > HEADER_BYTES:
        raise ValueError(f"a header of {len(body)} bytes does not fit")
    area[: len(fixed)] = np.frombuffer(fixed, np.uint8)
    area[len(fixed) : len(fixed) + len(body)] = np.frombuffer(body, np.uint8)
    area[_COMPLETE_AT : _COMPLETE_AT + 4].view(np.uint32)[0] = 1


def read_header(area: Any) -> SliceHeader | None:
    """The header in the first bytes of a file; None if it is incomplete or damaged, or of another version."""
    data = bytes(area[:HEADER_BYTES])
    if len(data) < HEADER_BYTES:
        return None
    magic, complete, length, digest = _FIXED.unpack_from(data)
    body = data[_FIXED.size : _FIXED.size + length]
    if magic != _MAGIC or complete != 1 or blake3(body).digest() != digest:
        return None
    try:
        return msgspec.msgpack.decode(body, type=SliceHeader)
    except msgspec.DecodeError:
        return None
