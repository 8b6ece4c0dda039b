"""Memory of a GPU that may outlive the process: CUDA's virtual memory management exports it as a descriptor.

As long as any process has the descriptor open, one without CUDA too, the memory stays what it is, even if the process
that made it is killed in the midst of a kernel. Whoever gets the descriptor maps the memory in a millisecond.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import secrets
import weakref
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from blake3 import blake3

from numoe.engine.cpu.memory import align
from numoe.engine.errors import ResourceError
from numoe.engine.gguf import GgufFile, TensorInfo
from numoe.engine.gpu.compiler import source
from numoe.engine.gpu.device import cupy
from numoe.engine.gpu.matrices import matrix_bytes
from numoe.engine.keeper import Keepsakes
from numoe.engine.private import Stamp

if TYPE_CHECKING:
    import cupy as cp

logger = logging.getLogger(__name__)
_PINNED: Final = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
_POSIX_DESCRIPTOR: Final = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_DEVICE: Final = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_READ_WRITE: Final = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE
_HAS_VIRTUAL_MEMORY, _HAS_DESCRIPTORS = 102, 103  # of CUdevice_attribute
_NOTHING: Final = ctypes.c_ulonglong(0)
_ALIGNMENT: Final = 256


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int), ("handles", ctypes.c_int), ("location", _Location), ("metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )  # fmt: skip


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


@functools.cache
def _cuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(name: str, *arguments: Any) -> None:
    """Call the driver; ResourceError for what it does not do."""
    if code := getattr(_cuda(), name)(*arguments):
        raise ResourceError(f"{name} failed with CUDA error {code}")


def can_be_exported(device: int) -> bool:
    """Whether memory of a device can outlive its process: not everywhere, for example not under WSL."""
    value = ctypes.c_int()
    for attribute in (_HAS_VIRTUAL_MEMORY, _HAS_DESCRIPTORS):
        _check("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        if not value.value:
            return False
    return True


class _Mapped:
    """Exportable memory of a device, new or behind a descriptor, mapped until nothing refers to this any more."""

    def __init__(self, nbytes: int, device: int, descriptor: int | None = None) -> None:
        location = _Location(_DEVICE, device)
        properties = _Properties(_PINNED, _POSIX_DESCRIPTOR, location)
        granularity, handle, address = ctypes.c_size_t(), ctypes.c_ulonglong(), ctypes.c_uint64()
        _check("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(properties), 0)
        size = ctypes.c_size_t(align(nbytes, granularity.value))
        with contextlib.ExitStack() as undo:
            if descriptor is None:
                _check("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(properties), _NOTHING)
            else:
                what = ctypes.c_void_p(descriptor)
                _check("cuMemImportFromShareableHandle", ctypes.byref(handle), what, _POSIX_DESCRIPTOR)
            undo.callback(_cuda().cuMemRelease, handle)
            _check("cuMemAddressReserve", ctypes.byref(address), size, ctypes.c_size_t(0), _NOTHING, _NOTHING)
            undo.callback(_cuda().cuMemAddressFree, address, size)
            _check("cuMemMap", address, size, ctypes.c_size_t(0), handle, _NOTHING)
            undo.callback(_cuda().cuMemUnmap, address, size)
            access = _Access(location, _READ_WRITE)
            _check("cuMemSetAccess", address, size, ctypes.byref(access), ctypes.c_size_t(1))
            undo.callback(_cuda().cuCtxSynchronize)  # the first one that is called
            weakref.finalize(self, undo.pop_all().close)
        self._handle, self._nbytes, self._device, self._address = handle, nbytes, device, int(address.value)

    def export(self) -> int:
        """A descriptor of it."""
        descriptor = ctypes.c_int(-1)
        _check("cuMemExportToShareableHandle", ctypes.byref(descriptor), self._handle, _POSIX_DESCRIPTOR, _NOTHING)
        os.set_inheritable(descriptor.value, False)  # noqa: FBT003 - it takes no keyword
        return descriptor.value

    def array(self) -> cp.ndarray:
        """All of it as uint8."""
        cuda = cupy().cuda
        memory = cuda.UnownedMemory(self._address, self._nbytes, self, self._device)
        return cupy().ndarray(self._nbytes, np.uint8, cuda.MemoryPointer(memory, 0))


class KeptVram:
    """`nbytes` bytes on the current device, uint8 `array`, under a name that a successor asks for.

    layout: what shall lie there, and how. is_old: whether a predecessor has left it there. identity: of the memory.
    Where memory cannot outlive the process, or nobody keeps it, it is ordinary memory.
    """

    def __init__(self, keepsakes: Keepsakes, name: str, layout: bytes, nbytes: int) -> None:
        self._keepsakes, self._name, self._layout = keepsakes, name, layout
        self.is_old, self.identity = False, secrets.token_bytes(16)
        self._mapped: _Mapped | None = None
        if keepsakes and nbytes:
            self._map(nbytes)
        self.array: cp.ndarray = self._mapped.array() if self._mapped else cupy().empty(nbytes, np.uint8)

    def _map(self, nbytes: int) -> None:
        device = int(cupy().cuda.Device().id)
        try:
            if not can_be_exported(device):
                logger.warning("this GPU's driver does not export memory: what is in it will not outlive the worker")
                return
            if found := self._keepsakes.get(self._name, self._layout):
                try:
                    self._mapped = _Mapped(nbytes, device, found[1])
                except ResourceError as error:
                    logger.warning("what the GPU's memory held (%s) is lost: %s", self._name, error)
                    self._keepsakes.drop(self._name)
                else:
                    self.is_old, self.identity = True, found[0]
                    return
            self._mapped = _Mapped(nbytes, device)
        except (ResourceError, OSError) as error:
            logger.warning("the GPU's memory (%s) will not outlive the worker: %s", self._name, error)

    def keep(self) -> None:
        """Have it kept from now on, as its content is what it shall be."""
        if self._mapped is None or self.is_old:
            return
        try:
            self.identity = self._keepsakes.put(self._name, self._layout, self._mapped.export())
        except (ResourceError, OSError) as error:
            logger.warning("the GPU's memory (%s) will not outlive the worker: %s", self._name, error)


class WeightMemory:
    """One piece of VRAM for the matrices `names` of a model; each takes its part, in the same order for every worker.

    is_loaded: whether a predecessor has loaded them all.
    """

    def __init__(self, keepsakes: Keepsakes, gguf: GgufFile, names: list[str]) -> None:
        tensors = [gguf.tensors[name] for name in names]
        sizes = (matrix_bytes(info.qtype, info.rows, info.shape[-1]) for info in tensors if len(info.shape) > 1)
        nbytes = sum(align(size, _ALIGNMENT) for size in sizes)
        self._memory = KeptVram(keepsakes, "weights", _layout(gguf, tensors), nbytes)
        self._taken = 0

    @property
    def is_loaded(self) -> bool:
        """Whether the content is there already."""
        return self._memory.is_old

    def take(self, nbytes: int) -> cp.ndarray:
        """The next part, uint8."""
        start = self._taken
        self._taken += align(nbytes, _ALIGNMENT)
        if self._taken > self._memory.array.size:
            raise ValueError("more is taken than there are tensors for")
        return self._memory.array[start : start + nbytes]

    def keep(self) -> None:
        """Everything is loaded, and the kernels that did it are done."""
        self._memory.keep()


def _layout(gguf: GgufFile, tensors: list[TensorInfo]) -> bytes:
    """What the tensors are, of which state of the files, and how kernels lay them out."""
    digest = blake3(source("dequantize").encode())
    for path in gguf.paths:
        digest.update(repr((str(path), Stamp.at(path))).encode())
    for info in tensors:
        digest.update(repr((info.name, info.qtype, info.shape)).encode())
    return digest.digest()
