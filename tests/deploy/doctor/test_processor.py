"""The processor's checks, on trees of hosts and with each of their faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from numoe.deploy.doctor.check import Check, Host, ranges
from numoe.deploy.doctor.processor import (
    check_cpu_time,
    check_cpuset,
    check_governor,
    check_kernels,
    check_processor,
)
from tests.cluster import hosts
from tests.cluster.hosts import write


def with_governor(root: Path, *kinds: tuple[str, str, str]) -> Check:
    """The laptop with these drivers, governors and preferences on its CPUs, in turns."""
    hosts.laptop(root)
    names = ("scaling_driver", "scaling_governor", "energy_performance_preference")
    for cpu in range(16):
        for name, value in zip(names, kinds[cpu % len(kinds)], strict=True):
            if value:
                write(root, f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/{name}", value)
    return check_governor(Host.read(root))


def test_the_processor_is_described(tmp_path: Path) -> None:
    found = check_processor(Host.read(hosts.dual_xeon(tmp_path)))
    assert found.text == "Intel(R) Xeon(R) Gold 6138 CPU @ 2.00GHz: 2 sockets, 40 cores, 80 CPUs"
    assert (found.values["sockets"], found.values["cores"], found.values["cpus"]) == (2, 40, 80)


def test_small_cores_are_mentioned(tmp_path: Path) -> None:
    found = check_processor(Host.read(hosts.laptop(tmp_path)))
    assert found.text.endswith("1 socket, 12 cores, 16 CPUs, 8 of them on efficiency cores")


def test_the_kernels_take_the_best_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMOE_ISA", raising=False)
    found = check_kernels(Host.read(hosts.dual_xeon(tmp_path)))
    assert (found.state, found.values["features"]) == ("ok", ["avx2"])
    assert found.values["chosen"] == found.values["available"][0]


def test_a_forced_path_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMOE_ISA", "portable")
    found = check_kernels(Host.read(hosts.dual_xeon(tmp_path)), ["avx2", "portable"])
    assert (found.state, found.cure, found.values["chosen"]) == ("warning", "unset NUMOE_ISA", "portable")
    assert "avx2 is faster" in found.text


def test_a_path_that_cannot_run_is_an_error(tmp_path: Path) -> None:
    found = check_kernels(Host.read(hosts.dual_xeon(tmp_path)), refused="NUMOE_ISA=sse9 cannot run on this CPU")
    assert (found.state, found.cure, found.values["chosen"]) == ("error", "unset NUMOE_ISA", None)


def test_an_old_processor_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMOE_ISA", "portable")  # as an old processor chooses by itself
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    found = check_kernels(Host.read(hosts.dual_xeon(tmp_path)), ["portable"])
    assert (found.state, found.values["available"]) == ("warning", ["portable"])
    assert "AVX2" in found.cure


def test_all_cpus_of_a_host(tmp_path: Path) -> None:
    found = check_cpuset(Host.read(hosts.dual_xeon(tmp_path)))
    assert (found.state, found.text) == ("ok", "80 of 80 CPUs may be used (0-79)")


def test_whole_nodes_in_a_container_are_right(tmp_path: Path) -> None:
    found = check_cpuset(Host.read(hosts.half_container(tmp_path)))
    assert (found.state, found.text) == ("ok", "40 of 80 CPUs may be used (0-19,40-59)")


def test_a_part_of_a_node_is_a_warning(tmp_path: Path) -> None:
    root = hosts.dual_xeon(tmp_path)
    write(root, "/proc/self/status", "Cpus_allowed_list:\t0-19,40-59,60\nMems_allowed_list:\t0-1")
    found = check_cpuset(Host.read(root))
    assert found.state == "warning"
    assert found.text.endswith("only a part of node 1")


def test_cores_without_their_memory_are_a_warning(tmp_path: Path) -> None:
    root = hosts.dual_xeon(tmp_path)
    write(root, "/proc/self/status", "Cpus_allowed_list:\t0-79\nMems_allowed_list:\t0")
    found = check_cpuset(Host.read(root))
    assert (found.state, found.values["mems"]) == ("warning", (0,))
    assert "not the memory of node 1" in found.text
    assert "--cpuset-mems" in found.cure


def test_cpu_time(tmp_path: Path) -> None:
    assert check_cpu_time(Host.read(hosts.dual_xeon(tmp_path / "free"))).values == {"cpus": None}
    found = check_cpu_time(Host.read(hosts.half_container(tmp_path)))
    assert (found.state, found.values) == ("warning", {"cpus": 12.0})
    assert "--threads 12" in found.cure
    write(tmp_path, "/sys/fs/cgroup/cpu.max", "4000000 100000")
    assert check_cpu_time(Host.read(tmp_path)).state == "ok"


@pytest.mark.parametrize(
    ("driver", "governor", "preference", "state"),
    [
        ("intel_pstate", "performance", "performance", "ok"),
        ("intel_pstate", "powersave", "balance_performance", "ok"),
        ("intel_pstate", "powersave", "balance_power", "warning"),
        ("intel_pstate", "powersave", "", "warning"),
        ("amd-pstate-epp", "powersave", "power", "warning"),
        ("acpi-cpufreq", "performance", "", "ok"),
        ("acpi-cpufreq", "schedutil", "", "warning"),
        ("acpi-cpufreq", "powersave", "performance", "warning"),
    ],
)
def test_governors(tmp_path: Path, driver: str, governor: str, preference: str, state: str) -> None:
    found = with_governor(tmp_path, (driver, governor, preference))
    assert (found.state, found.values) == (state, {"governors": {governor: 16}})
    assert ("cpupower" in found.cure) == (state == "warning")


def test_one_slow_cpu_is_enough_for_a_warning(tmp_path: Path) -> None:
    found = with_governor(tmp_path, ("acpi-cpufreq", "performance", ""), ("acpi-cpufreq", "ondemand", ""))
    assert (found.state, found.values) == ("warning", {"governors": {"performance": 8, "ondemand": 8}})


def test_no_governor_to_read(tmp_path: Path) -> None:
    found = check_governor(Host.read(hosts.laptop(tmp_path)))
    assert (found.state, found.values) == ("ok", {"governors": {}})
    assert "not readable" in found.text


@pytest.mark.parametrize(("numbers", "text"), [((), ""), ((3,), "3"), ((0, 1, 2, 8, 10, 11), "0-2,8,10-11")])
def test_lists_are_written_as_the_kernel_does(numbers: tuple[int, ...], text: str) -> None:
    assert ranges(numbers) == text
