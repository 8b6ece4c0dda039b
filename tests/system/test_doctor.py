"""`numoe doctor` on this host, beside what really runs here."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import psutil
import pytest

from tests.system.harness import ServeProcess, numoe

NAMES = [
    "processor", "kernels", "cpuset", "cpu_time", "governor", "nodes", "memory_channels", "bandwidth", "binding",
    "numa_balancing", "memory", "shared_memory", "huge_pages", "transparent_huge_pages", "memlock", "swap", "gpu",
    "gpu_copies", "ray", "port", "store", "cache", "model",
]  # fmt: skip


def examine(*args: object) -> tuple[int, dict[str, dict]]:
    """The exit status, and each check by its name."""
    result = numoe("doctor", "--json", *args)
    assert result.stderr == ""
    values = json.loads(result.stdout)
    assert values["state"] == max(
        (check["state"] for check in values["checks"]), key=("ok", "warning", "error").index
    )
    return result.returncode, {check["name"]: check for check in values["checks"]}


def test_this_host_its_model_and_its_store(tiny_model: Path, tmp_path: Path) -> None:
    code, checks = examine(tiny_model, "--listen", "127.0.0.1:0", "--store", tmp_path / "store")
    assert code == 0
    assert list(checks) == NAMES
    assert all(check.keys() == {"name", "state", "text", "cure", "values"} for check in checks.values())
    assert all(bool(check["cure"]) == (check["state"] != "ok") for check in checks.values())
    assert sum(node["memory_bytes"] for node in checks["nodes"]["values"]["nodes"]) == pytest.approx(
        psutil.virtual_memory().total, rel=0.05
    )
    assert all(read["gb_s"] > 0.1 for read in checks["bandwidth"]["values"]["reads"])
    assert checks["store"]["state"] == "ok"
    assert checks["model"]["values"]["path"] == str(tiny_model)
    assert checks["shared_memory"]["values"]["model_bytes"] == checks["model"]["values"]["shared_bytes"] > 0


def test_an_error_is_the_exit_status(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        code, checks = examine("--store", "none", "--listen", f"127.0.0.1:{held.getsockname()[1]}")
    assert (code, checks["port"]["state"]) == (1, "error")
    code, checks = examine(tmp_path / "none.gguf", "--store", "none", "--listen", "127.0.0.1:0")
    assert (code, checks["model"]["state"]) == (1, "error")


def test_kernels_that_cannot_run_are_one_line_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMOE_ISA", "sse9")
    code, checks = examine("--store", "none", "--listen", "127.0.0.1:0")
    assert (code, list(checks)) == (1, NAMES)
    assert [name for name, check in checks.items() if check["state"] == "error"] == ["kernels"]
    assert checks["kernels"]["text"].startswith("NUMOE_ISA=sse9 cannot run on this CPU; choose one of ")


def test_a_server_that_runs_is_recognized(server: ServeProcess) -> None:
    code, checks = examine("--store", "none", "--listen", server.address)
    assert code == 0
    assert (checks["port"]["state"], checks["port"]["values"]["numoe"]) == ("ok", True)
    assert checks["port"]["values"]["held_by"] in server.pids
    assert checks["ray"]["values"]["own"] >= 1


def test_people_read_a_line_for_each_check_and_the_sum() -> None:
    result = numoe("doctor", "--store", "none", "--listen", "127.0.0.1:0")
    lines = result.stdout.splitlines()
    assert [line[9:].split("  ")[0].replace(" ", "_") for line in lines[:-1] if line[:1].strip()] == NAMES
    assert lines[-1].startswith(f"{sum(line.startswith('ok ') for line in lines)} ok, ")
    assert sum(line.lstrip().startswith("→") for line in lines) == sum(
        line.startswith(("warning ", "error ")) for line in lines
    )
