"""What a tensor holds, as a digest that is put together from parts, so that nobody reads a model a second time for it.

LtHash: 2048 bytes of blake3 of every unit and its place, added up as 1024 numbers modulo 2^16. Neither the order
matters nor who adds what, and finding other units with the same sum is as hard as a lattice problem (Bellare and
Micciancio, "A new paradigm for collision-free hashing", 1997; Lewi et al., "Securing update propagation with
homomorphic hashing", 2019). A unit is 32 rows: whoever cuts experts into slices cuts there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from numoe.engine.gguf import TensorInfo

UNIT_ROWS: Final = 32
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
        last = first + len(raw)
        if first % UNIT_ROWS or (last % UNIT_ROWS and last != tensor.rows):
            raise ValueError(f"rows {first} to {last} of {tensor.name} are not whole units of {UNIT_ROWS} rows")
        data, unit_bytes, lanes = raw.reshape(-1).data, UNIT_ROWS * tensor.row_bytes, _nothing()
        units = range(first // UNIT_ROWS, units_of(last))
        for number, unit in enumerate(units):
            digest = blake3(unit.to_bytes(8, "little")).update(data[number * unit_bytes : (number + 1) * unit_bytes])
            lanes += np.frombuffer(digest.digest(lanes.nbytes), "<u2")
        return cls(len(units), lanes)

    def __add__(self, other: ContentSum) -> ContentSum:
        """The sum of units that nobody has added yet."""
        return ContentSum(self.units + other.units, self.lanes + other.lanes)

    def digest(self, tensor: TensorInfo) -> bytes | None:
        """The digest of a tensor's bytes, 32 bytes; None while units are missing."""
        return blake3(self.lanes.astype("<u2").tobytes()).digest() if self.units == units_of(tensor.rows) else None


def units_of(rows: int) -> int:
    """Units that so many rows make."""
    return -(-rows // UNIT_ROWS)


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
