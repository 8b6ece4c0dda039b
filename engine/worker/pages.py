"""The CPU's KV pages in canonical bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from numoe.engine.models.config import ModelConfig
from numoe.engine.store.chunks import ChunkShape
from numoe.engine.store.portable import export_layer, import_layer, kv_type_name, portable_bytes
from numoe.engine.worker.kv_pool import KvPool

if TYPE_CHECKING:
    from typing_extensions import Buffer


class CpuPages:
    """The `PagePort` of a `KvPool`."""

    def __init__(self, config: ModelConfig, pool: KvPool) -> None:
        self._heads, self._dim, self._layers = config.n_kv_heads, config.head_dim, config.n_layers
        self._kind = pool.kind
        self._pages = pool.data.reshape(-1, config.n_layers, pool.layer_bytes)

    def shape(self, tokens: int) -> ChunkShape:
        """As `PagePort.shape`."""
        layer_bytes = portable_bytes(self._kind, self._heads, self._dim, tokens)
        return ChunkShape(kv_type_name(self._kind), self._layers, layer_bytes, tokens)

    def export_page(self, page: int, tokens: int) -> list[npt.NDArray[np.uint8]]:
        """As `PagePort.export_page`."""
        return [export_layer(raw, self._kind, self._heads, self._dim, tokens) for raw in self._pages[page]]

    def import_page(self, page: int, layers: Sequence[Buffer], tokens: int) -> None:
        """As `PagePort.import_page`."""
        for data, raw in zip(layers, self._pages[page], strict=True):
            import_layer(memoryview(data), raw, self._kind, self._heads, self._dim, tokens)

    def copy_page(self, source: int, target: int) -> None:
        """As `PagePort.copy_page`."""
        self._pages[target] = self._pages[source]
