"""Rotary embedding and attention over pages, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numoe.engine.cpu import attention
from numoe.engine.cpu.memory import address
from numoe.engine.cpu.program import N_ROWS, POSITIONS, STEP_FIELDS
from numoe.engine.models.config import RopeConfig
from numoe.engine.models.reference import rotate, softmax
from numoe.engine.worker.kv_pool import KV_TYPES, KvType
from tests.engine.cpu.paged import Cache, run

EDGES = [1, 2, 15, 16, 17, 31, 33, 240, 241, 255, 256, 257, 272, 511, 512, 513]
ROPES = {
    "norm": RopeConfig(dims=32, theta=1e4, style="norm"),
    "neox": RopeConfig(dims=32, theta=1e6, style="neox"),
    "half a head": RopeConfig(dims=16, theta=1e4, style="neox"),
    "yarn": RopeConfig(
        dims=32, theta=1e4, style="norm", scaling="yarn", factor=4.0, original_context=64, ext_factor=1.0
    ),
}


def rows_of(pairs: list[tuple[int, int]]) -> np.ndarray:
    """(slot, position) rows."""
    return np.asfortranarray(pairs, np.int32)


def softmax_attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One row, float64: q [heads, dim] over keys and values [tokens, KV heads, dim]."""
    group = q.shape[0] // keys.shape[1]
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    weights = softmax(np.einsum("hd,thd->ht", q.astype(np.float64), keys) / np.sqrt(q.shape[1]))
    return np.einsum("ht,thd->hd", weights, values)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.sampled_from(EDGES), min_size=1, max_size=4), group=st.integers(1, 16),
    kv_heads=st.integers(1, 3), dim=st.sampled_from([16, 48, 64, 128]), sharpness=st.sampled_from([0.1, 1.0, 30.0]),
)  # fmt: skip
def test_attention_equals_float64_and_splitting_it_changes_no_bit(
    lengths: list[int], group: int, kv_heads: int, dim: int, sharpness: float
) -> None:
    rng = np.random.default_rng(sum(lengths))
    cache = Cache(lengths, kv_heads, dim)
    for slot, length in enumerate(lengths):
        cache.fill(slot, length, rng)
    rows = rows_of([(slot, length - 1) for slot, length in enumerate(lengths)])
    q = (rng.standard_normal((len(rows), group * kv_heads, dim)) * sharpness).astype(np.float32)
    found = cache.attend(q, rows, threads=1, split=False)
    for row, (slot, length) in enumerate(enumerate(lengths)):
        want = softmax_attention(q[row], *cache.tokens(slot, length))
        assert np.abs(found[row] - want).max() <= 5e-6 * max(1, sharpness)
    for threads, split in ((1, True), (3, True), (2, False)):
        assert np.array_equal(cache.attend(q, rows, threads=threads, split=split), found)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.sampled_from(EDGES), min_size=1, max_size=3), group=st.integers(1, 9),
    dim=st.sampled_from([32, 64, 128]), keys=st.sampled_from(KV_TYPES), values=st.sampled_from(KV_TYPES),
)  # fmt: skip
def test_eight_bit_caches_are_close_to_float64_and_splitting_changes_no_bit(
    lengths: list[int], group: int, dim: int, keys: str, values: str
) -> None:
    rng, rope = np.random.default_rng(sum(lengths)), RopeConfig(dims=dim, theta=1e4, style="neox")
    cache, written = Cache(lengths, 2, dim, kind=KvType(keys, values)), []
    for slot, length in enumerate(lengths):
        k, v = (rng.standard_normal((length, 2, dim)).astype(np.float32) for _ in range(2))
        cache.rotate_and_append(k, k, v, rows_of([(slot, i) for i in range(length)]), rope, threads=2)
        written.append((rotate(k.astype(np.float64), rope), v.astype(np.float64)))
    rows = rows_of([(slot, length - 1) for slot, length in enumerate(lengths)])
    q = rng.standard_normal((len(rows), 2 * group, dim)).astype(np.float32)
    found = cache.attend(q, rows, threads=1, split=False)
    for row, history in enumerate(written):
        want = softmax_attention(q[row], *history)
        assert ((found[row] - want) ** 2).mean() <= 3e-4 * (want**2).mean()
    for threads, split in ((1, True), (3, True), (2, False)):
        assert np.array_equal(cache.attend(q, rows, threads=threads, split=split), found)


