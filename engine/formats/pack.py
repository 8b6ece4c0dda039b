"""GGUF rows to packed matrices: see `layouts.py` for what the bytes mean.

Packing is exact, and works on any range of 32-column blocks, also one that begins inside a
256-column block of the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as QuantType

from numoe.engine.formats.layouts import BLOCK_COLS, GROUP_ROWS, PackedFormat, packed_format

Bytes = npt.NDArray[Any]  # uint8: shifts and masks by Python numbers keep it, but not for the type checker
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Shape:
    """Shape and format of a packed matrix; `phase` is the first block's place in its super."""

    format: PackedFormat
    rows: int
    blocks: int
    phase: int = 0

    @property
    def groups(self) -> int:
        """Groups of 16 rows, the last one filled up with zeros."""
        return -(-self.rows // GROUP_ROWS)

    @property
    def group_bytes(self) -> int:
        """Bytes of one group."""
        return self.format.group_bytes(self.blocks, self.phase)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.groups * self.group_bytes


def shape_of(qtype: QuantType, rows: int, cols: int, block_range: tuple[int, int] | None = None) -> Shape:
    """The packed shape of `rows` x `cols` weights, or of a range of their 32-column blocks."""
    form = packed_format(qtype)
    first, last = block_range or (0, cols // BLOCK_COLS)
    return Shape(form, rows, last - first, first % form.super_blocks if form.super_blocks else 0)


def pack(raw: Bytes, qtype: QuantType, out: Bytes, block_range: tuple[int, int] | None = None) -> None:
    """Pack GGUF rows.

    raw: uint8 [rows, row_bytes], as the file has them. out: uint8 [shape_of(...).nbytes].
    block_range: the 32-column blocks to take, default all.
    """
    file_block, file_bytes = GGML_QUANT_SIZES[qtype]
    rows, cols = raw.shape[0], raw.shape[1] // file_bytes * file_block
    first, last = block_range or (0, cols // BLOCK_COLS)
    shape = shape_of(qtype, rows, cols, (first, last))
    groups = out.reshape(shape.groups, shape.group_bytes)
    # The file's blocks that hold the range.
    width = max(1, file_block // BLOCK_COLS)
    if file_block == 1:
        low, high = first * BLOCK_COLS * file_bytes, last * BLOCK_COLS * file_bytes
    else:
        low, high = first // width * file_bytes, -(-last // width) * file_bytes
    step = max(1, _CHUNK_BYTES // (GROUP_ROWS * max(1, high - low)))
    for start in range(0, shape.groups, step):
        part = raw[start * GROUP_ROWS : (start + step) * GROUP_ROWS, low:high]
        count = min(step, shape.groups - start)
        if part.shape[0] < count * GROUP_ROWS:
            part = np.concatenate([part, np.zeros((count * GROUP_ROWS - part.shape[0], high - low), np.uint8)])
        _PACKERS[qtype](np.ascontiguousarray(part), shape, groups[start : start + count])


def _store(groups: Bytes, shape: Shape, at: int, tiles: Bytes) -> None:
    """Write `tiles` uint8 [groups, blocks, n] at byte `at` of each tile."""
    area = groups[:, : shape.blocks * shape.format.tile_bytes]
    area.reshape(len(groups), shape.blocks, -1)[:, :, at : at + tiles.shape[2]] = tiles


def _store_super(groups: Bytes, shape: Shape, at: int, values: Bytes) -> None:
    """Write `values` uint8 [groups, supers, n] at byte `at` of each super."""
    area = groups[:, shape.blocks * shape.format.tile_bytes :]
    supers = shape.format.supers(shape.blocks, shape.phase)
    area.reshape(len(groups), supers, -1)[:, :, at : at + values.shape[2]] = values


def _interleave(per_row: Bytes) -> Bytes:
    """[rows, blocks, ...] to [groups, blocks, 16, ...]."""
    split = per_row.reshape(-1, GROUP_ROWS, *per_row.shape[1:])
    return np.ascontiguousarray(np.moveaxis(split, 1, 2))


def _as_bytes(values: Bytes) -> Bytes:
    """[groups, blocks, ...] to bytes [groups, blocks, n]."""
    contiguous = np.ascontiguousarray(values)
    return contiguous.view(np.uint8).reshape(*values.shape[:2], -1)


def _quads(codes: Bytes) -> Bytes:
    """Codes [rows, blocks, 32] to [groups, blocks, 8 vectors, 64]: byte 4 row + i is column 4 j + i."""
    split = codes.reshape(-1, GROUP_ROWS, codes.shape[1], 8, 4)
    return np.ascontiguousarray(split.transpose(0, 2, 3, 1, 4)).reshape(-1, codes.shape[1], 8, 64)


def _nibble_tiles(quads: Bytes) -> Bytes:
    """The low four bits of vectors 2 j and 2 j + 1 in one byte: [groups, blocks, 256]."""
    packed = (quads[:, :, 0::2] & 15) | ((quads[:, :, 1::2] & 15) << 4)
    return packed.reshape(*quads.shape[:2], 256)


def _bit4_plane(quads: Bytes) -> Bytes:
    """Bit 4 of every code: [groups, blocks, 64]."""
    return np.packbits((quads >> 4) & 1, axis=-1, bitorder="little").reshape(*quads.shape[:2], 64)


def _bits45_planes(quads: Bytes) -> Bytes:
    """Bits 4 and 5 of every code: [groups, blocks, 128]."""
    two = (quads >> 4) & 3
    fields = two.reshape(*quads.shape[:2], 2, 4, 64)
    packed = fields[:, :, :, 0] | fields[:, :, :, 1] << 2 | fields[:, :, :, 2] << 4 | fields[:, :, :, 3] << 6
    return packed.reshape(*quads.shape[:2], 128)


def _halves(bytes16: Bytes) -> Bytes:
    """Sixteen 4-bit values [..., 16] to 8 bytes: value i low, value i + 8 high."""
    pairs: Bytes = bytes16[..., :8] | bytes16[..., 8:] << 4
    return pairs


def _file_blocks(raw: Bytes, size: int) -> Bytes:
    return raw.reshape(raw.shape[0], -1, size)


def _nibbles(packed: Bytes) -> Bytes:
    """[..., 16] bytes to 32 codes: low halves first."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _pack_float(raw: Bytes, shape: Shape, groups: Bytes) -> None:
    size = shape.format.tile_bytes // (GROUP_ROWS * BLOCK_COLS)
    split = raw.reshape(-1, GROUP_ROWS, shape.blocks, BLOCK_COLS, size)
    columns = np.ascontiguousarray(split.transpose(0, 2, 3, 1, 4))
    _store(groups, shape, 0, columns.reshape(len(groups), shape.blocks, -1))


def _pack_q8_0(raw: Bytes, shape: Shape, groups: Bytes) -> None:
    blocks = _file_blocks(raw, 34)
    quads = _quads(blocks[:, :, 2:] ^ 128)
    _store(groups, shape, 0, quads.reshape(*quads.shape[:2], 512))
    _store(groups, shape, 512, _as_bytes(_interleave(blocks[:, :, :2])))


def _pack_4bit(raw: Bytes, shape: Shape, groups: Bytes) -> None:
    """Q4_0, IQ4_NL (a scale) and Q4_1 (a scale and a minimum)."""
    head = 4 if shape.format.qtype is QuantType.Q4_1 else 2
    blocks = _file_blocks(raw, head + 16)
    _store(groups, shape, 0, _nibble_tiles(_quads(_nibbles(blocks[:, :, head:]))))
    for at in range(0, head, 2):
        _store(groups, shape, 256 + 16 * at, _as_bytes(_interleave(blocks[:, :, at : at + 2])))


def _pack_5bit(raw: Bytes, shape: Shape, groups: Bytes) -> None:
    """Q5_0 (a scale) and Q5_1 (a scale and a minimum)."""
    head = 4 if shape.format.qtype is QuantType.Q5_1 else 2
    blocks = _file_blocks(raw, head + 20)
    fifth = np.unpackbits(blocks[:, :, head : head + 4], axis=-1, bitorder="little")
    quads = _quads(_nibbles(blocks[:, :, head + 4 :]) | fifth << 4)
    _store(groups, shape, 0, _nibble_tiles(quads))
    _store(groups, shape, 256, _bit4_plane(quads))
    for at in range(0, head, 2):
        _store(groups, shape, 320 + 16 * at, _as_bytes(_interleave(blocks[:, :, at : at + 2])))


def _of_range(per_block: Bytes, shape: Shape) -> Bytes:
    """The wanted blocks of [rows, file blocks, 8, ...]: [rows, blocks, ...]."""
    flat = per_block.reshape(per_block.shape[0], -1, *per_block.shape[3:])
    return flat[:, shape.phase : shape.phase + shape.blocks]


def _k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The 6-bit scales and minima [..., 8] that Q4_K and Q5_K keep in 12 bytes."""
    low, mid, high = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 2) & 48], axis=-1)
    minima = np.concatenate([mid & 63, high >> 4 | (mid >> 2) & 48], axis=-1)
    return scales, minima


def _pack_k_scales(blocks: Bytes, shape: Shape, groups: Bytes, at: int) -> None:
    """The scales of Q4_K and Q5_K: supers hold d and dmin, tiles the 6-bit factors."""
    _store_super(groups, shape, 0, _as_bytes(_interleave(blocks[:, :, 0:2])))
    _store_super(groups, shape, 32, _as_bytes(_interleave(blocks[:, :, 2:4])))
    scales, minima = (_interleave(_of_range(part, shape)) for part in _k_scales(blocks[:, :, 4:16]))
    _store(groups, shape, at, scales & 15 | (minima & 15) << 4)
    _store(groups, shape, at + 16, _halves(scales >> 4 | minima >> 4 << 2))


def _two_bits(packed: Bytes) -> Bytes:
    """64 bytes [..., 2, 32] to the codes of 8 blocks: block 4 n + j is field j of half n."""
    fields = packed[..., :, None, :] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    return fields.reshape(*packed.shape[:-2], 8, 32)


def _two_bit_planes(quads: Bytes) -> Bytes:
    """Bits 0 and 1 of every code: [groups, blocks, 128]."""
    return _bits45_planes(quads << 4)


def _pack_q2_k(raw: Bytes, shape: Shape, groups: Bytes) -> None:
    blocks = _file_blocks(raw, 84)
    codes = _two_bits(blocks[:, :, 16:80].reshape(*blocks.shape[:2], 2, 32))
    _store(groups, shape, 0, _two_bit_planes(_quads(_of_range(codes, shape))))
    scales = _interleave(_of_range(blocks[:, :, :16].reshape(*blocks.shape[:2], 8, 2), shape))
    _store(groups, shape, 128, _as_bytes(np.moveaxis(scales, 3, 2)))
    _store_super(groups, shape, 0, _as_bytes(_interleave(blocks[:, :, 80:82])))
    _store_super(groups, shape, 32, _as_bytes(_interleave(blocks[:, :, 82:84])))


def _pack_q3_k(raw: Bytes, shape: Shape, groups: Bytes) -> None:
    blocks = _file_blocks(raw, 110)
    count = blocks.shape[:2]
    codes = _two_bits(blocks[:, :, 32:96].reshape(*count, 2, 32))
    high = blocks[:, :, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    quads = _quads(_of_range(codes | high << 2, shape))
    _store(groups, shape, 0, _two_bit_planes(quads))
    _store(groups, shape, 128, _bit4_plane(quads << 2))
    # Sixteen 6-bit scales: 8 bytes of low nibbles, 4 bytes of high pairs.
    packed = blocks[:, :, 96:108]
    low = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], axis=-1)
    pairs = packed[..., None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    scales = low | pairs.reshape(*count, 16) << 4
    halves = _interleave(_of_range(scales.reshape(*count, 8, 2), shape))
    _store(groups, shape, 192, halves[..., 0] & 15 | (halves[..., 1] & 15) << 4)
    _store(groups, shape, 208, _halves(halves[..., 0] >> 4 | halves[..., 1] >> 4 << 2))
    _store_super(groups, shape, 0, _as_bytes(_interleave(blocks[:, :, 108:110])))


def _pack_mxfp4(raw: Bytes, shape: Shape, groups: Bytes) -> None:
    blocks = _file_blocks(raw, 17)
    _store(groups, shape, 0, _nibble_tiles(_quads(_nibbles(blocks[:, :, 1:]))))
    _store(groups, shape, 256, _interleave(blocks[:, :, 0]))


def _pack_q4_k(raw: Bytes, shape: Shape, groups: Bytes) -> None:
    blocks = _file_blocks(raw, 144)
    packed = blocks[:, :, 16:].reshape(*blocks.shape[:2], 4, 1, 32)
    codes = np.concatenate([packed & 15, packed >> 4], axis=3).reshape(*blocks.shape[:2], 8, 32)
    _store(groups, shape, 0, _nibble_tiles(_quads(_of_range(codes, shape))))
    _pack_k_scales(blocks, shape, groups, 256)


def _pack_q5_k(raw: Bytes, shape: Shape, groups: Bytes) -> None:
    blocks = _file_blocks(raw, 176)
    packed = blocks[:, :, 48:].reshape(*blocks.shape[:2], 4, 1, 32)
    codes = np.concatenate([packed & 15, packed >> 4], axis=3).reshape(*blocks.shape[:2], 8, 32)
    fifth = blocks[:, :, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    quads = _quads(_of_range(codes | fifth << 4, shape))
    _store(groups, shape, 0, _nibble_tiles(quads))
    _store(groups, shape, 256, _bit4_plane(quads))
    _pack_k_scales(blocks, shape, groups, 320)


def _pack_q6_k(raw: Bytes, shape: Shape, groups: Bytes) -> None:
    blocks = _file_blocks(raw, 210)
    count = blocks.shape[:2]
    # Per 128 columns: 64 bytes of low nibbles (columns 0..63 low, 64..127 high), 32 of high bits.
    low = blocks[:, :, :128].reshape(*count, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=3).reshape(*count, 8, 32)
    high = blocks[:, :, 128:192].reshape(*count, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    quads = _quads(_of_range(low | high.reshape(*count, 8, 32) << 4, shape))
    _store(groups, shape, 0, _nibble_tiles(quads))
    _store(groups, shape, 256, _bits45_planes(quads))
    scales = _interleave(_of_range(blocks[:, :, 192:208].reshape(*count, 8, 2), shape))
    _store(groups, shape, 384, _as_bytes(np.moveaxis(scales, 3, 2)))
    _store_super(groups, shape, 0, _as_bytes(_interleave(blocks[:, :, 208:210])))


def _pack_iq4_xs(raw: Bytes, shape: Shape, groups: Bytes) -> None:
    blocks = _file_blocks(raw, 136)
    codes = _nibbles(blocks[:, :, 8:].reshape(*blocks.shape[:2], 8, 16))
    _store(groups, shape, 0, _nibble_tiles(_quads(_of_range(codes, shape))))
    nibbles = blocks[:, :, 4:8, None] >> np.array([0, 4], np.uint8) & 15
    low = _interleave(_of_range(nibbles.reshape(*blocks.shape[:2], 8), shape))
    pairs = blocks[:, :, 2:4, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
    high = _interleave(_of_range(pairs.reshape(*blocks.shape[:2], 8), shape))
    _store(groups, shape, 256, _halves(low))
    _store(groups, shape, 264, high[..., 0:4] | high[..., 4:8] << 2 | high[..., 8:12] << 4 | high[..., 12:16] << 6)
    _store_super(groups, shape, 0, _as_bytes(_interleave(blocks[:, :, 0:2])))


_PACKERS: dict[QuantType, Callable[[Bytes, Shape, Bytes], None]] = {
    QuantType.F32: _pack_float,
    QuantType.F16: _pack_float,
    QuantType.BF16: _pack_float,
    QuantType.Q8_0: _pack_q8_0,
    QuantType.Q4_0: _pack_4bit,
    QuantType.Q4_1: _pack_4bit,
    QuantType.IQ4_NL: _pack_4bit,
    QuantType.Q5_0: _pack_5bit,
    QuantType.Q5_1: _pack_5bit,
    QuantType.Q2_K: _pack_q2_k,
    QuantType.Q3_K: _pack_q3_k,
    QuantType.MXFP4: _pack_mxfp4,
    QuantType.Q4_K: _pack_q4_k,
    QuantType.Q5_K: _pack_q5_k,
    QuantType.Q6_K: _pack_q6_k,
    QuantType.IQ4_XS: _pack_iq4_xs,
}
