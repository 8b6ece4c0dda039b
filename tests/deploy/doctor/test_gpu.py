"""Checks of the GPU: what the bus tells, what CuPy says, and what is copied."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from numoe.cluster.topology import Topology
from numoe.deploy.doctor.check import Host
from numoe.deploy.doctor.gpu import check_gpu, check_gpu_copies
from numoe.engine.errors import NumoeError, ResourceError
from numoe.engine.gpu.copies import HostCopies, ask_copies
from numoe.engine.gpu.device import Device, current
from tests.cluster import hosts

CARD = Device("NVIDIA GeForce RTX 3090", (8, 6), 24 << 30, 23 << 30, 82, copy_bytes_s=8e11)


def raising(message: str) -> object:
    def find(_: str) -> Device:
        raise ResourceError(message)

    return find


def why_not() -> str:
    """Why there is no GPU here, empty if there is one."""
    try:
        current()
    except NumoeError as reason:
        return str(reason)
    return ""


def found_card(_: str) -> Device:
    return CARD


def test_no_gpu_is_no_fault(tmp_path: Path) -> None:
    found = check_gpu(Host.read(hosts.laptop(tmp_path)))
    assert (found.state, found.values) == ("ok", {"driver": None, "gpus": [], "device": None})


def test_a_gpu_that_can_be_used(tmp_path: Path) -> None:
    found = check_gpu(Host.read(hosts.dual_xeon(tmp_path)), found_card)
    assert found.state == "ok"
    assert found.text.startswith("NVIDIA GeForce RTX 3090 at 0000:af:00.0 near node 1, driver 580.65.06;")
    assert found.values["device"]["capability"] == "8.6"
    assert found.values["gpus"][0]["numa_node"] == 1


def test_a_gpu_without_a_driver(tmp_path: Path) -> None:
    root = hosts.dual_xeon(tmp_path)
    (root / "sys/module/nvidia/version").unlink()
    found = check_gpu(Host.read(root))
    assert (found.state, found.values["driver"]) == ("warning", None)
    assert "install NVIDIA's driver" in found.cure


@pytest.mark.parametrize(("driver", "extra"), [("580.65.06", "cuda13"), ("535.183.01", "cuda12")])
def test_without_cupy_the_cure_is_the_extra_for_the_driver(tmp_path: Path, driver: str, extra: str) -> None:
    root = hosts.dual_xeon(tmp_path)
    hosts.write(root, "/sys/module/nvidia/version", driver)
    found = check_gpu(Host.read(root), raising("--device gpu: CuPy is not installed; install it"))
    assert (found.state, found.cure) == ("warning", f"pip install 'numoe[{extra}]'")


def test_a_driver_that_does_not_work(tmp_path: Path) -> None:
    found = check_gpu(Host.read(hosts.dual_xeon(tmp_path)), raising("--device gpu: no CUDA GPU can be used (999)"))
    assert found.state == "warning"
    assert "no CUDA GPU can be used (999)" in found.text
    assert "nvidia-smi" in found.cure


def test_a_gpu_in_a_narrow_slot(tmp_path: Path) -> None:
    root = hosts.dual_xeon(tmp_path)
    hosts.write_gpu(root, "0000:af:00.0", 1, width=4)
    found = check_gpu(Host.read(root), found_card)
    assert found.state == "warning"
    assert "4 of 16 PCIe lanes" in found.text


def test_copies(tmp_path: Path) -> None:
    def ask(nodes: object) -> list[HostCopies]:
        assert nodes == [0, 1]
        return [HostCopies(0, 20e9, 18e9), HostCopies(1, 25e9, 24e9)]

    found = check_gpu_copies(Host.read(hosts.dual_xeon(tmp_path)), found_card, ask)
    assert found.state == "ok"
    assert found.text == (
        "GB/s copied: 400 within the GPU; node 0: 20.0 to the GPU, 18.0 back; node 1: 25.0 to the GPU, 24.0 back"
    )
    assert found.values["host"][1] == {"node": 1, "to_gpu_gb_s": 25, "from_gpu_gb_s": 24}


def test_a_nearest_node_that_is_not(tmp_path: Path) -> None:
    found = check_gpu_copies(
        Host.read(hosts.dual_xeon(tmp_path)),
        found_card,
        lambda _: [HostCopies(0, 25e9, 24e9), HostCopies(1, 12e9, 12e9)],
    )
    assert found.state == "warning"
    assert "the nearest node is not the fastest" in found.text


def test_memory_that_cannot_be_pinned_is_an_error(tmp_path: Path) -> None:
    found = check_gpu_copies(Host.read(hosts.dual_xeon(tmp_path)), found_card, raising("CUDA cannot pin 0.27 GB"))
    assert (found.state, found.text) == ("error", "CUDA cannot pin 0.27 GB")
    assert "memlock" in found.cure


def test_without_a_gpu_nothing_is_copied() -> None:
    """In the real process, which says why on one line."""
    reason = why_not()
    if not reason:
        pytest.skip("there is a GPU")
    with pytest.raises(ResourceError, match="cannot be measured") as refused:
        ask_copies([0])
    assert reason in str(refused.value)


@pytest.mark.gpu
def test_this_gpu_copies() -> None:
    """Both ways faster than the slowest link that a GPU is put on, and slower than any there is."""
    if reason := why_not():
        pytest.skip(reason)
    for copies in ask_copies([node.id for node in Topology.read().nodes if node.has_memory]):
        assert 1e8 < copies.to_gpu < 1e12
        assert 1e8 < copies.from_gpu < 1e12
    assert check_gpu(Host.read()).values["device"] is not None
    assert check_gpu_copies(Host.read()).values["device_gb_s"] > 1


def test_a_module_that_prints_nothing_else() -> None:
    """Of no node at all it prints an empty list, or why not."""
    run = subprocess.run([sys.executable, "-m", "numoe.engine.gpu.copies"], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == ("[]" if run.returncode == 0 else "")
