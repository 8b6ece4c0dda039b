"""Bandwidth is measured by pinned threads, for each pair of nodes, and remembered."""

from __future__ import annotations

import mmap
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from numoe.cluster import bandwidth as measuring
from numoe.cluster.bandwidth import Bandwidth, ReadSpeed, bandwidth, measure, remembered
from numoe.cluster.topology import NumaNode, Topology
from numoe.engine import numa
from numoe.engine.cpu.memory import address
from numoe.engine.cpu.reading import READ_STEP_BYTES, read
from numoe.engine.errors import ResourceError
from tests.cluster import hosts

CPU = min(os.sched_getaffinity(0))
GIB = 1 << 30


def node(number: int, *cpus: int, gib: float = 1) -> NumaNode:
    memory = int(gib * GIB)
    return NumaNode(id=number, cores=tuple((cpu,) for cpu in cpus), memory_bytes=memory, available_bytes=memory)


@pytest.fixture(autouse=True)
def little_and_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_LEAST_BYTES", 16 << 20)
    monkeypatch.setattr(measuring, "_ROUND_S", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_loop_reads_every_byte() -> None:
    values = np.zeros(64 * READ_STEP_BYTES // 4, np.float32)
    values[:] = np.random.default_rng(0).integers(0, 100, len(values))
    assert read(address(values), values.nbytes) == values.sum()


def test_this_host_is_measured_once() -> None:
    topology = Topology(nodes=(node(0, *sorted(os.sched_getaffinity(0))),))
    steps: list[tuple[int, int]] = []
    first = bandwidth(topology, progress=lambda done, of: steps.append((done, of)))
    assert (first.between(0, 0) or 0) > 1e8
    assert first.total(topology) == first.local(topology, 0) == first.between(0, 0)
    assert steps == [(1, 1)]
    assert bandwidth(topology) == remembered(topology) == first
    assert bandwidth(topology, again=True).measured > first.measured


def test_of_two_who_ask_at_once_one_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they would find half of it."""
    both, measured = threading.Barrier(2), list[Bandwidth]()

    def measure(*_: object) -> Bandwidth:
        measured.append(Bandwidth(measured=len(measured), reads=()))
        time.sleep(0.1)
        return measured[-1]

    def ask(_: int) -> Bandwidth:
        both.wait()
        return bandwidth(Topology(nodes=(node(0, CPU),)))

    monkeypatch.setattr(measuring, "measure", measure)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(ask, range(2)))
    assert found == measured * 2


def test_what_is_remembered_is_of_this_host_only(tmp_path: Path) -> None:
    one, two = Topology(nodes=(node(0, CPU),)), Topology(nodes=(node(0, CPU, CPU + 1000),))
    bandwidth(one)
    assert remembered(two) is None
    assert remembered(Topology(nodes=(node(0, CPU, gib=3),))) is None
    assert remembered(Topology(nodes=one.nodes, cpu_model="another")) is None
    assert remembered(Topology(nodes=(node(0, CPU, gib=1.001),))) is not None  # another kernel takes a little more
    assert len(list((tmp_path / "cache/numoe/bandwidth").iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"{", b'{"measured": 1}', b"\xff"])
def test_a_damaged_memory_is_measured_again(tmp_path: Path, content: bytes) -> None:
    topology = Topology(nodes=(node(0, CPU),))
    bandwidth(topology)
    (file,) = (tmp_path / "cache/numoe/bandwidth").iterdir()
    file.write_bytes(content)
    assert remembered(topology) is None
    assert bandwidth(topology).reads


def test_a_cache_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    assert bandwidth(Topology(nodes=(node(0, CPU),))).reads


def test_each_thread_is_on_its_core_and_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    seen: dict[int, tuple[frozenset[int], int, int]] = {}

    def work(start: int, nbytes: int) -> None:
        seen[threading.get_ident()] = (frozenset(os.sched_getaffinity(0)), start, nbytes)

    with measuring._Readers(node(0, *cpus)) as readers:
        readers.run(1 << 20, len(cpus) * 4096, work)
    assert {mask for mask, _, _ in seen.values()} == {frozenset({cpu}) for cpu in cpus}
    assert sorted(start for _, start, _ in seen.values()) == [(1 << 20) + 4096 * i for i in range(len(cpus))]
    assert {nbytes for _, _, nbytes in seen.values()} == {4096}


def test_memory_lies_on_the_node_that_is_measured() -> None:
    """As the kernel tells, for every node of this host."""
    topology = Topology.read()
    for memory in topology.nodes:
        team = measuring._Readers(topology.compute_nodes[0])
        with team, measuring._buffer(topology, memory, team) as buffer:
            assert buffer is not None
            assert numa.page_nodes(*buffer).keys() == {memory.id}


def test_memory_that_cannot_be_bound_is_told_from_what_is_slow() -> None:
    """Node 63 is not there: its memory cannot be read, and without cores nobody could touch it from nearby."""
    topology = Topology(nodes=(node(0, CPU), node(63)))
    found = measure(topology)
    assert found.between(0, 0) is not None
    assert found.between(0, 63) is None


def test_too_little_memory_is_an_error_with_its_cure() -> None:
    with pytest.raises(ResourceError, match=r"node 0 has 0\.00 GB of memory free.*free some"):
        measure(Topology(nodes=(node(0, CPU, gib=1e-3),)))


def test_what_a_node_without_memory_reads_is_what_is_nearest(tmp_path: Path) -> None:
    root = hosts.hbm(tmp_path)
    hosts.write(root, "/sys/devices/system/node/node1/meminfo", "Node 1 MemTotal: 0 kB")
    reads = tuple(ReadSpeed(cores=c, memory=m, bytes_s=10.0 * c + m) for c in (0, 1) for m in (0, 2, 3))
    found = Bandwidth(measured=0.0, reads=reads)
    assert found.local(Topology.read(root), 1) == 13.0
    assert found.total(Topology.read(root)) == 13.0
    assert found.between(1, 1) is None


def test_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    class Mapping(mmap.mmap):
        def close(self) -> None:
            super().close()
            closed.append(self.closed)

    monkeypatch.setattr(mmap, "mmap", Mapping)
    measure(Topology(nodes=(node(0, CPU),)))
    assert closed == [True]
