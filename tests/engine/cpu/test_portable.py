"""The kernels between KV pages and canonical bytes are NumPy's, on the CPU's pages and on a GPU's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numoe.engine.cpu import portable
from numoe.engine.gpu import kv_pool as gpu
from numoe.engine.store.portable import portable_bytes
from numoe.engine.worker.kv_pool import KvType
from tests.engine.cpu import portable_reference as reference
from tests.engine.cpu.pages import Layers

CPU_KINDS = [KvType(*both) for both in itertools.product(("f16", "q8_0"), repeat=2)]
GPU_KINDS = [KvType(*both) for both in itertools.product(gpu.GPU_KV_TYPES, repeat=2)]


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    """Compiled before hypothesis looks at the clock."""
    portable.prepare(portable.transfer)
    portable.prepare(portable.transfer_interleaved)


def dims(kind: KvType, *, on_gpu: bool = False) -> st.SearchStrategy[int]:
    step = 16 if kind == KvType() else 32
    return st.integers(1, (256 if on_gpu else 160) // step).map(lambda n: n * step)


def of_page(kinds: list[KvType], *, on_gpu: bool) -> st.SearchStrategy[Layers]:
    """Layers of any size."""
    return st.sampled_from(kinds).flatmap(
        lambda kind: st.builds(
            Layers, st.just(kind), st.integers(1, 3), dims(kind, on_gpu=on_gpu), st.just(on_gpu), st.integers(1, 2)
        )
    )


ANY = st.one_of(of_page(CPU_KINDS, on_gpu=False), of_page(GPU_KINDS, on_gpu=True))


@given(layers=ANY, tokens=st.integers(1, 256), seed=st.integers(0, 99))
def test_exported_bytes_are_the_references(layers: Layers, tokens: int, seed: int) -> None:
    page = layers.random(seed)
    assert np.array_equal(layers.exported(page, tokens), layers.reference(page, tokens))


@given(layers=ANY, tokens=st.integers(1, 256), seed=st.integers(0, 99))
def test_imported_tokens_are_what_was_exported_and_all_others_stay(layers: Layers, tokens: int, seed: int) -> None:
    page, rows = layers.random(seed), layers.exported(layers.random(seed + 1), tokens)
    before = layers.exported(page, 256)
    layers.transfer(page, rows, tokens, to_page=True)
    assert np.array_equal(layers.reference(page, tokens), rows)
    after = layers.exported(page, 256)
    for old, new in zip(before, after, strict=True):
        for was, now in zip(by_token(old, layers), by_token(new, layers), strict=True):
            assert np.array_equal(was[tokens:], now[tokens:])


def by_token(row: np.ndarray, layers: Layers) -> list[np.ndarray]:
    """The codes and scales of a whole layer's heads, keys and values, [256 tokens, bytes] each."""
    parts = []
    for _, kind in itertools.product(range(layers.heads), (layers.kind.keys, layers.kind.values)):
        for nbytes in (layers.dim * {"f16": 16, "q8_0": 8, "q4_0": 4}[kind] // 8, kind != "f16" and layers.dim // 16):
            part, row = np.split(row, [256 * nbytes])
            parts.append(part.reshape(256, -1))
    return parts


@given(
    heads=st.integers(1, 3), blocks=st.integers(1, 5), tokens=st.integers(1, 256), seed=st.integers(0, 99),
    equal=st.booleans(),
)  # fmt: skip
def test_values_with_many_scales_are_imported_as_the_reference_does(
    heads: int, blocks: int, tokens: int, seed: int, *, equal: bool
) -> None:
    layers, rng = Layers(KvType("f16", "q8_0"), heads, 32 * blocks, count=1), np.random.default_rng(seed)
    rows = rng.integers(0, 256, (1, portable_bytes(layers.kind, heads, layers.dim, tokens)), np.uint8)
    scales = rows.reshape(heads, -1)[:, -2 * blocks * tokens :].view(np.float16).reshape(heads, tokens, blocks)
    scales[...] = rng.uniform(0.001, 3, scales.shape)
    if equal:
        scales[:, ::2] = scales[:, ::2, :1]
    page, want = layers.random(seed), layers.random(seed)
    layers.transfer(page, rows, tokens, to_page=True)
    reference.import_layer(rows[0], want[0], layers.kind, heads, layers.dim, tokens)
    assert np.array_equal(layers.exported(page, tokens), layers.exported(want, tokens))


@pytest.mark.parametrize("values", ["f16", "q8_0"])
def test_tiles_of_imported_values_have_scales_of_one(values: str) -> None:
    layers = Layers(KvType("f16", values), 1, 64, count=1)
    page = layers.random(0)
    before = page.copy()
    layers.transfer(page, layers.exported(layers.random(1), 33), 33, to_page=True)
    if values == "q8_0":
        tiles = page[0, layers.cells[0] :][: 4 * 8 * 544].reshape(4, 8, 544)[..., 512:].view(np.float16)
        assert (tiles[:, :2] == 1).all()
        old = before[0, layers.cells[0] :][: 4 * 8 * 544].reshape(4, 8, 544)
        assert np.array_equal(tiles[:, 2:].view(np.uint8), old[:, 2:, 512:])


@given(
    keys=st.sampled_from(["f16", "q8_0"]), values=st.sampled_from(["f16", "q8_0"]), tokens=st.integers(1, 256),
    blocks=st.integers(1, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_what_a_cpu_exports_goes_through_a_gpu_unchanged(
    keys: str, values: str, tokens: int, blocks: int, seed: int
) -> None:
    kind = KvType(keys, values)
    cpu, on_gpu = Layers(kind, 2, 32 * blocks), Layers(kind, 2, 32 * blocks, on_gpu=True)
    rows, there, back = cpu.exported(cpu.random(seed), tokens), on_gpu.random(seed + 1), cpu.random(seed + 2)
    on_gpu.transfer(there, rows, tokens, to_page=True)
    assert np.array_equal(on_gpu.reference(there, tokens), rows)
    cpu.transfer(back, on_gpu.exported(there, tokens), tokens, to_page=True)
    assert np.array_equal(cpu.reference(back, tokens), rows)
