"""The memory of the KV pages (see `cpu/attention.py` for what a page holds)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from numoe.engine.cpu.memory import address
from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.models.config import ModelConfig


class KvPool:
    """`n_pages` pages of 256 tokens: uint8 [n_pages, layers, KV heads, keys and values]."""

    def __init__(self, config: ModelConfig, n_pages: int) -> None:
        self.head_bytes = 2 * 2 * PAGE_TOKENS * config.head_dim
        self.layer_bytes = config.n_kv_heads * self.head_bytes
        self.page_bytes = config.n_layers * self.layer_bytes
        # Not touched here: the kernel hands out a page's memory when it is first written.
        self.data: npt.NDArray[np.uint8] = np.empty(n_pages * self.page_bytes + 64, np.uint8)
        self._start = -address(self.data) % 64

    def layer_address(self, layer: int) -> int:
        """Where layer `layer` of page 0 begins; other pages follow at multiples of `page_bytes`."""
        return address(self.data) + self._start + layer * self.layer_bytes

    @staticmethod
    def nbytes(config: ModelConfig, n_pages: int) -> int:
        """Bytes of a pool."""
        return n_pages * config.n_layers * config.n_kv_heads * 4 * PAGE_TOKENS * config.head_dim
