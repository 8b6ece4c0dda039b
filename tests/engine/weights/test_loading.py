"""Loading reads once, holds nothing twice, and leaves the page cache as it was found."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from numoe.engine.experts.mailbox import Mailbox, MailboxLayout
from numoe.engine.experts.shard import ExpertShard, ShardSlice
from numoe.engine.gguf import GgufFile
from numoe.engine.models.config import ModelConfig
from numoe.engine.numa import PAGE_BYTES
from numoe.engine.progress import Progress
from numoe.engine.weights import CachedPages, SharedReads, load_tensors
from numoe.engine.weights import loading as loading_module
from numoe.engine.worker.weights import plan_dense
from tests.engine.weights.support import packed
from tests.models import make_model

MiB = 1 << 20


def written(path: Path) -> Path:
    """The file, on the disk and out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def cached_bytes(path: Path) -> int:
    ranges = CachedPages.look([path]).ranges[str(path)]
    return sum(last - first for first, last in ranges) * PAGE_BYTES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 MiB of experts and 8 of embeddings."""
    path = tmp_path_factory.mktemp("m") / "m.gguf"
    return make_model(path, "qwen3moe", vocab=8192, hidden=256, n_experts=9, expert_ffn=256, layers=3)


def test_every_byte_is_read_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = list[tuple[int, int]]()
    original = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        reads.append((offset, offset + len(buffers[0])))
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(loading_module, "_PIECE_BYTES", 1 << 16)
    with GgufFile.open(model) as gguf:
        tensors = plan_dense(gguf)
        packed(gguf, tensors)
    reads.sort()
    assert all(before[1] <= after[0] for before, after in pairwise(reads))
    assert sum(stop - start for start, stop in reads) == sum(p.tensor.nbytes for p in tensors)


def test_small_pieces_make_the_same_slice(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with GgufFile.open(model) as gguf:
        whole = packed(gguf, plan_dense(gguf))
        monkeypatch.setattr(loading_module, "_PIECE_BYTES", 1)
        assert np.array_equal(packed(gguf, plan_dense(gguf)), whole)


def test_the_page_cache_is_left_as_it_was(model: Path) -> None:
    path = written(model)
    if cached_bytes(path):
        pytest.skip("this file system does not give its pages back")
    with GgufFile.open(path) as gguf:
        tensors = plan_dense(gguf)
        largest = max(tensors, key=lambda p: p.tensor.nbytes).tensor
        middle = (largest.offset + largest.nbytes // 2) // PAGE_BYTES * PAGE_BYTES
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
            os.pread(file.fileno(), 1 * MiB, middle)
        before = CachedPages.look([path])
        assert cached_bytes(path) >= 1 * MiB
        out = np.zeros(sum(p.nbytes + 64 for p in tensors), np.uint8)
        load_tensors(out, tensors, Progress(1), 2, pages=before)
        before.drop_all()
        assert CachedPages.look([path]) == before
        load_tensors(out, tensors, Progress(1), 2)
        assert CachedPages.look([path]) != before  # what would be left without


def test_tensors_that_every_shard_reads_are_dropped_by_the_last(model: Path, tmp_path: Path) -> None:
    first, second = (SharedReads.open(tmp_path / "reads", i, 2, 3) for i in range(2))
    assert not first.finished(1)
    assert second.finished(1)
    first.finish_all()
    assert second.finished(0)


@pytest.mark.usefixtures("shm_root")
def test_shards_leave_the_page_cache_as_it_was(model: Path, tmp_path: Path) -> None:
    path = written(model)
    if cached_bytes(path):
        pytest.skip("this file system does not give its pages back")
    pages = CachedPages.look([path])
    with GgufFile.open(path) as gguf:
        config = ModelConfig.from_gguf(gguf)
        assert config.moe is not None
        mailbox = Mailbox.create(str(tmp_path / "mailbox"), MailboxLayout(2, 1, config.moe.n_used, config.hidden))
        for index in range(2):
            shard = ExpertShard(
                config, gguf, mailbox, ShardSlice(index, 2), folder=tmp_path, threads=1, threads_on_host=1
            )
            shard.load(pages)
            down = gguf.tensors["blk.1.ffn_down_exps.weight"]
            ranges = CachedPages.look([path]).ranges[str(path)]
            is_there = any(
                a * PAGE_BYTES <= down.offset + down.nbytes // 2 < b * PAGE_BYTES for a, b in ranges
            )
            assert is_there == (index == 0)
    pages.drop_all()
    header = min(tensor.offset for tensor in gguf.tensors.values())
    assert cached_bytes(path) <= header + MiB  # its metadata stays mapped


LOAD = """
import resource, sys
from pathlib import Path
from numoe.engine.cpu.packing import pack_kernel
from numoe.engine.gguf import GgufFile
from numoe.engine.progress import Progress
from numoe.engine.weights import media, open_tensors, SliceKey, source_fingerprint
from numoe.engine.worker.weights import plan_dense
from tests.engine.weights.test_loading import CachedPages, cached_bytes, written
media.SHM = Path(sys.argv[2])
path = written(Path(sys.argv[1]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with GgufFile.open(path) as gguf:
    tensors = plan_dense(gguf)
    for packed in tensors:
        packed.shape and pack_kernel(packed.tensor.qtype)
    class Watched(Progress):
        cached = 0
        def advance(self, nbytes):
            super().advance(nbytes)
            self.cached = max(self.cached, cached_bytes(path))
    pages, at_first, before, progress = CachedPages.look([path]), cached_bytes(path), peak(), Watched(1)
    key = SliceKey(source=source_fingerprint(gguf.paths), cut="dense")
    found = open_tensors(key, gguf, tensors, progress, threads=1, pages=pages)
    print(found.array.nbytes, peak() - before, progress.cached - at_first)
"""


def test_nothing_is_held_twice(shm_root: Path, tmp_path: Path) -> None:
    """The most memory that a load takes, and of the file what is in the page cache meanwhile."""
    path = make_model(tmp_path / "m.gguf", "llama", vocab=160_000, hidden=256, embd_type="F16", tied=False)
    command = [sys.executable, "-c", LOAD, str(path), str(shm_root)]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    nbytes, peak, cached = map(int, run.stdout.split())
    assert nbytes > 150 * MiB
    assert peak <= 1.05 * nbytes + 8 * MiB  # a thread's buffer, which is nothing to a real model
    assert cached <= 16 * MiB  # two pieces
