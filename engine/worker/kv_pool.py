"""The memory of the KV pages (see `cpu/attention.py` and `cpu/kv_cells.py` for what a page holds)."""

from __future__ import annotations

from dataclasses import dataclass

from numoe.engine.cpu.kv_cells import cell_bytes
from numoe.engine.cpu.memory import address, aligned_bytes
from numoe.engine.errors import UnsupportedError
from numoe.engine.models.config import ModelConfig

KV_TYPES = ("f16", "q8_0")


@dataclass(frozen=True)
class KvType:
    """The element types of keys and values, each of KV_TYPES."""

    keys: str = "f16"
    values: str = "f16"

    def check(self, config: ModelConfig) -> None:
        """Raise UnsupportedError for a type there is not, or one that the model's heads do not fit."""
        for kind in (self.keys, self.values):
            if kind not in KV_TYPES:
                raise UnsupportedError(f"KV cache type {kind} is not supported; use one of {', '.join(KV_TYPES)}")
            if kind == "q8_0" and config.head_dim % 32:
                raise UnsupportedError(
                    f"KV cache type q8_0 needs heads of a multiple of 32, and the model has {config.head_dim}; use f16"
                )


F16 = KvType()


class KvPool:
    """`n_pages` pages of 256 tokens: uint8 [n_pages, layers, KV heads, keys and values]."""

    def __init__(self, config: ModelConfig, n_pages: int, kind: KvType) -> None:
        self.kind = kind
        self.key_bytes = cell_bytes(kind.keys, config.head_dim, values=False)
        self.head_bytes = self.key_bytes + cell_bytes(kind.values, config.head_dim, values=True)
        self.layer_bytes = config.n_kv_heads * self.head_bytes
        self.page_bytes = config.n_layers * self.layer_bytes
        self.data = aligned_bytes(n_pages * self.page_bytes)

    def layer_address(self, layer: int) -> int:
        """Where layer `layer` of page 0 begins; other pages follow at multiples of `page_bytes`."""
        return address(self.data) + layer * self.layer_bytes

    @staticmethod
    def nbytes(config: ModelConfig, n_pages: int, kind: KvType) -> int:
        """Bytes of a pool."""
        keys = cell_bytes(kind.keys, config.head_dim, values=False)
        values = cell_bytes(kind.values, config.head_dim, values=True)
        return n_pages * config.n_layers * config.n_kv_heads * (keys + values)
