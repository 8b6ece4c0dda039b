"""The names and sizes of canonical bytes."""

from __future__ import annotations

import numpy as np
import pytest

from numoe.engine.store.chunks import ChunkShape
from numoe.engine.store.portable import check_layers, chunk_shape, kv_type_name, layers_within, portable_bytes
from numoe.engine.worker.kv_pool import KvType
from tests.engine.gpu.paged import model

SHAPE = ChunkShape("f16/q8_0", layers=2, layer_bytes=6, tokens=3)


@pytest.mark.parametrize(
    ("kind", "of_token"),
    [
        (KvType(), 64 * 4),
        (KvType("f16", "q8_0"), 64 * 3 + 4),
        (KvType("q8_0", "q8_0"), 64 * 2 + 8),
        (KvType("q8_0", "q4_0"), 64 + 32 + 8),
    ],
)
def test_a_layer_holds_codes_and_a_scale_for_32_of_them(kind: KvType, of_token: int) -> None:
    assert portable_bytes(kind, 3, 64, 7) == 3 * 7 * of_token
    assert chunk_shape(model(6, 3, 64), kind, 7) == ChunkShape(kv_type_name(kind), 2, 21 * of_token, 7)


@pytest.mark.parametrize("tokens", [0, 257, -1])
def test_a_page_without_tokens_or_with_too_many_has_no_shape(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 256 tokens, not {tokens}"):
        chunk_shape(model(6, 3, 64), KvType(), tokens)


def test_a_type_is_named_after_keys_and_values() -> None:
    assert kv_type_name(KvType("q8_0", "f16")) == "q8_0/f16"


def test_layers_are_views() -> None:
    out = np.zeros(12, np.uint8)
    for number, layer in enumerate(layers_within(out, SHAPE)):
        layer[:] = number + 1
    assert out.tolist() == [1] * 6 + [2] * 6
    assert [layer.tolist() for layer in check_layers([memoryview(out)[:6], bytes(6)], SHAPE)] == [[1] * 6, [0] * 6]


@pytest.mark.parametrize(
    "out", [np.zeros(11, np.uint8), np.zeros(24, np.uint8)[::2], np.zeros(12, np.int8), np.frombuffer(bytes(12), "u1")]
)
def test_memory_that_layers_do_not_fit_is_refused(out: np.ndarray) -> None:
    with pytest.raises(ValueError, match="3 tokens take 12"):
        layers_within(out, SHAPE)
