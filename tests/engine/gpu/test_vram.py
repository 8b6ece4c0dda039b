"""Memory of a GPU that outlives the process which made it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from numoe.engine.gguf import GgufFile
from numoe.engine.gpu.forward import GpuForward
from numoe.engine.gpu.vram import KeptVram
from numoe.engine.keeper import Keeper, Keepsakes
from numoe.engine.kv.pages import pages_for
from numoe.engine.models.config import ModelConfig
from numoe.engine.progress import Progress
from numoe.engine.worker.options import ForwardOptions
from tests.engine.worker.local import batch
from tests.models import make_model

pytestmark = pytest.mark.gpu

NBYTES = 5_000_000
KILLED = """
import os, signal, sys
from pathlib import Path
import cupy
from numoe.engine.gpu.vram import KeptVram
from numoe.engine.keeper import Keepsakes
cupy.zeros(1)
memory = KeptVram(Keepsakes(Path(sys.argv[1])), "kv", b"as before", int(sys.argv[2]))
memory.array[:] = cupy.arange(memory.array.size, dtype=cupy.uint32).astype(cupy.uint8)
cupy.cuda.Device().synchronize()
memory.keep()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Path]:
    """The socket of a keeper."""
    path = tmp_path / "keeper"
    keeper = Keeper(path)
    yield path
    keeper.close()


def leave_memory(keeper: Path, nbytes: int) -> None:
    """Have a process make memory, write to it, and be killed."""
    command = [sys.executable, "-c", KILLED, str(keeper), str(nbytes)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


def test_memory_of_a_killed_process_is_there_as_it_was(keeper: Path) -> None:
    import cupy

    cupy.zeros(1)
    leave_memory(keeper, NBYTES)
    memory = KeptVram(Keepsakes(keeper), "kv", b"as before", NBYTES)
    assert memory.is_old
    assert np.array_equal(memory.array.get(), np.arange(NBYTES, dtype=np.uint32).astype(np.uint8))
    again = KeptVram(Keepsakes(keeper), "kv", b"as before", NBYTES)
    assert again.identity == memory.identity
    again.array[:3] = 7
    assert memory.array[:4].tolist() == [7, 7, 7, 3]


def test_memory_of_another_layout_is_let_go(keeper: Path) -> None:
    import cupy

    cupy.zeros(1)
    runtime, large = cupy.cuda.runtime, 1 << 30
    free = runtime.memGetInfo()[0]
    leave_memory(keeper, large)
    assert runtime.memGetInfo()[0] <= free - large, "the keeper has it"
    assert not KeptVram(Keepsakes(keeper), "kv", b"another", NBYTES).is_old
    assert runtime.memGetInfo()[0] > free - large


def test_a_successor_loads_no_weights_and_has_the_pages(keeper: Path, tmp_path: Path) -> None:
    path = make_model(tmp_path / "m.gguf", "qwen3moe", n_experts=8, n_used=2, attn_type="Q8_0")
    tokens = np.random.default_rng(3).integers(0, 256, 9).tolist()

    def answers(start: int) -> tuple[np.ndarray, int, bytes]:
        """The logits of tokens from `start` on, the bytes loaded, and which pages they are in."""
        with GgufFile.open(path) as gguf:
            options = ForwardOptions(
                max_rows=96, slots=2, n_pages=2 * pages_for(512), context=512, threads=2, threads_on_host=9,
                gpu_layers=2, keepsakes=Keepsakes(keeper),
            )  # fmt: skip
            loaded, progress = [0], Progress(1)
            progress.advance = loaded.append  # type: ignore[method-assign]
            forward = GpuForward(ModelConfig.from_gguf(gguf), gguf, None, options, progress)
            rows = [(token, start + i, 0) for i, token in enumerate(tokens[start:])]
            found = np.array(forward.run(batch(forward, rows, range(len(rows)))))
            forward.close()
            return found, sum(loaded), forward.kv_identity

    want, loaded, pages = answers(0)
    assert loaded > 0
    found, loaded, same = answers(len(tokens) - 1)
    assert loaded == 0
    assert same == pages
    assert np.array_equal(found[-1], want[-1]), "with the keys and values of the one before"
