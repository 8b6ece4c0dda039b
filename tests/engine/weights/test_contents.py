"""A model's content is summed up while its slices are loaded, and the sum is the same however it is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from gguf import GGMLQuantizationType as QuantType

from numoe.engine.experts.mailbox import Mailbox, MailboxLayout
from numoe.engine.experts.shard import ExpertShard, ShardSlice
from numoe.engine.gguf import GgufFile, TensorInfo
from numoe.engine.models.config import ModelConfig
from numoe.engine.progress import Progress
from numoe.engine.weights import ContentSum, linked_contents
from numoe.engine.weights import loading as loading_module
from numoe.engine.weights.contents import unit_rows
from numoe.engine.worker.options import ForwardOptions, SharedWeights
from numoe.engine.worker.weights import DENSE, DenseWeights
from tests.engine.weights.support import key_of
from tests.models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that are no multiple of a unit, and seven blocks of columns for the shards to share."""
    path = tmp_path_factory.mktemp("m") / "m.gguf"
    return make_model(
        path, "qwen3moe", vocab=333, hidden=96, n_experts=5, expert_ffn=224, layers=2, experts_type="Q4_0"
    )


def rows(gguf: GgufFile, tensor: TensorInfo) -> np.ndarray:
    return gguf.read(tensor.name).reshape(tensor.rows, tensor.row_bytes)


def whole(gguf: GgufFile) -> dict[str, bytes | None]:
    return {name: ContentSum.of(t, 0, rows(gguf, t)).digest(t) for name, t in gguf.tensors.items()}


def load(model: Path, folder: Path, shards: int, layers_on_gpu: int = 0) -> None:
    with GgufFile.open(model) as gguf:
        config = ModelConfig.from_gguf(gguf)
        assert config.moe is not None
        layout = MailboxLayout(shards, 1, config.moe.n_used, config.hidden)
        mailbox = Mailbox.create(str(folder / "mailbox"), layout)
        for index in range(shards):
            cut = ShardSlice(index, shards, layers_on_gpu)
            ExpertShard(config, gguf, mailbox, cut, folder=folder, threads=2, threads_on_host=2).load()
        options = ForwardOptions(
            max_rows=1, slots=1, n_pages=1, context=256, threads=2, threads_on_host=2,
            shared=SharedWeights(folder, key_of(gguf), None),
        )  # fmt: skip
        DenseWeights(gguf, options, Progress(1))


@pytest.mark.usefixtures("shm_root")
@pytest.mark.parametrize("shards", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("piece_bytes", [1, 8 << 20], ids=["small pieces", "large pieces"])
def test_slices_know_the_content_of_every_tensor_however_it_is_cut(
    model: Path, tmp_path: Path, shards: int, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading_module, "_PIECE_BYTES", piece_bytes)
    load(model, tmp_path, shards)
    with GgufFile.open(model) as gguf:
        sums = linked_contents(tmp_path, gguf.tensors)
        assert {name: sums[name].digest(tensor) for name, tensor in gguf.tensors.items()} == whole(gguf)


@pytest.mark.usefixtures("shm_root")
def test_what_no_slice_has_read_is_not_known(model: Path, tmp_path: Path) -> None:
    load(model, tmp_path, 3, layers_on_gpu=1)
    with GgufFile.open(model) as gguf:
        sums, name = linked_contents(tmp_path, gguf.tensors), "blk.{}.ffn_down_exps.weight"
        assert name.format(0) not in sums
        assert sums[name.format(1)].digest(gguf.tensors[name.format(1)]) is not None
        next(tmp_path.glob("weights-experts-1*")).unlink()
        (tmp_path / f"weights-{DENSE}").unlink()
        sums = linked_contents(tmp_path, gguf.tensors)
        assert set(sums) == {f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up", "down")}
        assert [sums[name].digest(gguf.tensors[name]) for name in sums] == [None] * 3


@pytest.mark.parametrize(
    ("name", "unit"),
    [("output.weight", 1024), ("blk.0.ffn_gate_exps.weight", 32), ("blk.0.ffn_down_exps.weight", 32)],
)
def test_a_sum_is_that_of_blake3_of_units(model: Path, name: str, unit: int) -> None:
    with GgufFile.open(model) as gguf:
        tensor = gguf.tensors[name]
        data, size = rows(gguf, tensor).tobytes(), unit * tensor.row_bytes
        total = [0] * 1024
        for number, start in enumerate(range(0, len(data), size)):
            digest = blake3(data[start : start + size]).digest(2048 * (number + 1))[-2048:]
            numbers = [int.from_bytes(digest[2 * i : 2 * i + 2], "little") for i in range(1024)]
            total = [(a + b) % 65536 for a, b in zip(total, numbers, strict=True)]
        found = ContentSum.of(tensor, 0, rows(gguf, tensor))
        assert (found.units, found.lanes.tolist()) == (-(-tensor.rows // unit), total)


def test_units_are_large_where_nobody_cuts_and_never_go_beyond_a_matrix() -> None:
    def unit(name: str, *shape: int) -> int:
        return unit_rows(TensorInfo(name, shape, QuantType.Q8_0, Path("m.gguf"), 0, 0))

    assert unit("blk.0.ffn_up_exps.weight", 128, 768, 2048) == 32
    assert unit("blk.0.ffn_down_exps.weight", 128, 2048, 768) == 512
    assert unit("blk.0.ffn_down_exps.weight", 128, 96, 768) == 32
    assert unit("output.weight", 100_000, 2048) == 128
    assert unit("blk.0.attn_norm.weight", 2048) == 128


def test_units_may_be_added_in_any_order_but_not_swapped(model: Path) -> None:
    with GgufFile.open(model) as gguf:
        tensor = gguf.tensors["blk.0.ffn_gate_exps.weight"]
        raw = rows(gguf, tensor)
        content = ContentSum.of(tensor, 0, raw)
        parts = [ContentSum.of(tensor, first, raw[first : first + 64]) for first in range(0, tensor.rows, 64)]
        assert sum(reversed(parts), ContentSum()).digest(tensor) == content.digest(tensor)
        swapped = np.concatenate([raw[32:64], raw[:32], raw[64:]])
        assert ContentSum.of(tensor, 0, swapped).digest(tensor) != content.digest(tensor)


@pytest.mark.parametrize(("first", "last"), [(16, 64), (0, 48), (32, 1119)])
def test_half_a_unit_is_refused(model: Path, first: int, last: int) -> None:
    with GgufFile.open(model) as gguf:
        tensor = gguf.tensors["blk.0.ffn_gate_exps.weight"]
        with pytest.raises(ValueError, match="whole units"):
            ContentSum.of(tensor, first, rows(gguf, tensor)[first:last])
