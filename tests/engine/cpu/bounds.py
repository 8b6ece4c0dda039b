"""Runs kernels over guarded arrays; test_bounds.py starts it as a process of its own, for a fault kills it.

Reads names of CASES, a line each. Says what it is about to run, then "ok".
"""

from __future__ import annotations

import faulthandler
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as QuantType
from numba import njit

from numoe.engine.cpu import attention, dense
from numoe.engine.cpu import simd as v
from numoe.engine.cpu.memory import address
from numoe.engine.cpu.packing import pack
from numoe.engine.cpu.program import FAILED, Kernel
from numoe.engine.cpu.rows import activation_bytes
from numoe.engine.cpu.team import ThreadTeam
from numoe.engine.experts import exchange, loop
from numoe.engine.experts.mailbox import SHARD_STRIDE, SHARDS_AT, Mailbox, MailboxLayout
from numoe.engine.experts.shard import ExpertShard
from numoe.engine.formats import pack as numpy_pack
from numoe.engine.formats import shape_of
from numoe.engine.gpu import kv_pool as gpu_kv_pool
from numoe.engine.scheduler import Batch
from numoe.engine.worker import forward as worker_forward
from numoe.engine.worker.kv_pool import KvType
from numoe.engine.worker.weights import DenseWeights
from tests.engine.cpu.guard import SIDES, GuardedMemory, offsets
from tests.engine.cpu.pages import Layers
from tests.engine.cpu.support import ALL_FORMATS, Matrix, random_weights
from tests.engine.cpu.test_products import as_seen
from tests.engine.worker import local
from tests.models import make_model

COLS = 512
# Of 32 columns, few being whole blocks of 256. Activation rows of 128 columns, and of multiples, have no padding.
BLOCK_RANGES = ((0, 1), (5, 6), (3, 7), (0, 9), (2, 14), (0, 16))
TILE_RANGE = (2, 14)
ROW_COUNTS = (*range(1, 18), 32, 37)


def say(*what: object) -> None:
    """Tell the test what runs next: the last thing said is where it died."""
    print(*what, flush=True)


# --- one format ---------------------------------------------------------------------------------------


def check_product(memory: GuardedMemory, qtype: QuantType) -> None:
    """Every register tile, and the rounding of activations before it."""
    raw, weights = random_weights(qtype, 33, COLS)
    shapes = [(blocks, outputs, n) for blocks in BLOCK_RANGES for outputs in (1, 17, 33) for n in (1, 5, 17)]
    shapes += [(TILE_RANGE, 33, n) for n in ROW_COUNTS]
    for (first, last), outputs, n in shapes:
        part = weights[:outputs, 32 * first : 32 * last].astype(np.float64)
        x = np.random.default_rng(n).standard_normal((n, part.shape[1])).astype(np.float32)
        say(f"product:{qtype.name}, {n} rows of {x.shape[1]} columns, {outputs} outputs")
        with memory.everywhere():
            found = Matrix(raw[:outputs], qtype, COLS, (first, last), numpy_pack).product(x)
        seen = as_seen(x, qtype)
        scale = np.abs(seen) @ np.abs(part).T
        assert np.abs(found - seen @ part.T).max() <= 3e-6 * scale.max()


def check_unpack(memory: GuardedMemory, qtype: QuantType) -> None:
    """Every row of a group."""
    raw, weights = random_weights(qtype, 33, COLS)
    for first, last in BLOCK_RANGES:
        say(f"unpack:{qtype.name}, blocks {first} to {last}")
        with memory.everywhere():
            found = Matrix(raw, qtype, COLS, (first, last), numpy_pack).unpacked()
        assert np.array_equal(found, weights[:, 32 * first : 32 * last])


def check_pack(memory: GuardedMemory, qtype: QuantType) -> None:
    """Row counts that fill the last group and that do not, every range of blocks."""
    for rows in (1, 15, 16, 17, 33):
        raw, _ = random_weights(qtype, rows, COLS)
        guarded = memory.copy(raw)
        for blocks in BLOCK_RANGES:
            nbytes = shape_of(qtype, rows, COLS, blocks).nbytes
            want, found = np.zeros(nbytes, np.uint8), memory.row_of([nbytes])
            numpy_pack(raw, qtype, want, blocks)
            say(f"pack:{qtype.name}, {rows} rows, blocks {blocks}")
            with memory.everywhere():
                pack(guarded, qtype, found, blocks)
            assert np.array_equal(found, want)


# --- KV pages ---------------------------------------------------------------------------------------


