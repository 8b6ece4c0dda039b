"""The two kernels of each weight format: products with activation rows, and unpacking.

Both are C functions (`numba.cfunc`), called by address from other kernels: one compiled loop serves
every mixture of formats in a model. They are compiled on first use and cached on disk.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite.binding as llvm
from gguf import GGMLQuantizationType as QuantType
from numba import cfunc, types

from numoe.engine.cpu import ISA, tile
from numoe.engine.cpu import simd as v
from numoe.engine.cpu.blocks import block_product, block_unpack
from numoe.engine.cpu.memory import inline
from numoe.engine.formats.layouts import packed_format

TILE_ROWS = (12, 4) if ISA == "avx512" else (4, 2)
"""Activation rows of register tiles: as many as leave no register spilled, and for the rest of them.

What then remains goes one by one. A group of eight query heads, or eight streams, are two passes.
"""

FAR_BYTES, NEAR_BYTES = 16384, 2048
"""How far ahead of its use a weight is fetched to the second-level cache, and from there to the first.

The first level of Intel's cores has too few places for lines under way to reach the memory's bandwidth by itself.
"""
FETCHES_FAR = not llvm.get_host_cpu_name().startswith("znver")
"""AMD's Zen cores reach it through the first level, and lose a tenth of it to the second fetch of each line."""

product_signature = types.void(*[types.intp] * 10)
unpack_signature = types.void(*[types.intp] * 5)


@inline
def _fetch(p: int, end: int, ahead: int, nbytes: int) -> None:
    """Fetch `nbytes` read later than those at `p`, in a stream that goes on at `ahead` after `end`."""
    far, near = p + FAR_BYTES, p + NEAR_BYTES
    if far >= end:
        far += ahead - end
    if near >= end:
        near += ahead - end
    for line in range(0, nbytes, 64):
        if FETCHES_FAR:
            v.prefetch_l2(far + line)
        v.prefetch(near + line)


@inline
def _fetch_shared(shared: int, nbytes: int, group_bytes: int, end: int, ahead: int) -> None:
    """Fetch what the same super of the next group shares, whose first tile needs it at once, and this group's next."""
    far = shared + group_bytes
    if far >= end:
        far += ahead - end
    for line in range(0, nbytes, 64):
        if FETCHES_FAR:
            v.prefetch_l2(far + line)
        v.prefetch(shared + nbytes + line)


@inline
def _run_tile(
    name: Any, acc: Any, tile_bytes: int, super_bytes: int, super_blocks: int,
    w: int, blocks: int, phase: int, rows: int, out: int, stride: int,
) -> None:  # fmt: skip
    """One group of weights against as many activation rows as `acc` has accumulators."""
    x = tile.tile_pointers(acc, rows)
    shared, until = w + blocks * tile_bytes, super_blocks - phase
    for block in range(blocks):
        p = w + block * tile_bytes
        for line in range(0, tile_bytes, 64):
            v.prefetch(p + NEAR_BYTES + line)
        acc = block_product(name, acc, p, shared, x, blocks * 32, block)
        if super_bytes:
            until -= 1
            if until == 0:
                shared, until = shared + super_bytes, super_blocks
    tile.tile_store(acc, out, stride)


@inline
def _run_pair(
    name: Any, acc: Any, tile_bytes: int, super_bytes: int, super_blocks: int,
    w: int, group_bytes: int, apart: int, end: int, ahead: int, blocks: int, phase: int, rows: int,
    out: int, out_apart: int, stride: int,
) -> None:  # fmt: skip
    """Two groups of weights, `apart` bytes from each other, side by side: memory likes two streams better than one.

    The first stream ends at `end` and goes on at `ahead`, the second `apart` bytes behind.
    """
    x, left, right = tile.tile_pointers(acc, rows), acc, acc
    shared, until = w + blocks * tile_bytes, super_blocks - phase
    for block in range(blocks):
        p = w + block * tile_bytes
        if super_bytes and (block == 0 or until == super_blocks):
            _fetch_shared(shared, super_bytes, group_bytes, end, ahead)
            _fetch_shared(shared + apart, super_bytes, group_bytes, end + apart, ahead + apart)
        _fetch(p, end, ahead, tile_bytes)
        left = block_product(name, left, p, shared, x, blocks * 32, block)
        _fetch(p + apart, end + apart, ahead + apart, tile_bytes)
        right = block_product(name, right, p + apart, shared + apart, x, blocks * 32, block)
        if super_bytes:
            until -= 1
            if until == 0:
                shared, until = shared + super_bytes, super_blocks
    if super_bytes:  # the tiles of the next group lie so many bytes further on
        between = w + blocks * tile_bytes
        _fetch(between, end, ahead, group_bytes - blocks * tile_bytes)
        _fetch(between + apart, end + apart, ahead + apart, group_bytes - blocks * tile_bytes)
    tile.tile_store(left, out, stride)
    tile.tile_store(right, out + out_apart, stride)


@cache
def product_kernel(qtype: QuantType) -> Any:
    """The kernel (w, group_bytes, groups, blocks, phase, rows, n, out, stride, ahead) of a format.

    It multiplies `groups` groups of 16 weight rows, packed at `w`, `group_bytes` from group to
    group, each of `blocks` blocks of 32 columns, the first at `phase` in its super, with `n`
    activation rows whose addresses are int64 at `rows`, and writes float32 [n, 16 groups] at `out`,
    `stride` bytes from row to row. `ahead` is the `w` of the call that is likely to follow, whose first
    weights are fetched meanwhile; 0 if none is. `.address` is the kernel's C function's.
    """
    form, (many, some) = packed_format(qtype), TILE_ROWS
    name, tile_bytes, super_bytes, super_blocks = form.name, form.tile_bytes, form.super_bytes, form.super_blocks

    @cfunc(product_signature, nopython=True, cache=True, error_model="numpy")
    def product(
        w: int, group_bytes: int, groups: int, blocks: int, phase: int, rows: int, n: int, out: int, stride: int,
        ahead: int,
    ) -> None:  # fmt: skip
        # Group g goes with group g + half: each of the two streams reads from front to end.
        half, tiled = (groups + 1) // 2, n - n % many
        end = w + half * group_bytes
        if ahead == 0:
            ahead = end - FAR_BYTES  # what is there already
        for g in range(half):
            for k in range(g, groups, half):
                for i in range(0, tiled, many):
                    _run_tile(
                        name, tile.tile_zero(many), tile_bytes, super_bytes, super_blocks,
                        w + k * group_bytes, blocks, phase, rows + 8 * i, out + 64 * k + i * stride, stride,
                    )  # fmt: skip
            other, i = half if g + half < groups else 0, tiled
            while n - i >= some:
                _run_pair(
                    name, tile.tile_zero(some), tile_bytes, super_bytes, super_blocks,
                    w + g * group_bytes, group_bytes, other * group_bytes, end, ahead, blocks, phase, rows + 8 * i,
                    out + 64 * g + i * stride, 64 * other, stride,
                )  # fmt: skip
                i += some
            while n - i >= 1:
                _run_pair(
                    name, tile.tile_zero(1), tile_bytes, super_bytes, super_blocks,
                    w + g * group_bytes, group_bytes, other * group_bytes, end, ahead, blocks, phase, rows + 8 * i,
                    out + 64 * g + i * stride, 64 * other, stride,
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
