"""Layers of a KV page, their way to canonical bytes and back by the kernels, and by NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from numoe.engine.cpu import kv_cells, portable
from numoe.engine.cpu.memory import address
from numoe.engine.gpu import kv_pool as gpu
from numoe.engine.store.portable import portable_bytes
from numoe.engine.worker.kv_pool import KvType
from tests.engine.cpu import portable_reference as reference


@dataclass(frozen=True)
class Layers:
    """The layers of a page, as a backend has them."""

    kind: KvType
    heads: int
    dim: int
    on_gpu: bool = False
    count: int = 2

    @property
    def cells(self) -> tuple[int, int]:
        """Bytes of a head's keys and values."""
        if self.on_gpu:
            return gpu.cell_bytes(self.kind.keys, self.dim), gpu.cell_bytes(self.kind.values, self.dim)
        sizes = [kv_cells.cell_bytes(k, self.dim, values=v) for k, v in ((self.kind.keys, 0), (self.kind.values, 1))]
        return sizes[0], sizes[1]

    def random(self, seed: int) -> np.ndarray:
        """uint8 [layers, layer bytes]."""
        return np.random.default_rng(seed).integers(0, 256, (self.count, self.heads * sum(self.cells)), np.uint8)

    def transfer(self, page: np.ndarray, rows: np.ndarray, tokens: int, *, to_page: bool) -> None:
        """Between a page and canonical bytes [layers, bytes]."""
        kernel: Callable[..., None] = portable.transfer_interleaved if self.on_gpu else portable.transfer
        key_bytes, head_bytes = self.cells[0], sum(self.cells)
        record = portable.page_record(
            self.heads, self.dim, (self.kind.keys, self.kind.values), key_bytes, head_bytes
        )
        table = np.array([address(row) for row in rows], np.int64)
        kernel(address(record), address(page), address(table), len(table), tokens, int(to_page))

    def exported(self, page: np.ndarray, tokens: int) -> np.ndarray:
        """Canonical bytes [layers, bytes]."""
        rows = np.zeros((self.count, portable_bytes(self.kind, self.heads, self.dim, tokens)), np.uint8)
        self.transfer(page, rows, tokens, to_page=False)
        return rows

    def reference(self, page: np.ndarray, tokens: int) -> np.ndarray:
        """The same by NumPy."""
        export = reference.export_gpu_layer if self.on_gpu else reference.export_layer
        return np.stack([export(layer, self.kind, self.heads, self.dim, tokens) for layer in page])