def check_transfer(memory: GuardedMemory, *, on_gpu: bool) -> None:
    """Every KV type and number of tokens that fills tiles or does not, both ways."""
    kinds = gpu_kv_pool.GPU_KV_TYPES if on_gpu else ("f16", "q8_0")
    for keys, values, dim, tokens in product(kinds, kinds, (32, 96), (1, 6, 31, 32, 77, 256)):
        layers = Layers(KvType(keys, values), 2, dim, on_gpu)
        page, want = memory.copy(layers.random(0)), layers.reference(layers.random(0), tokens)
        rows = memory.zeros(want.shape, np.uint8)
        say(f"pages: {'GPU' if on_gpu else 'CPU'}, {keys} and {values} of {dim} dimensions, {tokens} tokens")
        for to_page in (False, True):
            layers.transfer(page, rows, tokens, to_page=to_page)
        assert np.array_equal(rows, want)


# --- whole forward passes ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A model (see `tests.models.Options`) and how it is run; of six shards, one has no columns of odd sizes."""

    arch: str
    options: dict[str, object]
    kv_type: tuple[str, str] = ("f16", "f16")
    shards: int = 1


ODD = {"hidden": 96, "heads": 6, "expert_ffn": 160, "vocab": 283}
PASSES = {
    "forward:dense": Pass(arch="llama", options={"attn_type": "Q8_0"}),
    "forward:odd sizes": Pass(arch="qwen3moe", options={**ODD, "head_dim": 48, "n_experts": 5}, shards=2),
    "forward:8-bit keys": Pass(
        arch="qwen3moe", kv_type=("q8_0", "f16"), shards=6,
        options={**ODD, "kv_heads": 6, "head_dim": 32, "experts_type": "Q8_0", "attn_type": "Q8_0"},
    ),
    "forward:8-bit values": Pass(
        arch="llama-moe", kv_type=("f16", "q8_0"),
        options={"kv_heads": 1, "heads": 9, "head_dim": 32, "hidden": 288, "experts_type": "Q8_0", "n_used": 3},
    ),
    "forward:8-bit keys and values": Pass(
        arch="qwen3moe", kv_type=("q8_0", "q8_0"), shards=3, options={"experts_type": "IQ4_XS", "attn_type": "Q8_0"}
    ),
}  # fmt: skip
NAMES = {
    value.address: f"step:{name}"
    for module in (attention, dense, exchange)
    for name, value in vars(module).items()
    if isinstance(value, Kernel)
}


class NamingTeam(ThreadTeam):
    """Runs a program one operation at a time, and says which is next."""

    def run(self, operations: np.ndarray, step: np.ndarray) -> None:
        operations[:, -1] = np.maximum(operations[:, -1], 1)  # every program ends with a barrier
        for i, name in enumerate(NAMES[kernel] for kernel in operations[:, 0]):
            say(name)
            if name == "step:exchange":
                say("loop:shard, while step:exchange waits for it")
            super().run(operations[i : i + 1], step)
            if step[FAILED]:
                return


@dataclass(frozen=True)
class GuardedLayout(MailboxLayout):
    """A mailbox whose regions have forbidden pages between them."""

    side: str = "end"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of the words, expert ids, weights, 8-bit and float32 rows, and of each shard's partial sums."""
        pairs, partials = 4 * self.max_rows * self.top_k, 4 * self.max_rows * self.hidden
        rows = (self.max_rows * activation_bytes(self.hidden, kind) for kind in ("q8", "f32"))
        return SHARDS_AT + SHARD_STRIDE * self.shards, pairs, pairs, *rows, *([partials] * self.shards)

    def _offset(self, region: int) -> int:
        return offsets(self.sizes, self.side)[region]

    ids = property(lambda self: self._offset(1))
    weights = property(lambda self: self._offset(2))
    q8_rows = property(lambda self: self._offset(3))
    f32_rows = property(lambda self: self._offset(4))
    partials = property(lambda self: self._offset(5))
    partial_bytes = property(lambda self: self._offset(6) - self._offset(5) if self.shards > 1 else self.sizes[5])


def guarded_shard(memory: GuardedMemory) -> type[ExpertShard]:
    """A shard whose matrices, and the parts of whose scratch, have forbidden pages between them."""

    class GuardedShard(ExpertShard):
        def _layer_records(self) -> np.ndarray:
            records = super()._layer_records()
            for layer, parts in self._plan.items():
                for i, m in enumerate(parts):
                    data = memory.copy(self._weights.array[m.offset : m.offset + m.nbytes])
                    records[layer, loop.MATRIX_FIELDS * i + loop.ADDRESS] = address(data)
            return records

        def _shard_record(self) -> np.ndarray:
            record = super()._shard_record()
            rows, experts = self._mailbox.layout.max_rows, int(record[loop.EXPERTS])
            pairs = rows * self._mailbox.layout.top_k
            sizes = [4 * (2 * experts + 1), 4 * pairs, 8 * rows, 256 * rows]
            at = offsets(sizes * 2, memory.side)
            record[loop.SCRATCH] = address(memory.row_of(sizes * self._threads))
            record[[loop.PAIRS_OFFSET, loop.POINTERS_OFFSET, loop.TILE_OFFSET, loop.SCRATCH_BYTES]] = at[1:5]
            return record

    return GuardedShard


