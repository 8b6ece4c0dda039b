"""A real server for the tests of this folder: Ray, the actors, gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import make_model
from tests.system.harness import ServeProcess


@pytest.fixture(scope="session", autouse=True)
def data_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers keep out of the data of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized Mixture of Experts whose greedy continuations vary."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return make_model(path, "qwen3moe", experts_type="Q8_0", attn_type="Q8_0", seed=3, context=2048)


@pytest.fixture(scope="session")
def server(tiny_model: Path) -> Iterator[ServeProcess]:
    """Eight slots, two shards, chunks of 32 tokens, a short queue."""
    flags = ("--parallel", 8, "--shards", 2, "--chunk", 32, "--ctx-size", 512, "--queue", 2)
    process = ServeProcess(tiny_model, *flags)
    yield process
    process.stop()
