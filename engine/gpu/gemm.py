"""Products of matrices by cuBLAS, on the current stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from numoe.engine.gpu.device import cupy

_TRANSPOSED, _AS_IS = 1, 0  # cublasOperation_t
_COMPUTE_32F = 68  # cublasComputeType_t: float32 sums, no TF32
_DEFAULT_ALGORITHM = -1
_TYPES: dict[Any, int] = {np.float32: 0, np.float16: 2}  # cudaDataType_t
_FACTORS = np.array([0, 1], np.float32)
_ZERO, _ONE = _FACTORS.ctypes.data, _FACTORS.ctypes.data + 4


@dataclass(frozen=True)
class Shape:
    """x: [rows, cols]; out: [rows, out_cols], of which a product may fill only some columns."""

    rows: int
    cols: int
    out_cols: int


def multiply(weights: int, x: int, out: int, shape: Shape, count: int, dtype: Any, *, add: bool) -> None:
    """out[:, :count] = x weights^T, or += that; device addresses.

    weights: [count, cols] and x: [rows, cols] of `dtype`, out: float32 with rows of shape.out_cols.
    """
    from cupy_backends.cuda.libs import cublas

    # cuBLAS counts columns first: to it weights are [cols, count], x is [cols, rows], out is [count, rows].
    kind, cols = _TYPES[dtype], shape.cols
    cublas.gemmEx(
        cupy().cuda.device.get_cublas_handle(), _TRANSPOSED, _AS_IS, count, shape.rows, cols, _ONE,
        weights, kind, cols, x, kind, cols, _ONE if add else _ZERO,
        out, _TYPES[np.float32], shape.out_cols, _COMPUTE_32F, _DEFAULT_ALGORITHM,
    )  # fmt: skip
