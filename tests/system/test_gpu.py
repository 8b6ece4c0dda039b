"""Attention on a GPU through the real processes: its answers, what is refused, and a shard that dies in a step."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from numoe.deploy.client import Client
from numoe.engine.gguf import GgufFile
from numoe.engine.models.reference import reference_logits
from numoe.v1 import generation_pb2 as pb
from tests.models import make_model
from tests.system.harness import ServeProcess, numoe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("gpu_experts", ["0", "1", "auto"])
def test_logits_equal_the_float64_reference(tmp_path: Path, gpu_experts: str) -> None:
    model = make_model(tmp_path / "f32.gguf", "qwen3moe", seed=1, n_experts=4, n_used=4)
    ids = np.random.default_rng(5).integers(0, 256, 40).tolist()
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    flags = ("--shards", 2, "--chunk", 16, "--device", "gpu", "--gpu-experts", gpu_experts)
    result = numoe("logits", model, "--tokens-file", tmp_path / "ids.json", "--out", tmp_path / "out.npz", *flags)
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "out.npz") as found, GgufFile.open(model) as gguf:
        want = reference_logits(gguf, ids)
        assert ((found["logits"] - want) ** 2).mean() / want.var() <= 1e-4


def test_serve_does_what_plan_says(tiny_model: Path) -> None:
    room = json.loads(numoe("plan", tiny_model, "--json", "--device", "gpu", "--gpu-experts", 1).stdout)
    on_gpu = sum(place["bytes"] for place in room["where"] if "memory" not in place["place"])
    planned = json.loads(numoe("plan", tiny_model, "--json", "--device", "gpu", "--gpu-memory", on_gpu).stdout)
    assert planned["gpu_layers"] == 1
    server = ServeProcess(tiny_model, "--device", "gpu", "--gpu-memory", on_gpu)
    try:
        shards = [actor for actor in server.status()["actors"] if actor["role"] == "expert"]
        assert len(shards) == sum("experts 0" in place["what"] for place in planned["where"]) == 1
        sampled = ("--max-tokens", 20, "--temperature", 0.8, "--top-k", 20, "--seed", 3)
        first, again = (server.generate("one two", *sampled)["text"] for _ in range(2))
        assert first == again
    finally:
        server.stop()
    assert server.left_over() == []


def test_too_little_vram_is_refused_with_the_numbers(tiny_model: Path) -> None:
    result = numoe("serve", tiny_model, "--device", "gpu", "--gpu-memory", "1G")
    assert result.returncode != 0
    for word in ("GB of VRAM", "weights", "KV cache", "reserve", "--ctx-size"):
        assert word in result.stderr


def test_a_shard_killed_in_a_step_is_replaced_and_the_gpu_does_not_spin(tiny_model: Path) -> None:
    server = ServeProcess(tiny_model, "--shards", 2, "--device", "gpu", "--gpu-experts", 0)
    with Client(server.address) as client:
        stream = client.generation.Generate(
            pb.GenerateRequest(text="endless", stopping=pb.StopOptions(max_tokens=1900, ignore_eos=True))
        )
        next(message for message in stream if message.WhichOneof("event") == "tokens")
        victim = next(actor["pid"] for actor in server.status()["actors"] if actor["role"] == "expert")
        os.kill(victim, signal.SIGKILL)
        *_, last = stream
    assert last.WhichOneof("event") == "finished"
    pids = {actor["pid"] for actor in server.status()["actors"] if actor["role"] == "expert"}
    assert len(pids) == 2
    assert victim not in pids
    server.stop()
    assert server.left_over() == []  # a process whose GPU spins cannot end
