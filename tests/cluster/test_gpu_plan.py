"""What of a model lives on the GPU: attention, and layers of routed experts as far as there is room."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from numoe.cluster.plan import GPU_RESERVE, Plan, PlanOptions, check_memory, make_plan
from numoe.cluster.topology import NumaNode, Topology
from numoe.engine.errors import InputError, ResourceError
from numoe.engine.gguf import GgufFile
from numoe.engine.gpu.device import Device
from numoe.engine.models.config import ModelConfig
from tests.models import make_model

GPU = Device("a GPU", (8, 6), 80 << 30, 80 << 30, 46, copy_bytes_s=4e11)
HOST = Topology(nodes=(NumaNode(id=0, cores=((0,), (1,), (2,)), memory_bytes=1 << 30),))
LAYERS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("m") / "m.gguf"
    return make_model(path, "qwen3moe", layers=LAYERS, expert_ffn=256, experts_type="Q4_K", hidden=256, context=4096)


def plan(model: Path, gpu: Device | None = GPU, **options: Any) -> Plan:
    with GgufFile.open(model) as gguf:
        return make_plan(ModelConfig.from_gguf(gguf), gguf, HOST, PlanOptions(**options), gpu)


def test_what_fits_goes_to_the_gpu_and_the_shards_hold_the_rest(model: Path) -> None:
    on_cpu = plan(model, gpu_layers=0)
    assert on_cpu.gpu_layers == on_cpu.gpu_expert_bytes == 0
    for layers in range(1, LAYERS):
        placed = plan(model, gpu_layers=layers)
        assert placed.shards[0].nbytes == on_cpu.shards[0].nbytes * (LAYERS - layers) // LAYERS
        assert placed.attention_bytes == on_cpu.attention_bytes + placed.gpu_expert_bytes
        assert placed.expert_slice(0) != on_cpu.expert_slice(0)
        room = placed.attention_bytes + GPU_RESERVE
        assert plan(model, gpu_memory=room).gpu_layers == layers
        assert plan(model, gpu_memory=room - 1).gpu_layers == layers - 1
        check_memory(plan(model, gpu_memory=room), available=1 << 40, shared=1 << 40)


def test_there_are_no_shards_if_the_gpu_has_every_expert(model: Path) -> None:
    placed = plan(model)
    assert placed.gpu_layers == LAYERS
    assert placed.mailbox is None
    assert not placed.shards
    assert placed.total_bytes == 0


def test_what_does_not_fit_is_refused_with_the_numbers(model: Path) -> None:
    placed = plan(model, gpu_layers=LAYERS)
    free = placed.attention_bytes + GPU_RESERVE
    check_memory(replace(placed, gpu=replace(GPU, free_bytes=free)))
    for refused in (
        replace(placed, gpu=replace(GPU, free_bytes=free - 1)),
        plan(model, gpu_layers=LAYERS, gpu_memory=free - 1),
    ):
        with pytest.raises(ResourceError, match=rf"{free / 1e9:.2f} GB of VRAM .* a GPU .*--gpu-experts"):
            check_memory(refused)


@pytest.mark.parametrize(("gpu", "layers"), [(GPU, LAYERS + 1), (None, 1)])
def test_more_layers_than_there_are_are_refused(model: Path, gpu: Device | None, layers: int) -> None:
    with pytest.raises(InputError, match=f"--gpu-experts {layers}"):
        plan(model, gpu, gpu_layers=layers)
