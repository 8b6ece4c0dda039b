"""Slices outlive who loaded them, are attached to only when whole, and removed only when nobody uses them."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from numoe.engine.errors import DataLossError, ModelFileError, ResourceError, UnavailableError
from numoe.engine.gguf import GgufFile
from numoe.engine.numa import huge_share
from numoe.engine.progress import Progress
from numoe.engine.weights import (
    SliceKey,
    WeightSlice,
    free_weights,
    hold_weights,
    is_loaded,
    link_slice,
    media,
    open_tensors,
    remove_slice,
    stored_slices,
    sweep_incomplete,
    verify_slice,
)
from numoe.engine.weights.slices import open_slice
from numoe.engine.worker.weights import plan_dense
from tests.engine.weights.support import key_of, load, packed
from tests.models import make_model

pytestmark = pytest.mark.usefixtures("shm_root")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("m") / "m.gguf", "llama", attn_type="Q4_K", embd_type="Q8_0", hidden=256)


@pytest.fixture
def key(model: Path) -> SliceKey:
    with GgufFile.open(model) as gguf:
        return key_of(gguf)


def test_who_attaches_sees_what_was_loaded(model: Path, key: SliceKey) -> None:
    first, loaded = load(model), Progress(1)
    second = load(model, progress=loaded)
    with GgufFile.open(model) as gguf:
        want = packed(gguf, plan_dense(gguf))
    assert np.array_equal(first.array, want)
    assert np.array_equal(second.array, want)
    assert loaded.snapshot() == (1, 1, 0.0)
    assert second.path.samefile(first.path)
    with pytest.raises(ValueError, match="read-only"):
        second.array[0] = 1
    first.close()
    second.close()
    assert is_loaded(key)
    assert load(model).header == second.header


def test_files_are_private(model: Path, shm_root: Path) -> None:
    path = load(model).path
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == path.parent.parent.stat().st_mode & 0o777 == 0o700
    assert path.parent.parent == shm_root / "numoe"


def test_what_another_user_owns_is_not_entered(shm_root: Path) -> None:
    (shm_root / "numoe").mkdir(mode=0o755)  # somebody else may look into it
    assert media.weights_root() == shm_root / f"numoe-weights-{os.getuid()}"


def test_shards_that_come_at_once_agree_where_weights_lie(shm_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one makes the folder just after this one has not found it."""
    look, shared = Path.lstat, shm_root / "numoe"

    def look_too_early(path: Path) -> os.stat_result:
        if path == shared and not shared.exists():
            shared.mkdir(mode=0o700)
            raise FileNotFoundError(path)
        return look(path)

    monkeypatch.setattr(Path, "lstat", look_too_early)
    assert [media.weights_root() for _ in range(2)] == [shared, shared]


