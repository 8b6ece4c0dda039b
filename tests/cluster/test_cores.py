"""Threads get a physical core each, on the node of their memory."""

from __future__ import annotations

import pytest

from numoe.cluster.cores import Seating, Seats
from numoe.cluster.topology import NumaNode, Topology
from numoe.engine.errors import InputError

GB = 1 << 30


def host(nodes: int, cores: int, *, smt: bool = False, slow: int = 0) -> Topology:
    """Nodes with so many cores; siblings are numbered behind all first processors, as Linux does."""
    total = nodes * cores
    return Topology(
        nodes=tuple(
            NumaNode(
                id=n,
                cores=tuple((cpu, cpu + total) if smt else (cpu,) for cpu in range(n * cores, (n + 1) * cores)),
                memory_bytes=GB,
                distances={other: 10 if other == n else 21 for other in range(nodes)},
            )
            for n in range(nodes)
        ),
        efficiency_cpus=tuple(range(total - slow, total)),
    )


def seats(topology: Topology, shards: int, numa: str = "auto", threads: int | None = None) -> list[Seats]:
    seating = Seating(topology, numa)
    return [seating.shard(index, shards, threads) for index in range(shards)]


def test_a_shard_on_each_node_with_a_thread_on_each_core_but_one() -> None:
    first, second = seats(host(2, 20, smt=True), 2)
    assert first == Seats((0,), (0,), tuple(range(19)), 19)
    assert second == Seats((1,), (1,), tuple(range(20, 39)), 19)


def test_few_cores_are_all_used() -> None:
    assert seats(host(1, 2), 1) == [Seats((0,), (), (0, 1), 2)]  # one node: nothing to bind memory to
    assert seats(host(1, 1, smt=True), 1)[0].cpus == (0, 1)  # siblings count as cores where there are next to none


def test_small_cores_of_hybrid_processors_do_not_compute() -> None:
    assert seats(host(1, 6, slow=2), 1)[0].cpus == (0, 1, 2, 3)


def test_shards_of_one_node_share_its_cores_and_one_of_many_nodes_has_all() -> None:
    four = seats(host(2, 4), 4)
    assert [s.cpus for s in four] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [s.nodes for s in four] == [(0,), (0,), (1,), (1,)]
    assert seats(host(2, 4), 1) == [Seats((0, 1), (0, 1), tuple(range(8)), 8)]


@pytest.mark.parametrize(("threads", "cpus"), [(2, (0,)), (8, (0, 1, 2, 3)), (12, (0, 1, 2, 3, 8, 9))])
def test_threads_that_are_asked_for_take_cores_first_and_siblings_then(threads: int, cpus: tuple[int, ...]) -> None:
    assert seats(host(2, 4, smt=True), 2, threads=threads)[0].cpus == cpus


@pytest.mark.parametrize(
    ("topology", "threads", "cpus"),
    [
        (host(1, 4, smt=True), None, (4, 5, 6, 7)),
        (host(1, 4), None, (0, 1, 2, 3)),
        (host(1, 4), 2, (2, 3)),
        (host(2, 2, smt=True), None, (4, 6, 5, 7)),
    ],
    ids=["siblings", "the same", "free cores", "nodes in turn"],
)
def test_attention_takes_free_cores_then_siblings_then_what_is_left(
    topology: Topology, threads: int | None, cpus: tuple[int, ...]
) -> None:
    seating = Seating(topology, "auto")
    count = len(seating.nodes)
    assert seating.attention(threads, [seating.shard(i, count, threads) for i in range(count)]).cpus == cpus


def test_a_gpu_gets_a_core_also_where_there_are_few() -> None:
    assert Seating(host(1, 4), "auto", spare=True).shard(0, 1, None).cpus == (0, 1, 2)
    assert Seating(host(1, 8), "auto", spare=True).shard(0, 1, None).cpus == tuple(range(7))


def test_numa_off_pins_and_binds_nothing() -> None:
    assert seats(host(2, 4, smt=True), 2, "off") == [Seats((), (), (), 8)] * 2


@pytest.mark.parametrize("numa", ["distribute", "numactl"])
def test_words_of_llama_server_mean_all_nodes(numa: str) -> None:
    assert seats(host(2, 4), 2, numa) == seats(host(2, 4), 2)


def test_isolate_is_the_node_that_one_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numoe.cluster.cores.current_cpu", lambda: 5)
    assert seats(host(2, 4), 1, "isolate") == [Seats((1,), (1,), (4, 5, 6, 7), 4)]


def test_nodes_by_number() -> None:
    assert [s.nodes for s in seats(host(4, 2), 2, "1,3")] == [(1,), (3,)]


@pytest.mark.parametrize("numa", ["5", "0,5", "both", "", "0,", "-1", "²"])
def test_nodes_that_there_are_not_are_named(numa: str) -> None:
    with pytest.raises(InputError, match="--numa"):
        Seating(host(2, 4), numa)


def test_memory_of_a_node_without_any_is_the_nearest() -> None:
    nodes = (
        NumaNode(id=0, cores=((0,), (1,)), memory_bytes=GB, distances={0: 10, 1: 21, 2: 30}),
        NumaNode(id=1, cores=((2,), (3,)), distances={0: 21, 1: 10, 2: 15}),
        NumaNode(id=2, memory_bytes=GB, distances={0: 30, 1: 15, 2: 10}),
    )
    first, second = seats(Topology(nodes=nodes), 2)
    assert (first.memory, second.memory) == ((0,), (2,))
