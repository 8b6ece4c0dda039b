"""Pages that the kernels wrote, exported and imported elsewhere, attend to the same bits."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from numoe.engine.models.config import RopeConfig
from numoe.engine.store.chunks import build_chunk, decode_chunk
from numoe.engine.store.portable import kv_type_name, portable_bytes
from numoe.engine.worker.kv_pool import KvPool, KvType
from numoe.engine.worker.pages import CpuPages
from tests.engine.cpu.paged import Cache
from tests.engine.gpu.paged import model

KINDS = [KvType(keys, values) for keys, values in itertools.product(("f16", "q8_0"), repeat=2)]
NAMES = [kv_type_name(kind) for kind in KINDS]
HEADS, KV_HEADS, KEY = 4, 2, bytes(32)


def write(cache: Cache, first: int, last: int, seed: int = 0) -> None:
    """Append tokens first … last - 1 of sequence 0 with the kernels; equal arguments, equal tokens."""
    rng = np.random.default_rng([seed, first])
    rows = np.asfortranarray([(0, position) for position in range(first, last)], np.int32)
    shape = (last - first, KV_HEADS, cache.dim)
    q = np.zeros((last - first, HEADS, cache.dim), np.float32)
    k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    rope = RopeConfig(dims=cache.dim, theta=1e4, style="neox")
    cache.rotate_and_append(q, k, v, rows, rope)


def attend(cache: Cache, length: int) -> np.ndarray:
    q = np.random.default_rng(9).standard_normal((1, HEADS, cache.dim)).astype(np.float32)
    return cache.attend(q, np.asfortranarray([(0, length - 1)], np.int32), threads=1, split=False)


def pages_of(cache: Cache) -> CpuPages:
    """A cache has the pages of a pool of one layer."""
    pool: Any = SimpleNamespace(
        kind=cache.kind, data=cache.memory,
        key_bytes=cache.key_bytes, head_bytes=cache.head_bytes, page_bytes=cache.page_bytes,
    )  # fmt: skip
    return CpuPages(model(HEADS, KV_HEADS, cache.dim, layers=1), pool)


def moved(cache: Cache, length: int, capacity: int) -> Cache:
    """A cache elsewhere, of garbage, into which `length` tokens were imported."""
    other = Cache([100, capacity], KV_HEADS, cache.dim, seed=5, kind=cache.kind)
    other.tables = other.tables[1:]
    source, target = pages_of(cache), pages_of(other)
    for number in range(-(-length // 256)):
        tokens = min(256, length - 256 * number)
        layers = source.export_page(cache.tables[0, number], tokens)
        assert layers[0].nbytes == portable_bytes(cache.kind, KV_HEADS, cache.dim, tokens)
        target.import_page(other.tables[0, number], layers, tokens)
    return other


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("length", [1, 15, 33, 256, 300])
def test_attention_is_the_same_after_a_move(kind: KvType, dim: int, length: int) -> None:
    cache = Cache([400], KV_HEADS, dim, kind=kind)
    write(cache, 0, length)
    other = moved(cache, length, 400)
    assert np.array_equal(attend(cache, length), attend(other, length))
    write(cache, length, length + 40)
    write(other, length, length + 40)
    assert np.array_equal(attend(cache, length + 40), attend(other, length + 40))


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_the_bytes_are_heads_of_keys_then_values_by_token(kind: KvType) -> None:
    cache, reference = Cache([256], KV_HEADS, 64, kind=kind), Cache([256], KV_HEADS, 64)
    write(cache, 0, 256)
    write(reference, 0, 256)
    data = pages_of(cache).export_page(0, 256)[0]
    expected = np.stack(reference.tokens(0, 256))  # [2, tokens, heads, dim]
    for head, part in np.ndindex(KV_HEADS, 2):
        name = (kind.keys, kind.values)[part]
        start = head * data.size // KV_HEADS + part * portable_bytes(KvType(kind.keys, kind.keys), 1, 64) // 2
        error = np.abs(decoded(data[start:], name) - expected[part, :, head]).max()
        assert error <= (0 if name == "f16" else 0.02)


def decoded(data: np.ndarray, kind: str) -> np.ndarray:
    """256 tokens of 64 dimensions, as `store/portable.py` describes them."""
    if kind == "f16":
        return data[: 256 * 64 * 2].view(np.float16).reshape(256, 64).astype(float)
    codes = data[: 256 * 64].view(np.int8).reshape(256, 2, 32)
    scales = data[256 * 64 : 256 * 64 + 256 * 4].view(np.float16).reshape(256, 2, 1)
    return (codes * scales.astype(float)).reshape(256, 64)


def test_values_with_a_scale_for_every_32_dimensions_are_rounded_to_one() -> None:
    kind, rng = KvType("f16", "q8_0"), np.random.default_rng(3)
    data = np.zeros(portable_bytes(kind, 1, 64), np.uint8)
    half = data[256 * 64 * 2 :]
    half[: 256 * 64].view(np.int8)[:] = rng.integers(-127, 128, 256 * 64)
    scales = half[256 * 64 :].view(np.float16)
    scales[:] = rng.uniform(0.01, 0.02, 512)
    config = model(1, 1, 64, layers=1)
    pages = CpuPages(config, KvPool(config, 1, kind))
    pages.import_page(0, [data], 256)
    again = pages.export_page(0, 256)[0][256 * 64 * 2 :]
    largest = scales.reshape(256, 2).max(axis=1)
    assert np.array_equal(again[256 * 64 :].view(np.float16).reshape(256, 2), np.stack([largest, largest], axis=1))
    error = np.abs(decoded(again, "q8_0") - decoded(half, "q8_0")).max(axis=1)
    assert (error <= largest.astype(float) / 2 + 1e-9).all()


def filled(kind: KvType, n_pages: int) -> tuple[CpuPages, np.ndarray]:
    """Pages of random bytes of a model of three layers, and their memory [n_pages, page bytes]."""
    config = model(HEADS, KV_HEADS, 64, layers=3)
    pool = KvPool(config, n_pages, kind)
    pool.data[:] = np.random.default_rng(1).integers(0, 256, pool.data.size, np.uint8)
    return CpuPages(config, pool), pool.data.reshape(n_pages, -1)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_a_chunk_is_written_in_place_and_read_back(kind: KvType) -> None:
    pages, memory = filled(kind, 3)
    shape, before = pages.shape(100), memory[2].copy()
    data = build_chunk(KEY, shape, lambda out: pages.export_page(0, 100, out))
    pages.import_page(1, decode_chunk(data, KEY, shape), 100)
    assert all(map(np.array_equal, pages.export_page(0, 100), pages.export_page(1, 100)))
    assert np.array_equal(memory[2], before)


def test_a_page_is_copied() -> None:
    pages, memory = filled(KvType("q8_0", "f16"), 3)
    before = memory.copy()
    pages.copy_page(0, 2)
    assert np.array_equal(memory, before[[0, 1, 0]])


def test_many_threads_may_move_pages_at_once() -> None:
    pages, _ = filled(KvType("q8_0", "q8_0"), 32)
    want = [pages.export_page(page, 256) for page in range(16)]

    def move(page: int) -> bool:
        layers = pages.export_page(page, 256)
        pages.import_page(16 + page, layers, 256)
        return all(map(np.array_equal, layers, want[page]))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(move, range(16)))
    assert all(all(map(np.array_equal, pages.export_page(16 + page, 256), want[page])) for page in range(16))


def test_sizes_that_do_not_fit_are_refused() -> None:
    pages, memory = filled(KvType(), 2)
    before, layers = memory.copy(), [np.zeros(10 * KV_HEADS * 64 * 4, np.uint8)] * 3
    with pytest.raises(ValueError, match=r"3 layers of 5120 bytes, not 3 of \[5119, 5120\]"):
        pages.import_page(0, [*layers[:2], layers[0][1:]], 10)
    with pytest.raises(ValueError, match="3 layers of 5120 bytes, not 2 of"):
        pages.import_page(0, layers[:2], 10)
    with pytest.raises(ValueError, match="1 to 256 tokens, not 257"):
        pages.import_page(0, layers, 257)
    with pytest.raises(ValueError, match="10 tokens take 15360 contiguous bytes, not 15359"):
        pages.export_page(0, 10, np.zeros(15359, np.uint8))
    with pytest.raises(IndexError):
        pages.export_page(2, 10)
    assert np.array_equal(memory, before)
