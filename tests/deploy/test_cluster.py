"""The Ray that a server starts for itself: what killed ones have left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from numoe.deploy import cluster


def test_the_sessions_of_killed_servers_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setattr(cluster, "PRIVATE_TEMP", str(tmp_path))
    for name in (str(ended.pid), str(os.getpid()), "notes"):
        (tmp_path / name / "session_latest").mkdir(parents=True)
    cluster.remove_stale_sessions()
    assert {folder.name for folder in tmp_path.iterdir()} == {str(os.getpid()), "notes"}
