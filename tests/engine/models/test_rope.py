"""RoPE frequencies from the papers' formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from numoe.engine.models.config import RopeConfig
from numoe.engine.models.reference import rotate
from numoe.engine.models.rope import rope_frequencies

PLAIN = RopeConfig(dims=64, theta=10000.0, style="neox", original_context=4096)
YARN = replace(PLAIN, scaling="yarn", factor=8.0, ext_factor=1.0)


def test_plain_frequencies_are_a_geometric_series():
    inv_freq, magnitude = rope_frequencies(PLAIN)
    assert inv_freq.dtype == np.float32
    assert inv_freq.shape == (32,)
    assert inv_freq[0] == 1.0
    assert np.allclose(inv_freq[1:] / inv_freq[:-1], 10000 ** (-2 / 64), rtol=1e-6)
    assert magnitude == 1.0


def test_linear_divides_every_frequency():
    inv_freq, magnitude = rope_frequencies(replace(PLAIN, scaling="linear", factor=4.0))
    assert np.array_equal(inv_freq, rope_frequencies(PLAIN)[0] / 4)
    assert magnitude == 1.0


def test_frequency_factors_divide_their_frequency():
    factors = tuple(float(i + 1) for i in range(32))
    inv_freq, _ = rope_frequencies(replace(PLAIN, frequency_factors=factors))
    assert np.allclose(inv_freq * factors, rope_frequencies(PLAIN)[0], rtol=1e-6)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    plain, (inv_freq, magnitude) = rope_frequencies(PLAIN)[0], rope_frequencies(YARN)
    turns = 4096 * plain / (2 * math.pi)
    assert np.allclose(inv_freq[turns > 40], plain[turns > 40])
    assert np.allclose(inv_freq[turns < 0.7], plain[turns < 0.7] / 8)
    between = (turns < 25) & (turns > 1.3)
    assert ((plain[between] / 8 < inv_freq[between]) & (inv_freq[between] < plain[between])).all()
    assert magnitude == pytest.approx(1 + 0.1 * math.log(8))


def test_attn_factor_multiplies():
    assert rope_frequencies(replace(PLAIN, attn_factor=1.25))[1] == 1.25
    assert rope_frequencies(replace(YARN, attn_factor=2.0))[1] == pytest.approx(2 + 0.2 * math.log(8))


@pytest.mark.parametrize("style", ["norm", "neox"])
def test_rotation_keeps_lengths_and_depends_on_distance_only(style):
    rope = replace(PLAIN, dims=8, style=style)
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 8))
    q, k = (rotate(np.repeat(x, 10, axis=0), rope)[:, 0] for x in (q, k))
    assert np.allclose((q * q).sum(-1), (q[0] * q[0]).sum())
    assert np.allclose((q[3:] * k[:-3]).sum(-1), q[3] @ k[0])


def test_styles_differ_only_in_which_elements_are_paired():
    x = np.random.default_rng(1).standard_normal((5, 2, 8))
    halves = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # neox pair i is elements i and i + 4
    norm = rotate(x[..., halves], replace(PLAIN, dims=8, style="norm"))
    assert np.allclose(norm, rotate(x, replace(PLAIN, dims=8))[..., halves])


def test_elements_past_dims_stay():
    x = np.random.default_rng(2).standard_normal((3, 1, 12))
    y = rotate(x, replace(PLAIN, dims=8))
    assert np.array_equal(y[..., 8:], x[..., 8:])
    assert not np.allclose(y[2, :, :8], x[2, :, :8])
