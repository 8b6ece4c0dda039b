"""Runs in a virtual machine with two NUMA nodes, and prints as JSON what it found: see test_two_nodes.py.

Everything that lies on a node is said twice, by numoe and by the kernel's /proc/self/numa_maps.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from numoe.actors.gateway.admin import actor_message
from numoe.actors.placement import describe, reporter_of
from numoe.cluster.cores import Seating, Seats
from numoe.cluster.status import ActorInfo
from numoe.cluster.topology import Topology
from numoe.deploy.placements import placement_json
from numoe.engine.errors import NumoeError
from numoe.engine.gguf import GgufFile
from numoe.engine.numa import Pins, huge_share, last_cpus
from numoe.engine.progress import Progress
from numoe.engine.weights import (
    PackedTensor,
    SliceKey,
    SliceReporter,
    WeightSlice,
    open_tensors,
    remove_slice,
    source_fingerprint,
)
from numoe.engine.weights.slices import open_slice

VECTORS, COLUMNS = 6, 1 << 20


def main() -> None:
    """All checks, one after the other."""
    found: dict[str, Any] = {}
    topology = Topology.read()
    found["nodes"] = {node.id: node.cpus for node in topology.nodes}
    seating = Seating(topology, "auto")
    shards = [seating.shard(index, 2, None) for index in range(2)]
    found["seats"] = [[seats.nodes, seats.memory, seats.cpus] for seats in shards]
    found["isolated"] = [node.id for node in Seating(topology, "isolate").nodes]
    with tempfile.TemporaryDirectory() as folder, GgufFile.open(vectors(Path(folder) / "m.gguf")) as model:
        found["plain"] = [load(model, f"shard-{i}", seats.memory, seats.cpus) for i, seats in enumerate(shards)]
        found["attached"] = attached(model, "shard-1", (1,))
        found["status"] = [status(model, f"shard-{i}", seats) for i, seats in enumerate(shards)]
        found["misplaced"] = misplaced(model, shards[0])
        found["spread"] = load(model, "dense", (0, 1), ())
        found["full"] = refused(model)
        for cut, nodes in (("shard-0", (0,)), ("shard-1", (1,)), ("dense", (0, 1))):
            remove_slice(key_of(model, cut, nodes).path)
        run("mount", "-o", "remount,huge=advise", "/dev/shm")
        found["transparent"] = load(model, "thp", (1,), ())
        Path("/sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages").write_text("24")
        Path("/dev/hugepages").mkdir(exist_ok=True)
        run("mount", "-t", "hugetlbfs", "none", "/dev/hugepages")
        found["hugetlbfs"] = load(model, "huge", (1,), ())
        found["no huge pages there"] = load(model, "huge", (0,), ())
        key = key_of(model, "huge", (1,))
        found["linked"] = str(key.path.resolve())
        found["removed"] = [remove_slice(key.path), list(map(str, Path("/dev/hugepages").glob("*/*")))]
    found["threads"] = threads(shards[1].cpus)
    print(json.dumps(found))


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)


def vectors(path: Path) -> Path:
    """A file of vectors, which are loaded without kernels: to compile them takes minutes here."""
    writer = gguf.GGUFWriter(path, "llama")
    for i in range(VECTORS):
        writer.add_tensor(f"v{i}", np.full(COLUMNS, i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def key_of(model: GgufFile, cut: str, nodes: tuple[int, ...]) -> SliceKey:
    return SliceKey(source=source_fingerprint(model.paths), cut=cut, nodes=nodes)


def load(model: GgufFile, cut: str, nodes: tuple[int, ...], cpus: tuple[int, ...]) -> dict[str, Any]:
    """Load a slice to these nodes with threads on these processors; where it lies."""
    tensors = [PackedTensor(info, None, 4 * COLUMNS * i) for i, info in enumerate(model.tensors.values())]
    weights = open_tensors(
        key_of(model, cut, nodes), model, tensors, Progress(1),
        threads=len(cpus) or 2, on_thread=Pins(cpus).pin_next,
    )  # fmt: skip
    assert (weights.array.view(np.float32).reshape(VECTORS, -1) == np.arange(VECTORS)[:, None]).all()
    return described(weights, nodes)


def attached(model: GgufFile, cut: str, nodes: tuple[int, ...]) -> dict[str, Any]:
    """What one sees who attaches: none of the pages is mapped yet."""
    return described(WeightSlice.open(key_of(model, cut, nodes).path), nodes)


def described(weights: WeightSlice, nodes: tuple[int, ...]) -> dict[str, Any]:
    """What numoe and the kernel say about a slice."""
    report, path = SliceReporter(weights, nodes, bound=True).report(), weights.path.resolve()
    assert report.huge == huge_share(str(path))
    found = {
        "kernel": kernel_pages(path), "on_nodes": report.on_nodes, "medium": report.medium, "huge": report.huge,
        "problem": report.problem,
    }  # fmt: skip
    weights.close()
    return found


def kernel_pages(path: Path) -> dict[str, int]:
    """Pages on each node of this process's mapping of a file, as numa_maps tells, and their size in kB."""
    line = next(line for line in Path("/proc/self/numa_maps").read_text().splitlines() if f"file={path}" in line)
    fields = dict(field.split("=", 1) for field in line.split() if "=" in field)
    return {name: int(value) for name, value in fields.items() if name[0] == "N" or name == "kernelpagesize_kB"}


def refused(model: GgufFile) -> str:
    """What is said about more than there is on a node."""
    total = next(node for node in Topology.read().nodes if node.id == 1).memory_bytes
    try:
        open_slice(key_of(model, "full", (1,)), total, 1, 1)
    except NumoeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def status(model: GgufFile, cut: str, seats: Seats) -> dict[str, Any] | None:
    """What `numoe status --json` has of a shard that attaches to its slice, and whose threads are at work."""
    weights = WeightSlice.open(key_of(model, cut, seats.memory).path)
    with working(seats.cpus) as ran_on:
        placement = describe(seats, reporter_of(weights, seats), ran_on())
    weights.close()
    return placement_json(actor_message(ActorInfo(role="expert", pid=1, host="vm", placement=placement)))


def misplaced(model: GgufFile, seats: Seats) -> dict[str, Any]:
    """The same of weights for a node that lie on another, as where they could not be bound."""
    load(model, "elsewhere", (1,), ())
    path = key_of(model, "elsewhere", (1,)).path
    weights = WeightSlice.open(path)
    report = reporter_of(weights, seats).report()
    weights.close()
    remove_slice(path)
    return {"on_nodes": report.on_nodes, "problem": report.problem}


def threads(cpus: tuple[int, ...]) -> list[int]:
    """Where threads run that are pinned to these processors, while there is enough to do."""
    found = []
    with working(cpus) as ran_on:
        for _ in range(20):
            time.sleep(0.05)
            found += ran_on()
    return sorted(set(found[4 * len(cpus) :]))


@contextmanager
def working(cpus: tuple[int, ...]) -> Iterator[Callable[[], list[int]]]:
    """Threads that are pinned to these processors and work inside the block; tells where each of them ran last."""
    pins, done, pinned = Pins(cpus), threading.Event(), threading.Barrier(len(cpus) + 1)

    def work(number: int) -> None:
        pins.pin(number)
        pinned.wait()
        while not done.is_set():
            np.ones(1000).sum()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(cpus))]
    for worker in workers:
        worker.start()
    pinned.wait()
    yield lambda: last_cpus(worker.native_id for worker in workers if worker.native_id)
    done.set()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
