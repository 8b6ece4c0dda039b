"""The memory of the KV pages in VRAM (`cuda/kv.cuh` says what a page holds)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from numoe.engine.errors import UnsupportedError
from numoe.engine.gpu.vram import KeptVram
from numoe.engine.keeper import Keepsakes
from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.models.config import ModelConfig
from numoe.engine.worker.kv_pool import KvType

if TYPE_CHECKING:
    import cupy as cp

BLOCK = 32
"""Elements that share a scale in q8_0 and q4_0."""

_CODE_BITS = {"f16": 16, "q8_0": 8, "q4_0": 4}
GPU_KV_TYPES = tuple(_CODE_BITS)
KINDS = {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
"""What the types are called in `cuda/kv.cuh`."""
MAX_HEAD_DIM = 256


def check_kv_type(config: ModelConfig, kind: KvType) -> None:
    """Raise UnsupportedError for a type there is not on a GPU, or heads that kernels cannot take."""
    dim = config.head_dim
    if dim % 16 or dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"attention on a GPU needs heads of a multiple of 16 up to {MAX_HEAD_DIM}, and the model has {dim}; "
            "use the CPU"
        )
    for name in (kind.keys, kind.values):
        if name not in GPU_KV_TYPES:
            raise UnsupportedError(f"KV cache type {name} is not supported; use one of {', '.join(GPU_KV_TYPES)}")
        if name != "f16" and dim % BLOCK:
            raise UnsupportedError(
                f"KV cache type {name} needs heads of a multiple of {BLOCK}, and the model has {dim}; use f16"
            )


def cell_bytes(kind: str, dim: int) -> int:
    """Bytes of one head's keys, or values, in a page: codes, then float16 scales unless kind is f16."""
    scales = 0 if kind == "f16" else 2 * PAGE_TOKENS * (dim // BLOCK)
    return PAGE_TOKENS * dim * _CODE_BITS[kind] // 8 + scales


class GpuKvPool:
    """`n_pages` pages of 256 tokens on the current device: uint8 [n_pages, layers, layer_bytes].

    A layer's part of a page holds, for each KV head, keys (`key_bytes`), then values. Nothing is
    written to begin with. keepsakes, identity: as of `worker.kv_pool.KvPool`. UnsupportedError as `check_kv_type`.
    """

    def __init__(
        self, config: ModelConfig, n_pages: int, kind: KvType, keepsakes: Keepsakes | None = None
    ) -> None:  # fmt: skip
        check_kv_type(config, kind)
        self.kind, self._dim = kind, config.head_dim
        self.key_bytes = cell_bytes(kind.keys, config.head_dim)
        self.head_bytes = self.key_bytes + cell_bytes(kind.values, config.head_dim)
        self.layer_bytes = config.n_kv_heads * self.head_bytes
        self.page_bytes = config.n_layers * self.layer_bytes
        layout = f"{n_pages} GPU pages of {self.page_bytes}, keys {kind.keys}, values {kind.values}".encode()
        memory = KeptVram(keepsakes or Keepsakes(), "kv", layout, n_pages * self.page_bytes)
        memory.keep()  # whatever is in it: the journal says what that is
        self.identity = memory.identity
        self.data: cp.ndarray = memory.array.reshape(n_pages, config.n_layers, self.layer_bytes)

    @staticmethod
    def nbytes(config: ModelConfig, n_pages: int, kind: KvType) -> int:
        """Bytes of a pool."""
        head = cell_bytes(kind.keys, config.head_dim) + cell_bytes(kind.values, config.head_dim)
        return n_pages * config.n_layers * config.n_kv_heads * head

    def place(self, layer: int, page_tables: cp.ndarray) -> tuple[Any, ...]:
        """What KV_PARAMETERS of `cuda/kv.cuh` stands for; page_tables: int32 [slots, pages], on the device."""
        return (
            np.uint64(self.layer_address(layer)), np.int64(self.page_bytes), np.int32(self.head_bytes),
            np.int32(self.key_bytes), page_tables, np.int32(page_tables.shape[1]),
        )  # fmt: skip

    def token_parts(self) -> list[tuple[int, int]]:
        """Codes and scales of keys, then of values: where a KV head's begin in its part of a page, bytes a token."""
        found = []
        for start, kind in ((0, self.kind.keys), (self.key_bytes, self.kind.values)):
            codes = self._dim * _CODE_BITS[kind] // 8
            found.append((start, codes))
            if kind != "f16":
                found.append((start + PAGE_TOKENS * codes, 2 * self._dim // BLOCK))
        return found

    def layer_address(self, layer: int) -> int:
        """Where layer `layer` of page 0 begins; other pages follow at multiples of `page_bytes`."""
        return int(self.data.data.ptr) + layer * self.layer_bytes
