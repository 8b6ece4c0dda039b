"""Routed experts of whole layers that live in VRAM, as far as there is room (`--gpu-experts`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from numoe.engine.experts.shard import PARTS, expert_names
from numoe.engine.gguf import GgufFile
from numoe.engine.gpu import rows as ops
from numoe.engine.gpu.matrices import GEMV_ROWS, GpuMatrix, Workspace, multiply_chosen
from numoe.engine.gpu.pairs import ExpertPairs
from numoe.engine.gpu.staging import Staging
from numoe.engine.gpu.vram import WeightMemory
from numoe.engine.models.config import MoeConfig
from numoe.engine.progress import Progress

if TYPE_CHECKING:
    import cupy as cp


class ResidentExperts:
    """The experts of `layers`, loaded on the current stream; each part is one matrix, expert below expert."""

    def __init__(
        self, moe: MoeConfig, gguf: GgufFile, layers: Sequence[int],
        pairs: ExpertPairs, workspace: Workspace, memory: WeightMemory, progress: Progress,
    ) -> None:  # fmt: skip
        self._moe, self._pairs, self._layers = moe, pairs, dict[int, dict[str, GpuMatrix]]()
        staging = Staging()
        try:
            for layer in layers:
                self._layers[layer] = {
                    part: GpuMatrix.load(gguf, name, workspace, staging, progress, memory)
                    for part, name in zip(PARTS, expert_names(layer), strict=True)
                }
        finally:
            staging.close()

    def __contains__(self, layer: object) -> bool:
        return layer in self._layers

    def run(self, layer: int, x: cp.ndarray, normed: cp.ndarray, logits: cp.ndarray, rows: int) -> None:
        """x += the layer's experts, applied to its rows; up to GEMV_ROWS of them may be captured in a graph.

        x, normed: float32 [rows, hidden]; logits: the router's, float32 [rows, experts].
        """
        self._pairs.route(logits, rows)
        if rows <= GEMV_ROWS:
            self._few(self._layers[layer], normed, rows)
        else:
            self._many(self._layers[layer], normed, rows)
        self._pairs.combine(x, rows, grouped=rows > GEMV_ROWS)

    def _few(self, matrices: dict[str, GpuMatrix], normed: cp.ndarray, rows: int) -> None:
        """Each pair straight from the quantized weights of its expert."""
        pairs, experts, count = self._pairs, self._moe.n_experts, rows * self._moe.n_used
        gate, up = pairs.both
        both = [(matrices["gate"], gate), (matrices["up"], up)]
        multiply_chosen(both, experts, pairs.ids, normed, count, self._moe.n_used)
        ops.swiglu(gate, up, gate, count)
        multiply_chosen([(matrices["down"], pairs.y)], experts, pairs.ids, gate, count, 1)

    def _many(self, matrices: dict[str, GpuMatrix], normed: cp.ndarray, rows: int) -> None:
        """All experts in float16, some at a time."""
        pairs, moe = self._pairs, self._moe
        offsets = pairs.group(normed, rows)
        for first in range(0, moe.n_experts, pairs.portion):
            last = min(first + pairs.portion, moe.n_experts)
            self._unpack(matrices, first, last)
            pairs.multiply(first, last, offsets)

    def _unpack(self, matrices: dict[str, GpuMatrix], first: int, last: int) -> None:
        ffn, hidden, pairs = self._moe.ffn, matrices["gate"].cols, self._pairs
        at, rows = pairs.gate_up.data.ptr, (last - first) * ffn
        matrices["gate"].dequantize_parts(first * ffn, rows, at, part=ffn)
        matrices["up"].dequantize_parts(first * ffn, rows, at + 2 * ffn * hidden, part=ffn)
        down_rows = (last - first) * hidden
        matrices["down"].dequantize_parts(first * hidden, down_rows, pairs.down.data.ptr, part=down_rows)