def crashed_load(key: SliceKey, shm_root: Path) -> None:
    """A process that is killed while it loads."""
    script = (
        "import sys, time; from pathlib import Path; from numoe.engine.weights import SliceKey, media\n"
        "from numoe.engine.weights.slices import open_slice\n"
        f"media.SHM = Path({str(shm_root)!r})\n"
        f"found = open_slice(SliceKey(source={key.source!r}, cut={key.cut!r}), 1 << 20, 3, 1)\n"
        "found.array[:] = 7; print('loading', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        [found] = stored_slices()
        assert (found.in_use, found.header) == (True, None)
        assert not remove_slice(found.path)
        process.send_signal(signal.SIGKILL)


def test_a_load_that_crashed_is_not_attached_to_but_done_again(model: Path, key: SliceKey, shm_root: Path) -> None:
    crashed_load(key, shm_root)
    assert not is_loaded(key)
    with pytest.raises(UnavailableError, match="not complete"):
        WeightSlice.open(key.path)
    found = load(model)
    assert found.header is not None
    assert verify_slice(found.path, 2) == []


def test_what_a_crash_left_is_removed_by_the_next_load_of_any_model(model: Path) -> None:
    kept = load(model).path
    other = SliceKey(source="0" * 32, cut="dense")
    open_slice(other, 1 << 20, 3, 1).close()  # given up without a word, as a killed process does
    assert other.path.exists()
    sweep_incomplete()
    assert not other.path.parent.exists()
    assert kept.exists()


def test_what_is_no_slice_is_in_nobodys_way(model: Path) -> None:
    kept = load(model).path
    (kept.parent / "folder").mkdir()
    assert [found.path for found in stored_slices()] == [kept]
    sweep_incomplete()
    assert kept.exists()
    assert (kept.parent / "folder").is_dir()


def test_a_second_server_waits_for_the_first_ones_load(model: Path, key: SliceKey) -> None:
    with GgufFile.open(model) as gguf:
        tensors = plan_dense(gguf)
        pieces = sum(1 for packed_tensor in tensors for _ in packed_tensor.pieces())
        first = open_slice(key, packed(gguf, tensors).nbytes, pieces, len(tensors))
    results = list[WeightSlice]()
    second = threading.Thread(target=lambda: results.append(load(model)))
    second.start()
    second.join(0.3)
    assert not results
    inode = first.path.stat().st_ino
    first.close()  # the first one crashes: the second loads
    second.join(30)
    assert results[0].header is not None
    assert results[0].path.stat().st_ino != inode


def test_weights_in_use_are_not_removed(model: Path, tmp_path: Path, key: SliceKey) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    servers = []
    for folder in folders:
        folder.mkdir()
        found = load(model)
        link_slice(folder, "dense", found)
        servers.append([found, *hold_weights(folder)])
    servers[0][0].close()  # its worker dies
    free_weights(folders[1])
    assert is_loaded(key)
    for found in servers[0][1:]:
        found.close()
    free_weights(folders[0])
    assert is_loaded(key)  # the other server is still there
    for found in servers[1]:
        found.close()
    free_weights(folders[1])
    assert not key.path.parent.parent.exists()


@pytest.mark.parametrize("what", ["weights", "table"])
def test_damage_is_found(model: Path, what: str) -> None:
    found = load(model)
    assert found.header is not None
    at = 4096 + (12345 if what == "weights" else found.header.nbytes + 3)
    with found.path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    if what == "table":
        with pytest.raises(DataLossError, match="table of checksums"):
            verify_slice(found.path, 1)
    else:
        [place] = verify_slice(found.path, 1)
        assert place <= 12345


def test_a_damaged_header_is_no_header(model: Path, key: SliceKey) -> None:
    path = load(model).path
    with path.open("r+b") as file:
        file.seek(60)
        file.write(b"\xff\xff")
    assert not is_loaded(key)


def test_a_shortened_file_is_not_complete(model: Path, key: SliceKey) -> None:
    os.truncate(load(model).path, 8192)
    assert not is_loaded(key)


def test_no_room_is_said_before_anything_is_loaded(shm_root: Path) -> None:
    with pytest.raises(ResourceError, match=r"no room for 11258.*numoe weights"):
        open_slice(SliceKey(source="0" * 32, cut="dense"), 1 << 50, 1, 1)
    assert list(shm_root.iterdir()) == []


def test_a_full_file_system_is_an_error_and_no_bus_error(
    shm_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room that was there when it was asked for and is gone when it is needed."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        monkeypatch.setattr(media, "SHM", place)
        monkeypatch.setattr(media.Medium, "free_bytes", lambda *_: 1 << 40)
        with pytest.raises(ResourceError, match="no room"):
            open_slice(SliceKey(source="0" * 32, cut="dense"), 16 << 20, 1, 1)
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_file_that_changed_since_it_was_planned_is_refused(model: Path, tmp_path: Path, key: SliceKey) -> None:
    changed = tmp_path / "m.gguf"
    changed.write_bytes(model.read_bytes())
    with GgufFile.open(changed) as gguf:
        with pytest.raises(ModelFileError, match="changed since"):
            open_tensors(key, gguf, plan_dense(gguf), Progress(1), threads=1)
        planned = key_of(gguf)
        time.sleep(0.01)
        os.utime(changed)
        with pytest.raises(ModelFileError, match="changed since"):
            open_tensors(planned, gguf, plan_dense(gguf), Progress(1), threads=1)


def test_a_file_that_is_cut_off_while_it_is_read_is_an_error_and_leaves_nothing(
    model: Path, tmp_path: Path, shm_root: Path
) -> None:
    short = tmp_path / "m.gguf"
    short.write_bytes(model.read_bytes())
    with GgufFile.open(short) as gguf:
        os.truncate(short, short.stat().st_size // 2)
        with pytest.raises(ModelFileError, match="cut off"):
            open_tensors(key_of(gguf), gguf, plan_dense(gguf), Progress(1), threads=1)
    assert list(shm_root.iterdir()) == []


LINUX = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


@pytest.mark.skipif(LINUX < (6, 1) or not HUGE_PAGES.exists(), reason="this kernel makes no huge pages on request")
def test_weights_lie_in_huge_pages_also_for_who_attaches(tmp_path: Path) -> None:
    if "[deny]" in (HUGE_PAGES / "shmem_enabled").read_text():
        pytest.skip("this system denies huge pages in shared memory")
    path = make_model(tmp_path / "m.gguf", "llama", attn_type="F32", hidden=1024)
    for weights in (load(path), load(path)):
        assert weights.array.nbytes > 8 << 20
        weights.array.sum()
        assert huge_share(str(weights.path)) > 1 - (2 << 20) / weights.array.nbytes  # all but what is behind the last
        assert weights.header is not None
        assert weights.header.medium == "transparent"


def test_what_was_attached_to_cannot_be_written(model: Path) -> None:
    loaded, attached = load(model), load(model)
    assert loaded.array.flags.writeable
    assert not attached.array.flags.writeable
