"""Models are placed, and what does not fit is refused with numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from numoe.cluster.plan import CacheOptions, Plan, PlanOptions, check_memory, fit_cache, make_plan
from numoe.cluster.topology import NumaNode, Topology
from numoe.engine.errors import InputError, ResourceError
from numoe.engine.experts.mailbox import Mailbox
from numoe.engine.experts.shard import ExpertShard, ShardSlice
from numoe.engine.gguf import GgufFile
from numoe.engine.models.config import ModelConfig
from numoe.engine.progress import Progress
from numoe.engine.weights import hold_weights, is_loaded, media
from numoe.engine.worker.kv_pool import KvPool
from numoe.engine.worker.options import ForwardOptions, SharedWeights
from numoe.engine.worker.weights import DenseWeights
from tests.cluster.hosts import write
from tests.models import make_model

TWO_NODES = Topology(
    nodes=tuple(
        NumaNode(id=number, cores=tuple((cpu,) for cpu in cpus), memory_bytes=1 << 30)
        for number, cpus in enumerate(((0, 1, 2), (4, 5, 6)))
    )
)
ONE_NODE = Topology(nodes=TWO_NODES.nodes[:1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("m") / "m.gguf", "qwen3moe", expert_ffn=256, context=4096)


def plan(model: Path, topology: Topology = TWO_NODES, **options: int) -> Plan:
    with GgufFile.open(model) as gguf:
        return make_plan(ModelConfig.from_gguf(gguf), gguf, topology, PlanOptions(**options))


def test_one_shard_for_each_node(model: Path) -> None:
    placed = plan(model)
    assert [(shard.numa_node, shard.threads) for shard in placed.shards] == [(0, 3), (1, 3)]
    assert placed.attention_threads == 6
    assert placed.context == 4096


@pytest.mark.parametrize("shards", [1, 3, 4, 8])
def test_threads_and_bytes_are_shared_out(model: Path, shards: int) -> None:
    placed = plan(model, shards=shards)
    assert sum(shard.threads for shard in placed.shards) == max(6, shards)
    assert {node for shard in placed.shards for node in shard.seats.nodes} == {0, 1}
    assert sum(shard.nbytes for shard in placed.shards) == plan(model, shards=1).shards[0].nbytes


@pytest.mark.parametrize(
    ("flag", "options"),
    [
        ("--shards", {"shards": 9}),
        ("--parallel", {"slots": 0}),
        ("--ctx-size", {"context": 4097}),
        ("--threads", {"threads": -1}),
    ],
)
def test_a_value_that_makes_no_sense_names_its_flag(model: Path, flag: str, options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=flag):
        plan(model, **options)


def test_missing_memory_is_named(model: Path) -> None:
    placed = plan(model)
    needed = placed.total_bytes + placed.process_bytes
    check_memory(placed, available=needed, shared=placed.shared_bytes)
    with pytest.raises(ResourceError, match=r"0\.50 GB is missing.*--ctx-size"):
        check_memory(placed, available=needed - 500_000_000, shared=1 << 40)
    with pytest.raises(ResourceError, match=r"shared memory.*--shm-size"):
        check_memory(placed, available=1 << 40, shared=placed.shared_bytes - 1)


def set_aside(root: Path, monkeypatch: pytest.MonkeyPatch, *pages: int) -> None:
    """Huge pages of 2 MiB, so many free on each node."""
    folder = "hugepages/hugepages-2048kB"
    for number, free in enumerate(pages):
        write(root, f"/node{number}/{folder}/free_hugepages", str(free))
    write(root, f"/{folder}/free_hugepages", str(sum(pages)))
    monkeypatch.setattr(media, "_HUGE", root / "hugepages")
    monkeypatch.setattr(media, "_NODES", root)
    monkeypatch.setattr(media, "huge_media", lambda: iter([media.Medium("hugetlbfs", root / "huge", 2 << 20)]))


@pytest.mark.parametrize(
    ("topology", "pages", "missing"),
    [
        # Each shard takes two pages of its node, and attention, on any node, one, which it gets first.
        (TWO_NODES, (3, 3), 0), (TWO_NODES, (3, 2), 1), (TWO_NODES, (2, 2), 2), (TWO_NODES, (0, 0), 3),
        # The one shard takes three.
        (ONE_NODE, (4,), 0), (ONE_NODE, (3,), 1), (ONE_NODE, (0,), 2),
    ],
)  # fmt: skip
def test_huge_pages_are_given_out_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    topology: Topology, pages: tuple[int, ...], missing: int,
) -> None:  # fmt: skip
    placed = plan(model, topology)
    set_aside(tmp_path, monkeypatch, *pages)
    left = sorted(placed.slices.values())[len(placed.slices) - missing :]
    needed = sum(left) + placed.mailbox.nbytes
    check_memory(placed, available=1 << 40, shared=needed)
    with pytest.raises(ResourceError, match="shared memory"):
        check_memory(placed, available=1 << 40, shared=needed - 1)


def test_what_belongs_on_a_node_is_counted_together(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards on each node, and its half of attention's weights."""
    set_aside(tmp_path, monkeypatch, 0, 0)
    placed = plan(model, shards=4)
    wanted = [sum(shard.nbytes for shard in placed.shards[at : at + 2]) + placed.dense_bytes // 2 for at in (0, 2)]

    def check(*kilobytes: int) -> None:
        for number, free in enumerate(kilobytes):
            write(tmp_path, f"/node{number}/meminfo", f"Node {number} MemFree: {free} kB\n")
        check_memory(placed, available=1 << 40, shared=1 << 40)

    enough = [-(-nbytes // 1024) for nbytes in wanted]
    check(*enough)
    with pytest.raises(ResourceError, match="on node 0, "):
        check(enough[0] - 1, enough[1])
    with pytest.raises(ResourceError, match="on node 1, "):
        check(enough[0], enough[1] - 1)


@pytest.mark.parametrize("options", [{}, {"attn_type": "Q8_0", "experts_type": "IQ4_XS", "embd_type": "Q6_K"}])
def test_what_is_counted_is_what_is_allocated(
    tmp_path: Path, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "SHM", tmp_path)
    path = make_model(tmp_path / "m.gguf", "qwen3moe", hidden=256, expert_ffn=256, vocab=283, **options)
    placed = plan(path, shards=3, context=300, slots=2)
    with GgufFile.open(path) as gguf:
        config = ModelConfig.from_gguf(gguf)
        options = ForwardOptions(
            max_rows=1, slots=1, n_pages=1, context=1, threads=2, threads_on_host=2,
            shared=SharedWeights(tmp_path, placed.dense_slice),
        )  # fmt: skip
        dense = DenseWeights(gguf, options, Progress(1))
        mailbox = Mailbox.create(str(tmp_path / "mailbox"), placed.mailbox)
        slices = [
            ExpertShard(
                config, gguf, mailbox, ShardSlice(i, 3),
                folder=tmp_path, threads=1, threads_on_host=1, key=placed.expert_slice(i),
            ).load()
            for i in range(3)
        ]  # fmt: skip
    assert placed.dense_bytes == dense.nbytes
    assert [shard.nbytes for shard in placed.shards] == [found.array.nbytes for found in slices]
    mapped = sum(found.header.nbytes for found in hold_weights(tmp_path)) + (tmp_path / "mailbox").stat().st_size
    assert placed.shared_bytes == mapped
    assert all(map(is_loaded, placed.slices))
    assert placed.kv_bytes <= KvPool(config, placed.n_pages, placed.kv_type).data.nbytes <= placed.kv_bytes + 64
    assert placed.n_pages == 4
    assert placed.total_bytes == placed.kv_bytes + placed.shared_bytes


def test_prompts_get_no_more_memory_than_the_model_leaves(model: Path) -> None:
    placed = plan(model, cache=CacheOptions(cache_ram_bytes=1000))
    for left, bound in ((5000, 1000), (300, 300), (-7, 0)):
        assert fit_cache(placed, placed.total_bytes + placed.process_bytes + left).cache.cache_ram_bytes == bound


def test_what_is_kept_of_a_full_context_must_leave_room(model: Path) -> None:
    assert plan(model, context=512, cache=CacheOptions(keep=511)).cache.keep == 511
    with pytest.raises(InputError, match="--keep 512"):
        plan(model, context=512, cache=CacheOptions(keep=512))


def test_a_dense_model_has_no_shards(tmp_path: Path) -> None:
    placed = plan(make_model(tmp_path / "m.gguf", "llama"))
    assert placed.shards == ()
    assert placed.mailbox is None
