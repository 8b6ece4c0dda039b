"""Weights and activations for kernel tests, and the kernels called from Python."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType as QuantType
from gguf import quants

from numoe.engine.cpu.memory import address, aligned_bytes, aligned_copy
from numoe.engine.cpu.packing import pack as compiled_pack
from numoe.engine.cpu.products import product_kernel, unpack_kernel
from numoe.engine.cpu.rows import activation_bytes, quantize_row
from numoe.engine.formats import FORMATS, shape_of
from tests.models import Weights

ALL_FORMATS = sorted(FORMATS, key=lambda qtype: qtype.name)


def random_weights(qtype: QuantType, rows: int, cols: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """GGUF rows uint8 [rows, row_bytes], and what GGML says they are: float32 [rows, cols]."""
    raw = Weights(seed).packed(qtype.name, (rows, cols), 1.0)
    raw = np.ascontiguousarray(raw).view(np.uint8).reshape(rows, -1)
    return raw, quants.dequantize(raw, qtype).reshape(rows, cols)


class Matrix:
    """A packed matrix whose products can be called."""

    def __init__(
        self, raw: np.ndarray, qtype: QuantType, cols: int, block_range: tuple[int, int] | None = None,
        pack: Callable[..., None] = compiled_pack,
    ) -> None:  # fmt: skip
        self.qtype, self.shape = qtype, shape_of(qtype, len(raw), cols, block_range)
        self.data = aligned_bytes(self.shape.nbytes)
        pack(raw, qtype, self.data, block_range)

    def group(self, number: int) -> int:
        """The address of a group."""
        return address(self.data) + number * self.shape.group_bytes

    def unpacked(self) -> np.ndarray:
        """Every weight, by the unpack kernel: float32 [rows, cols]."""
        out = aligned_copy(np.zeros((self.shape.rows, self.shape.blocks * 32), np.float32))
        kernel = unpack_kernel(self.qtype).ctypes
        for row in range(self.shape.rows):
            kernel(self.group(row // 16), self.shape.blocks, self.shape.phase, row % 16, address(out[row]))
        return out

    def product(self, x: np.ndarray) -> np.ndarray:
        """x float32 [n, cols] times the matrix, by the product kernel: float32 [n, rows]."""
        kind = self.shape.format.activations
        stride, n = activation_bytes(x.shape[1], kind), len(x)
        buffer = aligned_bytes(n * stride)
        pointers = aligned_copy(address(buffer) + stride * np.arange(n, dtype=np.int64))
        for i, row in enumerate(aligned_copy(x.astype(np.float32))):
            if kind == "q8":
                quantize_row(address(row), x.shape[1], int(pointers[i]))
            else:
                buffer[i * stride : i * stride + row.nbytes] = row.view(np.uint8)
        out = aligned_copy(np.full((n, 16 * self.shape.groups), np.nan, np.float32))
        kernel = product_kernel(self.qtype).ctypes
        shape = self.shape
        kernel(
            self.group(0), shape.group_bytes, shape.groups, shape.blocks, shape.phase,
            address(pointers), n, address(out), out.strides[0], self.group(0),
        )  # fmt: skip
        return out[:, : self.shape.rows]
