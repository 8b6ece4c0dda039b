"""The packed layouts of weight matrices: what the kernels read.

A matrix [rows, cols] is cut into groups of 16 rows and blocks of 32 columns. All of a group lies
together, its tiles (16 rows x 32 columns) one after the other, then its *supers*: what 256 columns
share in the K-quants. The sixteen rows are interleaved so that one vector instruction works on all
of them, and a group is read as one sequential stream. Codes are the unsigned ones of the GGUF
format (signed ones biased by their `bias`); nothing is requantized.

    tile of Q4_0, for example:  256 bytes of codes | 16 float16 scales
    codes: for each j < 4, 64 bytes; byte 4 row + i holds the codes of columns 8 j + i (low half)
    and 8 j + 4 + i (high half) of that row, i < 4

An eight-bit tile has, for each j < 8, 64 bytes: byte 4 row + i is column 4 j + i. A fifth bit is a
plane of 8 x 64 bits in that order; two-bit codes or two high bits are 2 x 64 bytes, vector j in
field j % 4 of plane j // 4. Float tiles hold, for each column, its sixteen rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGMLQuantizationType as QuantType

from numoe.engine.errors import UnsupportedError

GROUP_ROWS = 16
"""Rows that are interleaved."""

BLOCK_COLS = 32
"""Columns of a tile."""


@dataclass(frozen=True)
class PackedFormat:
    """The layout of one weight format.

    tile_bytes:  bytes of 16 rows x 32 columns.
    super_bytes: bytes that each `super_blocks` tiles of a group share; 0 for none.
    bias:        what is subtracted from a code before it is scaled.
    activations: what the products want: "q8" (8-bit blocks of 32) or "f32".
    """

    qtype: QuantType
    tile_bytes: int
    super_bytes: int = 0
    super_blocks: int = 0
    bias: int = 0
    activations: str = "q8"

    @property
    def name(self) -> str:
        """GGML's name of the format."""
        return str(self.qtype.name)

    def supers(self, blocks: int, phase: int) -> int:
        """Supers that `blocks` tiles touch, the first being number `phase` of its super."""
        return -(-(phase + blocks) // self.super_blocks) if self.super_blocks else 0

    def group_bytes(self, blocks: int, phase: int = 0) -> int:
        """Bytes of a group of 16 rows."""
        return blocks * self.tile_bytes + self.supers(blocks, phase) * self.super_bytes


_ALL = (
    PackedFormat(QuantType.F32, 2048, activations="f32"),
    PackedFormat(QuantType.F16, 1024, activations="f32"),
    PackedFormat(QuantType.BF16, 1024, activations="f32"),
    PackedFormat(QuantType.Q8_0, 544, bias=128),
    PackedFormat(QuantType.Q4_0, 288, bias=8),
    PackedFormat(QuantType.Q4_1, 320),
    PackedFormat(QuantType.Q5_0, 352, bias=16),
    PackedFormat(QuantType.Q5_1, 384),
    PackedFormat(QuantType.Q2_K, 160, super_bytes=64, super_blocks=8),
    PackedFormat(QuantType.Q3_K, 216, super_bytes=32, super_blocks=8, bias=4),
    PackedFormat(QuantType.Q4_K, 280, super_bytes=64, super_blocks=8),
    PackedFormat(QuantType.Q5_K, 344, super_bytes=64, super_blocks=8),
    PackedFormat(QuantType.Q6_K, 416, super_bytes=32, super_blocks=8, bias=32),
    PackedFormat(QuantType.IQ4_NL, 288, bias=128),
    PackedFormat(QuantType.IQ4_XS, 268, super_bytes=32, super_blocks=8, bias=128),
    PackedFormat(QuantType.MXFP4, 272, bias=12),
)
FORMATS = {f.qtype: f for f in _ALL}
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The non-linear code book of IQ4_NL and IQ4_XS."""
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of E2M1, the element of MXFP4 (OCP Microscaling Formats 1.0, section 5.3.3)."""


def packed_format(qtype: QuantType) -> PackedFormat:
    """The layout for a weight format; UnsupportedError names the formats there are."""
    found = FORMATS.get(qtype)
    if found is None:
        raise UnsupportedError(
            f"weight format {qtype.name} is not supported; use one of {', '.join(f.name for f in _ALL)}"
        )
    return found
