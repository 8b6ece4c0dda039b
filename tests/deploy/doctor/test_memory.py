"""Checks of memory: limits, pages, /dev/shm and what a model needs of them."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pytest

from numoe.cluster.plan import Plan, PlanOptions, make_plan
from numoe.cluster.topology import Topology
from numoe.deploy.doctor.check import Check, Host
from numoe.deploy.doctor.memory import (
    check_huge_pages,
    check_memlock,
    check_memory,
    check_shared_memory,
    check_swap,
    check_transparent,
    refusal,
)
from numoe.engine.gguf import GgufFile
from numoe.engine.gpu.device import Device
from numoe.engine.models.config import ModelConfig
from tests.cluster import hosts
from tests.cluster.hosts import GIB, write
from tests.models import make_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    with GgufFile.open(make_model(tmp_path_factory.mktemp("m") / "m.gguf", "qwen3moe")) as gguf:
        return make_plan(ModelConfig.from_gguf(gguf), gguf, Topology.read(), PlanOptions())


def sized(plan: Plan, gib: int) -> Plan:
    """The same plan with experts of that size."""
    return replace(plan, shards=(replace(plan.shards[0], nbytes=gib * GIB),))


def host(root: Path, available_gib: int = 300, mounts: str = "tmpfs /dev/shm tmpfs rw,size=1k 0 0") -> Host:
    """The dual Xeon, with these mounts."""
    hosts.dual_xeon(root)
    total = "MemTotal: 402653184 kB\n"
    write(root, "/proc/meminfo", f"{total}MemAvailable: {available_gib << 20} kB\nSwapTotal: 0 kB")
    write(root, "/proc/self/mounts", mounts)
    return Host.read(root)


def test_memory_without_limits(tmp_path: Path, tiny: Plan) -> None:
    found = check_memory(host(tmp_path), tiny)
    assert (found.state, found.text) == ("ok", "322.1 GB of 412.3 GB available")
    assert found.values == {"total_bytes": 384 * GIB, "available_bytes": 300 * GIB, "limit_bytes": None}


def test_a_model_that_does_not_fit_is_an_error(tmp_path: Path, tiny: Plan) -> None:
    found = check_memory(host(tmp_path), sized(tiny, 310))
    assert found.state == "error"
    assert "the model needs 334.1" in found.text
    assert found.text.endswith("11.99 GB is missing")
    assert "lower --ctx-size" in found.cure


def test_the_containers_limit_counts(tmp_path: Path, tiny: Plan) -> None:
    host(tmp_path)
    hosts.half_container(tmp_path)
    found = check_memory(Host.read(tmp_path), sized(tiny, 45))
    assert (found.state, found.values["available_bytes"]) == ("ok", 50 * GIB)
    found = check_memory(Host.read(tmp_path), sized(tiny, 55))
    assert found.state == "error"
    assert "53.7 GB of the container's 68.7 GB" in found.text


@pytest.mark.parametrize(
    ("total", "state"), [(64 << 20, "error"), (100 * GIB, "warning"), (192 * GIB, "ok"), (350 * GIB, "ok")]
)
def test_the_size_of_shared_memory(tmp_path: Path, total: int, state: str) -> None:
    found = check_shared_memory(host(tmp_path), space=(total, total))
    assert (found.state, found.values["total_bytes"]) == (state, total)
    assert ("remount,size=346G" in found.cure) == (state != "ok")


def test_shared_memory_against_the_model(tmp_path: Path, tiny: Plan) -> None:
    found = check_shared_memory(host(tmp_path), sized(tiny, 80), (200 * GIB, 90 * GIB))
    assert (found.state, found.values["free_bytes"]) == ("ok", 90 * GIB)
    found = check_shared_memory(host(tmp_path), sized(tiny, 95), (200 * GIB, 90 * GIB))
    assert found.state == "error"
    assert found.text.endswith("5.37 GB is missing")
    assert "--shm-size" in found.cure


def test_a_gpu_with_too_little_memory(tiny: Plan) -> None:
    card = Device("a GPU", (8, 6), 8 << 30, 1 << 20, 46)
    found = refusal("model", replace(tiny, gpu=card), "it", {})
    assert found is not None
    assert found.text.startswith("it; attention needs")
    assert found.text.endswith("of a GPU 0.00 GB may be used")
    assert found.cure.startswith("lower --ctx-size")
    assert refusal("model", tiny, "it", {}) is None


def test_the_size_of_this_hosts_shared_memory() -> None:
    assert check_shared_memory(Host.read()).values["total_bytes"] > 0


def huge(root: Path, check: object, writable: bool = True) -> Check:
    """A check on a host with 100 pages of 1 GiB on each node, 98 free, mounted under the root."""
    place = root / "mnt/huge"
    place.mkdir(parents=True)
    host(root, mounts="none /mnt/huge hugetlbfs rw,pagesize=1024M 0 0" if writable else "")
    for node in (0, 1):
        hosts.write_hugepages(root, f"/sys/devices/system/node/node{node}/hugepages", {1048576: (100, 98)})
    return check(Host.read(root))  # type: ignore[operator]


def test_no_huge_pages_are_no_fault(tmp_path: Path) -> None:
    assert check_huge_pages(host(tmp_path)).text == "none reserved"


def test_huge_pages_that_can_be_used(tmp_path: Path) -> None:
    found = huge(tmp_path, check_huge_pages)
    assert found.text == "node 0: 98 of 100 of 1G free, node 1: 98 of 100 of 1G free, at /mnt/huge"
    assert found.values["pages"][1] == {"node": 1, "size_bytes": GIB, "total": 100, "free": 98}
    assert (found.state, found.values["mounts"]) == ("ok", ["/mnt/huge"])


def test_huge_pages_that_are_mounted_nowhere(tmp_path: Path) -> None:
    found = huge(tmp_path, check_huge_pages, writable=False)
    assert found.state == "warning"
    assert "mount -t hugetlbfs -o pagesize=1G" in found.cure


@pytest.mark.parametrize(
    ("enabled", "shmem", "option", "state", "cure"),
    [
        ("madvise", "never", "huge=advise", "ok", ""),
        ("always", "never", "huge=within_size", "ok", ""),
        ("madvise", "force", "huge=never", "ok", ""),
        ("madvise", "never", "size=1k", "warning", "remount,huge=advise"),
        ("madvise", "deny", "huge=always", "warning", "shmem_enabled"),
        ("never", "never", "huge=always", "warning", "transparent_hugepage/enabled"),
    ],
)
def test_transparent_huge_pages(
    tmp_path: Path, enabled: str, shmem: str, option: str, state: str, cure: str
) -> None:
    host(tmp_path, mounts=f"tmpfs /dev/shm tmpfs rw 0 0\ntmpfs /dev/shm tmpfs rw,{option} 0 0")
    hosts.write_transparent(tmp_path, enabled, shmem)
    found = check_transparent(Host.read(tmp_path))
    assert (found.state, found.values["enabled"], found.values["shmem_enabled"]) == (state, enabled, shmem)
    assert cure in found.cure


def test_a_kernel_without_transparent_huge_pages(tmp_path: Path) -> None:
    write(tmp_path, "/sys/devices/system/cpu/online", "0")
    assert check_transparent(Host.read(tmp_path)).state == "warning"


def test_weights_in_reserved_pages_need_no_others(tmp_path: Path, tiny: Plan) -> None:
    assert huge(tmp_path / "1", lambda host: check_transparent(host, sized(tiny, 190))).state == "ok"
    assert huge(tmp_path / "2", lambda host: check_transparent(host, sized(tiny, 200))).state == "warning"


def test_locked_memory_matters_to_gpus(tmp_path: Path, tiny: Plan) -> None:
    with_gpu = host(tmp_path / "gpu")
    assert check_memlock(with_gpu, limit=8 << 20).state == "warning"
    assert "ulimit -l unlimited" in check_memlock(with_gpu, limit=8 << 20).cure
    assert check_memlock(with_gpu, limit=resource.RLIM_INFINITY).values == {"bytes": None}
    assert check_memlock(with_gpu, sized(tiny, 50), limit=60 * GIB).state == "ok"
    assert check_memlock(with_gpu, sized(tiny, 70), limit=60 * GIB).state == "warning"
    assert check_memlock(Host.read(hosts.laptop(tmp_path / "none")), limit=8 << 20).state == "ok"


@pytest.mark.parametrize(
    ("swap", "swappiness", "state"), [(0, 60, "ok"), (8, 60, "warning"), (8, 1, "ok"), (8, 0, "ok")]
)
def test_swap(tmp_path: Path, swap: int, swappiness: int, state: str) -> None:
    host(tmp_path)
    write(tmp_path, "/proc/meminfo", f"SwapTotal: {swap << 20} kB")
    write(tmp_path, "/proc/sys/vm/swappiness", swappiness)
    found = check_swap(Host.read(tmp_path))
    assert (found.state, found.values) == (state, {"total_bytes": swap * GIB, "swappiness": swappiness})
