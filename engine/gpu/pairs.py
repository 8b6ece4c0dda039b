"""The (row, choice) pairs of a step's routed experts: routing, grouping by expert, products of many rows, sums.

What multiplies the experts on the GPU shares it: `streamed.py`, whose weights come from the host portion by
portion, and `resident.py`, whose weights live in VRAM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from numoe.engine.gguf import GgufFile
from numoe.engine.gpu import gemm
from numoe.engine.gpu.compiler import module
from numoe.engine.gpu.device import cupy
from numoe.engine.models.config import ModelConfig, MoeConfig

if TYPE_CHECKING:
    import cupy as cp

PORTION_BYTES = 64 << 20
"""Of experts' weights that become float16 at a time."""
_THREADS, _ROUTE_THREADS = 256, 128


class ExpertPairs:
    """Buffers for the pairs of up to `max_rows` rows, and for the float16 weights of `portion` experts.

    gate_up: float16 [portion, 2 ffn, hidden], of each expert gate above up. down: float16 [portion, hidden, ffn].
    """

    def __init__(self, config: ModelConfig, gguf: GgufFile, max_rows: int) -> None:
        assert config.moe is not None
        self._moe, self._hidden, empty = config.moe, config.hidden, cupy().empty
        self.portion = portion_experts(config.moe, gguf)
        moe, hidden, pairs = config.moe, config.hidden, max_rows * config.moe.n_used
        self.gate_up = empty((self.portion, 2 * moe.ffn, hidden), np.float16)
        self.down = empty((self.portion, hidden, moe.ffn), np.float16)
        self.ids, self._weights = empty(pairs, np.int32), empty(pairs, np.float32)
        self._offsets = empty(moe.n_experts + 1, np.int32)
        self._order, self._place = empty(pairs, np.int32), empty(pairs, np.int32)
        self._in_order = cupy().arange(pairs, dtype=np.int32)
        self._rows = empty((pairs, hidden), np.float16)
        self.both = empty((2, pairs, moe.ffn), np.float32)
        self._h = empty((pairs, moe.ffn), np.float16)
        self.y = empty((pairs, hidden), np.float32)
        self._kernels = module("experts")
        import cupyx

        self._host_offsets = cupyx.zeros_pinned(moe.n_experts + 1, np.int32)

    @staticmethod
    def nbytes(config: ModelConfig, gguf: GgufFile, max_rows: int) -> int:
        """Bytes of VRAM that the buffers take."""
        if (moe := config.moe) is None:
            return 0
        of_pair = 20 + 2 * config.hidden + 8 * moe.ffn + 2 * moe.ffn + 4 * config.hidden
        return portion_experts(moe, gguf) * 6 * moe.ffn * config.hidden + max_rows * moe.n_used * of_pair

    def route(self, logits: cp.ndarray, rows: int) -> None:
        """Choose experts: `ids` and their weights; logits: the router's, float32 [rows, experts]."""
        moe = self._moe
        self._kernels.get_function("route_rows")(
            (rows,), (_ROUTE_THREADS,),
            (
                logits, np.int32(moe.n_experts), np.int32(moe.n_used), np.int32(moe.normalize_weights),
                np.float32(moe.weights_scale), self.ids, self._weights,
            ),
            shared_mem=4 * (moe.n_experts + 2 * moe.n_used),
        )  # fmt: skip

    def group(self, normed: cp.ndarray, rows: int) -> list[int]:
        """Sort the pairs by expert and gather their rows; where each expert's begin, [experts + 1].

        normed: float32 [rows, hidden]. Waits for the routing to be known on the host.
        """
        moe, kernels, pairs = self._moe, self._kernels, rows * self._moe.n_used
        kernels.get_function("group_pairs")(
            (moe.n_experts,), (_THREADS,),
            (self.ids, np.int32(pairs), np.int32(moe.n_experts), self._offsets, self._order, self._place),
        )  # fmt: skip
        stream = cupy().cuda.get_current_stream()
        self._offsets.data.copy_to_host_async(self._host_offsets.ctypes.data, self._offsets.nbytes)
        known = stream.record()
        kernels.get_function("gather_pairs")(
            (pairs,), (_THREADS,),
            (normed, self._order, np.int32(moe.n_used), np.int32(self._hidden), self._rows),
        )  # fmt: skip
        known.synchronize()
        found: list[int] = self._host_offsets.tolist()
        return found

    def multiply(self, first: int, last: int, offsets: list[int]) -> None:
        """The products of experts `first` to `last`, whose weights are in `gate_up` and `down`, with their rows."""
        start, end = offsets[first], offsets[last]
        if start == end:
            return
        ffn, hidden = self._moe.ffn, self._hidden
        # Addresses are reckoned here: an array's slice takes Python longer than cuBLAS a launch.
        gate_up, rows, both = self.gate_up.data.ptr, self._rows.data.ptr, self.both.data.ptr
        down, h, y = self.down.data.ptr, self._h.data.ptr, self.y.data.ptr
        experts = [
            (e - first, offsets[e], offsets[e + 1] - offsets[e])
            for e in range(first, last)
            if offsets[e] < offsets[e + 1]
        ]
        for i, at, count in experts:
            gemm.multiply(
                gate_up + 4 * i * ffn * hidden, rows + 2 * at * hidden, both + 8 * at * ffn,
                gemm.Shape(count, hidden, 2 * ffn), 2 * ffn, np.float16, add=False,
            )  # fmt: skip
        arguments = (np.uint64(both + 8 * start * ffn), np.int32(ffn), np.uint64(h + 2 * start * ffn))
        self._kernels.get_function("swiglu_pairs")((end - start,), (_THREADS,), arguments)
        for i, at, count in experts:
            gemm.multiply(
                down + 2 * i * hidden * ffn, h + 2 * at * ffn, y + 4 * at * hidden,
                gemm.Shape(count, ffn, hidden), hidden, np.float16, add=False,
            )  # fmt: skip

    def combine(self, x: cp.ndarray, rows: int, *, grouped: bool) -> None:
        """x += the weighted sum of each row's pairs; x: float32 [rows, hidden]. grouped: `y` is in `group`'s order."""
        place = self._place if grouped else self._in_order
        self._kernels.get_function("combine_pairs")(
            (rows,), (_THREADS,),
            (x, self.y, place, self._weights, np.int32(self._moe.n_used), np.int32(self._hidden)),
        )  # fmt: skip


def portion_experts(moe: MoeConfig, gguf: GgufFile) -> int:
    """How many experts of a layer have their weights as float16 at a time."""
    layers: dict[str, int] = {}
    for name, info in gguf.tensors.items():
        if "_exps." in name:
            layer = name.split(".")[1]
            layers[layer] = layers.get(layer, 0) + info.nbytes
    return min(moe.n_experts, max(1, PORTION_BYTES * moe.n_experts // max(layers.values())))
