"""The memory of the KV pages (see `cpu/attention.py` and `cpu/kv_cells.py` for what a page holds)."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from numoe.engine.cpu.kv_cells import cell_bytes
from numoe.engine.cpu.memory import address, align, aligned_bytes
from numoe.engine.errors import UnsupportedError
from numoe.engine.keeper import Keepsakes
from numoe.engine.mapping import HUGE_BYTES, map_file
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
    """`n_pages` pages of 256 tokens: uint8 [n_pages, layers, KV heads, keys and values].

    keepsakes: where they outlive the worker. identity: of the memory: where it is that of a worker before, what it had
    written is there.
    """

    def __init__(
        self, config: ModelConfig, n_pages: int, kind: KvType, keepsakes: Keepsakes | None = None
    ) -> None:  # fmt: skip
        self.kind = kind
        self.key_bytes = cell_bytes(kind.keys, config.head_dim, values=False)
        self.head_bytes = self.key_bytes + cell_bytes(kind.values, config.head_dim, values=True)
        self.layer_bytes = config.n_kv_heads * self.head_bytes
        self.page_bytes = config.n_layers * self.layer_bytes
        self.identity, self.data = _memory(n_pages * self.page_bytes, self.page_bytes, kind, keepsakes or Keepsakes())

    def layer_address(self, layer: int) -> int:
        """Where layer `layer` of page 0 begins; other pages follow at multiples of `page_bytes`."""
        return address(self.data) + layer * self.layer_bytes

    @staticmethod
    def nbytes(config: ModelConfig, n_pages: int, kind: KvType) -> int:
        """Bytes of a pool."""
        keys = cell_bytes(kind.keys, config.head_dim, values=False)
        values = cell_bytes(kind.values, config.head_dim, values=True)
        return n_pages * config.n_layers * config.n_kv_heads * (keys + values)


def _memory(
    nbytes: int, page_bytes: int, kind: KvType, keepsakes: Keepsakes
) -> tuple[bytes, npt.NDArray[np.uint8]]:  # fmt: skip
    """Memory that outlives the worker, as far as somebody keeps it, and its identity."""
    if not keepsakes:
        return secrets.token_bytes(16), aligned_bytes(nbytes)
    layout = f"{nbytes} bytes of pages of {page_bytes}, keys {kind.keys}, values {kind.values}".encode()
    if found := keepsakes.get("kv", layout):
        identity, descriptor = found
    else:
        descriptor = os.memfd_create("numoe-kv", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, align(nbytes, HUGE_BYTES))
        identity = keepsakes.put("kv", layout, descriptor)
    return identity, map_file(descriptor, writable=True)[:nbytes]
