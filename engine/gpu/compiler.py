"""The CUDA C++ sources: `module` compiles one for the GPU at hand, `compile_source` without any GPU.

A source `cuda/NAME.cu` includes only headers of that folder and CUDA's own. The former are put in
place as text, so that a compiled module's cache key covers them. Kernels are `extern "C"`, or
templates of which `module` compiles what is asked for; a source instantiates all of them where
ALL_INSTANCES is defined, as `compile_source` does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from numoe.engine.gpu.device import cupy
from numoe.engine.gpu.launch import Kernel

ARCHS = (75, 80, 86, 89, 90, 120)
"""Compute capabilities, times ten, that every source compiles for."""

OPTIONS = ("-std=c++17", "-default-device", "-lineinfo")

_FOLDER = Path(__file__).parent / "cuda"
_INCLUDE = re.compile(r'^\s*#include "([^"]+)"\s*$')

_told: ContextVar[Callable[[str], None] | None] = ContextVar("told", default=None)

SOURCES = tuple(sorted(path.stem for path in _FOLDER.glob("*.cu")))
"""The names of all sources."""


def source(name: str) -> str:
    """The text of `cuda/NAME.cu` with this package's headers in place, each once."""
    return "\n".join(_lines(f"{name}.cu", set()))


def _lines(file: str, seen: set[str]) -> Iterator[str]:
    seen.add(file)
    yield f'#line 1 "{file}"'
    for number, line in enumerate((_FOLDER / file).read_text().splitlines(), 1):
        include = _INCLUDE.match(line)
        if not include:
            yield line
        elif include[1] not in seen:
            yield from _lines(include[1], seen)
            yield f'#line {number + 1} "{file}"'
        else:
            yield ""


class Module:
    """A compiled source."""

    def __init__(self, raw: Any) -> None:
        self._raw, self._kernels = raw, dict[str, Kernel]()

    def get_function(self, name: str) -> Kernel:
        """Its kernel `name`."""
        if name not in self._kernels:
            self._kernels[name] = Kernel(self._raw.get_function(name))
        return self._kernels[name]


def module(name: str, *instances: str) -> Module:
    """The compiled source `name` on the current device; made once, cached on disk.

    `instances` are template kernels to be found by `get_function`, e.g. "decode<128, 8>".
    """
    return _module(name, instances, cupy().cuda.Device().id)


@functools.cache
def _module(name: str, instances: tuple[str, ...], _device: int) -> Module:
    if tell := _told.get():
        tell(f"compiling CUDA kernels (once on this machine): {name}")
    found = cupy().RawModule(code=source(name), options=OPTIONS, name_expressions=instances or None)
    found.compile()
    return Module(found)


@contextmanager
def compiling_told(tell: Callable[[str], None]) -> Iterator[None]:
    """Tell of each source that is compiled, or found in the cache, inside the block; of nothing at its end."""
    token = _told.set(tell)
    try:
        yield
    finally:
        _told.reset(token)
        tell("")


def compile_source(name: str, arch: int) -> bytes:
    """The machine code of a source for one of ARCHS. RuntimeError holds the compiler's log.

    Needs no GPU and no CuPy, but `cuda-bindings`, NVRTC and CUDA's headers (the `dev` extra).
    """
    from cuda.bindings import nvrtc

    def check(result: tuple[Any, ...]) -> Any:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC: {result[0].name}")
        return result[1] if len(result) > 1 else None

    program = check(nvrtc.nvrtcCreateProgram(source(name).encode(), f"{name}.cu".encode(), 0, [], []))
    options = [*OPTIONS, "-DALL_INSTANCES", f"-arch=sm_{arch}", *(f"-I{folder}" for folder in _header_folders())]
    error = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * check(nvrtc.nvrtcGetProgramLogSize(program))
        check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{name}.cu does not compile for sm_{arch}:\n{log.decode().rstrip(chr(0))}")
    code: bytes = b" " * check(nvrtc.nvrtcGetCUBINSize(program))
    check(nvrtc.nvrtcGetCUBIN(program, code))
    check(nvrtc.nvrtcDestroyProgram(program))
    return code


def _header_folders() -> Iterator[str]:
    """Where CUDA's own headers are: a pip package's or a toolkit's."""
    from cuda.pathfinder import find_nvidia_header_directory

    for library in ("cudart", "cccl"):
        if folder := find_nvidia_header_directory(library):
            yield folder
