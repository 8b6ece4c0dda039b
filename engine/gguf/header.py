"""The header of one GGUF file: metadata and tensor directory, validated.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. All integers are little-endian:

    magic "GGUF", version u32, tensor count u64, key count u64
    keys:    name, value type u32, value
    tensors: name, dimension count u32, dimensions u64 (innermost first), type u32, offset u64
    padding to the alignment, then the tensor data that the offsets count from

This is a scan of our own, not `gguf.GGUFReader`: the reader trusts every count and offset (2^60 keys
make it loop for ever, a string length past the end gives garbage), and it makes three NumPy views
per token of the vocabulary, seconds for 150,000 tokens. Types, block sizes and dequantization are
still the `gguf` package's.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from numoe.engine.errors import UnsupportedError
from numoe.engine.gguf.scanner import DAMAGED, Scanner, Value, quoted
from numoe.engine.gguf.tensors import TensorInfo, row_bytes

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)  # equal in layout: 3 only allows big-endian files, which are refused
MAX_KEYS: Final = 1 << 16
MAX_TENSORS: Final = 1 << 20
MAX_DIMENSIONS: Final = 4
DEFAULT_ALIGNMENT: Final = 32
SMALLEST_KEY: Final = 8 + 1 + 4 + 1  # bytes: name length, one letter, value type, one-byte value
SMALLEST_TENSOR: Final = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class Header:
    """What one file says of itself: `metadata` by key, `tensors` by name in file order."""

    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]


def read_header(path: Path, data: mmap.mmap) -> Header:
    """Scan and check the header of the file `path` mapped as `data`.

    Raises ModelFileError for anything that is not a sound GGUF v2 or v3 file, and UnsupportedError
    for a tensor type that the `gguf` package does not know, whose size nobody can tell.
    """
    scan = Scanner(path, data)
    tensor_count, key_count = _counts(scan, data)
    metadata = _metadata(scan, key_count)
    alignment = _alignment(scan, metadata)
    tensors = _tensors(scan, tensor_count)
    data_start = math.ceil(scan.position / alignment) * alignment
    _check_layout(scan, tensors, data_start, alignment, len(data))
    placed = {
        name: TensorInfo(name, t.shape, t.qtype, path, data_start + t.offset, t.nbytes)
        for name, t in tensors.items()
    }
    return Header(metadata, placed)


def _counts(scan: Scanner, data: mmap.mmap) -> tuple[int, int]:
    """Check magic and version; (tensor count, key count)."""
    start = scan.take(4, "the magic number")
    magic = data[start : start + 4]
    if magic != MAGIC:
        cure = "give a .gguf file, or convert the model to GGUF"
        raise scan.error(f"not a GGUF file: it starts with {magic!r}, not {MAGIC!r}", cure)
    version = scan.u32("the version")
    if version not in VERSIONS:
        if version & 0xFFFF == 0 and version:
            raise scan.error("a big-endian GGUF file", "convert the model on a little-endian machine")
        raise scan.error(f"GGUF version {version}, where 2 and 3 are read", "convert the model again")
    tensor_count = scan.u64("the tensor count")
    key_count = scan.u64("the key count")
    if key_count > MAX_KEYS or key_count * SMALLEST_KEY > scan.remaining:
        raise scan.error(f"its header claims {key_count} metadata keys, more than the file can hold")
    if tensor_count > MAX_TENSORS or tensor_count * SMALLEST_TENSOR > scan.remaining:
        raise scan.error(f"its header claims {tensor_count} tensors, more than the file can hold")
    return tensor_count, key_count


def _metadata(scan: Scanner, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for index in range(count):
        key = scan.text(f"the name of metadata key {index}")
        if not key:
            raise scan.error(f"metadata key {index} has an empty name")
        if key in metadata:
            raise scan.error(f"metadata key {quoted(key)} appears twice")
        what = f"metadata key {quoted(key)}"
        metadata[key] = scan.value(scan.u32(what), what)
    return metadata


def _alignment(scan: Scanner, metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment <= 0:
        raise scan.error(f"general.alignment is {quoted(str(alignment))}, not a power of two")
    if alignment & (alignment - 1) or alignment > 1 << 30:
        raise scan.error(f"general.alignment is {alignment}, not a power of two up to 2^30")
    return alignment


def _tensors(scan: Scanner, count: int) -> dict[str, TensorInfo]:
    """Scan the tensor directory; offsets still count from the start of the tensor data."""
    tensors: dict[str, TensorInfo] = {}
    for index in range(count):
        name = scan.text(f"the name of tensor {index}")
        if not name:
            raise scan.error(f"tensor {index} has an empty name")
        if name in tensors:
            raise scan.error(f"tensor {quoted(name)} appears twice")
        tensors[name] = _tensor(scan, name)
    return tensors


def _tensor(scan: Scanner, name: str) -> TensorInfo:
    what = f"tensor {quoted(name)}"
    dimensions = scan.u32(what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise scan.error(f"{what} has {dimensions} dimensions, where 1 to {MAX_DIMENSIONS} are possible")
    shape = tuple(scan.u64(what) for _ in range(dimensions))[::-1]
    if 0 in shape:
        raise scan.error(f"{what} has a dimension of zero: {list(shape)}")
    kind = scan.u32(what)
    offset = scan.u64(what)
    try:
        qtype = GGMLQuantizationType(kind)
    except ValueError:
        raise UnsupportedError(
            f"{scan.path}: {what} has the unknown type {kind}; take a file in one of llama.cpp's own formats"
        ) from None
    block, _ = GGML_QUANT_SIZES[qtype]
    if shape[-1] % block:
        raise scan.error(f"{what} has rows of {shape[-1]} elements, no multiple of {qtype.name}'s {block}")
    nbytes = math.prod(shape[:-1]) * row_bytes(qtype, shape[-1])
    return TensorInfo(name, shape, qtype, scan.path, offset, nbytes)


def _check_layout(
    scan: Scanner, tensors: dict[str, TensorInfo], data_start: int, alignment: int, file_size: int
) -> None:
    """Every tensor lies aligned inside the file, and no two share a byte."""
    end, previous = 0, ""
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        what = f"the data of tensor {quoted(tensor.name)}"
        if tensor.offset % alignment:
            raise scan.error(f"{what} begins at {tensor.offset}, no multiple of the alignment {alignment}")
        if tensor.offset < end:
            raise scan.error(f"{what} overlaps that of {quoted(previous)}")
        end, previous = tensor.offset + tensor.nbytes, tensor.name
        if data_start + end > file_size:
            raise scan.error(
                f"{what} ends at byte {data_start + end}, past the file's end at {file_size}",
                f"it is truncated or damaged: {DAMAGED}",
            )
