"""Host memory that CUDA has pinned and mapped: kernels read and write it, copies run at full speed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from numoe.engine.cpu.memory import address
from numoe.engine.errors import ResourceError

_MAPPED = 2  # cudaHostRegisterMapped
_PORTABLE = 1


class RegisteredMemory:
    """The pages of a uint8 array, registered with CUDA until `close`; the caller keeps the array alive."""

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        from cupy.cuda import runtime

        self._address, self._open = address(array), True
        try:
            runtime.hostRegister(self._address, array.nbytes, _MAPPED | _PORTABLE)
        except runtime.CUDARuntimeError as error:
            raise ResourceError(
                f"CUDA cannot pin {array.nbytes / 1e9:.2f} GB of host memory ({error}): raise the limit of locked "
                "memory (ulimit -l unlimited), or in a container --ulimit memlock=-1"
            ) from None

    @property
    def device_address(self) -> int:
        """Where kernels see the memory. With unified addressing (every 64-bit system) that is the host's address."""
        return self._address

    def close(self) -> None:
        """Unregister; no kernel may use the memory any more."""
        from cupy.cuda import runtime

        if self._open:
            self._open = False
            runtime.hostUnregister(self._address)
