"""Shards against a float64 mixture of experts, through the mailbox."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from numoe.engine import shm
from numoe.engine.cpu.memory import address
from numoe.engine.cpu.rows import quantize_reference, quantize_row
from numoe.engine.errors import UnavailableError
from numoe.engine.experts.exchange import publish_request
from numoe.engine.experts.mailbox import (
    HEARTBEAT,
    REPLY_SLEEPERS,
    REQUEST_LAYER,
    REQUEST_ROWS,
    REQUEST_SEQUENCE,
    REQUEST_SLEEPERS,
    STEP_START,
    STEPPING,
    LateShardError,
    Mailbox,
    MailboxLayout,
)
from numoe.engine.experts.shard import ExpertShard, ShardSlice
from numoe.engine.formats import packed_format
from numoe.engine.gguf import GgufFile
from numoe.engine.models.config import ModelConfig
from numoe.engine.weights import free_weights
from tests.models import Weights, build_model

HIDDEN, FFN, EXPERTS, USED, MAX_ROWS, LAYER = 256, 512, 5, 2, 40, 1
# Of gate, up and down. The last mixes both kinds of activations, and cuts supers of 256 columns.
TYPES = {"F32": ("F32",) * 3, "Q8_0": ("Q8_0",) * 3, "mixed": ("Q4_K", "F16", "IQ4_XS")}
PARTS = ("gate", "up", "down")


@pytest.fixture(scope="module", params=TYPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = build_model("qwen3moe", n_experts=EXPERTS, n_used=USED, hidden=HIDDEN, expert_ffn=FFN)
    weights = Weights(5)
    for part, qtype in zip(PARTS, TYPES[request.param], strict=True):
        shape = (EXPERTS, HIDDEN, FFN) if part == "down" else (EXPERTS, FFN, HIDDEN)
        data = weights.packed(qtype, shape, shape[2] ** -0.5)
        tiny.tensors[f"blk.{LAYER}.ffn_{part}_exps.weight"] = (data, qtype)
    return tiny.write(tmp_path_factory.mktemp("m") / "m.gguf")


class Client:
    """Asks running shards as the attention worker does."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox, self.layout = mailbox, mailbox.layout
        self.sequence = int(self._region(REQUEST_SEQUENCE, 4).view(np.uint32)[0])

    def _region(self, at: int, nbytes: int) -> np.ndarray:
        return self.mailbox.segment.array[at : at + nbytes]

    def heartbeat(self, shard: int) -> int:
        return int(self._region(self.layout.reply(shard) + HEARTBEAT, 4).view(np.uint32)[0])

    def ask(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Partial sums float32 [shards, rows, hidden] for rows x float32 [rows, hidden]."""
        layout, rows = self.layout, len(x)
        self._region(layout.ids, 4 * ids.size)[:] = ids.astype(np.int32).reshape(-1).view(np.uint8)
        self._region(layout.weights, weights.nbytes)[:] = weights.reshape(-1).view(np.uint8)
        self._region(layout.f32_rows, x.nbytes)[:] = x.reshape(-1).view(np.uint8)
        stride = (layout.f32_rows - layout.q8_rows) // layout.max_rows
        for i, row in enumerate(x):
            quantize_row(address(row), HIDDEN, self.mailbox.base + layout.q8_rows + i * stride)
        self._region(REQUEST_LAYER, 8).view(np.int64)[0] = LAYER
        self._region(REQUEST_ROWS, 8).view(np.int64)[0] = rows
        self.mailbox.partials()[:] = np.nan
        self.sequence = (self.sequence + 1) % 2**32
        base = self.mailbox.base
        publish_request(base, layout.shards, self.sequence)
        for shard in range(layout.shards):
            at = layout.reply(shard)
            while self._region(at, 4).view(np.uint32)[0] != self.sequence:
                pass
        return self.mailbox.partials()[:, :rows].copy()


@contextmanager
def running(model: Path, shards: int, threads: int = 2, sequence: int = 0) -> Iterator[Client]:
    folder = shm.create_folder(f"test-{secrets.token_hex(4)}")
    with GgufFile.open(model) as gguf:
        config = ModelConfig.from_gguf(gguf)
        mailbox = Mailbox.create(str(folder / "mailbox"), MailboxLayout(shards, MAX_ROWS, USED, HIDDEN))
        mailbox.word(REQUEST_SEQUENCE)[0] = sequence
        mailbox.shard_words(0)[:] = sequence
        crew = []
        for index in range(shards):
            cut = ShardSlice(index, shards)
            crew.append(ExpertShard(config, gguf, mailbox, cut, folder=folder, threads=threads, threads_on_host=99))
            crew[-1].load()
            done, total, _ = crew[-1].progress.snapshot()
            assert done == total
            crew[-1].start()
        try:
            yield Client(mailbox)
        finally:
            mailbox.stop_shards()
            for shard in crew:
                shard.join()
                shard.close()
            free_weights(folder)
            shm.remove_folder(folder)


def mixture(model: Path, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The layer in float64, with activations rounded where the kernels round them."""
    with GgufFile.open(model) as gguf:
        names = [f"blk.{LAYER}.ffn_{part}_exps.weight" for part in PARTS]
        gate, up, down = (gguf.dequantize(name).astype(np.float64) for name in names)
        of_gate, of_up, of_down = (packed_format(gguf.tensors[name].qtype).activations for name in names)

    def seen(rows: np.ndarray, activations: str) -> np.ndarray:
        if activations == "f32":
            return rows.astype(np.float64)
        codes, scales = quantize_reference(rows.astype(np.float32))
        return codes * np.repeat(scales.astype(np.float64), 32, axis=1)

    out = np.zeros((len(x), HIDDEN))
    for row, choice in np.ndindex(ids.shape):
        expert, here = ids[row, choice], x[row : row + 1]
        g, u = seen(here, of_gate) @ gate[expert].T, seen(here, of_up) @ up[expert].T
        h = g / (1 + np.exp(-g)) * u
        out[row] += weights[row, choice] * (seen(h, of_down) @ down[expert].T)[0]
    return out


def case(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(EXPERTS)[:USED] for _ in range(rows)])
    weights = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
    return rng.standard_normal((rows, HIDDEN)).astype(np.float32), ids, weights


