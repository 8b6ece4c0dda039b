"""Appending to the KV pool on the GPU, and rotary embedding, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from numoe.engine.errors import UnsupportedError
from numoe.engine.gpu.kv_pool import GPU_KV_TYPES, GpuKvPool, check_kv_type
from numoe.engine.models.config import RopeConfig
from numoe.engine.models.reference import rotate
from numoe.engine.worker.kv_pool import KvType
from tests.engine.gpu.paged import Sequences, decode, encode, model, nmse

ROPES = {
    "norm": RopeConfig(dims=64, theta=1e4, style="norm"),
    "neox": RopeConfig(dims=64, theta=1e6, style="neox"),
    "half a head": RopeConfig(dims=32, theta=1e4, style="neox"),
    "half a head, norm": RopeConfig(dims=32, theta=1e4, style="norm"),
    "yarn": RopeConfig(
        dims=64, theta=1e4, style="norm", scaling="yarn", factor=4.0, original_context=64, ext_factor=1.0
    ),
}  # fmt: skip
NOISE = {"f16": 1e-7, "q8_0": 6e-5, "q4_0": 1.5e-2}
"""Largest mean squared error of a KV type over normally distributed numbers' mean square."""


@pytest.mark.parametrize("kind", GPU_KV_TYPES)
@pytest.mark.parametrize("dim", [32, 96, 128])
def test_the_reference_keeps_numbers_and_fills_a_cell(kind: str, dim: int) -> None:
    x = np.random.default_rng(1).standard_normal((256, dim)).astype(np.float32)
    cell = encode(x, kind)
    config = model(1, 1, dim)
    assert len(cell) * 2 * config.n_layers == GpuKvPool.nbytes(config, 1, KvType(kind, kind))
    assert nmse(decode(cell, kind, dim), x) < NOISE[kind]


@pytest.mark.parametrize(
    ("dim", "kind", "reason"),
    [
        (128, KvType("q5_1", "f16"), "q5_1"), (48, KvType("f16", "q4_0"), "multiple of 32"),
        (24, KvType(), "multiple of 16"), (512, KvType(), "up to 256"),
    ],
)  # fmt: skip
def test_what_kernels_cannot_take_is_refused(dim: int, kind: KvType, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        check_kv_type(model(2, 1, dim), kind)


def appended(sequences: Sequences, q: np.ndarray, k: np.ndarray, v: np.ndarray, rows: list, norms=(None, None)):
    """Run `append` for layer 1; the rotated queries."""
    import cupy

    inputs = sequences.inputs(rows)
    q, k, v = (cupy.asarray(x.reshape(len(rows), -1)) for x in (q, k, v))
    norms = [None if norm is None else cupy.asarray(norm) for norm in norms]
    sequences.attention.begin(inputs.positions, len(rows))
    sequences.attention.append(
        1, q, k, v, *norms, inputs.positions, inputs.slots, inputs.page_tables, len(rows)
    )  # fmt: skip
    return q.get().reshape(len(rows), -1, sequences.config.head_dim)


@pytest.mark.gpu
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", ROPES)
def test_queries_and_keys_are_rotated_and_written_to_their_pages(name: str, normed: bool) -> None:
    rope, rng, count = ROPES[name], np.random.default_rng(3), 270
    sequences = Sequences(model(6, 2, 64, rope=rope), [count], max_rows=200)
    q, k, v = (rng.standard_normal((count, heads, 64)).astype(np.float32) for heads in (6, 2, 2))
    norms = tuple(rng.uniform(0.5, 2, 64).astype(np.float32) for _ in range(2)) if normed else (None, None)
    order, rotated = rng.permutation(count), np.empty_like(q)
    for part in (order[:100], order[100:]):
        rotated[part] = appended(sequences, q[part], k[part], v[part], [(0, int(at)) for at in part], norms)

    def want(x: np.ndarray, which: int) -> np.ndarray:
        x = x.astype(np.float64)
        if normed:
            x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * norms[which]
        return rotate(x, rope)

    np.testing.assert_allclose(rotated, want(q, 0), atol=3e-6)
    keys, values = sequences.tokens(0, count)
    np.testing.assert_allclose(keys, want(k, 1), rtol=2**-11 + 1e-5, atol=3e-6)  # float16 rounds to half a unit
    assert np.array_equal(values, v.astype(np.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("keys", GPU_KV_TYPES)
@pytest.mark.parametrize("values", GPU_KV_TYPES)
def test_every_kv_type_is_written_as_the_reference_does(keys: str, values: str, dim: int) -> None:
    rng, kind = np.random.default_rng(4), KvType(keys, values)
    sequences = Sequences(model(3, 3, dim), [300, 40], kind, max_rows=300)
    k, v = (rng.standard_normal((300, 3, dim)).astype(np.float32) * 3 for _ in range(2))
    v[17] = 0
    appended(sequences, k.copy(), k, v, [(0, at) for at in range(300)])
    found_keys, found_values = sequences.tokens(0, 300)
    assert nmse(found_keys, rotate(k.astype(np.float64), sequences.config.rope)) < NOISE[keys]
    for head in range(3):
        padded = np.zeros((512, dim), np.float32)
        padded[:300] = v[:, head]
        want = np.concatenate([decode(encode(page, values), values, dim) for page in np.split(padded, 2)])
        # A quotient that lies between two codes may be rounded to either.
        off = np.abs(found_values[:, head] - want[:300])
        assert (off > 1e-6).mean() < 1e-3
        assert off.max() <= np.abs(v).max() / (7 if values == "q4_0" else 120)
    assert (sequences.pool.data[:, 0].get() == 0xFF).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GPU_KV_TYPES)
def test_writing_a_token_leaves_every_other_byte_alone(kind: str) -> None:
    rng = np.random.default_rng(4)
    sequences = Sequences(model(2, 2, 64), [300, 40], KvType(kind, kind))
    before = sequences.pool.data.get()
    k = rng.standard_normal((1, 2, 64)).astype(np.float32)
    appended(sequences, k, k, k, [(0, 257)])
    changed = sequences.pool.data.get() != before
    assert np.unique(np.nonzero(changed)[0]).tolist() == [sequences.tables[0, 1]]
    assert np.unique(np.nonzero(changed)[1]).tolist() == [1]
    token_bytes = sequences.pool.layer_bytes // 256
    assert 0.8 * token_bytes <= changed.sum() <= token_bytes  # some new bytes are 0xFF too


@pytest.mark.gpu
def test_angles_are_exact_far_into_a_long_context() -> None:
    """float32 angles would be off by a hundredth of a turn at a million tokens."""
    import cupy

    rope = RopeConfig(dims=64, theta=1e6, style="neox", attn_factor=1.5)
    sequences = Sequences(model(1, 1, 64, rope=rope), [1])
    positions = np.array([0, 131_071, 1_000_003], np.int32)
    sequences.attention.begin(cupy.asarray(positions), 3)
    angles = positions[:, None] * 1e6 ** (-np.arange(32) / 32)
    found = sequences.attention._table.get()[:3]
    np.testing.assert_allclose(found[:, :, 0], 1.5 * np.cos(angles), atol=2e-7)
    np.testing.assert_allclose(found[:, :, 1], 1.5 * np.sin(angles), atol=2e-7)
