"""A chunk's object comes back as it was, or says which chunk and layer are damaged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numoe.engine.errors import DataLossError, UnsupportedError
from numoe.engine.store.chunks import ChunkShape, Provenance, build_chunk, decode_chunk, encode_chunk

KEY = bytes(range(32))
SHAPE = ChunkShape("q8_0/f16", layers=3, layer_bytes=40)
LAYERS = [np.random.default_rng(i).integers(0, 256, 40).astype(np.uint8) for i in range(3)]
OBJECT = encode_chunk(KEY, SHAPE.kv_type, LAYERS)


@given(
    layers=st.lists(st.binary(min_size=7, max_size=7), min_size=1, max_size=5),
    key=st.binary(min_size=32, max_size=32),
    tokens=st.integers(1, 256),
)
def test_layers_come_back(layers: list[bytes], key: bytes, tokens: int) -> None:
    shape = ChunkShape("f16/f16", len(layers), 7, tokens)
    data = encode_chunk(key, "f16/f16", layers, tokens)
    assert len(data) == shape.object_bytes
    assert [bytes(layer) for layer in decode_chunk(data, key, shape)] == layers


def test_an_object_that_is_filled_in_place_is_the_same() -> None:
    assert build_chunk(KEY, SHAPE, lambda out: np.copyto(out.reshape(3, 40), LAYERS)) == OBJECT


@given(at=st.integers(0, len(OBJECT) - 1), bits=st.integers(1, 255))
def test_any_changed_byte_is_noticed(at: int, bits: int) -> None:
    damaged = bytearray(OBJECT)
    damaged[at] ^= bits
    with pytest.raises(DataLossError, match=KEY.hex()):
        decode_chunk(bytes(damaged), KEY, SHAPE)


@given(length=st.integers(0, len(OBJECT) - 1))
def test_an_object_cut_anywhere_is_noticed(length: int) -> None:
    with pytest.raises(DataLossError, match=KEY.hex()):
        decode_chunk(OBJECT[:length], KEY, SHAPE)


def test_an_object_with_something_behind_it_is_damaged() -> None:
    with pytest.raises(DataLossError, match="from its end on"):
        decode_chunk(bytes(OBJECT) + b"x", KEY, SHAPE)


@pytest.mark.parametrize("layer", range(3))
def test_the_damaged_layer_is_named(layer: int) -> None:
    damaged = bytearray(OBJECT)
    damaged[-40 * (3 - layer)] ^= 1
    with pytest.raises(DataLossError, match=f"layer {layer};"):
        decode_chunk(bytes(damaged), KEY, SHAPE)
    with pytest.raises(DataLossError, match=f"from layer {layer} on"):
        decode_chunk(OBJECT[: len(OBJECT) - 40 * (3 - layer) + 5], KEY, SHAPE)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (ChunkShape("f16/f16", 3, 40), "kv_type q8_0/f16 where f16/f16"),
        (ChunkShape("q8_0/f16", 2, 40), "layers 3 where 2"),
        (ChunkShape("q8_0/f16", 3, 48), "layer_bytes 40 where 48"),
        (ChunkShape("q8_0/f16", 3, 40, tokens=12), "tokens 256 where 12"),
    ],
)
def test_a_chunk_of_another_shape_is_refused(shape: ChunkShape, reason: str) -> None:
    with pytest.raises(DataLossError, match=reason):
        decode_chunk(OBJECT, KEY, shape)


def test_another_chunk_under_this_name_is_refused() -> None:
    with pytest.raises(DataLossError, match=f"{'ff' * 32} is damaged: it holds chunk {KEY.hex()}"):
        decode_chunk(OBJECT, b"\xff" * 32, SHAPE)


@pytest.mark.parametrize(("version", "cure"), [(3, "use a newer numoe"), (1, "is computed again")])
def test_another_format_is_not_called_damage(monkeypatch: pytest.MonkeyPatch, version: int, cure: str) -> None:
    monkeypatch.setattr("numoe.engine.store.chunks.FORMAT_VERSION", version)
    other = encode_chunk(KEY, SHAPE.kv_type, LAYERS)
    monkeypatch.undo()
    with pytest.raises(UnsupportedError, match=f"format {version}, where 2 is read; .*{cure}"):
        decode_chunk(other, KEY, SHAPE)
    assert Provenance.peek(other) is None


def test_layers_of_different_sizes_make_no_chunk() -> None:
    with pytest.raises(ValueError, match="one size"):
        encode_chunk(KEY, "f16/f16", [b"1", b"22"])
    with pytest.raises(ValueError, match="one size"):
        encode_chunk(KEY, "f16/f16", [])
