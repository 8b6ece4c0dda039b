"""The two kernels of each weight format: products with activation rows, and unpacking.

Both are C functions (`numba.cfunc`), called by address from other kernels: one compiled loop serves
every mixture of formats in a model. They are compiled on first use and cached on disk.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from gguf import GGMLQuantizationType as QuantType
from numba import cfunc, njit, types

from numoe.engine.cpu import ISA, tile
from numoe.engine.cpu import simd as v
from numoe.engine.cpu.blocks import block_product, block_unpack
from numoe.engine.formats.layouts import packed_format

TILE_ROWS = (12, 4) if ISA == "avx512" else (4, 2)
"""Activation rows of register tiles: as many as leave no register spilled, and for the rest of them.

What then remains goes one by one. A group of eight query heads, or eight streams, are two passes.
"""

product_signature = types.void(*[types.intp] * 7)
unpack_signature = types.void(*[types.intp] * 5)


@njit(nogil=True, error_model="numpy", forceinline=True)
def _run_tile(
    name: Any, acc: Any, tile_bytes: int, super_bytes: int, super_blocks: int,
    w: int, blocks: int, phase: int, rows: int, out: int, stride: int,
) -> None:  # fmt: skip
    """One group of weights against as many activation rows as `acc` has accumulators."""
    x = tile.tile_pointers(acc, rows)
    shared, until = w + blocks * tile_bytes, super_blocks - phase
    for block in range(blocks):
        p = w + block * tile_bytes
        # Far enough ahead to hide memory, whatever the stride of the hardware's own prefetcher.
        for line in range(0, tile_bytes, 64):
            v.prefetch(p + 8 * tile_bytes + line)
        acc = block_product(name, acc, p, shared, x, blocks * 32, block)
        if super_bytes:
            until -= 1
            if until == 0:
                shared, until = shared + super_bytes, super_blocks
    tile.tile_store(acc, out, stride)


@cache
def product_kernel(qtype: QuantType) -> Any:
    """The kernel (w, blocks, phase, rows, n, out, stride) of a format; `.address` is its C function's.

    It multiplies one group of 16 weight rows, packed at `w` with `blocks` blocks of 32 columns, the
    first at `phase` in its super, with `n` activation rows whose addresses are int64 at `rows`, and
    writes float32 [n, 16] at `out`, `stride` bytes from row to row.
    """
    form, (many, some) = packed_format(qtype), TILE_ROWS
    name, tile_bytes, super_bytes, super_blocks = form.name, form.tile_bytes, form.super_bytes, form.super_blocks

    @cfunc(product_signature, nopython=True, cache=True, error_model="numpy")
    def product(w: int, blocks: int, phase: int, rows: int, n: int, out: int, stride: int) -> None:
        i = 0
        while n - i >= many:
            _run_tile(
                name, tile.tile_zero(many), tile_bytes, super_bytes, super_blocks,
                w, blocks, phase, rows + 8 * i, out + i * stride, stride,
            )  # fmt: skip
            i += many
        while n - i >= some:
            _run_tile(
                name, tile.tile_zero(some), tile_bytes, super_bytes, super_blocks,
                w, blocks, phase, rows + 8 * i, out + i * stride, stride,
            )  # fmt: skip
            i += some
        while n - i >= 1:
            _run_tile(
                name, tile.tile_zero(1), tile_bytes, super_bytes, super_blocks,
                w, blocks, phase, rows + 8 * i, out + i * stride, stride,
            )  # fmt: skip
            i += 1

    return product


@cache
def unpack_kernel(qtype: QuantType) -> Any:
    """The kernel (w, blocks, phase, row, out) that writes row `row` < 16 of a group as float32 at `out`."""
    form = packed_format(qtype)
    name, tile_bytes, super_bytes, super_blocks = form.name, form.tile_bytes, form.super_bytes, form.super_blocks

    @cfunc(unpack_signature, nopython=True, cache=True, error_model="numpy")
    def unpack(w: int, blocks: int, phase: int, row: int, out: int) -> None:
        scratch = tile.stack_tile()
        for block in range(blocks):
            shared = w + blocks * tile_bytes
            if super_bytes:
                shared += (phase + block) // super_blocks * super_bytes
            block_unpack(name, w + block * tile_bytes, shared, scratch)
            for column in range(32):
                value = v.load_scalar_f32(scratch + 64 * column + 4 * row)
                v.store_scalar_f32(out + 4 * (32 * block + column), value)

    return unpack
