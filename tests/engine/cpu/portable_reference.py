"""KV pages and their canonical bytes, in NumPy: what `engine/cpu/portable.py` is checked against."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from numoe.engine.cpu.kv_cells import cell_bytes
from numoe.engine.gpu.kv_pool import cell_bytes as gpu_cell_bytes
from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.store.portable import BLOCK, portable_bytes
from numoe.engine.worker.kv_pool import KvType

Bytes = npt.NDArray[np.uint8]

_TILE: Final = 544  # bytes of 16 x 32 packed Q8_0 weights: codes [8, 16, 4], float16 scales [16]
_COLUMNS: Final = PAGE_TOKENS // BLOCK
_BIAS: Final = np.uint32(0x80808080)  # packed codes are unsigned, 128 more than what they stand for


def export_layer(raw: Bytes, kind: KvType, n_kv_heads: int, dim: int, tokens: int = PAGE_TOKENS) -> Bytes:
    """The canonical bytes of the first `tokens` tokens of a layer of one of the CPU's pages.

    raw: uint8 [n_kv_heads * head bytes], contiguous, as in `KvPool`.
    """
    out = np.empty(portable_bytes(kind, n_kv_heads, dim, tokens), np.uint8)
    _transfer(raw, out, kind, n_kv_heads, dim, tokens, to_page=False)
    return out


def import_layer(
    data: Bytes | memoryview, raw: Bytes, kind: KvType, n_kv_heads: int, dim: int, tokens: int = PAGE_TOKENS
) -> None:
    """Write the first `tokens` tokens of a layer of one of the CPU's pages from their canonical bytes.

    data: uint8 [portable_bytes]. raw: uint8 [n_kv_heads * head bytes], contiguous. Further tokens
    can be appended behind the last one.
    """
    _transfer(raw, np.frombuffer(data, np.uint8), kind, n_kv_heads, dim, tokens, to_page=True)


def _half_bytes(kind: str, dim: int, tokens: int) -> int:
    """Canonical bytes of one head's keys, or values."""
    return portable_bytes(KvType(kind, kind), 1, dim, tokens) // 2


def _transfer(
    page: Bytes, portable: Bytes, kind: KvType, n_kv_heads: int, dim: int, tokens: int, *, to_page: bool
) -> None:
    """Copy between a layer of a page and its canonical bytes; ValueError if the sizes do not fit."""
    key_bytes = cell_bytes(kind.keys, dim, values=False)
    head_bytes = key_bytes + cell_bytes(kind.values, dim, values=True)
    if page.size != n_kv_heads * head_bytes or not page.flags.c_contiguous:
        raise ValueError(f"a layer of a page is {n_kv_heads * head_bytes} contiguous bytes, not {page.size}")
    if not 1 <= tokens <= PAGE_TOKENS:
        raise ValueError(f"a page holds 1 to {PAGE_TOKENS} tokens, not {tokens}")
    expected = portable_bytes(kind, n_kv_heads, dim, tokens)
    if portable.size != expected:
        raise ValueError(f"{tokens} tokens of a layer are {expected} bytes, not {portable.size}")
    cells, rows = page.reshape(n_kv_heads, head_bytes), portable.reshape(n_kv_heads, -1)
    split = _half_bytes(kind.keys, dim, tokens)
    halves = (
        (_KEYS[kind.keys], cells[:, :key_bytes], rows[:, :split]),
        (_VALUES[kind.values], cells[:, key_bytes:], rows[:, split:]),
    )
    for copy, cell, half in halves:
        copy(cell, half, dim, tokens, to_page=to_page)


def _view(cells: Bytes, dtype: npt.DTypeLike, *shape: int) -> npt.NDArray[Any]:
    """Bytes [heads, n] as [heads, *shape] of `dtype`; a view, as only the last axis is split."""
    return cells.view(dtype).reshape(len(cells), *shape)


def _copy_blocks(blocks: npt.NDArray[Any], rows: npt.NDArray[Any], *, to_blocks: bool) -> None:
    """Copy between blocks of tokens [heads, blocks, width, ...] and rows [heads, tokens, ...]."""
    width, tokens = blocks.shape[2], rows.shape[1]
    full, rest = divmod(tokens, width)
    whole = rows[:, : full * width].reshape(len(rows), full, width, *rows.shape[2:])
    pairs = [(blocks[:, :full], whole)]
    if rest:
        pairs.append((blocks[:, full, :rest], rows[:, full * width :]))
    for block, row in pairs:
        np.copyto(*((block, row) if to_blocks else (row, block)))


