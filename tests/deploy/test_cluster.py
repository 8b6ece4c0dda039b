"""The Ray that a server starts for itself: what killed ones have left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from numoe.deploy import cluster
from numoe.deploy.raylets import Raylet
from numoe.engine.errors import UnavailableError


def test_the_sessions_of_killed_servers_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, ending = (subprocess.Popen([sys.executable, "-c", ""]) for _ in range(2))
    for process in (ended, ending):
        process.wait()
    monkeypatch.setattr(cluster, "PRIVATE_TEMP", str(tmp_path))
    monkeypatch.setattr(cluster, "find_raylets", lambda: [Raylet(1, "10.0.0.1:6379", str(tmp_path / str(ending.pid)))])
    for name in (str(ended.pid), str(ending.pid), str(os.getpid()), "notes"):
        (tmp_path / name / "session_latest").mkdir(parents=True)
    cluster.remove_stale_sessions()
    assert {folder.name for folder in tmp_path.iterdir()} == {str(ending.pid), str(os.getpid()), "notes"}


def test_an_address_where_no_cluster_answers_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would try for a minute."""
    monkeypatch.setattr(cluster.ray, "init", lambda **_: pytest.fail("Ray was asked"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UnavailableError, match="no Ray cluster answers at RAY_ADDRESS"):
        cluster.start_ray()
