"""A shard: its slice of every routed expert, and the threads that serve the mailbox."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from numoe.engine.cpu.memory import ALIGNMENT, address, align, aligned_bytes, aligned_copy, record
from numoe.engine.cpu.products import product_kernel
from numoe.engine.cpu.rows import activation_bytes
from numoe.engine.cpu.sync import BARRIER_BYTES, CACHE_LINE, handoff_looks
from numoe.engine.experts.loop import LAYER_FIELDS, SHARD_FIELDS, shard_loop
from numoe.engine.experts.mailbox import REQUEST_SLEEPERS, Mailbox
from numoe.engine.formats import BLOCK_COLS, Shape, shape_of
from numoe.engine.gguf import GgufFile
from numoe.engine.models.config import ModelConfig
from numoe.engine.numa import Pins, last_cpus
from numoe.engine.progress import Progress
from numoe.engine.weights import (
    CachedPages,
    PackedTensor,
    SharedReads,
    SliceKey,
    WeightSlice,
    link_slice,
    open_tensors,
    source_fingerprint,
)

PARTS = ("gate", "up", "down")


@dataclass(frozen=True)
class ShardSlice:
    """The part of every expert that shard `index` of `count` holds: a range of intermediate columns.

    skipped: of the layers with routed experts that many, the first ones, are held by a GPU instead.
    """

    index: int
    count: int
    skipped: int = 0

    def blocks(self, intermediate: int) -> tuple[int, int]:
        """The range of 32-column blocks, as equal as they divide."""
        total = intermediate // BLOCK_COLS
        return total * self.index // self.count, total * (self.index + 1) // self.count

    def readers(self, intermediate: int) -> list[int]:
        """The shards that read the same rows for their ranges, this one among them even if its range is empty."""
        cuts = [(index, *replace(self, index=index).blocks(intermediate)) for index in range(self.count)]
        return [index for index, first, last in cuts if first < last or index == self.index]

    @property
    def name(self) -> str:
        """What its weights are called."""
        return f"experts-{self.index}-of-{self.count}" + (f"-after-{self.skipped}" if self.skipped else "")


@dataclass(frozen=True)
class ExpertMatrices:
    """One of gate, up and down of one layer: [experts] packed matrices of this shape, from `offset` on."""

    tensor: str
    part: str
    shape: Shape
    experts: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return self.experts * self.shape.nbytes


def expert_names(layer: int) -> list[str]:
    """The tensors of a layer's routed experts: gate, up and down."""
    return [f"blk.{layer}.ffn_{part}_exps.weight" for part in PARTS]


def expert_layers(config: ModelConfig, gguf: GgufFile) -> list[int]:
    """The layers that have routed experts."""
    return [layer for layer in range(config.n_layers) if expert_names(layer)[0] in gguf.tensors]


def plan_slice(config: ModelConfig, gguf: GgufFile, cut: ShardSlice) -> dict[int, list[ExpertMatrices]]:
    """What the shard holds: for each layer whose routed experts it has, gate, up and down."""
    plan: dict[int, list[ExpertMatrices]] = {}
    offset = 0
    for layer in expert_layers(config, gguf)[cut.skipped :]:
        names = expert_names(layer)
        plan[layer] = []
        for part, name in zip(PARTS, names, strict=True):
            info = gguf.tensors[name]
            experts, rows, cols = info.shape
            first, last = cut.blocks(cols if part == "down" else rows)
            if part == "down":
                shape = shape_of(info.qtype, rows, cols, (first, last))
            else:
                shape = shape_of(info.qtype, BLOCK_COLS * (last - first), cols)
            plan[layer].append(ExpertMatrices(name, part, shape, experts, offset))
            offset = align(offset + plan[layer][-1].nbytes)
    return plan


def slice_bytes(plan: dict[int, list[ExpertMatrices]]) -> int:
    """Bytes of a shard's weights."""
    return max((m.offset + align(m.nbytes) for layer in plan.values() for m in layer), default=0) or ALIGNMENT


