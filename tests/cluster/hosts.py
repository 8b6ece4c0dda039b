"""Trees of procfs and sysfs as kernels on well-known hosts write them.

    topology = Topology.read(dual_xeon(tmp_path))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from numoe.cluster.topology import parse_cpu_list

Siblings = Callable[[int], str]
GIB = 1 << 30


def write(root: Path, name: str, content: object) -> None:
    """One file of a host; its folders come with it."""
    path = root / name.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}\n")


def pairs(offset: int) -> Siblings:
    """SMT siblings lie `offset` CPUs apart."""
    return lambda cpu: f"{cpu % offset},{cpu % offset + offset}"


def neighbours(cpus: int) -> Siblings:
    """SMT siblings below `cpus` lie side by side; the other CPUs have none."""
    return lambda cpu: f"{cpu - cpu % 2}-{cpu - cpu % 2 + 1}" if cpu < cpus else str(cpu)


def write_host(
    root: Path, model: str, nodes: Sequence[tuple[str, int, int]], distances: Sequence[str], siblings: Siblings,
    cache: tuple[str, Callable[[int], str]], numbers: Sequence[int] | None = None,
) -> Path:  # fmt: skip
    """A host without limits; its root.

    nodes: of each the CPUs, GiB of memory (a quarter is free, a half caches files), and socket.
    distances: of each, as in its file. cache: size and sharers of the last level. numbers: of the nodes.
    """
    every = [cpu for cpus, _, _ in nodes for cpu in parse_cpu_list(cpus)]
    write(root, "/proc/cpuinfo", f"processor\t: 0\nmodel name\t: {model}\nflags\t\t: fpu avx2")
    write(root, "/proc/self/status", f"Name:\tpython\nCpus_allowed_list:\t0-{max(every)}\nMems_allowed_list:\t0-63")
    write(root, "/sys/devices/system/cpu/online", f"0-{max(every)}")
    for number, (cpus, gib, package), row in zip(numbers or range(len(nodes)), nodes, distances, strict=True):
        node = f"/sys/devices/system/node/node{number}"
        write(root, f"{node}/cpulist", cpus)
        write(root, f"{node}/distance", row)
        write(root, f"{node}/meminfo", meminfo(gib, f"Node {number} "))
        write_hugepages(root, f"{node}/hugepages", {})
        for cpu in parse_cpu_list(cpus):
            folder = f"/sys/devices/system/cpu/cpu{cpu}"
            write(root, f"{folder}/topology/core_cpus_list", siblings(cpu))
            write(root, f"{folder}/topology/physical_package_id", package)
            write(root, f"{folder}/cache/index3/size", cache[0])
            write(root, f"{folder}/cache/index3/shared_cpu_list", cache[1](cpu))
    write_transparent(root)
    return root


def meminfo(gib: int, prefix: str = "") -> str:
    kb = gib << 20
    values = {"MemTotal": kb, "MemFree": kb // 4, "Active(file)": kb // 4, "Inactive(file)": kb // 4, "SReclaimable": 0}
    return "\n".join(f"{prefix}{name}: {value:>12} kB" for name, value in values.items())


def write_hugepages(root: Path, folder: str, pages: Mapping[int, tuple[int, int]]) -> None:
    """Reserved pages by size in kB: how many, and how many are free."""
    for size in (2048, 1048576):
        total, free = pages.get(size, (0, 0))
        write(root, f"{folder}/hugepages-{size}kB/nr_hugepages", total)
        write(root, f"{folder}/hugepages-{size}kB/free_hugepages", free)


def write_transparent(root: Path, enabled: str = "madvise", shmem: str = "never") -> None:
    def brackets(words: str, chosen: str) -> str:
        return " ".join(f"[{word}]" if word == chosen else word for word in words.split())

    folder = "/sys/kernel/mm/transparent_hugepage"
    write(root, f"{folder}/enabled", brackets("always madvise never", enabled))
    write(root, f"{folder}/shmem_enabled", brackets("always within_size advise never deny force", shmem))
    write(root, f"{folder}/hpage_pmd_size", 2 << 20)


def write_gpu(root: Path, address: str, node: int, width: int = 16, near: str | None = None) -> None:
    """An RTX 3090 with NVIDIA's driver."""
    folder = f"/sys/bus/pci/devices/{address}"
    files = {"vendor": "0x10de", "class": "0x030000", "numa_node": node, "current_link_width": width}
    for name, value in (files | {"max_link_width": 16, "local_cpulist": near or ""}).items():
        write(root, f"{folder}/{name}", value)
    write(root, f"/proc/driver/nvidia/gpus/{address}/information", "Model: \t\t NVIDIA GeForce RTX 3090\nIRQ: 42")
    write(root, "/sys/module/nvidia/version", "580.65.06")


