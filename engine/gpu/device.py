"""What GPU there is."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from numoe.engine.errors import ResourceError, UnsupportedError

OLDEST = (7, 5)
"""The lowest compute capability that the kernels are written for: Turing."""


@dataclass(frozen=True)
class Device:
    """A CUDA GPU.

    capability:   its compute capability, e.g. (9, 0).
    memory_bytes: all of its memory.
    sms:          streaming multiprocessors.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    sms: int


@functools.cache
def cupy() -> Any:
    """The CuPy package; UnsupportedError says how to get it."""
    try:
        import cupy
    except ImportError:
        raise UnsupportedError(
            "CuPy is not installed; install numoe[cuda12] or numoe[cuda13], whichever the driver supports"
        ) from None
    return cupy


def current() -> Device:
    """The current CUDA device.

    UnsupportedError without CuPy or for a GPU that is too old, ResourceError without a GPU.
    """
    runtime = cupy().cuda.runtime
    try:
        properties = runtime.getDeviceProperties(runtime.getDevice())
    except runtime.CUDARuntimeError as error:
        raise ResourceError(f"no CUDA GPU can be used ({error}); check nvidia-smi and the driver") from None
    device = Device(
        properties["name"].decode(),
        (properties["major"], properties["minor"]),
        properties["totalGlobalMem"],
        properties["multiProcessorCount"],
    )
    if device.capability < OLDEST:
        raise UnsupportedError(f"{device.name} has compute capability {device.capability}; {OLDEST} is the oldest")
    return device