def test_a_row_of_a_prefill_chunk_sees_what_comes_before_it_and_nothing_after() -> None:
    cache, rng = Cache([300], 1, 32), np.random.default_rng(1)
    cache.fill(0, 300, rng)
    rows = rows_of([(0, position) for position in (0, 15, 16, 254, 255, 256, 298)])
    q = rng.standard_normal((len(rows), 2, 32)).astype(np.float32)
    found = cache.attend(q, rows, threads=2, split=False)
    for row, (_, position) in enumerate(rows):
        want = softmax_attention(q[row], *cache.tokens(0, position + 1))
        np.testing.assert_allclose(found[row], want, atol=5e-6)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", ROPES)
def test_queries_and_keys_are_rotated_and_written_to_their_pages(name: str, normed: bool) -> None:
    rope, rng, count = ROPES[name], np.random.default_rng(3), 270
    cache = Cache([count], 2, 32)
    q, k, v = (rng.standard_normal((count, heads, 32)).astype(np.float32) for heads in (6, 2, 2))
    norms = tuple(rng.uniform(0.5, 2, 32).astype(np.float32) for _ in range(2)) if normed else None
    order = rng.permutation(count)
    rotated = np.empty_like(q)
    for part in (order[:100], order[100:]):
        rows = rows_of([(0, position) for position in part])
        rotated[part] = cache.rotate_and_append(q[part], k[part], v[part], rows, rope, norms=norms, threads=2)

    def want(x: np.ndarray, which: int) -> np.ndarray:
        x = x.astype(np.float64)
        if norms:
            x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * norms[which]
        return rotate(x, rope)

    np.testing.assert_allclose(rotated, want(q, 0), atol=3e-6)
    keys, values = cache.tokens(0, count)
    np.testing.assert_allclose(keys, want(k, 1), rtol=2**-11 + 1e-5, atol=3e-6)  # float16 rounds to half a unit
    assert np.array_equal(values, v.astype(np.float16))


def test_writing_a_token_leaves_every_other_one_alone() -> None:
    cache, rng = Cache([300, 40], 2, 32), np.random.default_rng(4)
    for slot, length in enumerate((300, 40)):
        cache.fill(slot, length, rng)
    before = [cache.tokens(slot, length) for slot, length in enumerate((300, 40))]
    new = rng.standard_normal((1, 2, 32)).astype(np.float32)
    cache.rotate_and_append(new, new, new, rows_of([(0, 257)]), ROPES["neox"])
    for slot, old in enumerate(before):
        for was, now in zip(old, cache.tokens(slot, len(old[0])), strict=True):
            changed = np.unique(np.nonzero(was != now)[0]).tolist()
            assert changed == ([257] if slot == 0 else [])


def test_angles_are_exact_far_into_a_long_context() -> None:
    """float32 angles would be off by a hundredth of a turn at a million tokens."""
    positions, inverse = np.array([0, 131_071, 1_000_003], np.int32), 1e6 ** (-np.arange(32) / 32)
    out, step = np.empty((3, 2, 32), np.float32), np.zeros(STEP_FIELDS, np.int64)
    step[[N_ROWS, POSITIONS]] = 3, address(positions)
    run([(attention.rope_table, (address(inverse), 32, 1.5, address(out), out.strides[0]))], step, threads=1)
    angles = positions[:, None] * inverse
    np.testing.assert_allclose(out[:, 0], 1.5 * np.cos(angles), atol=2e-7)
    np.testing.assert_allclose(out[:, 1], 1.5 * np.sin(angles), atol=2e-7)
