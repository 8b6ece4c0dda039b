"""The attention side's tensors in VRAM: everything but the routed experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from numoe.engine.experts.shard import ShardSlice
from numoe.engine.gguf import GgufFile
from numoe.engine.gpu.device import cupy
from numoe.engine.gpu.matrices import FLOATS, TILE_FORMATS, GpuMatrix, Workspace, matrix_bytes
from numoe.engine.gpu.pairs import ExpertPairs
from numoe.engine.gpu.staging import Staging
from numoe.engine.gpu.streamed import ring_bytes
from numoe.engine.gpu.vram import WeightMemory
from numoe.engine.models.config import ModelConfig
from numoe.engine.progress import Progress
from numoe.engine.worker.weights import dense_tensor_names

if TYPE_CHECKING:
    import cupy as cp

_WORKSPACE_BYTES = 256 << 20


class GpuWeights:
    """Matrices and vectors by the names of their tensors, loaded on the current stream."""

    def __init__(self, gguf: GgufFile, max_rows: int, memory: WeightMemory, progress: Progress) -> None:
        self.matrices: dict[str, GpuMatrix] = {}
        self.vectors: dict[str, cp.ndarray] = {}
        names = dense_tensor_names(gguf)
        tensors = [gguf.tensors[name] for name in names if len(gguf.tensors[name].shape) > 1]
        self.workspace = workspace = Workspace.fitting(tensors, max_rows, _WORKSPACE_BYTES)
        staging = Staging()
        try:
            for name in names:
                if len(gguf.tensors[name].shape) == 1:
                    self.vectors[name] = cupy().asarray(gguf.dequantize(name), np.float32)
                else:
                    self.matrices[name] = GpuMatrix.load(gguf, name, workspace, staging, progress, memory)
        finally:
            staging.close()


def dense_bytes(gguf: GgufFile, names: Iterable[str]) -> int:
    """Bytes of VRAM that the tensors take."""
    total = 0
    for name in names:
        info = gguf.tensors[name]
        if len(info.shape) == 1:
            total += 4 * info.shape[0]
        elif info.qtype in FLOATS or info.qtype in TILE_FORMATS:
            total += matrix_bytes(info.qtype, info.rows, info.shape[-1])
    return total


def work_bytes(config: ModelConfig, gguf: GgufFile, cuts: Sequence[ShardSlice], max_rows: int) -> int:
    """Bytes of VRAM that a forward pass of up to `max_rows` rows works in, where shards hold `cuts`."""
    heads = 2 * config.n_heads * config.head_dim + 2 * config.n_kv_heads * config.head_dim
    experts = config.moe.n_experts if config.moe else 0
    floats = max_rows * (2 * config.hidden + heads + 2 * config.dense_ffn + experts)
    widest = max(config.hidden, config.n_heads * config.head_dim, config.dense_ffn)
    return (
        4 * floats + 16 * 4 * (config.vocab + config.hidden) + 2 * max_rows * widest + _WORKSPACE_BYTES
        + ring_bytes(config, gguf, cuts) + ExpertPairs.nbytes(config, gguf, max_rows)
    )  # fmt: skip
