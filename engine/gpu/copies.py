"""How fast a GPU copies from and to the memory of each node, out of pages that CUDA has pinned as it does weights.

`python -m numoe.engine.gpu.copies NODE ...` prints it as JSON: a CUDA context takes memory for as
long as its process lives.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from numoe.engine.cpu.memory import address
from numoe.engine.errors import NumoeError, ResourceError
from numoe.engine.gpu.device import cupy, current
from numoe.engine.gpu.registered import RegisteredMemory
from numoe.engine.numa import bind_memory

_BYTES = 256 << 20
_ROUNDS = 5


@dataclass(frozen=True)
class HostCopies:
    """Bytes a second from the memory of a node to the GPU, and back."""

    node: int
    to_gpu: float
    from_gpu: float


def ask_copies(nodes: Sequence[int]) -> list[HostCopies]:
    """Measure the current device with memory of these nodes, in a process of its own; ResourceError if it cannot be."""
    command = [sys.executable, "-m", __name__, *map(str, nodes)]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this Python, our module
    if asked.returncode:
        reason = asked.stderr.strip().rpartition("\n")[2] or f"exit status {asked.returncode}"
        raise ResourceError(f"the GPU's copies cannot be measured: {reason}")
    return [HostCopies(**fields) for fields in json.loads(asked.stdout)]


def measure_copies(node: int) -> HostCopies:
    """The best of a few copies of the current device; ResourceError if CUDA cannot pin memory."""
    cp = cupy()
    target = cp.empty(_BYTES, cp.uint8)
    mapping = mmap.mmap(-1, _BYTES)
    pages = np.frombuffer(mapping, np.uint8)
    with contextlib.suppress(OSError):  # one node, or a kernel that does not let us
        bind_memory(address(pages), _BYTES, node)
    ctypes.memset(address(pages), 1, _BYTES)
    registered = RegisteredMemory(pages)
    try:
        host, gpu, runtime = registered.device_address, target.data.ptr, cp.cuda.runtime
        return HostCopies(
            node,
            _best(gpu, host, runtime.memcpyHostToDevice),
            _best(host, gpu, runtime.memcpyDeviceToHost),
        )
    finally:
        registered.close()


def _best(target: int, source: int, kind: int) -> float:
    cp, times = cupy(), list[float]()
    for _ in range(_ROUNDS):
        start, end = cp.cuda.Event(), cp.cuda.Event()
        start.record()
        cp.cuda.runtime.memcpyAsync(target, source, _BYTES, kind, cp.cuda.get_current_stream().ptr)
        end.record()
        end.synchronize()
        times.append(cp.cuda.get_elapsed_time(start, end) / 1e3)
    return _BYTES / min(times)


if __name__ == "__main__":
    try:
        current()
        print(json.dumps([asdict(measure_copies(int(node))) for node in sys.argv[1:]]))
    except NumoeError as error:
        sys.exit(str(error))
