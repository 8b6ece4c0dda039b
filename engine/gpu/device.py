"""What GPU there is."""

from __future__ import annotations

import functools
import importlib
import json
import logging
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from numoe.engine.errors import NumoeError, ResourceError, UnsupportedError

OLDEST = (7, 5)
"""The lowest compute capability that the kernels are written for: Turing."""


@dataclass(frozen=True)
class Device:
    """A CUDA GPU.

    capability:   its compute capability, e.g. (9, 0).
    memory_bytes: all of its memory; free_bytes: what nobody has taken.
    copy_bytes_s: bytes a second that it reads and writes while copying, 0 if nobody measured.
    sms:          streaming multiprocessors.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int
    sms: int
    copy_bytes_s: float = 0.0


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


def import_libraries() -> None:
    """Import CuPy and what it imports when it is used; CUDA is not called."""
    cupy()
    importlib.import_module("cupyx")


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
        runtime.memGetInfo()[0],
        properties["multiProcessorCount"],
    )
    if device.capability < OLDEST:
        raise UnsupportedError(f"{device.name} has compute capability {device.capability}; {OLDEST} is the oldest")
    return device


def find_gpu(wanted: str) -> Device | None:
    """The GPU for attention: none for "cpu", what `current` says for "gpu", and for "auto" the GPU if one can be used.

    Asked in a process of its own, because a CUDA context takes hundreds of megabytes of the GPU's memory for as long as
    its process lives.
    """
    if wanted == "cpu" or (wanted == "auto" and not _has_driver()):
        return None
    asked = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True, check=False)  # noqa: S603
    if asked.returncode == 0:
        fields = json.loads(asked.stdout)
        return Device(**fields | {"capability": tuple(fields["capability"])})
    error = asked.stderr.strip().rpartition("\n")[2] or f"exit status {asked.returncode}"
    if wanted == "gpu":
        raise ResourceError(f"--device gpu: {error}")
    logging.getLogger(__name__).warning("attention runs on the CPU: %s", error)
    return None


def _measured(device: Device) -> Device:
    """The current device with its bandwidth: the best of a few copies."""
    cp, size = cupy(), 256 << 20
    source, target = cp.zeros(size, cp.uint8), cp.empty(size, cp.uint8)
    times = []
    for _ in range(5):
        start, end = cp.cuda.Event(), cp.cuda.Event()
        start.record()
        target.data.copy_from_device_async(source.data, size)
        end.record()
        end.synchronize()
        times.append(cp.cuda.get_elapsed_time(start, end) / 1e3)
    return replace(device, copy_bytes_s=2 * size / min(times))


def _has_driver() -> bool:
    """Whether NVIDIA's kernel driver is there."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(_measured(current()))))
    except NumoeError as error:
        sys.exit(str(error))
