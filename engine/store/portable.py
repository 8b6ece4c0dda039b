"""Canonical bytes of one layer of a page: the same wherever attention ran.

For each KV head the keys, then the values, both token by token:

    f16     float16 [tokens, dim]
    q8_0    int8 codes [tokens, dim], then float16 scales [tokens, dim / 32]; a number is code * scale
    q4_0    4-bit codes [tokens, dim / 2], dimensions 2 i and 2 i + 1 in the low and the high half of
            byte i, then scales as above; a number is (code - 8) * scale

The CPU's pages (`cpu/attention.py`, `cpu/kv_cells.py`) and the GPU's (`gpu/cuda/kv.cuh`) are packed for
their kernels; `cpu/portable.py` converts both. On the CPU 8-bit values have one scale a token, which
stands here dim / 32 times: so there is one form for pages that have a scale for every 32 dimensions as
well. What came from those is brought to the token's largest scale when it is imported, and rounded once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.models.config import ModelConfig
from numoe.engine.store.chunks import ChunkShape
from numoe.engine.worker.kv_pool import KvType

if TYPE_CHECKING:
    from typing_extensions import Buffer

Bytes = npt.NDArray[np.uint8]

BLOCK: Final = 32
"""Dimensions that share a scale."""
_CODE_BITS: Final = {"f16": 16, "q8_0": 8, "q4_0": 4}


def kv_type_name(kind: KvType) -> str:
    """The name of a KV type in keys and manifests, such as "q8_0/f16": of keys, then of values."""
    return f"{kind.keys}/{kind.values}"


def portable_bytes(kind: KvType, n_kv_heads: int, dim: int, tokens: int = PAGE_TOKENS) -> int:
    """Canonical bytes of one layer of a page with `tokens` tokens."""
    return n_kv_heads * tokens * (_token_bytes(kind.keys, dim) + _token_bytes(kind.values, dim))


def chunk_shape(config: ModelConfig, kind: KvType, tokens: int = PAGE_TOKENS) -> ChunkShape:
    """The shape of a chunk of `tokens` tokens; ValueError unless that is 1 to 256."""
    if not 1 <= tokens <= PAGE_TOKENS:
        raise ValueError(f"a page holds 1 to {PAGE_TOKENS} tokens, not {tokens}")
    layer_bytes = portable_bytes(kind, config.n_kv_heads, config.head_dim, tokens)
    return ChunkShape(kv_type_name(kind), config.n_layers, layer_bytes, tokens)


def check_layers(layers: Sequence[Buffer], shape: ChunkShape) -> list[Bytes]:
    """The canonical bytes of each layer as arrays; ValueError if they do not fit `shape`."""
    arrays = [np.frombuffer(memoryview(layer), np.uint8) for layer in layers]
    sizes = {array.size for array in arrays}
    if sizes != {shape.layer_bytes} or len(arrays) != shape.layers:
        raise ValueError(
            f"{shape.tokens} tokens are {shape.layers} layers of {shape.layer_bytes} bytes, "
            f"not {len(arrays)} of {sorted(sizes)}"
        )
    return arrays


def layers_within(out: Bytes | None, shape: ChunkShape) -> list[Bytes]:
    """Where the layers go in `out`, contiguous uint8 [layers * layer_bytes], or in new memory."""
    nbytes = shape.layers * shape.layer_bytes
    out = np.empty(nbytes, np.uint8) if out is None else out
    if out.dtype != np.uint8 or out.size != nbytes or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(f"{shape.tokens} tokens take {nbytes} contiguous bytes, not {out.nbytes}")
    return list(out.reshape(shape.layers, shape.layer_bytes))


def addresses(arrays: Sequence[Bytes]) -> npt.NDArray[np.int64]:
    """The address of each array, which the caller keeps alive."""
    return np.array([array.ctypes.data for array in arrays], np.int64)


def _token_bytes(kind: str, dim: int) -> int:
    """Canonical bytes of one token's keys, or values, of one head."""
    return dim * _CODE_BITS[kind] // 8 + (0 if kind == "f16" else 2 * (dim // BLOCK))