# With 17 shards and 16 blocks of 32 columns, one shard has nothing; of three, one cuts across two supers.
@pytest.mark.parametrize("shards", [1, 2, 3, 17])
def test_partial_sums_add_up_to_the_mixture(model: Path, shards: int) -> None:
    with running(model, shards) as client:
        for rows in (1, 2, 13, MAX_ROWS):
            x, ids, weights = case(rows, seed=rows)
            found, want = client.ask(x, ids, weights).sum(axis=0), mixture(model, x, ids, weights)
            # A product in float32 may land on the other side of a rounding of h than in float64.
            assert ((found - want) ** 2).mean() <= 2e-6 * want.var()


def test_every_row_on_one_expert(model: Path) -> None:
    x, ids, weights = case(MAX_ROWS, seed=1)
    ids[:] = [3, 0]
    with running(model, 2) as client:
        want = mixture(model, x, ids, weights)
        assert ((client.ask(x, ids, weights).sum(axis=0) - want) ** 2).mean() <= 2e-6 * want.var()


def test_a_row_is_the_same_alone_and_with_others_and_for_any_threads(model: Path) -> None:
    x, ids, weights = case(20, seed=2)
    with running(model, 2, threads=1) as client:
        want = client.ask(x, ids, weights)
    for threads in (2, 3):
        with running(model, 2, threads=threads) as client:
            assert np.array_equal(client.ask(x, ids, weights), want)
            for row in (0, 7, 19):
                part = slice(row, row + 1)
                assert np.array_equal(client.ask(x[part], ids[part], weights[part]), want[:, part])


def test_sequence_numbers_wrap_around(model: Path) -> None:
    x, ids, weights = case(3, seed=3)
    with running(model, 2, sequence=2**32 - 3) as client:
        answers = [client.ask(x, ids, weights) for _ in range(6)]
    assert client.sequence == 3
    assert all(np.array_equal(answer, answers[0]) for answer in answers)


def test_idle_shards_use_no_processor_and_show_that_they_live(model: Path) -> None:
    with running(model, 2) as client:
        client.ask(*case(1, seed=0))
        beats = [client.heartbeat(shard) for shard in range(2)]
        start = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - start < 0.05
        assert all(client.heartbeat(shard) > before for shard, before in enumerate(beats))


