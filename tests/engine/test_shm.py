"""Shared memory is private, reserved before use, and never left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from numoe.engine import private, shm
from numoe.engine.errors import AccessError, ResourceError, UnavailableError
from numoe.engine.reserved import rewrite


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shm, "ROOT", tmp_path / "numoe")
    return tmp_path / "numoe"


def test_two_mappings_see_the_same_bytes(root: Path) -> None:
    folder = shm.create_folder("one")
    first = shm.SharedSegment.create(folder / "x", 4096)
    second = shm.SharedSegment.attach(folder / "x", 4096)
    first.array[17] = 5
    assert second.array[17] == 5
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}
    assert root.stat().st_mode & 0o777 == folder.stat().st_mode & 0o777 == 0o700
    shm.remove_folder(folder)
    assert not root.exists()


def test_servers_that_end_meanwhile_are_in_nobodys_way(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one of a user removes the root, just when another has looked at it."""
    ends = 2

    def make_private_folder(path: Path) -> None:
        nonlocal ends
        private.make_private_folder(path)
        if ends:
            ends -= 1
            path.rmdir()

    monkeypatch.setattr(shm, "make_private_folder", make_private_folder)
    assert shm.create_folder("one").is_dir()
    shm.remove_folder(root / "one")
    root.mkdir()
    ends = 1
    assert shm.remove_stale() == []


def test_no_room_is_said_and_leaves_no_file(root: Path) -> None:
    folder = shm.create_folder("one")
    with pytest.raises(ResourceError, match="no room"):
        shm.SharedSegment.create(folder / "x", 1 << 60)
    assert not (folder / "x").exists()


def test_another_size_is_not_attached(root: Path) -> None:
    folder = shm.create_folder("one")
    shm.SharedSegment.create(folder / "x", 4096)
    with pytest.raises(UnavailableError, match="8192 bytes"):
        shm.SharedSegment.attach(folder / "x", 8192)
    with pytest.raises(UnavailableError, match="cannot be mapped"):
        shm.SharedSegment.attach(folder / "absent", 4096)


def test_a_segment_that_others_may_open_is_not_attached(root: Path) -> None:
    folder = shm.create_folder("one")
    shm.SharedSegment.create(folder / "x", 4096)
    (folder / "link").symlink_to(folder / "x")
    with pytest.raises(UnavailableError, match="cannot be mapped"):
        shm.SharedSegment.attach(folder / "link", 4096)
    (folder / "x").chmod(0o660)
    with pytest.raises(AccessError, match="not this user's alone"):
        shm.SharedSegment.attach(folder / "x", 4096)


def test_nothing_behind_a_link_is_removed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "home" / "work").mkdir(parents=True)
    os.utime(tmp_path / "home" / "work", (1, 1))
    root.symlink_to(tmp_path / "home")
    with pytest.raises(AccessError, match="no folder"):
        shm.remove_stale()
    assert (tmp_path / "home" / "work").is_dir()


def test_only_folders_of_dead_owners_are_stale(root: Path) -> None:
    living, dead, reused = (shm.create_folder(name) for name in ("living", "dead", "reused"))
    rewrite(dead / "owner", b"999999999 1.0")
    rewrite(reused / "owner", b"%d 1.0" % os.getpid())  # this pid, but of a process that started long ago
    assert shm.remove_stale() == [dead, reused]
    assert living.is_dir()


def test_a_folder_that_is_just_being_made_is_spared(root: Path) -> None:
    shm.create_folder("living")
    (root / "new").mkdir()
    assert shm.remove_stale() == []
    os.utime(root / "new", (1, 1))
    assert shm.remove_stale() == [root / "new"]
