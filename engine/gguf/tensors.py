"""What a tensor in a GGUF file is, which weight formats numoe computes with, dequantization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

WEIGHT_TYPES: Final[tuple[GGMLQuantizationType, ...]] = (
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
    GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q2_K,
    GGMLQuantizationType.Q3_K,
    GGMLQuantizationType.Q4_K,
    GGMLQuantizationType.Q5_K,
    GGMLQuantizationType.Q6_K,
    GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.IQ4_XS,
    GGMLQuantizationType.MXFP4,
)
"""The weight formats that numoe has kernels for."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it holds.

    shape:  NumPy order, last axis contiguous, e.g. [experts, rows, cols].
    qtype:  the GGML type of its elements.
    path:   the file that holds it (one part of a split file).
    offset: bytes from the start of that file; nbytes: its size there, without padding.
    """

    name: str
    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    path: Path
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Rows of shape[-1] elements."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return row_bytes(self.qtype, self.shape[-1])


def row_bytes(qtype: GGMLQuantizationType, columns: int) -> int:
    """Bytes of a row of `columns` elements, a multiple of the type's block size."""
    block, block_bytes = GGML_QUANT_SIZES[qtype]
    return int(columns // block * block_bytes)


def dequantize_rows(raw: npt.NDArray[np.uint8], qtype: GGMLQuantizationType) -> npt.NDArray[np.float32]:
    """Rows of packed blocks, uint8 [..., row_bytes], as float32 [..., columns] (`gguf.quants`)."""
    values: npt.NDArray[Any] = quants.dequantize(raw, qtype)
    return values.astype(np.float32, copy=False)
