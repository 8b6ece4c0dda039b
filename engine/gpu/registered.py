"""Host memory that CUDA has pinned and mapped: kernels read and write it, copies run at full speed.

Hundreds of gigabytes take seconds to pin. So that nobody who calls CUDA meanwhile has to wait for all of it, it is done
part by part; a copy must not go across the edge of a part (`split`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from numoe.engine.cpu.memory import address
from numoe.engine.errors import ResourceError

_MAPPED = 2  # cudaHostRegisterMapped
_PORTABLE = 1
_PART_BYTES = 256 << 20
_BREAK_S = 1e-3


class RegisteredMemory:
    """The pages of a uint8 array, registered with CUDA until `close`; the caller keeps the array alive."""

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        from cupy.cuda import runtime

        self._address, self._parts = address(array), list[int]()
        for start in range(0, array.nbytes, _PART_BYTES):
            if start:
                time.sleep(_BREAK_S)
            part, nbytes = self._address + start, min(_PART_BYTES, array.nbytes - start)
            try:
                runtime.hostRegister(part, nbytes, _MAPPED | _PORTABLE)
            except runtime.CUDARuntimeError as error:
                self.close()
                raise ResourceError(
                    f"CUDA cannot pin {array.nbytes / 1e9:.2f} GB of host memory ({error}): raise the limit of locked "
                    "memory (ulimit -l unlimited), or in a container --ulimit memlock=-1"
                ) from None
            self._parts.append(part)

    @property
    def device_address(self) -> int:
        """Where kernels see the memory. With unified addressing (every 64-bit system) that is the host's address."""
        return self._address

    def close(self) -> None:
        """Unregister; no kernel may use the memory any more."""
        from cupy.cuda import runtime

        while self._parts:
            runtime.hostUnregister(self._parts.pop())


def split(start: int, source: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """The pieces, address and bytes, of a piece of registered memory that begins at `start`: each within a part."""
    end = source + nbytes
    while source < end:
        edge = start + ((source - start) // _PART_BYTES + 1) * _PART_BYTES
        yield source, min(edge, end) - source
        source = edge
