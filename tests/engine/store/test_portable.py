"""Pages that the kernels wrote, exported and imported elsewhere, attend to the same bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numoe.engine.cpu.kv_cells import cell_bytes
from numoe.engine.models.config import RopeConfig
from numoe.engine.store.portable import export_layer, import_layer, kv_type_name, portable_bytes
from numoe.engine.worker.kv_pool import KvType
from tests.engine.cpu.paged import Cache

KINDS = [KvType(keys, values) for keys, values in itertools.product(("f16", "q8_0"), repeat=2)]
NAMES = [kv_type_name(kind) for kind in KINDS]
HEADS, KV_HEADS = 4, 2


def write(cache: Cache, first: int, last: int, seed: int = 0) -> None:
    """Append tokens first … last - 1 of sequence 0 with the kernels; equal arguments, equal tokens."""
    rng = np.random.default_rng([seed, first])
    rows = np.asfortranarray([(0, position) for position in range(first, last)], np.int32)
    shape = (last - first, KV_HEADS, cache.dim)
    q = np.zeros((last - first, HEADS, cache.dim), np.float32)
    k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    rope = RopeConfig(dims=cache.dim, theta=1e4, style="neox")
    cache.rotate_and_append(q, k, v, rows, rope)


def page(cache: Cache, number: int) -> np.ndarray:
    at = cache.tables[0, number] * cache.page_bytes
    return cache.memory[at : at + cache.page_bytes]


def attend(cache: Cache, length: int) -> np.ndarray:
    q = np.random.default_rng(9).standard_normal((1, HEADS, cache.dim)).astype(np.float32)
    return cache.attend(q, np.asfortranarray([(0, length - 1)], np.int32), threads=1, split=False)


def moved(cache: Cache, length: int, capacity: int) -> Cache:
    """A cache elsewhere, of garbage, into which `length` tokens were imported."""
    other = Cache([100, capacity], KV_HEADS, cache.dim, seed=5, kind=cache.kind)
    other.tables = other.tables[1:]
    for number in range(-(-length // 256)):
        tokens = min(256, length - 256 * number)
        data = export_layer(page(cache, number), cache.kind, KV_HEADS, cache.dim, tokens)
        assert data.nbytes == portable_bytes(cache.kind, KV_HEADS, cache.dim, tokens)
        import_layer(memoryview(data), page(other, number), cache.kind, KV_HEADS, cache.dim, tokens)
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
@given(tokens=st.integers(1, 256), seed=st.integers(0, 99))
def test_export_and_import_are_inverses(kind: KvType, tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, portable_bytes(kind, 3, 64, tokens)).astype(np.uint8)
    if kind.values == "q8_0":  # as the CPU writes it: one scale a token
        scales = data.reshape(3, -1)[:, -4 * tokens :].view(np.uint16).reshape(3, tokens, 2)
        scales[..., 1] = scales[..., 0]
    raw = np.full(3 * head_bytes(kind), 0xFF, np.uint8)
    import_layer(data, raw, kind, 3, 64, tokens)
    assert np.array_equal(export_layer(raw, kind, 3, 64, tokens), data)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_the_bytes_are_heads_of_keys_then_values_by_token(kind: KvType) -> None:
    cache = Cache([256], KV_HEADS, 64, kind=kind)
    write(cache, 0, 256)
    data = export_layer(page(cache, 0), kind, KV_HEADS, 64)
    reference = Cache([256], KV_HEADS, 64)
    write(reference, 0, 256)
    expected = np.stack(reference.tokens(0, 256))  # [2, tokens, heads, dim]
    for head, part in np.ndindex(KV_HEADS, 2):
        name = (kind.keys, kind.values)[part]
        start = head * data.size // KV_HEADS + part * portable_bytes(KvType(kind.keys, kind.keys), 1, 64) // 2
        error = np.abs(decoded(data[start:], name) - expected[part, :, head]).max()
        assert error <= (0 if name == "f16" else 0.02)


def head_bytes(kind: KvType) -> int:
    """Bytes of a head of 64 dimensions in one of the CPU's pages."""
    return cell_bytes(kind.keys, 64, values=False) + cell_bytes(kind.values, 64, values=True)


def decoded(data: np.ndarray, kind: str) -> np.ndarray:
    """256 tokens of 64 dimensions, as the module's docstring describes them."""
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
    raw = np.zeros(head_bytes(kind), np.uint8)
    import_layer(data, raw, kind, 1, 64)
    again = export_layer(raw, kind, 1, 64)[256 * 64 * 2 :]
    largest = scales.reshape(256, 2).max(axis=1)
    assert np.array_equal(again[256 * 64 :].view(np.float16).reshape(256, 2), np.stack([largest, largest], axis=1))
    error = np.abs(decoded(again, "q8_0") - decoded(half, "q8_0")).max(axis=1)
    assert (error <= largest.astype(float) / 2 + 1e-9).all()


def test_sizes_that_do_not_fit_are_refused() -> None:
    raw = np.zeros(2 * 256 * 64 * 2, np.uint8)
    with pytest.raises(ValueError, match="is 65536 contiguous bytes, not 65535"):
        export_layer(raw[1:], KvType(), 1, 64)
    with pytest.raises(ValueError, match="not 257"):
        export_layer(raw, KvType(), 1, 64, 257)
    with pytest.raises(ValueError, match="10 tokens of a layer are 2560 bytes, not 2559"):
        import_layer(np.zeros(2559, np.uint8), raw, KvType(), 1, 64, 10)
