"""Rotary position embedding (RoPE): frequencies, with linear and YaRN context extension."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from numoe.engine.models.config import RopeConfig


def rope_frequencies(rope: RopeConfig, dtype: npt.DTypeLike = np.float32) -> tuple[npt.NDArray[Any], float]:
    """Angle per position of each rotated pair, [dims/2] of `dtype`, and the factor of cos and sin.

    Pair i of a head at position p is rotated by p * inv_freq[i], and both its elements are
    multiplied by the factor.

    RoPE (Su et al., arXiv:2104.09864):  inv_freq[i] = theta^(-2i/dims) / frequency_factors[i]
    Linear (Chen et al., arXiv:2306.15595):  inv_freq / factor
    YaRN (Peng et al., arXiv:2309.00071), as llama.cpp computes it: pairs that turn often within the
    original context keep their frequency, pairs that turn seldom are interpolated as above, with
    a linear ramp r between the pairs that turn beta_fast and beta_slow times:

        pair(b)  = dims * ln(original_context / (2 pi b)) / (2 ln(theta))
        low, high = max(0, floor(pair(beta_fast))), min(dims - 1, ceil(pair(beta_slow)))
        r[i]     = ext_factor * (1 - clip((i - low) / max(0.001, high - low), 0, 1))
        inv_freq = inv_freq / factor * (1 - r) + inv_freq * r

    with cos and sin multiplied by attn_factor * (1 + 0.1 ln(max(1, factor))), which scales the
    attention logits by its square. Without YaRN (ext_factor 0) they are multiplied by attn_factor alone.
    """
    pairs = np.arange(rope.dims // 2, dtype=np.float64)
    inv_freq = rope.theta ** (-2.0 * pairs / rope.dims)
    if rope.frequency_factors is not None:
        inv_freq = inv_freq / np.array(rope.frequency_factors, np.float64)
    interpolated = inv_freq / rope.factor
    if rope.ext_factor == 0.0:
        return interpolated.astype(dtype), rope.attn_factor
    low = max(0, math.floor(_turning_pair(rope, rope.beta_fast)))
    high = min(rope.dims - 1, math.ceil(_turning_pair(rope, rope.beta_slow)))
    ramp = rope.ext_factor * (1.0 - np.clip((pairs - low) / max(0.001, high - low), 0.0, 1.0))
    mixed = interpolated * (1.0 - ramp) + inv_freq * ramp
    return mixed.astype(dtype), rope.attn_factor * (1.0 + 0.1 * math.log(max(1.0, rope.factor)))


def _turning_pair(rope: RopeConfig, turns: float) -> float:
    """Find the (fractional) pair that turns `turns` times within the original context."""
    wavelengths = rope.original_context / (turns * 2.0 * math.pi)
    return rope.dims * math.log(wavelengths) / (2.0 * math.log(rope.theta))
