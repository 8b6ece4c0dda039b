"""Launching kernels, one beginning before the one before has ended.

A decode step is a long chain of kernels of a few microseconds each, and a good part of each is getting
started. In a captured graph every kernel is therefore launched with CUDA's programmatic dependent launch
(compute capability 9.0, CUDA 12.4, or newer): its blocks may begin as soon as all blocks of the one before
have, load what no kernel of a step writes (weights, most keys and values), and then wait in
`await_previous` (`cuda/common.cuh`). Every kernel calls that.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from numoe.engine.gpu.device import cupy, current

_OLDEST_OVERLAPPING = (9, 0)
_OLDEST_DRIVER = 12040
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: which, and a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("n_attributes", ctypes.c_uint),
    )  # fmt: skip


class Kernel:
    """A compiled kernel: `kernel(grid, block, args, shared_mem=0)` launches it on the current stream.

    args: arrays on the device, NumPy scalars and records, in the order and of the types of the kernel's parameters.
    """

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def allow_shared_memory(self, nbytes: int) -> None:
        """Let launches ask for up to so many bytes of dynamic shared memory."""
        self._raw.max_dynamic_shared_size_bytes = nbytes

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None:
        """Launch it."""
        stream = cupy().cuda.get_current_stream()
        if _overlaps(cupy().cuda.Device().id) and stream.is_capturing():
            _launch(self._raw.kernel.ptr, grid, block, args, shared_mem, stream.ptr)
        else:
            self._raw(grid, block, args, shared_mem=shared_mem)


@functools.cache
def _overlaps(_device: int) -> bool:
    """Whether kernels of a graph on the current device may begin before the one before has ended."""
    runtime = cupy().cuda.runtime
    return current().capability >= _OLDEST_OVERLAPPING and runtime.driverGetVersion() >= _OLDEST_DRIVER


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _launch(
    function: int, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_mem: int, stream: int
) -> None:
    attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION)
    attribute.value[0] = 1
    shapes = [(ctypes.c_uint * 3)(*shape, *(1,) * (3 - len(shape))) for shape in (grid, block)]
    config = _Config(*shapes, shared_mem, stream, ctypes.pointer(attribute), 1)
    values = [ctypes.create_string_buffer(value, len(value)) for value in map(_bytes_of, args)]
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    status = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), pointers, None)
    if status:
        raise cupy().cuda.driver.CUDADriverError(status)


def _bytes_of(argument: Any) -> bytes:
    """A kernel's argument as its parameter's bytes."""
    if isinstance(argument, np.generic | np.ndarray):
        return argument.tobytes()
    return int(argument.data.ptr).to_bytes(8, "little")
