"""Kernels can be compiled before they are needed, and then are all there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as QuantType

from numoe.engine import kernels
from numoe.engine.cpu import attention, dense
from numoe.engine.cpu.program import Kernel
from numoe.engine.experts import exchange
from numoe.engine.gguf import GgufFile
from tests.models import make_model

ROOT = Path(__file__).resolve().parents[2]
PREPARE_AND_SERVE = """
import sys
from pathlib import Path
from numoe.engine.gguf import GgufFile
from numoe.engine.kernels import compile_kernel, needed_kernels
from numba.core import caching
from tests.engine.worker.local import local_forward, sequence_logits

path = Path(sys.argv[1])
for name in needed_kernels(GgufFile.open(path)):
    compile_kernel(name)

look_up, missed = caching.Cache.load_overload, []

def record(self, *args):
    missed.append(self._name)
    return look_up(self, *args)

caching.Cache.load_overload = record
with local_forward(path) as forward:
    sequence_logits(forward, range(20))
print(missed)
"""


def test_every_step_kernel_is_listed() -> None:
    found = {
        name
        for module in (attention, dense, exchange)
        for name, value in vars(module).items()
        if isinstance(value, Kernel)
    }
    assert set(kernels.STEP_KERNELS) == found


@pytest.mark.parametrize("arch", ["qwen3moe", "llama"])
def test_a_prepared_model_is_served_without_compiling(arch: str, tmp_path: Path) -> None:
    path = make_model(tmp_path / "m.gguf", arch, experts_type="IQ4_NL", attn_type="Q8_0")
    command = [sys.executable, "-c", PREPARE_AND_SERVE, path]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_a_model_asks_for_the_kernels_of_its_formats(tmp_path: Path) -> None:
    with GgufFile.open(
        make_model(tmp_path / "m.gguf", experts_type="IQ4_XS", attn_type="Q8_0", embd_type="Q6_K")
    ) as gguf:
        needed = kernels.needed_kernels(gguf)
    assert len(needed) == len(set(needed))
    formats = {name.partition(":")[2] for name in needed if name.startswith(("product:", "pack:"))}
    assert formats == {"F32", "Q8_0", "Q6_K", "IQ4_XS"}  # the router is F32
    assert "unpack:Q6_K" in needed


def test_what_is_compiled_is_remembered_until_the_sources_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "kernel_cache_dir", lambda _isa: tmp_path)
    assert kernels.compiled() == set()
    kernels.record_compiled(["step:attend"])
    kernels.record_compiled(["product:Q8_0"])
    assert kernels.compiled() == {"step:attend", "product:Q8_0"}
    (tmp_path / "compiled.json").write_text("cut sho")
    assert kernels.compiled() == set()


def test_an_unknown_format_has_no_kernel() -> None:
    assert "IQ1_S" in QuantType.__members__
    with pytest.raises(Exception, match="IQ1_S"):
        kernels.compile_kernel("product:IQ1_S")