def _f16_keys(cell: Bytes, half: Bytes, dim: int, tokens: int, *, to_page: bool) -> None:
    blocks = _view(cell, np.uint16, PAGE_TOKENS // 16, dim, 16).swapaxes(2, 3)
    _copy_blocks(blocks, _view(half, np.uint16, tokens, dim), to_blocks=to_page)


def _f16_values(cell: Bytes, half: Bytes, dim: int, tokens: int, *, to_page: bool) -> None:
    groups = _view(cell, np.uint16, dim // 16, PAGE_TOKENS, 16).swapaxes(1, 2)[:, :tokens]
    rows = _view(half, np.uint16, tokens, dim // 16, 16)
    np.copyto(*((groups, rows) if to_page else (rows, groups)))


def _sections(half: Bytes, dim: int, tokens: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """8-bit codes as uint32 [heads, tokens, dim / 4] and float16 scales [heads, tokens, dim / 32]."""
    codes = half[:, : tokens * dim].view(np.uint32).reshape(len(half), tokens, dim // 4)
    return codes, _view(half[:, tokens * dim :], np.float16, tokens, dim // BLOCK)


def _q8_keys(cell: Bytes, half: Bytes, dim: int, tokens: int, *, to_page: bool) -> None:
    blocks, words = dim // BLOCK, _TILE // 4
    tiles = _view(cell, np.uint32, PAGE_TOKENS // 16, blocks, words)[..., :128]
    # [heads, 16, 16 tokens, blocks, 8]: a word is four dimensions of a token.
    tiles = tiles.reshape(*tiles.shape[:3], 8, 16).transpose(0, 1, 4, 2, 3)
    scales = _view(cell, np.float16, PAGE_TOKENS // 16, blocks, _TILE // 2)[..., 256:].swapaxes(2, 3)
    codes, row_scales = _sections(half, dim, tokens)
    _copy_blocks(scales, row_scales, to_blocks=to_page)
    if to_page:
        _copy_blocks(tiles, (codes ^ _BIAS).reshape(len(half), tokens, blocks, 8), to_blocks=True)
    else:
        _copy_blocks(tiles, codes.reshape(len(half), tokens, blocks, 8), to_blocks=False)
        np.bitwise_xor(codes, _BIAS, out=codes)


def _q8_values(cell: Bytes, half: Bytes, dim: int, tokens: int, *, to_page: bool) -> None:
    heads, groups, columns = len(cell), dim // 16, -(-tokens // BLOCK)
    tiles = cell[:, : groups * _COLUMNS * _TILE].reshape(heads, groups, _COLUMNS, _TILE)[:, :, :columns]
    token_scales = cell[:, -2 * PAGE_TOKENS :].view(np.float16)[:, :tokens]
    codes, scales = _sections(half, dim, tokens)
    if to_page:
        codes, token_scales[...] = _one_scale(codes, scales)
        rows = codes.view(np.uint8)
        if tokens % BLOCK:
            rows = np.zeros((heads, columns * BLOCK, dim), np.uint8)
            rows[:, :tokens] = codes.view(np.uint8)
        rows = rows.reshape(heads, columns, 8, 4, dim)
        quads = np.empty((heads, columns, 8, dim, 4), np.uint8)
        for token in range(4):  # more than twice as fast as a transposition of single bytes
            quads[..., token] = rows[:, :, :, token]
        # [heads, columns, 8, groups, 16]: a word is one dimension of four tokens.
        words = tiles[..., :512].view(np.uint32).reshape(heads, groups, columns, 8, 16).transpose(0, 2, 3, 1, 4)
        np.bitwise_xor(quads.view(np.uint32).reshape(words.shape), _BIAS, out=words)
        tiles[..., 512:].view(np.float16)[...] = 1
    else:
        # [heads, columns, 8, 4 tokens, groups, 16 dimensions]
        packed = tiles[..., :512].reshape(heads, groups, columns, 8, 16, 4).transpose(0, 2, 3, 5, 1, 4)
        rows = np.ascontiguousarray(packed).reshape(heads, -1, dim)[:, :tokens]
        np.bitwise_xor(rows.view(np.uint32), _BIAS, out=codes)
        scales[...] = token_scales[..., None]


def _one_scale(codes: npt.NDArray[Any], scales: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """One scale for each token and its codes: those there are if all of a token's are equal, else for the largest."""
    bits = scales.view(np.uint16)
    if (bits == bits[:, :, :1]).all():
        return codes, scales[:, :, 0]
    numbers = codes.view(np.int8).reshape(*scales.shape, BLOCK) * scales.astype(np.float32)[..., None]
    largest = scales.max(axis=2)
    rounded: npt.NDArray[np.int8] = np.rint(numbers / largest.astype(np.float32)[..., None, None]).astype(np.int8)
    return rounded.reshape(*codes.shape[:2], -1).view(np.uint32), largest


_KEYS: Final = {"f16": _f16_keys, "q8_0": _q8_keys}
_VALUES: Final = {"f16": _f16_values, "q8_0": _q8_values}


def export_gpu_layer(raw: Bytes, kind: KvType, n_kv_heads: int, dim: int, tokens: int = PAGE_TOKENS) -> Bytes:
    """The canonical bytes of the first `tokens` tokens of a layer of one of the GPU's pages (`gpu/cuda/kv.cuh`)."""
    out = []
    for head in raw.reshape(n_kv_heads, -1):
        for cell, name in zip(np.split(head, [gpu_cell_bytes(kind.keys, dim)]), (kind.keys, kind.values), strict=True):
            out += _gpu_half(cell, name, dim, tokens)
    return np.concatenate(out)


def _gpu_half(cell: Bytes, kind: str, dim: int, tokens: int) -> list[Bytes]:
    if kind == "f16":
        return [cell[: 2 * dim * tokens]]
    bits = {"q8_0": 8, "q4_0": 4}[kind]
    packed, scales = np.split(cell, [PAGE_TOKENS * dim * bits // 8])
    codes = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=1).ravel()
    # Dimension i of block b is code 4 (i / 4 * blocks + b) + i % 4.
    i, b = np.arange(dim) % BLOCK, np.arange(dim) // BLOCK
    codes = codes.reshape(PAGE_TOKENS, dim)[:tokens, 4 * (i // 4 * (dim // BLOCK) + b) + i % 4]
    codes = codes ^ 128 if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
    return [codes.ravel(), scales[: 2 * tokens * (dim // BLOCK)]]
