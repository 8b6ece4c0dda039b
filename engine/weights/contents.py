"""What a tensor holds, as a digest that is put together from parts, so that nobody reads a model a second time for it.

LtHash: of every unit of a tensor 2048 bytes of blake3's output, for unit i those from 2048 i on, added up as 1024
numbers modulo 2^16. Neither the order matters nor who adds what, and finding other units with the same sum is as hard
as a lattice problem (Bellare and Micciancio, "A new paradigm for collision-free hashing", 1997; Lewi et al., "Securing
update propagation with homomorphic hashing", 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from numoe.engine.gguf import TensorInfo

_CUT_ROWS: Final = 32
"""Slices are cut between so many rows, where they are."""
_UNIT_BYTES: Final = 1 << 19
"""Of the largest unit: blake3 is faster on more bytes at once."""
CONTENT = np.dtype([("tensor", "u1", 32), ("units", "<u8"), ("lanes", "<u2", 1024)])
"""A row of the table of contents: the blake3 of a tensor's name, and the sum of some of its units."""


def _nothing() -> npt.NDArray[np.uint16]:
    return np.zeros(1024, np.uint16)


@dataclass(frozen=True)
class ContentSum:
    """The sum of `units` units of a tensor: `lanes`, uint16 [1024]."""

    units: int = 0
    lanes: npt.NDArray[np.uint16] = field(default_factory=_nothing)

    @classmethod
    def of(cls, tensor: TensorInfo, first: int, raw: npt.NDArray[np.uint8]) -> ContentSum:
        """The sum of some rows of a tensor: `raw`, uint8 [rows, row_bytes], as the file has them, from row `first` on.

        ValueError unless they are whole units.
        """
        last, rows = first + len(raw), unit_rows(tensor)
        if first % rows or (last % rows and last != tensor.rows):
            raise ValueError(f"rows {first} to {last} of {tensor.name} are not whole units of {rows} rows")
        data, nbytes, lanes = raw.reshape(-1).data, rows * tensor.row_bytes, _nothing()
        units = range(first // rows, -(-last // rows))
        for number, unit in enumerate(units):
            digest = blake3(data[number * nbytes : (number + 1) * nbytes])
            lanes += np.frombuffer(digest.digest(lanes.nbytes, seek=unit * lanes.nbytes), "<u2")
        return cls(len(units), lanes)

    def __add__(self, other: ContentSum) -> ContentSum:
        """The sum of units that nobody has added yet."""
        return ContentSum(self.units + other.units, self.lanes + other.lanes)

    def digest(self, tensor: TensorInfo) -> bytes | None:
        """The digest of a tensor's bytes, 32 bytes; None while units are missing."""
        units = -(-tensor.rows // unit_rows(tensor))
        return blake3(self.lanes.astype("<u2").tobytes()).digest() if self.units == units else None


def unit_rows(tensor: TensorInfo) -> int:
    """Rows of a unit: 32 of experts' gates and ups, which are cut anywhere between those.

    Of other tensors as many times twice that as are half a megabyte at most and divide each matrix of several.
    """
    rows = _CUT_ROWS
    if not tensor.name.endswith(("gate_exps.weight", "up_exps.weight")):
        matrix = tensor.shape[-2] if len(tensor.shape) > 2 else 0
        while 2 * rows * tensor.row_bytes <= _UNIT_BYTES and matrix % (2 * rows) == 0:
            rows *= 2
    return rows


def name_digest(name: str) -> bytes:
    """How the table of contents names a tensor."""
    return blake3(name.encode()).digest()


def content_table(names: Sequence[str], sums: Sequence[ContentSum]) -> npt.NDArray[np.void]:
    """The table of contents of tensors."""
    table = np.zeros(len(names), CONTENT)
    for row, name, content in zip(table, names, sums, strict=True):
        row["tensor"] = np.frombuffer(name_digest(name), np.uint8)
        row["units"], row["lanes"] = content.units, content.lanes
    return table
