"""Attention on the GPU over paged KV of every type, against float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from numoe.engine.gpu.kv_pool import GPU_KV_TYPES
from numoe.engine.models.reference import rotate
from numoe.engine.scheduler import Batch
from numoe.engine.worker.kv_pool import KvType
from tests.engine.gpu.paged import Sequences, model, nmse, softmax_attention

EDGES = [1, 2, 15, 16, 17, 31, 33, 63, 65, 240, 255, 256, 257, 511, 512, 513]
CLOSE = 1e-6
"""Queries, softmax weights and dequantized numbers are float16 where tensor cores take them."""

SHAPES = [
    (1, 1, 64), (3, 2, 64), (4, 3, 128), (7, 1, 128), (8, 4, 128), (9, 2, 64), (12, 8, 128), (16, 1, 128), (20, 1, 64),
    (5, 2, 32), (2, 2, 96), (8, 1, 256), (16, 1, 256), (3, 1, 224),
]  # fmt: skip
"""Query heads of a KV head, KV heads, head_dim."""
CASES = [(shape, KvType(kind, kind)) for shape in SHAPES for kind in GPU_KV_TYPES] + [
    ((8, 4, 128), KvType(keys, values)) for keys in GPU_KV_TYPES for values in GPU_KV_TYPES if keys != values
]


def name_of(value: KvType | tuple[int, int, int]) -> str:
    return f"{value.keys}-{value.values}" if isinstance(value, KvType) else "-".join(map(str, value))


def check(way: str, shape: tuple[int, int, int], kind: KvType, rows: list, lengths: list, loud: float = 1.0) -> None:
    group, kv_heads, dim = shape
    rng = np.random.default_rng(sum(shape))
    sequences = Sequences(model(group * kv_heads, kv_heads, dim), lengths, kind, max_rows=len(rows))
    for slot, length in enumerate(lengths):
        sequences.fill(slot, length, rng)
    q = (rng.standard_normal((len(rows), group * kv_heads, dim)) * loud).astype(np.float32)
    found = sequences.attend(way, q, rows)
    history = [sequences.tokens(slot, length) for slot, length in enumerate(lengths)]
    for row, (slot, position) in enumerate(rows):
        keys, values = (part[: position + 1] for part in history[slot])
        assert nmse(found[row], softmax_attention(q[row], keys, values)) <= CLOSE * max(1, loud**2), (slot, position)


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "kind"), CASES, ids=name_of)
def test_decode_equals_float64(shape: tuple[int, int, int], kind: KvType) -> None:
    """A step of as many sequences as rows, at page ends and in between; what lies behind them is NaN."""
    check("decode", shape, kind, [(slot, length - 1) for slot, length in enumerate(EDGES)], EDGES)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 48, 80, 112, 144, 240])
@pytest.mark.parametrize("way", ["decode", "prefill"])
def test_float16_takes_any_multiple_of_16(way: str, dim: int) -> None:
    check(way, (3, 2, dim), KvType(), [(slot, length - 1) for slot, length in enumerate(EDGES)], EDGES)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GPU_KV_TYPES)
@pytest.mark.parametrize("length", [1000, 5000, 20_000])
def test_decode_of_long_contexts_equals_float64(length: int, kind: str) -> None:
    check("decode", (8, 2, 128), KvType(kind, kind), [(0, length - 1), (1, 39)], [length, 40])


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["decode", "prefill"])
def test_sharp_scores_equal_float64(way: str) -> None:
    check(way, (8, 1, 128), KvType(), [(0, 599)], [600], loud=20.0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_weights_far_below_the_largest_still_count(kind: str) -> None:
    """A token that takes nearly all of the attention, as first tokens do, and thousands that share the rest."""
    rng, length = np.random.default_rng(2), 8000
    sequences = Sequences(model(8, 1, 64), [length], KvType(kind, kind))
    sequences.fill(0, length, rng, loud=0.01)
    q = np.ones((1, 8, 64), np.float32)
    page, part = int(sequences.tables[0, 0]), sequences.pool.data
    cells = part[page, 1].get()
    cells[:128] = np.full(64, 1.7, np.float16).view(np.uint8) if kind == "f16" else cells[:128]
    if kind == "q8_0":
        cells[:64] = 255
        cells[256 * 64 : 256 * 64 + 4] = np.full(2, 1.7 / 127, np.float16).view(np.uint8)
    sequences.pool.data[page, 1].set(cells)
    want = softmax_attention(q[0], *sequences.tokens(0, length))
    for way in ("decode", "prefill"):
        assert nmse(sequences.attend(way, q, [(0, length - 1)])[0], want) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GPU_KV_TYPES)
def test_a_decode_row_is_the_same_bits_in_any_batch(kind: str) -> None:
    rng, lengths = np.random.default_rng(7), [700, 1, 256, 3000, 17, 513, 90, 1025] * 2
    sequences = Sequences(model(16, 2, 128), lengths, KvType(kind, kind))
    for slot, length in enumerate(lengths):
        sequences.fill(slot, length, rng)
    rows = [(slot, length - 1) for slot, length in enumerate(lengths)]
    q = rng.standard_normal((16, 16, 128)).astype(np.float32)
    alone = np.concatenate([sequences.attend("decode", q[i : i + 1], rows[i : i + 1]) for i in range(16)])
    for count in range(2, 17):
        assert np.array_equal(sequences.attend("decode", q[:count], rows[:count]), alone[:count])
    order = rng.permutation(16)
    assert np.array_equal(sequences.attend("decode", q[order], [rows[i] for i in order]), alone[order])


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "kind"), CASES, ids=name_of)
def test_prefill_equals_float64(shape: tuple[int, int, int], kind: KvType) -> None:
    """A prompt's chunk across a page's end, the beginning of another, and single rows."""
    rows = [(0, position) for position in range(230, 270)] + [(1, position) for position in range(17)]
    check("prefill", shape, kind, [*rows, (2, 0), (3, 300), (4, 255)], [270, 17, 1, 301, 256])


@pytest.mark.gpu
@pytest.mark.parametrize("start", [0, 100, 2000])
@pytest.mark.parametrize("count", [17, 33, 200, 700])
def test_prefill_of_one_chunk_equals_float64(start: int, count: int) -> None:
    check("prefill", (8, 2, 128), KvType(), [(0, start + i) for i in range(count)], [start + count])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [KvType(*kinds) for kinds in itertools.product(GPU_KV_TYPES, repeat=2)], ids=name_of)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_prefill_of_pages_made_float16_first_equals_float64(dim: int, kind: KvType) -> None:
    """Enough rows of two prompts that their pages are converted, behind one row that decodes."""
    rng, lengths, starts = np.random.default_rng(3), [300, 600, 90], [299, 400, 0]
    capacities = [300, 1700, 90]  # as many pages as a context has are there for those of the prompts together
    rows = [(slot, position) for slot in range(3) for position in range(starts[slot], lengths[slot])]
    sequences = Sequences(model(8, 2, dim), capacities, kind, max_rows=len(rows))
    for slot, length in enumerate(lengths):
        sequences.fill(slot, length, rng)
    q = rng.standard_normal((len(rows), 8, dim)).astype(np.float32)
    slots, positions = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    batch = Batch(np.zeros_like(slots), positions, slots, np.zeros(0, np.int32), sequences.tables)
    sequences.attention.plan(batch, 1)
    assert bool(sequences.attention._widened) == (kind != KvType())
    found = sequences.attend("prefill", q[1:], rows[1:])
    for row in range(1, len(rows), 7):
        keys, values = (part[: positions[row] + 1] for part in sequences.tokens(slots[row], lengths[slots[row]]))
        assert nmse(found[row - 1], softmax_attention(q[row], keys, values)) <= CLOSE, row
    few = (part[:20] for part in (batch.token_ids, positions, slots))
    sequences.attention.plan(Batch(*few, batch.logit_rows, sequences.tables), 1)
    assert not sequences.attention._widened


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "decode_rows"), [(5, 0), (16, 0), (40, 3)])
def test_a_whole_step_equals_float64(count: int, decode_rows: int) -> None:
    """Three sequences go on by a token each, then comes a chunk of a fourth; keys are rotated and appended."""
    import cupy

    rng, config, starts = np.random.default_rng(8), model(8, 2, 64), [255, 0, 300, 250]
    sequences = Sequences(config, [start + count for start in starts])
    for slot, start in enumerate(starts):
        sequences.fill(slot, start, rng)
    rows = [(slot, starts[slot]) for slot in range(3)] + [(3, starts[3] + i) for i in range(count - 3)]
    q, k, v = (rng.standard_normal((count, heads, 64)).astype(np.float32) for heads in (8, 2, 2))
    arrays = [cupy.asarray(x.reshape(count, -1)) for x in (q, k, v)]
    inputs, out = sequences.inputs(rows), cupy.empty((count, 512), np.float32)
    attention = sequences.attention

    def step() -> None:
        attention.begin(inputs.positions, count)
        attention.run(1, *arrays, None, None, inputs, out, count, decode_rows=decode_rows)

    step()
    found = out.get().reshape(count, 8, 64)
    history = [sequences.tokens(slot, start + (count - 3 if slot == 3 else 1)) for slot, start in enumerate(starts)]
    for row, (slot, position) in enumerate(rows):
        spread = np.zeros((position + 1, 8, 64))
        spread[position] = q[row]
        rotated = rotate(spread, config.rope)[position]
        keys, values = (part[: position + 1] for part in history[slot])
        assert nmse(found[row], softmax_attention(rotated, keys, values)) <= CLOSE
        assert nmse(values[position], v[row]) <= 1e-6
    if count > 16:
        return
    for array, x in zip(arrays, (q, k, v), strict=True):
        array.set(x.reshape(count, -1))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        step()
        graph = stream.end_capture()
        out.fill(0)
        graph.launch(stream)
        stream.synchronize()
    assert np.array_equal(out.get().reshape(found.shape), found)
