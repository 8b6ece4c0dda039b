"""Every CUDA source compiles for every GPU that numoe supports; no GPU is needed for that."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from numoe.engine.gpu.compiler import ARCHS, SOURCES, compile_source, source


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", SOURCES)
def test_sources_compile(name: str, arch: int) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed; it is in the extra dev")
    assert compile_source(name, arch).startswith(b"\x7fELF")


@pytest.mark.parametrize("name", SOURCES)
def test_headers_are_in_place_once(name: str) -> None:
    text = source(name)
    assert '#include "' not in text
    assert text.count('#line 1 "common.cuh"') <= 1


def kernels(text: str) -> Iterator[tuple[str, str]]:
    """Name and body of each kernel that is defined in a source."""
    text = re.sub(r"__launch_bounds__\([^()]*(\([^()]*\)[^()]*)*\)", "", text)
    for found in re.finditer(r"__global__\s+void\s+(\w+)\s*\([^;{}]*\)\s*\{", text):
        depth, end = 1, found.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        yield found[1], text[found.end() : end]


def test_every_kernel_waits_for_those_before() -> None:
    """In a step's graph kernels begin before the one before has ended, and its end tells of all ends before."""
    bodies = {(name, kernel): body for name in SOURCES for kernel, body in kernels(source(name))}
    waiting = {key for key, body in bodies.items() if re.search(r"await_previous|multiply_rows|multiply_floats", body)}
    assert bodies.keys() == waiting
    assert len(bodies) > 25
