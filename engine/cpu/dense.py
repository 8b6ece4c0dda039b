"""Kernels of the dense part of a step: embedding, norms, matrix products, SwiGLU.

The record of each kernel is listed where its fields are read. Rows of a buffer are equally spaced;
a *pointer table* is int64 [rows], the address of each row, as product kernels want them.
"""

from __future__ import annotations

import numpy as np

from numoe.engine.cpu import simd as v
from numoe.engine.cpu.memory import field, float_field
from numoe.engine.cpu.program import LOGIT_ROWS, N_LOGITS, N_ROWS, TOKENS, kernel, share
from numoe.engine.cpu.rows import add_row, quantize_row, rms_norm_row, silu_mul
from numoe.engine.cpu.sync import call_product, call_unpack

ADDED_GROUPS = 8
"""Groups of 16 output columns whose results are added to the output together."""


@kernel
def embed(args: int, step: int, thread: int, threads: int) -> None:
    """x[row] = the embedding of token[row]. Record: unpack kernel, weights, group bytes, blocks, x, stride."""
    first, last = share(field(step, N_ROWS), thread, threads)
    blocks, stride = field(args, 3), field(args, 5)
    for row in range(first, last):
        token = np.intp(v.load_scalar_i32(field(step, TOKENS) + 4 * row))
        group = field(args, 1) + token // 16 * field(args, 2)
        call_unpack(field(args, 0), group, blocks, 0, token % 16, field(args, 4) + row * stride)


@kernel
def rms_norm(args: int, step: int, thread: int, threads: int) -> None:
    """Normalised rows as float32, and as 8-bit rows if wanted.

    Record: the step field that counts the rows, x, x stride, weight, cols, eps, out, out stride,
    8-bit out or 0, its stride.
    """
    first, last = share(field(step, field(args, 0)), thread, threads)
    cols = field(args, 4)
    for row in range(first, last):
        out = field(args, 6) + row * field(args, 7)
        rms_norm_row(field(args, 1) + row * field(args, 2), field(args, 3), cols, float_field(args, 5), out)
        if field(args, 8):
            quantize_row(out, cols, field(args, 8) + row * field(args, 9))


@kernel
def quantize(args: int, step: int, thread: int, threads: int) -> None:
    """8-bit rows of float32 rows. Record: x, x stride, cols, out, out stride."""
    first, last = share(field(step, N_ROWS), thread, threads)
    for row in range(first, last):
        quantize_row(field(args, 0) + row * field(args, 1), field(args, 2), field(args, 3) + row * field(args, 4))


@kernel
def matmul(args: int, step: int, thread: int, threads: int) -> None:
    """out[row] = W x[row], or out[row] += W x[row].

    Record: the step field that counts the rows, product kernel, weights, groups, group bytes,
    blocks, pointer table of x, out, out stride, scratch or 0, its bytes a thread. With scratch
    (float32 [rows, 16 ADDED_GROUPS]) the result is added to what `out` holds.
    """
    first, last = share(field(args, 3), thread, threads)
    rows, out, stride, scratch = field(step, field(args, 0)), field(args, 7), field(args, 8), field(args, 9)
    if rows == 0:
        return
    product, weights, group_bytes = field(args, 1), field(args, 2), field(args, 4)
    blocks, pointers = field(args, 5), field(args, 6)
    if not scratch:
        w, groups, out = weights + first * group_bytes, last - first, out + 64 * first
        call_product(product, w, group_bytes, groups, blocks, 0, pointers, rows, out, stride, 0)
        return
    tile = scratch + thread * field(args, 10)
    for group in range(first, last, ADDED_GROUPS):
        groups = min(ADDED_GROUPS, last - group)
        w, tile_stride = weights + group * group_bytes, 64 * ADDED_GROUPS
        ahead = w + groups * group_bytes if group + groups < last else 0
        call_product(product, w, group_bytes, groups, blocks, 0, pointers, rows, tile, tile_stride, ahead)
        for row in range(rows):
            add_row(out + row * stride + 64 * group, tile + row * tile_stride, 16 * groups)


@kernel
def swiglu(args: int, step: int, thread: int, threads: int) -> None:
    """out = silu(gate) * up, in place of gate. Record: gate, up, stride of both, cols."""
    rows, cols = field(step, N_ROWS), field(args, 3)
    first, last = share(rows * (cols // 16), thread, threads)
    for i in range(first, last):
        offset = i // (cols // 16) * field(args, 2) + 64 * (i % (cols // 16))
        gate = field(args, 0) + offset
        v.store_f32(gate, silu_mul(v.load_f32(gate), v.load_f32(field(args, 1) + offset)))


@kernel
def gather_logit_rows(args: int, step: int, thread: int, threads: int) -> None:
    """The rows whose logits are wanted, one after the other. Record: x, x stride, out, out stride, cols."""
    first, last = share(field(step, N_LOGITS), thread, threads)
    for i in range(first, last):
        row = np.intp(v.load_scalar_i32(field(step, LOGIT_ROWS) + 4 * i))
        x, out = field(args, 0) + row * field(args, 1), field(args, 2) + i * field(args, 3)
        for at in range(0, 4 * field(args, 4), 64):
            v.store_f32(out + at, v.load_f32(x + at))
