"""What `numoe serve` measures before it serves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from numoe.cluster.bandwidth import Bandwidth
from numoe.deploy import launch
from numoe.engine import shm
from numoe.engine.errors import ResourceError

EXPERTS: Any = SimpleNamespace(shards=(0,))
DENSE: Any = SimpleNamespace(shards=())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Bandwidth]:
    """What has been measured on a host where no server runs."""
    found: list[Bandwidth] = []

    def measure(_: Any, progress: Any) -> None:
        progress(1, 1)
        found.append(Bandwidth(measured=0.0, reads=()))

    monkeypatch.setattr(shm, "ROOT", tmp_path / "shm")
    monkeypatch.setattr(launch, "remembered", lambda _: found[0] if found else None)
    monkeypatch.setattr(launch, "bandwidth", measure)
    return found


def test_bandwidth_is_measured_by_the_first_server_of_a_host(measured: list[Bandwidth]) -> None:
    launch.measure_bandwidth(EXPERTS)
    launch.measure_bandwidth(EXPERTS)
    assert len(measured) == 1


def test_bandwidth_is_not_measured_for_nothing_nor_beside_a_server(measured: list[Bandwidth]) -> None:
    launch.measure_bandwidth(DENSE)
    (shm.ROOT / "another").mkdir(parents=True)
    launch.measure_bandwidth(EXPERTS)
    assert measured == []


def test_a_host_without_memory_for_it_serves_all_the_same(
    measured: list[Bandwidth], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise ResourceError("node 0 has 0.01 GB of memory free")

    monkeypatch.setattr(launch, "bandwidth", no_memory)
    launch.measure_bandwidth(EXPERTS)
    assert "node 0 has 0.01 GB" in capsys.readouterr().err
