"""`numoe plan`'s figures: bytes of a token, and context that fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from numoe.cluster.forecast import Forecast, forecast
from numoe.cluster.plan import GPU_RESERVE, Plan, PlanOptions, make_plan
from numoe.cluster.topology import NumaNode, Topology
from numoe.engine.gguf import GgufFile
from numoe.engine.gpu.device import Device
from numoe.engine.models.config import ModelConfig
from tests.models import make_model

GPU = Device("a GPU", (8, 6), 8 << 30, 8 << 30, 46, copy_bytes_s=4e11)
HOST = Topology(nodes=(NumaNode(id=0, cores=((0,), (1,), (2,)), memory_bytes=1 << 30),))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("m") / "m.gguf", "qwen3moe", expert_ffn=256, context=4096)


def both(model: Path, gpu: Device | None, gpu_layers: int = 0) -> tuple[Plan, Forecast]:
    with GgufFile.open(model) as gguf:
        config = ModelConfig.from_gguf(gguf)
        plan = make_plan(config, gguf, HOST, PlanOptions(gpu_layers=gpu_layers), gpu)
        return plan, forecast(plan, config, gguf, cpu_bytes_s=1e10, gpu_bytes_s=4e11, free_memory=1 << 33)


def test_a_token_reads_the_used_experts_and_everything_else_once(model: Path) -> None:
    plan, found = both(model, None)
    with GgufFile.open(model) as gguf:
        moe = ModelConfig.from_gguf(gguf).moe
        assert moe is not None
        assert found.expert_bytes == plan.shards[0].nbytes * moe.n_used // moe.n_experts
        dense = sum(info.nbytes for name, info in gguf.tensors.items() if "_exps" not in name and len(info.shape) > 1)
        assert found.dense_bytes == dense - gguf.tensors["token_embd.weight"].nbytes
    assert found.attention_ms == pytest.approx(1e3 * found.dense_bytes / 1e10)


def test_on_a_gpu_attention_and_kv_are_at_its_bandwidth(model: Path) -> None:
    plan, found = both(model, GPU)
    assert plan.gpu == GPU
    assert plan.attention_threads == 1
    assert plan.shards[0].threads == 2  # one processor is left to the worker
    assert found.attention_ms == pytest.approx(1e3 * found.dense_bytes / 4e11)
    assert found.experts_ms == pytest.approx(1e3 * found.expert_bytes / 1e10)
    assert found.context_tokens.keys() == {"f16", "q8_0", "q4_0"}


@pytest.mark.parametrize("gpu", [None, GPU])
def test_the_context_that_fits_fits(model: Path, gpu: Device | None) -> None:
    plan, found = both(model, gpu)
    per_token = found.kv_bytes / plan.context
    others = plan.dense_bytes + plan.work_bytes + GPU_RESERVE if gpu else plan.shared_bytes + plan.process_bytes
    free = (8 << 30) - others
    assert 0 <= free - found.context_tokens["f16"] * per_token < 256 * per_token
    with GgufFile.open(model) as gguf:
        layers = ModelConfig.from_gguf(gguf).n_layers
    # While a prompt is read on a GPU, one layer of one slot's pages is there as float16 too.
    share = 34 / 64 + (1 / (layers * plan.slots) if gpu else 0)
    assert found.context_tokens["q8_0"] == pytest.approx(found.context_tokens["f16"] / share, rel=0.05)


def test_experts_on_the_gpu_are_read_at_its_bandwidth(model: Path) -> None:
    _, shards = both(model, GPU)
    plan, found = both(model, GPU, gpu_layers=2)
    assert not plan.shards
    assert found.expert_bytes == found.experts_ms == 0
    assert found.gpu_expert_bytes == pytest.approx(shards.expert_bytes, rel=0.05)
    assert found.attention_ms == pytest.approx(1e3 * (found.dense_bytes + found.gpu_expert_bytes) / 4e11)
    assert found.context_tokens["f16"] < shards.context_tokens["f16"] + plan.gpu_expert_bytes
