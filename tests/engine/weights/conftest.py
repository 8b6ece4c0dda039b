"""Weights of tests lie in a folder of their own in shared memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from numoe.engine.weights import media


@pytest.fixture
def shm_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stands in for /dev/shm, and lies there."""
    folder = Path(tempfile.mkdtemp(prefix="numoe-test-", dir="/dev/shm"))
    monkeypatch.setattr(media, "SHM", folder)
    yield folder
    shutil.rmtree(folder)