def write_display(root: Path, address: str) -> None:
    """What draws a server's console, and the sound of a GPU: no GPUs."""
    write(root, f"/sys/bus/pci/devices/{address}/vendor", "0x1a03")
    write(root, f"/sys/bus/pci/devices/{address}/class", "0x030000")
    write(root, "/sys/bus/pci/devices/0000:3b:00.1/vendor", "0x10de")
    write(root, "/sys/bus/pci/devices/0000:3b:00.1/class", "0x040300")


def dual_xeon(root: Path) -> Path:
    """Two Xeon Gold 6138, 20 cores and 192 GiB each, a GPU at the second."""
    sockets = ["0-19,40-59", "20-39,60-79"]
    host = write_host(
        root, "Intel(R) Xeon(R) Gold 6138 CPU @ 2.00GHz", [(sockets[0], 192, 0), (sockets[1], 192, 1)],
        ["10 21", "21 10"], pairs(40), ("28160K", lambda cpu: sockets[cpu % 40 // 20]),
    )  # fmt: skip
    write_gpu(root, "0000:af:00.0", 1)
    write_display(root, "0000:03:00.0")
    return host


def epyc(root: Path, nodes_per_socket: int) -> Path:
    """Two EPYC 7763, 64 cores and 512 GiB each, in NPS1 or NPS4."""
    nodes, cores, per_socket = 2 * nodes_per_socket, 64 // nodes_per_socket, nodes_per_socket
    cpus = [f"{n * cores}-{(n + 1) * cores - 1},{128 + n * cores}-{127 + (n + 1) * cores}" for n in range(nodes)]
    distances = [
        " ".join("10" if n == m else "12" if n // per_socket == m // per_socket else "32" for m in range(nodes))
        for n in range(nodes)
    ]

    def complex_of(cpu: int) -> str:
        first = cpu % 128 // 8 * 8
        return f"{first}-{first + 7},{first + 128}-{first + 135}"

    specs = [(cpus[n], 512 // nodes_per_socket, n // per_socket) for n in range(nodes)]
    return write_host(root, "AMD EPYC 7763 64-Core Processor", specs, distances, pairs(128), ("32768K", complex_of))


def snc4_xeon(root: Path) -> Path:
    """A Xeon Platinum 8480+ as four nodes of 14 cores and 64 GiB, which share one last-level cache."""
    cpus = [f"{n * 14}-{n * 14 + 13},{56 + n * 14}-{69 + n * 14}" for n in range(4)]
    distances = [" ".join("10" if n == m else "12" for m in range(4)) for n in range(4)]
    specs = [(cpus[n], 64, 0) for n in range(4)]
    cache = ("107520K", lambda _: "0-111")
    return write_host(root, "Intel(R) Xeon(R) Platinum 8480+", specs, distances, pairs(56), cache)


def laptop(root: Path) -> Path:
    """A Core i7-1260P: four fast cores with two threads, eight small ones."""
    cache = ("18432K", lambda _: "0-15")
    write(root, "/sys/devices/cpu_core/cpus", "0-7")
    write(root, "/sys/devices/cpu_atom/cpus", "8-15")
    return write_host(
        root, "12th Gen Intel(R) Core(TM) i7-1260P", [("0-15", 32, 0)], ["10"], neighbours(8), cache
    )


def half_container(root: Path) -> Path:
    """The dual Xeon seen from a container with its first socket, 64 GiB and 12 CPUs' time, cgroups v2."""
    dual_xeon(root)
    status = "Name:\tpython\nCpus_allowed_list:\t0-19,40-59\nMems_allowed_list:\t0"
    write(root, "/proc/self/status", status)
    write(root, "/proc/self/cgroup", "0::/")
    mount = "2312 2300 0:28 / /sys/fs/cgroup ro,nosuid,nodev - cgroup2 cgroup rw,nsdelegate"
    write(root, "/proc/self/mountinfo", f"2300 1 0:200 / / rw - overlay overlay rw\n{mount}")
    for name, value in {
        "cpuset.cpus.effective": "0-19,40-59", "cpuset.mems.effective": "0", "cpu.max": "1200000 100000",
        "memory.max": 64 * GIB, "memory.high": "max", "memory.current": 40 * GIB,
        "memory.stat": f"anon {10 * GIB}\nfile {30 * GIB}\nshmem {4 * GIB}\n"
                       f"inactive_file {20 * GIB}\nactive_file {6 * GIB}",
    }.items():  # fmt: skip
        write(root, f"/sys/fs/cgroup/{name}", value)
    return root


def old_container(root: Path) -> Path:
    """The dual Xeon under cgroups v1, in a container whose paths begin outside of it: one CPU of each core, 96 GiB."""
    dual_xeon(root)
    write(root, "/proc/self/status", "Name:\tpython\nCpus_allowed_list:\t0-79\nMems_allowed_list:\t0-1")
    inside = "/docker/4f2a"
    write(root, "/proc/self/cgroup", f"4:memory:{inside}\n3:cpuset:{inside}\n2:cpu,cpuacct:{inside}\n1:name=systemd:/")
    mounts = {"memory": "memory", "cpuset": "cpuset", "cpu,cpuacct": "cpu,cpuacct"}
    lines = [f"9 8 0:9 {inside} /sys/fs/cgroup/{at} ro - cgroup cgroup rw,{of}" for at, of in mounts.items()]
    write(root, "/proc/self/mountinfo", "\n".join(lines))
    for name, value in {
        "cpuset/cpuset.cpus": "0-39", "cpu,cpuacct/cpu.cfs_quota_us": -1, "cpu,cpuacct/cpu.cfs_period_us": 100000,
        "memory/memory.limit_in_bytes": 96 * GIB, "memory/memory.usage_in_bytes": 50 * GIB,
        "memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {8 * GIB}\ntotal_active_file {2 * GIB}",
    }.items():  # fmt: skip
        write(root, f"/sys/fs/cgroup/{name}", value)
    return root


def cxl(root: Path) -> Path:
    """The dual Xeon's successor with a CXL memory card at its second socket: node 2 has memory and no cores."""
    specs = [("0-15", 256, 0), ("16-31", 256, 1), ("", 128, 0)]
    distances = ["10 21 24", "21 10 14", "24 14 10"]
    return write_host(root, "Intel(R) Xeon(R) 6730P", specs, distances, str, ("294912K", lambda _: "0-31"))


def hbm(root: Path) -> Path:
    """Two Xeon Max 9480 in flat mode, cut short: nodes 2 and 3 are their HBM."""
    specs = [("0-3", 128, 0), ("4-7", 128, 1), ("", 64, 0), ("", 64, 0)]
    distances = ["10 21 13 23", "21 10 23 13", "13 23 10 23", "23 13 23 10"]
    return write_host(root, "Intel(R) Xeon(R) CPU Max 9480", specs, distances, str, ("115200K", lambda _: "0-7"))
