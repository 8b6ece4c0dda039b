"""Every instruction set that this host can run computes the same."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from numoe.engine.cpu.isa import choose_isa, host_isas
from numoe.engine.errors import InputError

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("isa", host_isas())
def test_kernels_are_right_on_every_path(isa: str) -> None:
    environment = {**os.environ, "NUMOE_ISA": isa}
    command = [sys.executable, "-m", "tests.engine.cpu.isa_check"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{isa} ok"


def test_settings_hold_although_numba_was_imported_first(tmp_path: Path) -> None:
    """Or stale kernels would be kept beside the sources, and a forced path compiled for the host."""
    script = (
        "import numba, numoe.engine.cpu.team as team; from numba.core.registry import cpu_target;"
        "print(team._lead._cache.cache_path, cpu_target.target_context.codegen()._get_host_cpu_name())"
    )
    environment = {**os.environ, "NUMOE_ISA": "portable", "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
    folder, cpu = result.stdout.split()
    assert Path(folder).is_relative_to(tmp_path / "numoe" / "kernels")
    if platform.machine() == "x86_64":
        assert cpu == "x86-64-v2"


def test_a_cache_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    """As that of a user whose home is not there; what is compiled is this user's alone all the same."""
    (tmp_path / "home").write_text("")
    script = "import numoe.engine.cpu.team as team; print(team._lead._cache.cache_path)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "home" / "cache"), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    spare = tmp_path / f"numoe-kernels-{os.getuid()}"
    assert Path(result.stdout.strip()).is_relative_to(spare)
    assert spare.stat().st_mode & 0o777 == 0o700


def test_the_portable_path_runs_everywhere() -> None:
    assert host_isas()[-1] == "portable"


def test_a_path_that_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMOE_ISA", "sve2")
    with pytest.raises(InputError, match=r"NUMOE_ISA=sve2 cannot run.*portable"):
        choose_isa()