def test_a_mailbox_of_another_layout_is_not_attached(model: Path) -> None:
    with running(model, 1) as client:
        with pytest.raises(UnavailableError, match="bytes expected"):
            Mailbox.attach(str(client.mailbox.segment.path), MailboxLayout(2, MAX_ROWS, USED, HIDDEN))
        same = Mailbox.attach(str(client.mailbox.segment.path), client.layout)
        client.ask(*case(1, seed=0))
        assert np.array_equal(same.partials(), client.mailbox.partials(), equal_nan=True)
        same.close()


def test_a_shard_that_takes_a_dead_ones_place_answers_the_request_under_way(model: Path) -> None:
    """The dead one's words stay in the mailbox: its last reply, and sleepers that nobody will wake."""
    x, ids, weights = case(7, seed=3)
    with running(model, shards=2) as client:
        want = client.ask(x, ids, weights)
        box = client.mailbox
        box.shard_words(0)[1] -= 1  # as if shard 1 had died over this request
        box.partials()[1] = np.nan
        box.shard_words(REQUEST_SLEEPERS)[1] = 7
        with GgufFile.open(model) as gguf:
            folder = Path(box.segment.path).parent
            cut = ShardSlice(1, 2)
            successor = ExpertShard(
                ModelConfig.from_gguf(gguf), gguf, box, cut, folder=folder, threads=2, threads_on_host=99
            )
            successor.load()
        with pytest.raises(LateShardError, match="shard 1"):
            box.await_replies(0.05)
        successor.start()
        box.await_replies(10)
        assert np.array_equal(box.partials()[:, :7], want)
        assert box.shard_words(REQUEST_SLEEPERS)[1] <= 4
        box.stop_shards()
        successor.join()
        successor.close()


def test_a_worker_that_takes_anothers_place_forgets_its_waiters_and_its_step(model: Path) -> None:
    with running(model, shards=2) as client:
        box = client.mailbox
        box.shard_words(REPLY_SLEEPERS)[:] = 3
        box.begin_step()
        box.take_over()
        assert not box.shard_words(REPLY_SLEEPERS).any()
        assert not box.word(STEPPING).any()


def test_regions_of_a_mailbox_do_not_overlap() -> None:
    layout = MailboxLayout(3, 17, 8, 256)
    starts = [layout.reply(0), layout.ids, layout.weights, layout.q8_rows, layout.f32_rows, layout.partials]
    assert starts == sorted(starts)
    assert layout.reply(2) + 256 <= layout.ids
    assert layout.ids + 4 * 17 * 8 <= layout.weights
    assert layout.weights + 4 * 17 * 8 <= layout.q8_rows
    assert layout.q8_rows + 17 * (256 + 256 // 32 * 16) <= layout.f32_rows
    assert layout.f32_rows + 17 * 256 * 4 <= layout.partials
    assert layout.partials + 3 * layout.partial_bytes <= layout.nbytes


@pytest.mark.parametrize("count", [1, 2, 3, 7, 24])
def test_slices_cover_every_block_once(count: int) -> None:
    ranges = [ShardSlice(index, count).blocks(768) for index in range(count)]
    assert [block for first, last in ranges for block in range(first, last)] == list(range(24))
    sizes = [last - first for first, last in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_a_worker_that_cannot_wake_anybody_finds_the_shards_awake(model: Path) -> None:
    """As a GPU does it: a step begins, whoever sleeps is woken, and requests are only written."""
    with running(model, shards=2) as client:
        box, words = client.mailbox, client.mailbox.segment.array
        sleepers = box.shard_words(REQUEST_SLEEPERS)
        while sleepers.sum() < 4:  # two threads a shard
            time.sleep(0.01)
        box.begin_step()
        while sleepers.any():  # one call gives up after a moment: threads may have no processor
            box.wake_shards()
        time.sleep(0.1)
        assert not sleepers.any(), "they spin"
        box.end_step()
        while sleepers.sum() < 4:
            time.sleep(0.01)
        box.begin_step()
        words[STEP_START : STEP_START + 8].view(np.int64)[0] -= 60_000_000_000  # whose worker has died long ago
        box.wake_shards()
        time.sleep(0.3)
        assert sleepers.any(), "they sleep"
        box.end_step()
