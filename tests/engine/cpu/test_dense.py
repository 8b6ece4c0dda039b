"""The dense kernels of a step over any shape, on several threads, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QuantType
from hypothesis import given, settings
from hypothesis import strategies as st

from numoe.engine.cpu import dense
from numoe.engine.cpu.memory import address, aligned_bytes
from numoe.engine.cpu.products import product_kernel, unpack_kernel
from numoe.engine.cpu.program import LOGIT_ROWS, N_LOGITS, N_ROWS, STEP_FIELDS, TOKENS, Kernel
from numoe.engine.cpu.rows import activation_bytes, quantize_reference
from numoe.engine.worker.buffers import Rows
from tests.engine.cpu.paged import run
from tests.engine.cpu.support import Matrix, random_weights
from tests.engine.cpu.test_products import as_seen

# Rows with one and odd ones among them; columns that are multiples of 16, or of 32, and seldom of 256.
row_counts = st.integers(1, 21)
vector_columns = st.integers(1, 40).map(lambda n: 16 * n)
block_columns = st.integers(1, 20).map(lambda n: 32 * n)
thread_counts = st.integers(1, 3)
any_shape = settings(max_examples=25, deadline=None)


def random_rows(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(rows * cols).standard_normal((rows, cols)).astype(np.float32)


def buffer(values: np.ndarray) -> Rows:
    """A buffer of the engine's, float32 [rows, cols], with NaN behind each row."""
    found = Rows(*values.shape)
    found.array()[:] = np.nan
    found.array()[:, : values.shape[1]] = values
    return found


def values_of(rows: Rows) -> np.ndarray:
    return rows.array()[:, : rows.cols]


def call(function: Kernel, *record: float, rows: int, threads: int, field: int = N_ROWS, **addresses: int) -> None:
    """Run a kernel for `rows` rows, counted in `field` of the step."""
    step = np.zeros(STEP_FIELDS, np.int64)
    step[field] = rows
    for name, value in addresses.items():
        step[{"tokens": TOKENS, "logit_rows": LOGIT_ROWS}[name]] = value
    run([(function, record)], step, threads)


class Codes:
    """A buffer of 8-bit rows, read back."""

    def __init__(self, rows: int, cols: int) -> None:
        self.cols, self.stride = cols, activation_bytes(cols, "q8")
        self.memory = aligned_bytes(rows * self.stride)
        self.base = address(self.memory)

    def check(self, want: np.ndarray) -> None:
        """Codes, scales and sums are those of the rounded rows `want`, float32 [rows, cols]."""
        codes, scales = quantize_reference(want)
        found, blocks = self.memory.reshape(len(want), self.stride), self.cols // 32
        assert np.array_equal(found[:, : self.cols].view(np.int8), codes)
        meta = np.ascontiguousarray(found[:, self.cols : self.cols + 16 * blocks]).view(np.int32).reshape(-1, blocks, 4)
        np.testing.assert_allclose(np.ascontiguousarray(meta[..., 0]).view(np.float32), scales, rtol=1e-5)
        halves = codes.astype(np.int32).reshape(len(want), blocks, 2, 16).sum(axis=3)
        assert np.array_equal(meta[..., 2:], halves)
        assert np.array_equal(meta[..., 1], halves.sum(axis=2))


@any_shape
@given(rows=row_counts, cols=vector_columns, threads=thread_counts)
def test_rows_of_any_width_are_normalised(rows: int, cols: int, threads: int) -> None:
    values, weight = random_rows(rows, cols), random_rows(1, cols)[0]
    x, out = buffer(values), buffer(np.zeros_like(values))
    record = (N_ROWS, x.base, x.stride, address(weight), cols, 1e-5, out.base, out.stride, 0, 0)
    call(dense.rms_norm, *record, rows=rows, threads=threads)
    wide = values.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(values_of(out), want, rtol=3e-6)


@any_shape
@given(rows=row_counts, cols=block_columns, threads=thread_counts)
def test_rows_are_normalised_and_rounded_at_once(rows: int, cols: int, threads: int) -> None:
    x, out, codes = buffer(random_rows(rows, cols)), buffer(np.zeros((rows, cols))), Codes(rows, cols)
    weight = np.ones(cols, np.float32)
    record = (N_LOGITS, x.base, x.stride, address(weight), cols, 1e-5, out.base, out.stride, codes.base, codes.stride)
    call(dense.rms_norm, *record, rows=rows, threads=threads, field=N_LOGITS)
    codes.check(values_of(out))


