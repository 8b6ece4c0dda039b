"""Every CUDA source compiles for every GPU that numoe supports; no GPU is needed for that."""

from __future__ import annotations

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
