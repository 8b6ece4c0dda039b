"""Checks of nodes: their memory and its modules, their bandwidth, and binding to them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from numoe.cluster.bandwidth import Bandwidth, ReadSpeed
from numoe.cluster.topology import NumaNode, Topology
from numoe.cluster.topology.tree import Tree
from numoe.deploy.doctor.check import Host
from numoe.deploy.doctor.dimms import Slot, read_slots
from numoe.deploy.doctor.nodes import (
    check_balancing,
    check_bandwidth,
    check_binding,
    check_memory_channels,
    check_nodes,
)
from tests.cluster import hosts
from tests.cluster.hosts import GIB, write


def memory_device(place: str, mib: int, kind: int = 0x1A, speed: int = 2666, configured: int = 2666) -> bytes:
    """SMBIOS type 17 as version 2.8 has it: 0x28 bytes, then its strings."""
    size, extended = (mib, 0) if mib < 0x7FFF else (0x7FFF, mib)
    entry = struct.pack(
        "<BBHHHHHHBBBBBHHBBBBBIHHHH", 17, 0x28, 0x1100, 0, 0, 64, 64, size, 9, 0, 1, 2, kind, 0, speed,
        0, 0, 0, 0, 0, extended, configured, 1200, 1200, 1200,
    )  # fmt: skip
    assert len(entry) == 0x28
    return entry + place.encode() + b"\0BANK 0\0\0"


def write_dmi(root: Path, *devices: bytes) -> None:
    """A table with something before and after the memory devices."""
    table = root / "sys/firmware/dmi/tables/DMI"
    table.parent.mkdir(parents=True)
    bios = struct.pack("<BBH", 0, 4, 0) + b"A vendor\0\0"
    board = struct.pack("<BBH", 2, 4, 0) + b"\0\0"
    table.write_bytes(bios + board + b"".join(devices) + struct.pack("<BBH", 127, 4, 1) + b"\0\0" + b"\0" * 64)


def write_edac(root: Path, controllers: int, channels: int) -> None:
    for controller in range(controllers):
        for channel in range(channels):
            folder = f"/sys/devices/system/edac/mc/mc{controller}/dimm{2 * channel}"
            write(root, f"{folder}/dimm_location", f"channel {channel} slot 0 ")
            write(root, f"{folder}/size", 32768)
            empty = f"/sys/devices/system/edac/mc/mc{controller}/dimm{2 * channel + 1}"
            write(root, f"{empty}/dimm_location", f"channel {channels + channel} slot 0")
            write(root, f"{empty}/size", 0)


def speeds(*rows: tuple[float, ...]) -> Bandwidth:
    """GB/s of the cores of each node (rows) from the memory of each."""
    reads = [ReadSpeed(cores=c, memory=m, bytes_s=1e9 * gb) for c, row in enumerate(rows) for m, gb in enumerate(row)]
    return Bandwidth(measured=0.0, reads=tuple(reads))


def test_nodes_are_described(tmp_path: Path) -> None:
    found = check_nodes(Host.read(hosts.half_container(tmp_path)))
    assert found.state == "ok"
    assert found.text == (
        "node 0: 20 cores, 206.2 GB (154.6 GB available); "
        "node 1: cores of others, 206.2 GB (154.6 GB available), not for this process"
    )
    first = found.values["nodes"][0]
    assert (first["node"], first["cores"], first["package"], first["distances"]) == (0, 20, 0, {"0": 10, "1": 21})


def test_a_node_of_memory_only_is_right(tmp_path: Path) -> None:
    found = check_nodes(Host.read(hosts.cxl(tmp_path)))
    assert found.state == "ok"
    assert "node 2: no cores, 137.4 GB" in found.text


def test_cores_without_memory_are_a_warning(tmp_path: Path) -> None:
    root = hosts.epyc(tmp_path, 4)
    write(root, "/sys/devices/system/node/node6/meminfo", "Node 6 MemTotal: 0 kB")
    found = check_nodes(Host.read(root))
    assert found.state == "warning"
    assert "node 6 has none of its own" in found.text


def test_nodes_of_different_size_are_a_warning(tmp_path: Path) -> None:
    root = hosts.dual_xeon(tmp_path)
    write(root, "/sys/devices/system/node/node1/meminfo", hosts.meminfo(96, "Node 1 "))
    assert check_nodes(Host.read(root)).state == "warning"


def test_the_firmwares_table(tmp_path: Path) -> None:
    write_dmi(tmp_path, memory_device("DIMM_A1", 32766), memory_device("DIMM_A2", 0), memory_device("DIMM_B1", 65536))
    assert read_slots(Tree(tmp_path)) == [
        Slot("DIMM_A1 BANK 0", 32766 << 20, "DDR4", 2666, 2666),
        Slot("DIMM_A2 BANK 0", 0, "DDR4", 2666, 2666),
        Slot("DIMM_B1 BANK 0", 65536 << 20, "DDR4", 2666, 2666),
    ]


@pytest.mark.parametrize("cut", range(0, 130, 7))
def test_a_damaged_table_is_read_as_far_as_it_goes(tmp_path: Path, cut: int) -> None:
    write_dmi(tmp_path, memory_device("A", 1024), memory_device("B", 1024))
    table = tmp_path / "sys/firmware/dmi/tables/DMI"
    table.write_bytes(table.read_bytes()[:cut])
    slots = read_slots(Tree(tmp_path))
    assert slots is not None
    assert len(slots) <= 2


def test_modules_and_channels(tmp_path: Path) -> None:
    root = hosts.dual_xeon(tmp_path)
    write_dmi(root, *(memory_device(f"P{n // 12}_{n}", 32768 * (n % 2 == 0)) for n in range(24)))
    write_edac(root, 4, 3)
    found = check_memory_channels(Host.read(root))
    assert found.state == "ok"
    assert found.text == (
        "12 channels with modules, 12 of 24 slots filled, 12 × DDR4 34.4 GB at 2666 MT/s, at most 256 GB/s"
    )
    assert found.values == {"slots": 24, "modules": 12, "channels": 12, "mt_s": 2666, "peak_gb_s": 255.936}


@pytest.mark.parametrize(
    ("other", "cure"),
    [
        (memory_device("B", 16384), "modules of one kind"),
        (memory_device("B", 32768, configured=2133), "modules of one kind"),
        (memory_device("B", 32768, speed=3200), "below their speed"),
    ],
)
def test_modules_that_are_slower_than_they_could_be(tmp_path: Path, other: bytes, cure: str) -> None:
    write_dmi(hosts.dual_xeon(tmp_path), memory_device("A", 32768), other)
    found = check_memory_channels(Host.read(tmp_path))
    assert found.state == "warning"
    assert cure in found.cure


def test_a_speed_that_is_not_told_is_not_said(tmp_path: Path) -> None:
    write_dmi(hosts.dual_xeon(tmp_path), memory_device("A", 4096, speed=0, configured=0))
    found = check_memory_channels(Host.read(tmp_path))
    assert found.text == "1 of 1 slot filled, 1 × DDR4 4.3 GB"
    assert found.values["mt_s"] is None


def test_channels_that_cannot_be_read(tmp_path: Path) -> None:
    found = check_memory_channels(Host.read(hosts.dual_xeon(tmp_path)))
    assert (found.state, found.values["slots"], found.values["channels"]) == ("ok", None, None)
    assert found.text == "not readable: the firmware or hypervisor tells nothing"
    (tmp_path / "sys/firmware/dmi/tables/DMI").mkdir(parents=True)  # as unreadable as for users who are not root
    assert "only root" in check_memory_channels(Host.read(tmp_path)).text


def test_bandwidth_of_each_pair(tmp_path: Path) -> None:
    found = check_bandwidth(Host.read(hosts.dual_xeon(tmp_path)), speeds((105, 34), (33, 104)))
    assert found.state == "ok"
    assert "cores of node 0 from node 0: 105.0, 1: 34.0; cores of node 1 from node 0: 33.0, 1: 104.0" in found.text
    assert found.values["local_gb_s"] == 209
    assert found.values["reads"][1] == {"cores": 0, "memory": 1, "gb_s": 34}


@pytest.mark.parametrize(
    ("rows", "words"),
    [(((105, 34), (33, 60)), "nodes differ"), (((60, 90), (90, 60)), "node 1 is faster than node 0's own")],
)
def test_bandwidth_that_is_not_as_it_should_be(tmp_path: Path, rows: list[tuple[float, ...]], words: str) -> None:
    found = check_bandwidth(Host.read(hosts.dual_xeon(tmp_path)), speeds(*rows))
    assert found.state == "warning"
    assert words in found.text


def test_fast_memory_without_cores_is_no_fault(tmp_path: Path) -> None:
    rows = (200, 60, 500, 90), (60, 200, 90, 500)
    assert check_bandwidth(Host.read(hosts.hbm(tmp_path)), speeds(*rows)).state == "ok"


def test_a_node_with_fewer_cores_may_read_less(tmp_path: Path) -> None:
    root = hosts.dual_xeon(tmp_path)
    write(root, "/proc/self/status", "Cpus_allowed_list:\t0-19,20-24\nMems_allowed_list:\t0-1")
    assert check_bandwidth(Host.read(root), speeds((100, 34), (20, 25))).state == "ok"


def test_memory_is_bound_on_this_host() -> None:
    found = check_binding(Host.read())
    assert (found.state, found.values["refused"]) == ("ok", [])


def test_memory_that_cannot_be_bound_is_an_error() -> None:
    nodes = tuple(NumaNode(id=number, memory_bytes=GIB) for number in (0, 63))
    found = check_binding(Host(Tree(Path("/")), Topology(nodes=nodes)))
    assert (found.state, found.values) == ("error", {"nodes": [0, 63], "refused": [63]})
    assert "SYS_NICE" in found.cure


def test_one_node_does_without_binding() -> None:
    nodes = (NumaNode(id=63, memory_bytes=GIB),)
    assert check_binding(Host(Tree(Path("/")), Topology(nodes=nodes))).state == "ok"


@pytest.mark.parametrize(("value", "state"), [("1", "warning"), ("0", "ok"), (None, "ok")])
def test_automatic_balancing(tmp_path: Path, value: str | None, state: str) -> None:
    root = hosts.dual_xeon(tmp_path)
    if value:
        write(root, "/proc/sys/kernel/numa_balancing", value)
    assert check_balancing(Host.read(root)).state == state


def test_automatic_balancing_is_of_no_account_with_one_node(tmp_path: Path) -> None:
    write(hosts.laptop(tmp_path), "/proc/sys/kernel/numa_balancing", "1")
    assert check_balancing(Host.read(tmp_path)).state == "ok"
