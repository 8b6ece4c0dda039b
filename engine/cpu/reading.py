"""Reading memory as fast as it goes: what bandwidth is measured with."""

from __future__ import annotations

import numpy as np
from numba import njit

from numoe.engine.cpu import simd as v

READ_STEP_BYTES = 512
_READ_AHEAD = 4096


@njit(nogil=True, error_model="numpy", cache=True)
def read(start: int, nbytes: int) -> float:
    """Load every byte from `start` on, a multiple of READ_STEP_BYTES of them; a value that depends on each.

    Two streams, which the hardware's prefetchers like better than one.
    """
    half = nbytes // 2
    a = b = c = d = v.splat_f32(np.float32(0.0))
    for p in range(start, start + half, 256):
        q = p + half
        for line in range(0, 256, 64):
            v.prefetch(p + _READ_AHEAD + line)
            v.prefetch(q + _READ_AHEAD + line)
        a, b = v.add(a, v.load_f32(p)), v.add(b, v.load_f32(p + 64))
        c, d = v.add(c, v.load_f32(p + 128)), v.add(d, v.load_f32(p + 192))
        a, b = v.add(a, v.load_f32(q)), v.add(b, v.load_f32(q + 64))
        c, d = v.add(c, v.load_f32(q + 128)), v.add(d, v.load_f32(q + 192))
    return v.sum_f32(v.add(v.add(a, b), v.add(c, d)))
