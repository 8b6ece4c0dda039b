"""Weight matrices in VRAM: loading, products, rows of an embedding.

Quantized matrices stay quantized: GGUF's blocks are rearranged into tiles (`cuda/formats.cuh`), nothing
is requantized. F16, BF16 and F32 lie as in the file. Up to GEMV_ROWS rows of activations are multiplied
by kernels that read the weights once (`cuda/gemv.cu`), and a row's result is the same bit for bit for
any number of rows; more are multiplied by cuBLAS with weights and activations in float16.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType as QuantType

from numoe.engine.errors import UnsupportedError
from numoe.engine.gguf import GgufFile, TensorInfo
from numoe.engine.gpu import gemm
from numoe.engine.gpu.compiler import module
from numoe.engine.gpu.device import cupy, current
from numoe.engine.gpu.launch import Kernel
from numoe.engine.gpu.staging import Staging
from numoe.engine.progress import Progress

if TYPE_CHECKING:
    import cupy as cp

    from numoe.engine.gpu.vram import WeightMemory

GEMV_ROWS = 16
"""Rows of activations up to which products read the weights as they are stored."""

PRODUCTS_AT_ONCE = 4
"""Matrices that one launch multiplies with the same activations."""

FLOATS = {QuantType.F32: 4, QuantType.F16: 2, QuantType.BF16: 2}
"""Bytes of a number in the formats that are not quantized."""

_TILE_ROWS, _TILE_COLS, _LANES, _THREADS = 16, 64, 32, 256
_GEMV_WARPS, _FLOAT_ROWS = 16, 4
_ADD, _SHARE_X = 1, 2


@dataclass(frozen=True)
class TileFormat:
    """How a quantized format lies in VRAM; the numbers follow from its template arguments in formats.cuh.

    tile_bytes: of 16 rows x 64 columns. super_bytes: that 4 tiles share, 0 for none.
    block_floats: what the kernel keeps of 32 activations besides their codes.
    """

    tile_bytes: int
    super_bytes: int = 0
    block_floats: int = 2

    def row_bytes(self, tiles: int) -> int:
        """Bytes of 16 rows."""
        return tiles * self.tile_bytes + tiles // 4 * self.super_bytes


TILE_FORMATS = {
    QuantType.Q8_0: TileFormat(1088),
    QuantType.Q4_0: TileFormat(576),
    QuantType.Q4_1: TileFormat(640),
    QuantType.Q5_0: TileFormat(704),
    QuantType.Q5_1: TileFormat(768),
    QuantType.Q2_K: TileFormat(320, 64, block_floats=4),
    QuantType.Q3_K: TileFormat(448, 32),
    QuantType.Q4_K: TileFormat(576, 64),
    QuantType.Q5_K: TileFormat(704, 64),
    QuantType.Q6_K: TileFormat(832, 32),
    QuantType.IQ4_NL: TileFormat(576),
    QuantType.IQ4_XS: TileFormat(544, 32),
    QuantType.MXFP4: TileFormat(544),
}
"""Q4_K, Q5_K, IQ4_XS and Q3_K take 2.8, 2.3, 1.5 and 3.6 % more than in the file, the others nothing."""


class Workspace:
    """What products with many rows need, shared by all matrices: float16 activations and weights.

    max_rows, max_cols: of the activations. weight_bytes: of the weights that are float16 at a time; a
    larger matrix is multiplied in slabs.
    """

    def __init__(self, max_rows: int, max_cols: int, weight_bytes: int) -> None:
        self.x = cupy().empty(max_rows * max_cols, np.float16)
        self.weights = cupy().empty(weight_bytes // 2, np.float16)
        self._to_half = _kernels(QuantType.F32)["to_half"]

    @classmethod
    def fitting(cls, tensors: Iterable[TensorInfo], max_rows: int, limit_bytes: int = 256 << 20) -> Workspace:
        """A workspace for the largest of `tensors`, but with at most about `limit_bytes` of weights."""
        shapes = [(info.rows, info.shape[-1]) for info in tensors]
        cols = max(cols for _, cols in shapes)
        largest = max(2 * (rows + _TILE_ROWS) * cols for rows, cols in shapes)
        return cls(max_rows, cols, min(largest, max(limit_bytes, 2 * _TILE_ROWS * cols)))

    def round(self, x: cp.ndarray, count: int) -> cp.ndarray:
        """The first `count` numbers of x, float32, as float16; a multiple of 4."""
        self._to_half((-(-count // (4 * _THREADS)),), (_THREADS,), (x, np.int64(count), self.x))
        return self.x


@functools.cache
def _kernels(qtype: QuantType) -> dict[str, Kernel]:
    """The compiled kernels of a format on this device."""
    name = qtype.name
    if qtype in FLOATS:
        gemv = {f"gemv{r}": f"gemv_floats<{name}, {r}>" for r in (1, 2, 4, 8, 16)}
        gemv["gemv_experts"] = f"gemv_experts_floats<{name}>"
        other = {"embed": f"embed_floats<{name}>", "to_half": f"to_half<{name}>"}
    else:
        gemv = {f"gemv{4 * n}": f"gemv<{name}, {n}>" for n in (1, 2, 4)} | {"gemv_experts": f"gemv_experts<{name}>"}
        other = {what: f"{what}<{name}>" for what in ("repack", "dequantize", "embed")}
    found: dict[str, Kernel] = {}
    for source, kernels in (("gemv", gemv), ("dequantize", other)):
        compiled = module(source, *kernels.values())
        found |= {key: compiled.get_function(full) for key, full in kernels.items()}
    if qtype in TILE_FORMATS:
        for key in gemv:
            found[key].allow_shared_memory(_shared_limit())
    return found


@functools.cache
def _shared_limit() -> int:
    return int(cupy().cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])


@functools.cache
def _sms() -> int:
    return current().sms


def matrix_bytes(qtype: QuantType, rows: int, cols: int) -> int:
    """Bytes of VRAM that a matrix takes."""
    if qtype in FLOATS:
        return FLOATS[qtype] * rows * cols
    return -(-rows // _TILE_ROWS) * TILE_FORMATS[qtype].row_bytes(-(-cols // _TILE_COLS))


_PRODUCTS = np.dtype({
    "names": ["each", "count"],
    "formats": [(np.dtype([("weights", "u8"), ("out", "u8"), ("out_rows", "i8")]), PRODUCTS_AT_ONCE), "i8"],
})  # fmt: skip

_EXPERTS = np.dtype({
    "names": ["each", "bytes", "count"],
    "formats": [(np.dtype([("weights", "u8"), ("out", "u8"), ("out_rows", "i8")]), 2), ("i8", 2), "i8"],
})  # fmt: skip


class GpuMatrix:
    """A weight matrix [out_rows, cols] in VRAM.

    All formats of the CPU backend, straight from their GGUF blocks. `cols` is a multiple of the
    format's block and of 32.
    """

    def __init__(
        self, qtype: QuantType, out_rows: int, cols: int, workspace: Workspace, memory: WeightMemory | None = None
    ) -> None:
        if qtype not in FLOATS and qtype not in TILE_FORMATS:
            raise UnsupportedError(f"weight format {qtype.name} is not supported on a GPU")
        self.qtype, self.out_rows, self.cols, self._workspace = qtype, out_rows, cols, workspace
        self.tiles = -(-cols // _TILE_COLS)
        self.groups = -(-out_rows // _TILE_ROWS)
        self._kernels = _kernels(qtype)
        self.nbytes = matrix_bytes(qtype, out_rows, cols)
        if not self.is_float and self._shared_bytes(1) > _shared_limit():
            raise UnsupportedError(f"rows of {cols} weights are too long for this GPU's shared memory")
        self.data = cupy().empty(self.nbytes, np.uint8) if memory is None else memory.take(self.nbytes)

    @classmethod
    def load(
        cls, gguf: GgufFile, name: str, workspace: Workspace, staging: Staging, progress: Progress | None = None,
        memory: WeightMemory | None = None,
    ) -> GpuMatrix:  # fmt: skip
        """Tensor `name` of a file, brought to VRAM on the current stream; progress counts bytes of the file.

        memory: where it shall lie, or lies already; None for memory of its own.
        """
        info = gguf.tensors[name]
        matrix = cls(info.qtype, info.rows, info.shape[-1], workspace, memory)
        if memory is not None and memory.is_loaded:
            return matrix
        raw = gguf.read(name).reshape(info.rows, info.row_bytes)
        for first, rows, address in staging.upload(raw, _TILE_ROWS):
            matrix._store(first, rows, info.row_bytes, address)
            if progress:
                progress.advance(rows * info.row_bytes)
        return matrix

    @property
    def is_float(self) -> bool:
        """Whether it lies as in the file, not quantized."""
        return self.qtype in FLOATS

    def _store(self, first: int, rows: int, row_bytes: int, address: int) -> None:
        """GGUF rows at a device address to their place; `first` is a multiple of 16."""
        if self.is_float:
            runtime = cupy().cuda.runtime
            to = self.data.data.ptr + first * row_bytes
            stream = cupy().cuda.get_current_stream().ptr
            runtime.memcpyAsync(to, address, rows * row_bytes, runtime.memcpyDeviceToDevice, stream)
            return
        to = self.data.data.ptr + first // _TILE_ROWS * TILE_FORMATS[self.qtype].row_bytes(self.tiles)
        lanes = -(-rows // _TILE_ROWS) * self.tiles * _LANES
        self._launch(
            "repack", (-(-lanes // _THREADS),), np.uint64(address), np.int64(row_bytes), np.int32(rows),
            np.int32(self.cols), np.int32(self.tiles), np.uint64(to),
        )  # fmt: skip

    def _launch(self, kernel: str, grid: tuple[int, ...], *args: Any) -> None:
        self._kernels[kernel](grid, (_THREADS,), args)

    # --- products ---------------------------------------------------------------------------------

    def multiply(self, x: cp.ndarray, out: cp.ndarray, rows: int, *, add: bool = False, share_x: bool = False) -> None:
        """out[r] = W x[r], or out[r] += W x[r], for r < rows.

        share_x: the kernel launched next may read x before it waits for this one.

        x: float32 [., cols]; out: float32 [., out_rows]; both contiguous. Products of up to GEMV_ROWS
        rows take x as 15-bit integers of 32 at a time (F32, F16, BF16: as it is), of more as float16
        (F32: as it is); sums are float32.
        """
        multiply_all([(self, out)], x, rows, add=add, share_x=share_x)

    def _shared_bytes(self, rows: int) -> int:
        """Of a launch with `rows` rows: activations, and partial sums of every warp, twice."""
        activations = 2 * self.tiles * (64 + 4 * TILE_FORMATS[self.qtype].block_floats)
        return rows * (activations + 2 * 4 * _GEMV_WARPS * _TILE_ROWS)

    def _gemv_floats(self, x: cp.ndarray, out: cp.ndarray, rows: int, flags: int) -> None:
        at_once = 1 << (rows - 1).bit_length()
        self._launch(
            f"gemv{at_once}", (-(-self.out_rows // _FLOAT_ROWS),), self.data, x, np.int32(self.out_rows),
            np.int32(self.cols), np.int32(rows), out, np.int32(flags),
        )  # fmt: skip

    def _gemm(self, x: cp.ndarray, out: cp.ndarray, rows: int, *, add: bool) -> None:
        """Many rows: by cuBLAS, in float16 unless the weights are float32."""
        shape = gemm.Shape(rows, self.cols, self.out_rows)
        if self.qtype == QuantType.F32:
            gemm.multiply(self.data.data.ptr, x.data.ptr, out.data.ptr, shape, self.out_rows, np.float32, add=add)
            return
        space = self._workspace
        x = space.round(x, rows * self.cols)
        slab = self.out_rows
        if self.qtype != QuantType.F16:
            slab = min(slab, len(space.weights) // self.cols // _TILE_ROWS * _TILE_ROWS)
        for first in range(0, self.out_rows, slab):
            count = min(slab, self.out_rows - first)
            weights = self.data if self.qtype == QuantType.F16 else space.weights
            if self.qtype != QuantType.F16:
                self.dequantize_parts(first, count, space.weights.data.ptr, part=count)
            to = out.data.ptr + 4 * first
            gemm.multiply(weights.data.ptr, x.data.ptr, to, shape, count, np.float16, add=add)

    # --- weights as numbers -----------------------------------------------------------------------

    def dequantize_parts(self, first: int, rows: int, at: int, *, part: int) -> None:
        """Rows from `first` on as float16 at a device address; after each `part` rows as many are left out there.

        first, part: multiples of 16.
        """
        if not self.is_float:
            lanes = -(-rows // _TILE_ROWS) * self.tiles * _LANES
            self._launch(
                "dequantize", (-(-lanes // _THREADS),), self.data, np.int64(first // _TILE_ROWS), np.int32(rows),
                np.int32(self.cols), np.int32(self.tiles), np.uint64(at), np.int32(part),
            )  # fmt: skip
            return
        for start in range(0, rows, part):
            source = self.data.data.ptr + (first + start) * self.cols * FLOATS[self.qtype]
            count, target = min(part, rows - start) * self.cols, at + 4 * start * self.cols
            blocks = -(-count // (4 * _THREADS))
            self._launch("to_half", (blocks,), np.uint64(source), np.int64(count), np.uint64(target))

    def dequantize(self, out: cp.ndarray) -> None:
        """The whole matrix as float16 [out_rows, cols]."""
        self.dequantize_parts(0, self.out_rows, out.data.ptr, part=self.out_rows)

    def embed(self, tokens: cp.ndarray, out: cp.ndarray, rows: int) -> None:
        """out[r] = row tokens[r] as float32, bit for bit GGML's dequantization. tokens: int32 [rows]."""
        if self.is_float:
            grid = (-(-self.cols // _THREADS), rows)
            self._launch("embed", grid, self.data, tokens, np.int32(self.cols), out)
        else:
            grid = (-(-4 * self.tiles // _THREADS), rows)
            self._launch("embed", grid, self.data, tokens, np.int32(self.cols), np.int32(self.tiles), out)


def multiply_all(
    products: Sequence[tuple[GpuMatrix, cp.ndarray]], x: cp.ndarray, rows: int, *, add: bool = False,
    share_x: bool = False,
) -> None:  # fmt: skip
    """`matrix.multiply(x, out, rows)` for several (matrix, out) of the same x, in as few launches as can be."""
    if rows > GEMV_ROWS:
        for matrix, out in products:
            matrix._gemm(x, out, rows, add=add)
        return
    flags = _ADD * add | _SHARE_X * share_x
    quantized: dict[QuantType, list[tuple[GpuMatrix, cp.ndarray]]] = {}
    for matrix, out in products:
        if matrix.is_float:
            matrix._gemv_floats(x, out, rows, flags)
        else:
            quantized.setdefault(matrix.qtype, []).append((matrix, out))
    for same in quantized.values():
        for start in range(0, len(same), PRODUCTS_AT_ONCE):
            _gemv(same[start : start + PRODUCTS_AT_ONCE], x, rows, flags)


def _gemv(products: Sequence[tuple[GpuMatrix, cp.ndarray]], x: cp.ndarray, rows: int, flags: int) -> None:
    """Matrices of one quantized format times rows of x, in one launch for as many rows as fit."""
    matrix = products[0][0]
    step = min(rows, _shared_limit() // matrix._shared_bytes(1))
    packed = np.zeros((), _PRODUCTS)
    packed["count"] = len(products)
    blocks = min(sum(each.groups for each, _ in products), _sms())
    for first in range(0, rows, step):
        count = min(step, rows - first)
        for i, (each, out) in enumerate(products):
            packed["each"][i] = (each.data.data.ptr, out.data.ptr + 4 * first * each.out_rows, each.out_rows)
        at = np.uint64(x.data.ptr + 4 * first * matrix.cols)
        kernel = matrix._kernels["gemv4" if count <= 4 else "gemv8" if count <= 8 else "gemv16"]
        args = (packed, at, np.int32(matrix.cols), np.int32(count), np.int32(flags))
        kernel((blocks,), (_GEMV_WARPS * _LANES,), args, shared_mem=matrix._shared_bytes(count))


def multiply_chosen(
    products: Sequence[tuple[GpuMatrix, cp.ndarray]], experts: int, ids: cp.ndarray, x: cp.ndarray, pairs: int,
    per_row: int,
) -> None:  # fmt: skip
    """out[p] = W[ids[p]] x[p // per_row] for p < pairs and one or two (matrix, out) with the same columns.

    A matrix is those of all `experts`, one below the other, each of a multiple of 16 rows. ids: int32
    [pairs]; x: float32 [., cols]; out: float32 [., rows of an expert]. A pair's result is the same bits
    whatever the others are, those of `multiply` with that expert's matrix alone.
    """
    if len({matrix.qtype for matrix, _ in products}) > 1:
        for product in products:
            multiply_chosen([product], experts, ids, x, pairs, per_row)
        return
    matrix, packed = products[0][0], np.zeros((), _EXPERTS)
    packed["count"] = len(products)
    for i, (each, out) in enumerate(products):
        packed["each"][i] = (each.data.data.ptr, out.data.ptr, each.out_rows // experts)
        packed["bytes"][i] = each.nbytes // experts
    args = (packed, ids, x, np.int32(per_row), np.int32(matrix.cols))
    rows = [each.out_rows // experts for each, _ in products]
    if matrix.is_float:
        grid = (-(-max(rows) // _FLOAT_ROWS), pairs, len(products))
        matrix._kernels["gemv_experts"](grid, (_THREADS,), args)
        return
    blocks = min(sum(rows) // _TILE_ROWS, max(1, _sms() // pairs))
    kernel, shared = matrix._kernels["gemv_experts"], matrix._shared_bytes(1)
    kernel((blocks, pairs), (_GEMV_WARPS * _LANES,), args, shared_mem=shared)