def guarded_dense(memory: GuardedMemory) -> type[DenseWeights]:
    """Weights of the attention side with forbidden pages between them."""

    class GuardedDense(DenseWeights):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.matrices = {n: replace(m, data=memory.copy(m.data)) for n, m in self.matrices.items()}
            self.vectors = {name: memory.copy(vector) for name, vector in self.vectors.items()}

    return GuardedDense


def logits(path: Path, case: Pass, rows: int, threads: int, keep: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Steps of prefill, decode and both, at the ends of pages and of the KV pool; of `rows` rows at most.

    keep: makes the array that the step sees of each of a batch's.
    """
    steps = [  # of (slot, first position, rows)
        [(0, 256 - rows, rows)], [(1, 512 - rows, rows)], [(0, 255 - rows // 2, rows - 1), (1, 511, 1)],
        [(0, 255, 1)], [(1, 511, 1)], [(0, 0, 1)],
    ]  # fmt: skip
    found = []
    with local.local_forward(
        path, shards=case.shards, threads=threads, max_rows=rows, slots=2, kv_type=KvType(*case.kv_type)
    ) as forward:
        for step in steps:
            places = [(first + i, slot) for slot, first, count in step for i in range(count)]
            tokens = [(7 * position % 256, position, slot) for position, slot in places]
            batch = local.batch(forward, tokens, range(len(tokens)))
            fields = (batch.token_ids, batch.positions, batch.slots, batch.logit_rows, batch.page_tables)
            found.append(np.array(forward.run(Batch(*map(keep, fields)))))
    return np.concatenate(found)


def check_pass(memory: GuardedMemory, case: Pass) -> None:
    """A guarded pass computes the bits of one that is not."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder) / "m.gguf", case.arch, **case.options)
        for rows, threads in ((37, 1), (1, 3), (5, 2)):
            say(f"{rows} rows, {threads} threads, not yet between forbidden pages")
            want = logits(path, case, rows, threads, np.asarray)
            with memory.everywhere() as patch:
                patch.setattr(worker_forward, "ThreadTeam", NamingTeam)
                patch.setattr(local, "ExpertShard", guarded_shard(memory))
                patch.setattr(worker_forward, "DenseWeights", guarded_dense(memory))
                patch.setattr(local, "MailboxLayout", partial(GuardedLayout, side=memory.side))
                patch.setattr(Mailbox, "create", partial(guarded_mailbox, memory))
                found = logits(path, case, rows, threads, memory.copy)
            assert np.array_equal(found, want)


def guarded_mailbox(memory: GuardedMemory, path: str, layout: GuardedLayout) -> Mailbox:
    """A mailbox that only this process can see."""
    return Mailbox(SimpleNamespace(array=memory.row_of(layout.sizes)), layout)


# --- that the guard guards -----------------------------------------------------------------------------


@njit
def _copy_vectors(source: int, target: int, first: int, last: int) -> None:
    for i in range(first, last):
        v.store_f32(target + 64 * i, v.load_f32(source + 64 * i))


PAST, BEFORE = (0, 5), (-1, 4)  # of four vectors
FAULTS = {
    "fault:read past the end": ("end", "read", PAST),
    "fault:read before the start": ("start", "read", BEFORE),
    "fault:write past the end": ("end", "write", PAST),
    "fault:write before the start": ("start", "write", BEFORE),
    "fault:write unseen": ("end", "write", BEFORE),
}


def check_fault(memory: GuardedMemory, fault: str) -> None:
    """What has to be found: a kernel that reads or writes one vector too many."""
    side, access, vectors = FAULTS[fault]
    if side == memory.side:
        guarded, other = memory.zeros((4, 16)), np.zeros((6, 16), np.float32)
        addresses = address(guarded), address(other[1:])
        say(fault)
        _copy_vectors(*(addresses if access == "read" else reversed(addresses)), *vectors)


def cases() -> Iterator[tuple[str, Callable[[GuardedMemory], None]]]:
    """Every case by name."""
    for qtype in ALL_FORMATS:
        yield f"product:{qtype.name}", partial(check_product, qtype=qtype)
        yield f"unpack:{qtype.name}", partial(check_unpack, qtype=qtype)
        yield f"pack:{qtype.name}", partial(check_pack, qtype=qtype)
    yield "pages:transfer", partial(check_transfer, on_gpu=False)
    yield "pages:transfer_interleaved", partial(check_transfer, on_gpu=True)
    for name, case in PASSES.items():
        yield name, partial(check_pass, case=case)
    for fault in FAULTS:
        yield fault, partial(check_fault, fault=fault)


CASES = dict(cases())

if __name__ == "__main__":
    faulthandler.enable()
    for line in sys.stdin:
        memories = [GuardedMemory(side) for side in SIDES]
        for one in memories:
            say("side", one.side)
            CASES[line.strip()](one)
        say("everything, seen from what was written beside its arrays")
        for one in memories:  # last: a fault tells more
            one.check()
        say("ok")
