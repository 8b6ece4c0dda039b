"""What is read of hosts: trees of sysfs as different machines have them, and this machine."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import psutil
import pytest

from numoe.cluster.topology import (
    HugePages,
    Limits,
    NumaNode,
    Topology,
    TransparentHugePages,
    available_memory,
    parse_cpu_list,
)
from tests.cluster import hosts
from tests.cluster.hosts import GIB, write


@pytest.mark.parametrize(("text", "cpus"), [("0-3", [0, 1, 2, 3]), ("0,2-3,9", [0, 2, 3, 9]), ("", []), ("7", [7])])
def test_cpu_lists(text: str, cpus: list[int]) -> None:
    assert parse_cpu_list(text) == cpus


def test_two_sockets_with_two_threads_a_core(tmp_path: Path) -> None:
    topology = Topology.read(hosts.dual_xeon(tmp_path))
    first, second = topology.nodes
    assert topology.cpu_model == "Intel(R) Xeon(R) Gold 6138 CPU @ 2.00GHz"
    assert first.cores == tuple((cpu, cpu + 40) for cpu in range(20))
    assert second.cores == tuple((cpu, cpu + 40) for cpu in range(20, 40))
    assert second.cpus == (*range(20, 40), *range(60, 80))
    assert (first.package, second.package) == (0, 1)
    assert (first.memory_bytes, first.free_bytes, first.available_bytes) == (192 * GIB, 48 * GIB, 144 * GIB)
    assert (topology.distance(0, 0), topology.distance(0, 1)) == (10, 21)
    assert first.cache_bytes == 28160 * 1024
    assert len(topology.cores) == 40
    assert topology.allowed_cpus == tuple(range(80))
    assert topology.efficiency_cpus == ()


def test_gpus_have_their_nearest_node(tmp_path: Path) -> None:
    topology = Topology.read(hosts.dual_xeon(tmp_path))
    (gpu,) = topology.gpus
    assert (gpu.address, gpu.name, gpu.numa_node) == ("0000:af:00.0", "NVIDIA GeForce RTX 3090", 1)
    assert (gpu.link_width, gpu.max_link_width) == (16, 16)
    assert topology.gpu_driver == "580.65.06"


@pytest.mark.parametrize(("near", "node"), [("20-39,60-79", 1), ("0-79", None), (None, None)])
def test_a_gpu_whose_node_the_firmware_does_not_tell(tmp_path: Path, near: str | None, node: int | None) -> None:
    root = hosts.dual_xeon(tmp_path)
    hosts.write_gpu(root, "0000:af:00.0", -1, near=near)
    assert Topology.read(root).gpus[0].numa_node == node


def test_a_gpu_is_near_the_only_node(tmp_path: Path) -> None:
    hosts.write_gpu(hosts.laptop(tmp_path), "0000:01:00.0", -1)
    assert Topology.read(tmp_path).gpus[0].numa_node == 0


def test_the_driver_version_where_there_is_no_module_file(tmp_path: Path) -> None:
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build"
    write(tmp_path, "/proc/driver/nvidia/version", line)
    assert Topology.read(tmp_path).gpu_driver == "575.57.08"


@pytest.mark.parametrize(("per_socket", "cores", "gib"), [(1, 64, 512), (4, 16, 128)])
def test_epyc_in_nps1_and_nps4(tmp_path: Path, per_socket: int, cores: int, gib: int) -> None:
    topology = Topology.read(hosts.epyc(tmp_path, per_socket))
    assert [node.package for node in topology.nodes] == [0] * per_socket + [1] * per_socket
    assert {len(node.cores) for node in topology.nodes} == {cores}
    assert {len(core) for core in topology.cores} == {2}
    assert {node.memory_bytes for node in topology.nodes} == {gib * GIB}
    assert {node.cache_bytes for node in topology.nodes} == {cores // 8 * 32 << 20}
    assert topology.distance(0, len(topology.nodes) - 1) == 32
    if per_socket == 4:
        assert [topology.distance(5, node.id) for node in topology.nodes] == [32, 32, 32, 32, 12, 10, 12, 12]


def test_sub_numa_clusters_share_the_cache_of_their_socket(tmp_path: Path) -> None:
    topology = Topology.read(hosts.snc4_xeon(tmp_path))
    assert [len(node.cores) for node in topology.nodes] == [14] * 4
    assert {node.package for node in topology.nodes} == {0}
    assert topology.nodes[3].cores[0] == (42, 98)
    assert {node.cache_bytes for node in topology.nodes} == {107520 * 1024 // 4}


def test_a_laptop_has_small_cores(tmp_path: Path) -> None:
    topology = Topology.read(hosts.laptop(tmp_path))
    assert topology.cores == ((0, 1), (2, 3), (4, 5), (6, 7), *((cpu,) for cpu in range(8, 16)))
    assert topology.efficiency_cpus == tuple(range(8, 16))


def test_small_cores_of_arm_are_those_with_little_capacity(tmp_path: Path) -> None:
    root = hosts.laptop(tmp_path)
    for name in ("core", "atom"):
        (root / f"sys/devices/cpu_{name}/cpus").unlink()
    for cpu in range(16):
        write(root, f"/sys/devices/system/cpu/cpu{cpu}/cpu_capacity", (1024, 1000, 446)[min(2, cpu // 4)])
    assert Topology.read(root).efficiency_cpus == tuple(range(8, 16))


def test_a_container_with_half_the_cpus(tmp_path: Path) -> None:
    topology = Topology.read(hosts.half_container(tmp_path))
    first, second = topology.nodes
    assert topology.compute_nodes == (first,)
    assert (len(first.cores), second.cores, second.online_cpus) == (20, (), (*range(20, 40), *range(60, 80)))
    assert (first.has_memory, second.has_memory) == (True, False)
    limits = topology.limits
    assert limits.cpuset == (*range(20), *range(40, 60))
    assert (limits.mems, limits.cpu_quota) == ((0,), 12.0)
    assert (limits.memory_bytes, limits.memory_available_bytes) == (64 * GIB, 50 * GIB)
    assert topology.memory_for(1) == first


def test_memory_that_can_be_had_is_the_hosts_and_the_containers(tmp_path: Path) -> None:
    hosts.half_container(tmp_path)
    write(tmp_path, "/proc/meminfo", f"MemTotal: {384 << 20} kB\nMemAvailable: {300 << 20} kB")
    assert available_memory(tmp_path) == 50 * GIB
    write(tmp_path, "/proc/meminfo", f"MemTotal: {384 << 20} kB\nMemAvailable: {20 << 20} kB")
    assert available_memory(tmp_path) == 20 * GIB
    write(tmp_path, "/sys/fs/cgroup/memory.max", "max")
    write(tmp_path, "/proc/meminfo", f"MemTotal: {384 << 20} kB\nMemAvailable: {300 << 20} kB")
    assert available_memory(tmp_path) == 300 * GIB


def test_cgroups_v1_and_one_thread_of_each_core(tmp_path: Path) -> None:
    topology = Topology.read(hosts.old_container(tmp_path))
    assert topology.cores == tuple((cpu,) for cpu in range(40))
    limits = topology.limits
    assert (limits.cpuset, limits.cpu_quota) == (tuple(range(40)), None)
    assert (limits.memory_bytes, limits.memory_available_bytes) == (96 * GIB, 56 * GIB)


def test_the_tightest_of_nested_cgroups_counts(tmp_path: Path) -> None:
    root = hosts.half_container(tmp_path)
    write(root, "/proc/self/cgroup", "0::/pod/worker")
    write(root, "/sys/fs/cgroup/pod/worker/memory.max", "max")
    write(root, "/sys/fs/cgroup/pod/worker/cpu.max", "max 100000")
    write(root, "/sys/fs/cgroup/pod/memory.max", 8 * GIB)
    write(root, "/sys/fs/cgroup/pod/memory.current", 9 * GIB)
    write(root, "/sys/fs/cgroup/pod/cpu.max", "50000 100000")
    limits = Topology.read(root).limits
    assert (limits.memory_bytes, limits.memory_available_bytes, limits.cpu_quota) == (8 * GIB, 0, 0.5)


def test_a_cgroup_below_the_one_that_is_mounted(tmp_path: Path) -> None:
    root = hosts.old_container(tmp_path)
    write(root, "/proc/self/cgroup", "4:memory:/docker/4f2a/job\n3:cpuset:/docker/4f2a\n")
    write(root, "/sys/fs/cgroup/memory/job/memory.limit_in_bytes", 4 * GIB)
    write(root, "/sys/fs/cgroup/memory/job/memory.usage_in_bytes", 1 * GIB)
    limits = Topology.read(root).limits
    assert (limits.memory_bytes, limits.memory_available_bytes) == (4 * GIB, 3 * GIB)


def test_an_unlimited_cgroup_v1(tmp_path: Path) -> None:
    write(hosts.old_container(tmp_path), "/sys/fs/cgroup/memory/memory.limit_in_bytes", 9223372036854771712)
    limits = Topology.read(tmp_path).limits
    assert (limits.memory_bytes, limits.memory_available_bytes) == (None, None)


def test_an_affinity_mask_narrows_the_cpuset() -> None:
    assert Limits(affinity=(0, 1, 2), cpuset=(1, 2, 3)).cpus == {1, 2}
    assert Limits(affinity=(5,)).cpus == {5}
    assert Limits().cpus is None


def test_memory_on_a_card(tmp_path: Path) -> None:
    topology = Topology.read(hosts.cxl(tmp_path))
    card = topology.nodes[2]
    assert (card.cores, card.package, card.memory_bytes) == ((), None, 128 * GIB)
    assert card.has_memory
    assert [node.id for node in topology.compute_nodes] == [0, 1]


def test_high_bandwidth_memory_has_nodes_of_its_own(tmp_path: Path) -> None:
    topology = Topology.read(hosts.hbm(tmp_path))
    assert [node.id for node in topology.compute_nodes] == [0, 1]
    assert [topology.distance(1, node.id) for node in topology.nodes] == [21, 10, 23, 13]
    assert [topology.memory_for(node.id).id for node in topology.nodes] == [0, 1, 2, 3]


def test_cores_without_memory_take_the_nearest(tmp_path: Path) -> None:
    root = hosts.hbm(tmp_path)
    write(root, "/sys/devices/system/node/node1/meminfo", "Node 1 MemTotal: 0 kB\nNode 1 MemFree: 0 kB")
    assert Topology.read(root).memory_for(1).id == 3


def test_node_numbers_may_have_gaps(tmp_path: Path) -> None:
    specs, distances = [("0-1", 1, 0), ("", 1, 0), ("2-3", 1, 0)], ["10 20 30", "20 10 25", "30 25 10"]
    hosts.write_host(tmp_path, "a CPU", specs, distances, str, ("1M", str), numbers=(0, 2, 10))
    topology = Topology.read(tmp_path)
    assert [node.id for node in topology.nodes] == [0, 2, 10]
    assert topology.distance(10, 2) == 25
    with pytest.raises(KeyError):
        topology.node(1)


def test_reserved_huge_pages(tmp_path: Path) -> None:
    root = hosts.dual_xeon(tmp_path)
    hosts.write_hugepages(root, "/sys/devices/system/node/node1/hugepages", {2048: (1000, 300), 1048576: (64, 64)})
    first, second = Topology.read(root).nodes
    assert [pages.total for pages in first.hugepages] == [0, 0]
    assert second.hugepages == (HugePages(2 << 20, 1000, 300), HugePages(1 << 30, 64, 64))


def test_transparent_huge_pages(tmp_path: Path) -> None:
    root = hosts.dual_xeon(tmp_path)
    assert Topology.read(root).transparent_hugepages == TransparentHugePages(
        enabled="madvise", shmem_enabled="never", size=2 << 20
    )
    own = "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB"
    write(root, f"{own}/enabled", "always [inherit] madvise never")
    write(root, f"{own}/shmem_enabled", "always inherit within_size [advise] never")
    found = Topology.read(root).transparent_hugepages
    assert (found.enabled, found.shmem_enabled) == ("madvise", "advise")


def test_a_kernel_without_numa_is_one_node(tmp_path: Path) -> None:
    write(tmp_path, "/sys/devices/system/cpu/online", "0-3")
    write(tmp_path, "/proc/meminfo", hosts.meminfo(8))
    write(tmp_path, "/proc/self/status", "Cpus_allowed_list:\t1-2")
    hosts.write_hugepages(tmp_path, "/sys/kernel/mm/hugepages", {2048: (5, 4)})
    (node,) = Topology.read(tmp_path).nodes
    assert (node.id, node.cores, node.memory_bytes) == (0, ((1,), (2,)), 8 * GIB)
    assert node.hugepages[0] == HugePages(2 << 20, 5, 4)


def test_a_lone_node_has_all_memory(tmp_path: Path) -> None:
    """Its own file tells of what was there when the host started."""
    write(tmp_path, "/sys/devices/system/node/node0/cpulist", "0-1")
    write(tmp_path, "/sys/devices/system/node/node0/meminfo", hosts.meminfo(8, "Node 0 "))
    write(tmp_path, "/proc/meminfo", hosts.meminfo(24))
    assert [node.memory_bytes for node in Topology.read(tmp_path).nodes] == [24 * GIB]


def test_a_host_that_tells_nothing_has_one_node(tmp_path: Path) -> None:
    assert Topology.read(tmp_path).nodes == (NumaNode(id=0, cores=((0,),), online_cpus=(0,), distances={0: 10}),)


def test_this_host_is_read() -> None:
    """Beside what the kernel tells by other ways."""
    topology = Topology.read()
    assert topology.allowed_cpus == tuple(sorted(os.sched_getaffinity(0)))
    assert sum(node.memory_bytes for node in topology.nodes) == pytest.approx(psutil.virtual_memory().total, rel=0.05)
    if set(topology.allowed_cpus) == set(range(psutil.cpu_count() or 0)):
        assert len(topology.cores) == psutil.cpu_count(logical=False)
    assert available_memory() <= psutil.virtual_memory().total
    assert pickle.loads(pickle.dumps(topology)) == topology
