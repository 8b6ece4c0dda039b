"""The CPU's KV pages in canonical bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from numoe.engine.cpu import portable
from numoe.engine.cpu.memory import address
from numoe.engine.models.config import ModelConfig
from numoe.engine.store.chunks import ChunkShape
from numoe.engine.store.portable import addresses, check_layers, chunk_shape, layers_within
from numoe.engine.worker.kv_pool import KvPool

if TYPE_CHECKING:
    from typing_extensions import Buffer


class CpuPages:
    """The `PagePort` of a `KvPool`."""

    def __init__(self, config: ModelConfig, pool: KvPool) -> None:
        portable.prepare(portable.transfer)  # a thread that did it later would hold up a step
        self._config, self._kind = config, pool.kind
        self._pages = pool.data.reshape(-1, pool.page_bytes)
        kinds = (pool.kind.keys, pool.kind.values)
        self._record = portable.page_record(
            config.n_kv_heads, config.head_dim, kinds, pool.key_bytes, pool.head_bytes
        )

    def shape(self, tokens: int) -> ChunkShape:
        """As `PagePort.shape`."""
        return chunk_shape(self._config, self._kind, tokens)

    def export_page(
        self, page: int, tokens: int, out: npt.NDArray[np.uint8] | None = None
    ) -> list[npt.NDArray[np.uint8]]:
        """As `PagePort.export_page`."""
        layers = layers_within(out, self.shape(tokens))
        self._transfer(page, addresses(layers), tokens, to_page=False)
        return layers

    def import_page(self, page: int, layers: Sequence[Buffer], tokens: int) -> None:
        """As `PagePort.import_page`."""
        self._transfer(page, addresses(check_layers(layers, self.shape(tokens))), tokens, to_page=True)

    def copy_page(self, source: int, target: int) -> None:
        """As `PagePort.copy_page`."""
        np.copyto(self._pages[target], self._pages[source])

    def _transfer(self, page: int, layers: npt.NDArray[np.int64], tokens: int, *, to_page: bool) -> None:
        place = address(self._pages[page])
        portable.transfer(address(self._record), place, address(layers), len(layers), tokens, int(to_page))