class ExpertShard:
    """Has a slice in shared memory, and serves requests until stopped.

    folder: of the server, where the slice is linked. key: of the slice; by default on no node, of the model's
    files as they are now. cpus: of the threads, one each, none to leave them where the system puts them.
    """

    def __init__(
        self, config: ModelConfig, gguf: GgufFile, mailbox: Mailbox, cut: ShardSlice,
        *, folder: Path, threads: int, threads_on_host: int, key: SliceKey | None = None,
        cpus: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self._config, self._gguf, self._mailbox, self._cut, self._folder = config, gguf, mailbox, cut, folder
        self._pins, self._threads, self._looks = Pins(cpus), threads, handoff_looks(threads_on_host)
        self._key = key or SliceKey(source=source_fingerprint(gguf.paths), cut=cut.name)
        self._plan = plan_slice(config, gguf, cut)
        self.nbytes = slice_bytes(self._plan)
        self.progress = Progress(sum(m.nbytes for layer in self._plan.values() for m in layer))
        self._running: list[threading.Thread] = []

    def load(self, pages: CachedPages | None = None) -> WeightSlice:
        """Attach to the slice, or read, pack and place it on all of the shard's threads: see `weights/loading.py`.

        pages: of the model's files that were in the page cache; the others leave it when every shard has read them.
        """
        reads = None
        if pages is not None and self._cut.count > 1:
            reads = SharedReads.open(self._folder / "reads", self._cut.index, self._cut.count, len(self._plan))
        self._weights = open_tensors(
            self._key, self._gguf, self._packed_tensors(), self.progress,
            threads=self._threads, on_thread=self._pins.pin_next, pages=pages, reads=reads,
        )  # fmt: skip
        link_slice(self._folder, self._cut.name, self._weights)
        return self._weights

    def _packed_tensors(self) -> list[PackedTensor]:
        found = []
        for matrices in (m for layer in self._plan.values() for m in layer):
            info, is_down = self._gguf.tensors[matrices.tensor], matrices.part == "down"
            _, rows, cols = info.shape
            first, last = self._cut.blocks(cols if is_down else rows)
            readers = self._cut.readers(cols) if is_down else [self._cut.index]
            found.append(
                PackedTensor(
                    info, matrices.shape, matrices.offset, matrices.experts,
                    rows=(0, rows) if is_down else (BLOCK_COLS * first, BLOCK_COLS * last),
                    blocks=(first, last) if is_down else None,
                    readers=len(readers),
                    reader=readers.index(self._cut.index),
                )
            )  # fmt: skip
        return found

    def start(self) -> None:
        """Start the threads that serve the mailbox, behind the last request that this shard's predecessor answered."""
        self._layers = self._layer_records()
        self._record = self._shard_record()
        reply = self._mailbox.layout.reply(self._cut.index)
        seen = int(self._mailbox.word(reply)[0])
        self._mailbox.word(reply + REQUEST_SLEEPERS)[0] = 0
        self._running = [
            threading.Thread(
                target=self._serve, args=(i, seen), name=f"numoe-shard-{i}", daemon=True
            )
            for i in range(self._threads)
        ]
        for thread in self._running:
            thread.start()

    def _serve(self, thread: int, seen: int) -> None:
        self._pins.pin(thread)
        shard_loop(address(self._record), thread, seen)

    @property
    def ran_on(self) -> list[int]:
        """The processor that each thread ran on last."""
        return last_cpus(thread.native_id for thread in self._running if thread.native_id is not None)

    def join(self) -> None:
        """Wait until the mailbox's owner has stopped the shards."""
        for thread in self._running:
            thread.join()

    def close(self) -> None:
        """Give up the slice; no thread may be serving."""
        self._weights.close()

    def _layer_records(self) -> np.ndarray:
        layers = np.zeros((self._config.n_layers, LAYER_FIELDS), np.int64)
        base = address(self._weights.array)
        for layer, parts in self._plan.items():
            fields: list[int] = []
            for m in parts:
                is_q8 = int(m.shape.format.activations == "q8")
                kernel = product_kernel(m.shape.format.qtype).address
                fields += [
                    kernel, base + m.offset, m.shape.nbytes, m.shape.group_bytes, m.shape.blocks, m.shape.phase, is_q8
                ]  # fmt: skip
            layers[layer] = fields
        return aligned_copy(layers)

    def _shard_record(self) -> np.ndarray:
        layout, base, moe = self._mailbox.layout, self._mailbox.base, self._config.moe
        if moe is None:
            return record([0] * SHARD_FIELDS)
        first, last = self._cut.blocks(moe.ffn)
        pairs, cols = layout.max_rows * layout.top_k, BLOCK_COLS * (last - first)
        q8_stride, f32_stride = activation_bytes(cols, "q8"), activation_bytes(cols, "f32")
        self._h = {"q8": aligned_bytes(pairs * q8_stride), "f32": aligned_bytes(pairs * f32_stride)}
        self._pointers = {
            kind: aligned_copy(address(self._h[kind]) + stride * np.arange(pairs, dtype=np.int64))
            for kind, stride in (("q8", q8_stride), ("f32", f32_stride))
        }
        # A thread's scratch: offsets and active experts, sorted pairs, row addresses, product tiles.
        pairs_at = align(4 * (2 * moe.n_experts + 2))
        pointers_at = align(pairs_at + 4 * pairs)
        tile_at = align(pointers_at + 8 * layout.max_rows)
        scratch_bytes = align(tile_at + 2 * 128 * layout.max_rows, 4096)
        self._scratch = aligned_bytes(self._threads * scratch_bytes)
        self._words = aligned_bytes(BARRIER_BYTES + 4 * CACHE_LINE)
        words = address(self._words)
        return record([
            base, base + layout.reply(self._cut.index), base + layout.ids, base + layout.weights,
            base + layout.q8_rows, activation_bytes(layout.hidden, "q8"),
            base + layout.f32_rows, activation_bytes(layout.hidden, "f32"),
            base + layout.partials + self._cut.index * layout.partial_bytes,
            layout.hidden, layout.top_k, moe.n_experts, last - first, self._threads, self._looks,
            words, words + BARRIER_BYTES, address(self._layers),
            address(self._h["q8"]), q8_stride, address(self._h["f32"]), f32_stride,
            address(self._pointers["q8"]), address(self._pointers["f32"]),
            address(self._scratch), scratch_bytes, pairs_at, pointers_at, tile_at,
        ])  # fmt: skip
