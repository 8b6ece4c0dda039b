"""Packing is exact, and the compiled packer agrees with the one in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as QuantType
from hypothesis import given, settings
from hypothesis import strategies as st

from numoe.engine.cpu.packing import pack as compiled_pack
from numoe.engine.errors import UnsupportedError
from numoe.engine.experts.shard import ShardSlice
from numoe.engine.formats import pack as numpy_pack
from numoe.engine.formats import packed_format, shape_of
from tests.engine.cpu.support import ALL_FORMATS, Matrix, random_weights


@pytest.mark.parametrize("qtype", ALL_FORMATS, ids=lambda q: q.name)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_unpacking_gives_what_ggml_dequantizes_bit_for_bit(qtype: QuantType, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 40), label="rows")
    blocks = 8 * data.draw(st.integers(1, 3), label="supers")
    first = data.draw(st.integers(0, blocks - 1), label="first block")
    last = data.draw(st.integers(first + 1, blocks), label="last block")
    raw, weights = random_weights(qtype, rows, 32 * blocks, seed=rows)
    unpacked = Matrix(raw, qtype, 32 * blocks, (first, last)).unpacked()
    assert np.array_equal(unpacked, weights[:, 32 * first : 32 * last])


@pytest.mark.parametrize("qtype", ALL_FORMATS, ids=lambda q: q.name)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_bytes_unpack_to_what_ggml_dequantizes(qtype: QuantType, seed: int) -> None:
    """Scales that are subnormal, huge, infinite or no number, and codes that quantizers never write."""
    block, size = GGML_QUANT_SIZES[qtype]
    raw = np.random.default_rng(seed).integers(0, 256, (17, 512 // block * size), np.uint8)
    with np.errstate(all="ignore"):
        want = quants.dequantize(raw, qtype).reshape(17, 512)
    found = Matrix(raw, qtype, 512).unpacked()
    assert np.array_equal(found, want, equal_nan=True)


@pytest.mark.parametrize("qtype", ALL_FORMATS, ids=lambda q: q.name)
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 50), first=st.integers(0, 15), length=st.integers(1, 16))
def test_both_packers_write_the_same_bytes(qtype: QuantType, rows: int, first: int, length: int) -> None:
    blocks = (first, min(16, first + length))
    raw, _ = random_weights(qtype, rows, 512, seed=first)
    size = shape_of(qtype, rows, 512, blocks).nbytes
    found = [np.full(size, fill, np.uint8) for fill in (0x55, 0xAA)]
    numpy_pack(raw, qtype, found[0], blocks)
    compiled_pack(raw, qtype, found[1], blocks)
    assert np.array_equal(*found)


@pytest.mark.parametrize("qtype", ALL_FORMATS, ids=lambda q: q.name)
def test_packing_never_grows_a_matrix(qtype: QuantType) -> None:
    block, size = GGML_QUANT_SIZES[qtype]
    assert shape_of(qtype, 64, 1024).nbytes == 64 * 1024 // block * size


@pytest.mark.parametrize("qtype", ALL_FORMATS, ids=lambda q: q.name)
@pytest.mark.parametrize(("cols", "shards"), [(768, 2), (768, 3), (1536, 4), (2560, 4), (14336, 8)])
def test_cutting_columns_among_shards_grows_a_matrix_by_two_percent_at_most(
    qtype: QuantType, cols: int, shards: int
) -> None:
    """What 256 columns share is held twice where a cut goes through them."""
    block, size = GGML_QUANT_SIZES[qtype]
    cuts = [ShardSlice(index, shards).blocks(cols) for index in range(shards)]
    nbytes = sum(shape_of(qtype, 64, cols, cut).nbytes for cut in cuts)
    assert nbytes <= 1.02 * (64 * cols // block * size)


def test_wrong_buffers_are_refused() -> None:
    raw, _ = random_weights(QuantType.Q8_0, 16, 64)
    with pytest.raises(ValueError, match="are needed"):
        compiled_pack(raw, QuantType.Q8_0, np.zeros(10, np.uint8))


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"IQ1_S.*use one of.*Q4_K"):
        packed_format(QuantType.IQ1_S)
