"""Pages of a GPU's KV pool in canonical bytes: out, in, copied, and on to a CPU and back."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from numoe.engine.gpu import pages as gpu_pages
from numoe.engine.gpu.forward import GpuForward
from numoe.engine.gpu.kv_pool import GPU_KV_TYPES, GpuKvPool
from numoe.engine.gpu.pages import GpuPages
from numoe.engine.store.chunks import build_chunk, decode_chunk
from numoe.engine.store.portable import kv_type_name
from numoe.engine.worker.kv_pool import KV_TYPES, KvPool, KvType
from numoe.engine.worker.pages import CpuPages
from tests.engine.cpu.portable_reference import export_gpu_layer
from tests.engine.gpu.paged import Sequences, model
from tests.engine.worker.local import batch, local_forward, sequence_logits
from tests.models import make_model

pytestmark = pytest.mark.gpu

KINDS = [KvType(*both) for both in itertools.product(GPU_KV_TYPES, repeat=2)]
KEY = bytes(32)
TOKENS = np.random.default_rng(7).integers(0, 256, 300).tolist()


def filled(kind: KvType, *, n_pages: int = 3, dim: int = 64, layers: int = 3) -> tuple[GpuPages, GpuKvPool]:
    """Pages of random bytes, of two KV heads."""
    config = model(4, 2, dim, layers=layers)
    pool = GpuKvPool(config, n_pages, kind)
    pool.data.set(np.random.default_rng(1).integers(0, 256, pool.data.shape, np.uint8))
    pool.data.device.synchronize()
    return GpuPages(config, pool), pool


@pytest.mark.parametrize("kind", KINDS, ids=kv_type_name)
@pytest.mark.parametrize("tokens", [1, 77, 256])
@pytest.mark.parametrize("dim", [32, 96, 128])
def test_a_page_goes_out_and_comes_back(
    kind: KvType, tokens: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_pages, "_BUFFER_BYTES", 1 << 18)  # one layer at a time, some, or all
    pages, pool = filled(kind, dim=dim, layers=11)
    before = pool.data.get()
    layers = pages.export_page(1, tokens)
    for found, raw in zip(layers, before[1], strict=True):
        assert np.array_equal(found, export_gpu_layer(raw, kind, 2, dim, tokens))
    data = build_chunk(KEY, pages.shape(tokens), lambda out: pages.export_page(1, tokens, out))
    pages.import_page(2, decode_chunk(data, KEY, pages.shape(tokens)), tokens)
    after = pool.data.get()
    assert np.array_equal(after[:2], before[:2])
    for found, raw in zip(layers, after[2], strict=True):
        assert np.array_equal(found, export_gpu_layer(raw, kind, 2, dim, tokens))
    if tokens == 256:
        assert np.array_equal(after[2], before[1])


def test_a_page_is_copied() -> None:
    pages, pool = filled(KvType("q8_0", "q4_0"))
    before = pool.data.get()
    pages.copy_page(0, 2)
    assert np.array_equal(pool.data.get(), before[[0, 1, 0]])


def test_many_threads_may_move_pages_at_once() -> None:
    pages, pool = filled(KvType("q8_0", "q8_0"), n_pages=32)
    before = pool.data.get()

    def move(page: int) -> None:
        pages.import_page(16 + page, pages.export_page(page, 256), 256)

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(move, range(16)))
    assert np.array_equal(pool.data.get(), np.concatenate([before[:16]] * 2))


def test_sizes_that_do_not_fit_are_refused_and_leave_the_port_usable() -> None:
    pages, pool = filled(KvType())
    before = pool.data.get()
    for _ in range(2 * gpu_pages._LANES):
        with pytest.raises(ValueError, match="3 layers of 5120 bytes, not 1 of"):
            pages.import_page(0, [bytes(5120)], 10)
        with pytest.raises(IndexError):
            pages.export_page(3, 10)
    assert len(pages.export_page(2, 10)) == 3
    assert np.array_equal(pool.data.get(), before)


@pytest.mark.parametrize("kind", [KvType(*both) for both in itertools.product(KV_TYPES, repeat=2)], ids=kv_type_name)
@pytest.mark.parametrize("tokens", [1, 33, 256])
def test_what_a_cpu_exports_goes_through_a_gpu_unchanged(kind: KvType, tokens: int) -> None:
    config = model(4, 2, 64, layers=3)
    pool = KvPool(config, 2, kind)
    pool.data[:] = np.random.default_rng(2).integers(0, 256, pool.data.size, np.uint8)
    cpu, (gpu, _) = CpuPages(config, pool), filled(kind)
    want = cpu.export_page(0, tokens)
    gpu.import_page(1, want, tokens)
    cpu.import_page(1, gpu.export_page(1, tokens), tokens)
    assert all(map(np.array_equal, cpu.export_page(1, tokens), want))


@pytest.mark.parametrize("kind", KINDS, ids=kv_type_name)
@pytest.mark.parametrize("length", [1, 100, 256])
def test_attention_is_the_same_bits_after_a_move(kind: KvType, length: int) -> None:
    rng = np.random.default_rng(4)
    here, there = (Sequences(model(4, 2, 64), [256], kind) for _ in range(2))
    here.fill(0, length, rng)
    pages = [GpuPages(sequences.config, sequences.pool) for sequences in (here, there)]
    source, target = int(here.tables[0, 0]), int(there.tables[0, 0])
    there.pool.data.device.synchronize()
    pages[1].import_page(target, pages[0].export_page(source, length), length)
    q = rng.standard_normal((1, 4, 64)).astype(np.float32)
    found = [sequences.attend("decode", q, [(0, length - 1)]) for sequences in (here, there)]
    assert np.array_equal(*found)


def test_pages_move_while_steps_run_and_graphs_are_captured(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m.gguf", "qwen3moe", n_experts=4, n_used=4)
    with local_forward(path, slots=2, make=GpuForward) as forward:
        want = sequence_logits(forward, TOKENS[:40], chunk=1)
    with local_forward(path, slots=2, make=GpuForward) as forward:
        spare = 0  # the last page of the last slot (see `batch`), which no step reaches
        exported, stop = forward.pages.export_page(spare, 256), threading.Event()

        def move() -> int:
            count = 0
            while not stop.is_set() or not count:
                forward.pages.import_page(spare, exported, 256)
                assert all(map(np.array_equal, forward.pages.export_page(spare, 256), exported))
                count += 1
            return count

        with ThreadPoolExecutor(2) as threads:
            moves = threads.submit(move)
            try:
                found = sequence_logits(forward, TOKENS[:40], chunk=1)  # the first step captures its graph
                for rows in range(2, 9):
                    forward.run(batch(forward, [(TOKENS[i], i, 1) for i in range(rows)], [0]))
            finally:
                stop.set()
            assert moves.result() > 0
        np.testing.assert_array_equal(found, want)
