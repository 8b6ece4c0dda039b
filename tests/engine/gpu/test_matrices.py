"""Matrices in VRAM: every format, from GGUF's blocks to products, against `gguf.quants` in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as QuantType

from numoe.engine.gguf import GgufFile
from numoe.engine.gpu.matrices import GEMV_ROWS, TILE_FORMATS, GpuMatrix, Workspace, multiply_all, multiply_chosen
from numoe.engine.gpu.staging import Staging
from numoe.engine.progress import Progress
from tests.models import FLOAT_TYPES, QUANTIZED_TYPES, WEIGHT_TYPES, TinyModel, Weights

gpu = pytest.mark.gpu
MAX_ROWS, MAX_COLS = 64, 4096

Loaded = tuple[GpuMatrix, np.ndarray]
Load = Callable[..., Loaded]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """load(qtype, rows, cols): a random matrix in VRAM and its weights, float32 [rows, cols]."""

    def load(
        qtype: str, rows: int, cols: int, *, workspace: Workspace | None = None, slot_bytes: int = 1 << 20
    ) -> Loaded:
        packed = Weights(rows + cols).packed(qtype, (rows, cols), cols**-0.5)
        path = TinyModel("llama", {}, {"w": (packed, qtype)}).write(tmp_path / f"{qtype}-{rows}-{cols}.gguf")
        workspace = workspace or Workspace(MAX_ROWS, MAX_COLS, 1 << 22)
        progress, staging = Progress(1), Staging(slot_bytes, 2)
        with GgufFile.open(path) as gguf:
            matrix = GpuMatrix.load(gguf, "w", workspace, staging, progress)
            weights = gguf.dequantize("w").copy()
            assert progress.snapshot()[0] == gguf.tensors["w"].nbytes
        staging.close()
        return matrix, weights

    return load


def shapes(qtype: str) -> list[tuple[int, int]]:
    """Rows and columns on and off the edges of tiles, blocks and warps."""
    block = max(32, GGML_QUANT_SIZES[QuantType[qtype]][0])
    return [(16, block), (33, 3 * block), (5, 9 * block), (100, 2048), (1, 4096)]


def bound(qtype: str, rows: int) -> float:
    """Of an error relative to the norms of weights and activations: float32, 15-bit integers, float16."""
    if qtype == "F32" or (qtype in FLOAT_TYPES and rows <= GEMV_ROWS):
        return 1e-6
    return 5e-5 if rows <= GEMV_ROWS else 3e-4


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("qtype", QUANTIZED_TYPES)
def test_sizes(qtype: str) -> None:
    """A matrix takes about the room that it takes in the file."""
    block, size = GGML_QUANT_SIZES[QuantType[qtype]]
    ratio = TILE_FORMATS[QuantType[qtype]].row_bytes(2048 // 64) / (16 * 2048 // block * size)
    assert 1 <= ratio < (1.037 if qtype == "Q3_K" else 1.03)


@gpu
@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
def test_weights_are_what_the_file_says(qtype: str, load: Load) -> None:
    import cupy

    for rows, cols in shapes(qtype):
        matrix, weights = load(qtype, rows, cols, slot_bytes=1 << 18)
        tokens = np.random.default_rng(0).integers(0, rows, 40).astype(np.int32)
        out = cupy.full((40, cols), np.nan, np.float32)
        matrix.embed(cupy.asarray(tokens), out, 40)
        assert np.array_equal(out.get(), weights[tokens]), (rows, cols)
        halves = cupy.full((rows, cols), np.nan, np.float16)
        matrix.dequantize(halves)
        assert np.array_equal(halves.get(), weights.astype(np.float16)), (rows, cols)


@gpu
@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
def test_products(qtype: str, load: Load) -> None:
    import cupy

    rng = np.random.default_rng(1)
    for out_rows, cols in shapes(qtype):
        matrix, weights = load(qtype, out_rows, cols)
        for rows in (1, 2, 4, 5, 8, 9, 16, 17, 33):
            x = (rng.standard_normal((rows, cols)) * 10.0 ** rng.integers(-3, 4, (rows, 1))).astype(np.float32)
            before = rng.standard_normal((rows, out_rows)).astype(np.float32)
            want = x.astype(np.float64) @ weights.astype(np.float64).T
            out = cupy.asarray(before)
            matrix.multiply(cupy.asarray(x), out, rows)
            largest = np.linalg.norm(x, axis=1, keepdims=True) * np.linalg.norm(weights, axis=1).max()
            wrong = (np.abs(out.get() - want) / largest).max()
            assert wrong < bound(qtype, rows), (out_rows, cols, rows, wrong)
            plain = out.get()
            out.set(before)
            matrix.multiply(cupy.asarray(x), out, rows, add=True)
            assert error(out.get(), plain + before) < 1e-6, (out_rows, cols, rows)


@gpu
@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
def test_a_row_does_not_depend_on_the_others(qtype: str, load: Load) -> None:
    import cupy

    for out_rows, cols in ((100, 2048), (33, 768)):
        matrix, _ = load(qtype, out_rows, cols)
        x = cupy.asarray(np.random.default_rng(2).standard_normal((GEMV_ROWS, cols)).astype(np.float32))
        alone = cupy.empty((GEMV_ROWS, out_rows), np.float32)
        for row in range(GEMV_ROWS):
            matrix.multiply(x[row : row + 1], alone[row : row + 1], 1)
        for rows in range(2, GEMV_ROWS + 1):
            out = cupy.empty((rows, out_rows), np.float32)
            matrix.multiply(x, out, rows)
            assert np.array_equal(out.get(), alone[:rows].get()), rows


@gpu
def test_more_rows_than_shared_memory_holds_at_once(load: Load) -> None:
    import cupy

    matrix, weights = load("Q4_0", 32, 32768)
    x = np.random.default_rng(3).standard_normal((GEMV_ROWS, 32768)).astype(np.float32)
    out = cupy.empty((GEMV_ROWS, 32), np.float32)
    matrix.multiply(cupy.asarray(x), out, GEMV_ROWS)
    assert error(out.get(), x @ weights.T) < 1e-4


@gpu
@pytest.mark.parametrize("rows", [1, 7, 16, 40])
def test_several_matrices_at_once(rows: int, load: Load) -> None:
    import cupy

    kinds = [("Q8_0", 512), ("Q6_K", 40), ("Q8_0", 33), ("F32", 8), ("Q8_0", 64), ("Q8_0", 17), ("Q8_0", 16)]
    matrices = [load(qtype, out_rows, 1024)[0] for qtype, out_rows in kinds]
    x = cupy.asarray(np.random.default_rng(4).standard_normal((rows, 1024)).astype(np.float32))
    together, alone = ([cupy.empty((rows, m.out_rows), np.float32) for m in matrices] for _ in range(2))
    multiply_all(list(zip(matrices, together, strict=True)), x, rows)
    for matrix, out in zip(matrices, alone, strict=True):
        matrix.multiply(x, out, rows)
    for a, b in zip(together, alone, strict=True):
        assert np.array_equal(a.get(), b.get())


@gpu
@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
@pytest.mark.parametrize(("pairs", "per_row"), [(1, 1), (6, 2), (128, 8)])
def test_products_with_the_expert_of_each_pair(qtype: str, pairs: int, per_row: int, load: Load) -> None:
    """The same bits as that expert's matrix alone."""
    import cupy

    experts, cols = 4, 2 * max(32, GGML_QUANT_SIZES[QuantType[qtype]][0])
    generator = np.random.default_rng(1)
    ids = generator.integers(0, experts, pairs).astype(np.int32)
    x = cupy.asarray(generator.standard_normal((-(-pairs // per_row), cols)).astype(np.float32))
    chosen = []
    for rows in (48, 32):
        matrix, _ = load(qtype, experts * rows, cols)
        whole, out = cupy.empty((len(x), matrix.out_rows), np.float32), cupy.empty((pairs, rows), np.float32)
        for row in range(len(x)):
            matrix.multiply(x[row : row + 1], whole[row : row + 1], 1)
        want = [whole[p // per_row].reshape(experts, rows)[ids[p]].get() for p in range(pairs)]
        chosen.append((matrix, out, want))
    multiply_chosen([(m, out) for m, out, _ in chosen], experts, cupy.asarray(ids), x, pairs, per_row)
    for _, out, want in chosen:
        np.testing.assert_array_equal(out.get(), want)


@gpu
@pytest.mark.parametrize("qtype", ["Q4_K", "BF16"])
def test_slabs(qtype: str, load: Load) -> None:
    import cupy

    x = np.random.default_rng(5).standard_normal((20, 512)).astype(np.float32)
    matrix, weights = load(qtype, 1000, 512, workspace=Workspace(20, 512, 2 * 512 * 48))
    out = cupy.empty((20, 1000), np.float32)
    matrix.multiply(cupy.asarray(x), out, 20)
    assert error(out.get(), x @ weights.T) < 1e-3


@gpu
@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_K", "F32"])
def test_products_are_captured_into_a_graph(qtype: str, load: Load) -> None:
    import cupy

    matrix, weights = load(qtype, 300, 1024)
    x, out = cupy.zeros((3, 1024), np.float32), cupy.empty((3, 300), np.float32)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()  # the zeros are there
    with stream:
        stream.begin_capture()
        matrix.multiply(x, out, 3)
        graph = stream.end_capture()
        values = np.random.default_rng(6).standard_normal((3, 1024)).astype(np.float32)
        x.set(values)
        graph.launch(stream)
    stream.synchronize()
    assert error(out.get(), values @ weights.T) < 1e-4


@gpu
def test_large_activations_stay_finite(load: Load) -> None:
    """float16 ends at 65504; few rows are exact there, many are bounded."""
    import cupy

    matrix, weights = load("Q8_0", 16, 256)
    x = np.ones((20, 256), np.float32)
    x[:, 3] = 1e6
    for rows in (4, 20):
        out = cupy.empty((rows, 16), np.float32)
        matrix.multiply(cupy.asarray(x[:rows]), out, rows)
        assert np.isfinite(out.get()).all()
        if rows <= GEMV_ROWS:
            assert math.isclose(error(out.get(), x[:rows] @ weights.T), 0, abs_tol=1e-4)
