"""The attention kernels over a small KV pool of one layer, called as a forward pass calls them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from gguf import GGMLQuantizationType as QuantType

from numoe.engine.cpu import attention
from numoe.engine.cpu.kv_cells import cell_bytes
from numoe.engine.cpu.memory import address, align, aligned_bytes
from numoe.engine.cpu.products import product_kernel
from numoe.engine.cpu.program import (
    N_ROWS,
    PAGE_TABLE_STRIDE,
    PAGE_TABLES,
    POSITIONS,
    SLOTS,
    STEP_FIELDS,
    Kernel,
    Program,
)
from numoe.engine.cpu.rows import activation_bytes, quantize_row
from numoe.engine.cpu.team import ThreadTeam
from numoe.engine.kv.pages import PAGE_TOKENS, pages_for
from numoe.engine.models.config import RopeConfig
from numoe.engine.models.rope import rope_frequencies
from numoe.engine.worker.kv_pool import F16, KvType


def padded(values: np.ndarray) -> np.ndarray:
    """A copy of float32 [rows, ...] whose rows lie further apart than they are long."""
    wide = np.full((len(values), values[0].size + 16), np.nan, np.float32)
    wide[:, : values[0].size] = values.reshape(len(values), -1)
    return wide[:, : values[0].size].reshape(values.shape)


def run(calls: Sequence[tuple[Kernel, tuple[float, ...]]], step: np.ndarray, threads: int) -> None:
    """Run kernels one after the other on a team."""
    program, team = Program(), ThreadTeam(threads, threads_on_host=99)
    for function, record in calls:
        program.add(function, *record)
    try:
        team.run(program.table(), step)
    finally:
        team.close()


class Cache:
    """Pages for sequences of some lengths, in no particular order; what nobody wrote is NaN."""

    def __init__(self, lengths: Sequence[int], kv_heads: int, dim: int, seed: int = 0, kind: KvType = F16) -> None:
        self.kv_heads, self.dim, self.kind = kv_heads, dim, kind
        self.key_bytes = cell_bytes(kind.keys, dim, values=False)
        self.head_bytes = self.key_bytes + cell_bytes(kind.values, dim, values=True)
        self.page_bytes = kv_heads * self.head_bytes
        counts = [pages_for(length) for length in lengths]
        spare = iter(np.random.default_rng(seed).permutation(sum(counts)))
        self.tables = np.full((len(lengths), max(counts) + 1), 1 << 20, np.int32)
        for table, count in zip(self.tables, counts, strict=True):
            table[:count] = [next(spare) for _ in range(count)]
        self.memory = aligned_bytes(sum(counts) * self.page_bytes)
        self.memory.view(np.float16)[:] = np.nan

    def head(self, slot: int, page: int, kv_head: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys [16, dim, 16] and values [256, dim / 16, 16] of one head of a sequence's page, float16 both."""
        at = self.tables[slot, page] * self.page_bytes + kv_head * self.head_bytes
        keys, values = np.split(self.memory[at : at + self.head_bytes].view(np.float16), 2)
        return keys.reshape(16, self.dim, 16), values.reshape(-1, PAGE_TOKENS, 16).swapaxes(0, 1)

    def tokens(self, slot: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The first keys and values of a sequence, float64 [length, KV heads, dim] each."""
        shape = (length, self.kv_heads, self.dim)
        keys, values = np.empty(shape), np.empty(shape)
        for token, kv_head in np.ndindex(length, self.kv_heads):
            k, v = self.head(slot, token // PAGE_TOKENS, kv_head)
            at = token % PAGE_TOKENS
            keys[token, kv_head], values[token, kv_head] = k[at // 16, :, at % 16], v[at].ravel()
        return keys, values

    def fill(self, slot: int, length: int, rng: np.random.Generator) -> None:
        """Write random keys and values."""
        for page, kv_head in np.ndindex(pages_for(length), self.kv_heads):
            keys, values = self.head(slot, page, kv_head)
            here = min(PAGE_TOKENS, length - page * PAGE_TOKENS)
            values[:here] = rng.standard_normal((here, self.dim)).reshape(here, -1, 16)
            for token in range(here):
                keys[token // 16, :, token % 16] = rng.standard_normal(self.dim)

    def step(self, rows: np.ndarray) -> np.ndarray:
        """The step record for rows int32 [n, 2] of (slot, position). The caller keeps `rows` alive."""
        assert rows.dtype == np.int32
        assert rows.flags.f_contiguous
        step = np.zeros(STEP_FIELDS, np.int64)
        step[[N_ROWS, SLOTS, POSITIONS]] = len(rows), address(rows[:, 0]), address(rows[:, 1])
        step[[PAGE_TABLES, PAGE_TABLE_STRIDE]] = address(self.tables), self.tables.strides[0]
        return step

    def attend(self, q: np.ndarray, rows: np.ndarray, *, threads: int, split: bool) -> np.ndarray:
        """Attention of q float32 [n, heads, dim]: float32 [n, heads, dim]."""
        group, q8_bytes = q.shape[1] // self.kv_heads, activation_bytes(self.dim, "q8")
        q8 = aligned_bytes(q.shape[0] * q.shape[1] * q8_bytes)
        for i, head in enumerate(np.ascontiguousarray(q).reshape(-1, self.dim)):
            if self.dim % 32 == 0:
                quantize_row(address(head), self.dim, address(q8) + i * q8_bytes)
        q, out = padded(q), padded(np.full(q.shape, np.nan, np.float32))
        part = 4 * group * (self.dim + attention.STATE_FLOATS)
        scratch_bytes = align(2 * part + attention.scratch_bytes(group))
        pages, units = self.tables.shape[1], len(rows) * self.kv_heads
        scratch, parts = aligned_bytes(threads * scratch_bytes), aligned_bytes(units * pages * part if split else 0)
        record = (
            address(q), q.strides[0], address(out), out.strides[0], self.kv_heads, group, self.dim,
            1 / math.sqrt(self.dim), address(self.memory), self.page_bytes, self.head_bytes,
            address(scratch), scratch_bytes, address(parts), part, pages, units + 1 if split else 0,
            self.key_bytes, int(self.kind.keys == "q8_0"), int(self.kind.values == "q8_0"),
            product_kernel(QuantType.Q8_0).address, address(q8), q8_bytes,
        )  # fmt: skip
        run([(attention.attend, record), (attention.attend_merge, record)], self.step(rows), threads)
        return out

    def rotate_and_append(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, rows: np.ndarray, rope: RopeConfig,
        *, norms: tuple[np.ndarray, np.ndarray] | None = None, eps: float = 1e-5, threads: int = 1,
    ) -> np.ndarray:  # fmt: skip
        """Write keys and values float32 [n, KV heads, dim]; the rotated queries [n, heads, dim]."""
        q, k, v = padded(q), padded(k), padded(v)
        frequencies, magnitude = rope_frequencies(rope, np.float64)
        table = padded(np.zeros((len(rows), rope.dims), np.float32))
        table_record = (address(frequencies), rope.dims // 2, float(magnitude), address(table), table.strides[0])
        record = (
            address(q), q.strides[0], address(k), k.strides[0], address(v), v.strides[0],
            q.shape[1], self.kv_heads, self.dim, address(table), table.strides[0],
            rope.dims // 2, int(rope.style == "neox"), *((address(n) for n in norms) if norms else (0, 0)), float(eps),
            address(self.memory), self.page_bytes, self.head_bytes, self.key_bytes,
            int(self.kind.keys == "q8_0"), int(self.kind.values == "q8_0"), 0, 0,
        )  # fmt: skip
        calls = [(attention.rope_table, table_record), (attention.rope_and_append, record)]
        run(calls, self.step(rows), threads)
        return q