@any_shape
@given(rows=row_counts, cols=block_columns, threads=thread_counts)
def test_rows_of_any_width_are_rounded_as_the_reference_rounds_them(rows: int, cols: int, threads: int) -> None:
    values, codes = random_rows(rows, cols), Codes(rows, cols)
    x = buffer(values)
    call(dense.quantize, x.base, x.stride, cols, codes.base, codes.stride, rows=rows, threads=threads)
    codes.check(values)


@any_shape
@given(rows=row_counts, cols=vector_columns, threads=thread_counts)
def test_swiglu_of_any_width(rows: int, cols: int, threads: int) -> None:
    values, factors = random_rows(rows, cols), random_rows(rows, cols)[::-1]
    gate, up = buffer(values), buffer(factors)
    call(dense.swiglu, gate.base, up.base, gate.stride, cols, rows=rows, threads=threads)
    np.testing.assert_allclose(values_of(gate), values / (1 + np.exp(-values.astype(np.float64))) * factors, rtol=1e-6)


@any_shape
@given(rows=row_counts, cols=vector_columns, threads=thread_counts, data=st.data())
def test_the_rows_whose_logits_are_wanted_are_gathered(rows: int, cols: int, threads: int, data: st.DataObject) -> None:
    wanted = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=16)), np.int32)
    values = random_rows(rows, cols)
    x, out = buffer(values), buffer(np.zeros((len(wanted), cols)))
    record = (x.base, x.stride, out.base, out.stride, cols)
    call(
        dense.gather_logit_rows, *record,
        rows=len(wanted), threads=threads, field=N_LOGITS, logit_rows=address(wanted),
    )  # fmt: skip
    assert np.array_equal(values_of(out), values[wanted])


@pytest.mark.parametrize("qtype", [QuantType.F32, QuantType.Q8_0, QuantType.IQ4_NL], ids=lambda q: q.name)
@settings(max_examples=10, deadline=None)
@given(rows=row_counts, cols=block_columns, vocab=st.integers(1, 50), threads=thread_counts)
def test_tokens_of_a_vocabulary_of_any_size_are_embedded(
    qtype: QuantType, rows: int, cols: int, vocab: int, threads: int
) -> None:
    raw, weights = random_weights(qtype, vocab, cols)
    tokens = np.random.default_rng(vocab).integers(0, vocab, rows).astype(np.int32)
    tokens[-1] = vocab - 1
    matrix, x = Matrix(raw, qtype, cols), buffer(np.zeros((rows, cols)))
    record = (unpack_kernel(qtype).address, matrix.group(0), matrix.shape.group_bytes, cols // 32, x.base, x.stride)
    call(dense.embed, *record, rows=rows, threads=threads, tokens=address(tokens))
    assert np.array_equal(values_of(x), weights[tokens])


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("qtype", [QuantType.F32, QuantType.Q8_0, QuantType.IQ4_NL], ids=lambda q: q.name)
@settings(max_examples=10, deadline=None)
@given(rows=row_counts, cols=block_columns, outputs=st.integers(1, 300), threads=thread_counts)
def test_matrices_of_any_shape_are_multiplied(
    qtype: QuantType, add: bool, rows: int, cols: int, outputs: int, threads: int
) -> None:
    """Output rows need not be whole groups of 16, columns not whole blocks of 256, threads may have no group."""
    raw, weights = random_weights(qtype, outputs, cols)
    matrix, values = Matrix(raw, qtype, cols), random_rows(rows, cols)
    groups, tile_bytes = matrix.shape.groups, 64 * dense.ADDED_GROUPS * rows
    before = random_rows(rows, 16 * groups)
    x, out, tiles = buffer(values), buffer(before), aligned_bytes(threads * tile_bytes)
    if qtype is not QuantType.F32:
        source, x = x, Rows(rows, cols, "q8")
        call(dense.quantize, source.base, source.stride, cols, x.base, x.stride, rows=rows, threads=1)
    record = (
        N_ROWS, product_kernel(qtype).address, matrix.group(0), groups, matrix.shape.group_bytes, cols // 32,
        x.pointers, out.base, out.stride, address(tiles) if add else 0, tile_bytes,
    )  # fmt: skip
    call(dense.matmul, *record, rows=rows, threads=threads)
    seen, wide = as_seen(values, qtype), weights.astype(np.float64)
    want, scale = seen @ wide.T, np.abs(seen) @ np.abs(wide.T)
    found = values_of(out)[:, :outputs] - (before[:, :outputs] if add else 0)
    assert np.abs(found - want).max() <= 3e-6 * (scale.max() + np.abs(before).max())
