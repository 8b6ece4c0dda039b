"""Fields of records and aligned buffers: how Python hands addresses and sizes to kernels.

A record is an array of 64-bit fields: integers, addresses, or a float32 in the low half. Python
writes it once with `record`; kernels read it with `field` and `float_field`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from numba import njit

from numoe.engine.cpu import simd as v

inline = njit(nogil=True, error_model="numpy", forceinline=True)
_Element = TypeVar("_Element", bound=np.generic)
ALIGNMENT = 64
"""Bytes: a cache line, and a vector."""


@inline
def field(record: int, index: int) -> int:
    """Integer field `index` of the record at address `record`."""
    return v.load_scalar_i64(record + 8 * index)


@inline
def float_field(record: int, index: int) -> float:
    """Float32 field `index` of the record at address `record`."""
    return v.load_scalar_f32(record + 8 * index)


@inline
def set_field(record: int, index: int, value: int) -> None:
    """Write integer field `index`."""
    v.store_scalar_i64(record + 8 * index, value)


def record(values: Sequence[int | float]) -> npt.NDArray[np.int64]:
    """An int64 record; floats are stored as float32 in the low half."""
    fields = [struct.unpack("<i", struct.pack("<f", x))[0] if isinstance(x, float) else int(x) for x in values]
    return aligned_copy(np.array(fields, np.int64))


def align(nbytes: int, to: int = ALIGNMENT) -> int:
    """The next multiple of `to`."""
    return -(-nbytes // to) * to


def aligned_bytes(nbytes: int, alignment: int = ALIGNMENT) -> npt.NDArray[np.uint8]:
    """Zeroed uint8 [nbytes] whose address is a multiple of `alignment`.

    All that kernels read or write comes from here, but for a step's batch and what lies in shared
    memory. Large arrays take up no memory before they are written.
    """
    raw = np.zeros(nbytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + nbytes]


def aligned_copy(values: npt.NDArray[_Element]) -> npt.NDArray[_Element]:
    """A contiguous copy of an array in memory from `aligned_bytes`."""
    out = aligned_bytes(values.nbytes).view(values.dtype).reshape(values.shape)
    out[...] = values
    return out


def address(array: npt.NDArray[Any]) -> int:
    """The address of an array's first byte. The caller keeps the array alive."""
    return int(array.ctypes.data)
