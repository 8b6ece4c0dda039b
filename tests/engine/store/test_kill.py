"""A process that is killed at any point of a write to the folder leaves the old object or the new one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from numoe.engine.store import open_store

OLD, NEW = b"old" * 1000, b"new" * 500_000
WRITER = """
import os, pathlib, signal, sys
from numoe.engine.store import open_store

store, version, kill_at, calls = open_store(sys.argv[1]), sys.argv[2] or None, int(sys.argv[3]), 0

def dangerous(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

for name in ("open", "write", "fsync", "close"):
    setattr(os, name, dangerous(getattr(os, name)))
for name in ("rename", "mkdir"):
    setattr(pathlib.Path, name, dangerous(getattr(pathlib.Path, name)))
store.put_if("slots/a", b"new" * 500_000, version)
"""


def killed_writes(root: Path, *, old: bool) -> list[bytes | None]:
    """What the object is after a writer was killed at its first, second, … point; the last one was not."""
    seen: list[bytes | None] = []
    for number in range(1, 100):
        folder = root / str(number)
        store = open_store(folder)
        version = store.put_if("slots/a", OLD, None) if old else ""
        status = subprocess.run([sys.executable, "-c", WRITER, folder, version, str(number)], check=False).returncode
        assert status in (0, -signal.SIGKILL)
        seen.append(bytes(store.get("slots/a")) if store.exists("slots/a") else None)
        current = store.get_versioned("slots/a")[1] if seen[-1] is not None else None
        store.put_if("slots/a", NEW, current)  # nor is anybody locked out
        assert store.get("slots/a") == NEW
        assert [entry.key for entry in store.list()] == ["slots/a"]
        if status == 0:
            return seen
    raise AssertionError("the writer never ended")


def test_a_killed_replacement_leaves_the_old_or_the_new_object(tmp_path: Path) -> None:
    seen = killed_writes(tmp_path, old=True)
    assert len(seen) > 10
    assert set(seen) == {OLD, NEW}
    assert seen == sorted(seen, key=lambda data: data == NEW)


def test_a_killed_first_write_leaves_nothing_or_the_object(tmp_path: Path) -> None:
    seen = killed_writes(tmp_path, old=False)
    assert len(seen) > 10
    assert set(seen) == {None, NEW}
