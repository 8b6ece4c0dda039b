"""The forward pass of the attention side on the CPU, as a program for a thread team.

Two programs: the body (embedding and all layers) and the head (final norm and logits, for the rows
that want them). Routed experts are reached through the mailbox.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as QuantType

from numoe.engine.advice import touch_beside
from numoe.engine.cpu import attention, dense
from numoe.engine.cpu.memory import address, align, aligned_bytes, aligned_copy, record
from numoe.engine.cpu.products import product_kernel
from numoe.engine.cpu.program import (
    FAILED,
    LOGIT_ROWS,
    N_LOGITS,
    N_ROWS,
    PAGE_TABLE_STRIDE,
    PAGE_TABLES,
    PARTS,
    POSITIONS,
    SEQUENCE,
    SLOTS,
    STEP_FIELDS,
    TIMES,
    TOKENS,
    Program,
)
from numoe.engine.cpu.rows import activation_bytes
from numoe.engine.cpu.sync import handoff_looks
from numoe.engine.cpu.team import ThreadTeam
from numoe.engine.errors import UnavailableError
from numoe.engine.experts import exchange
from numoe.engine.experts.mailbox import LateShardError, Mailbox
from numoe.engine.gguf import GgufFile
from numoe.engine.kv.pages import pages_for
from numoe.engine.models.config import ModelConfig
from numoe.engine.models.rope import rope_frequencies
from numoe.engine.numa import Pins
from numoe.engine.progress import Progress
from numoe.engine.sampling import HostLogits
from numoe.engine.scheduler import Batch
from numoe.engine.weights import WeightSlice
from numoe.engine.worker.buffers import Rows
from numoe.engine.worker.kv_pool import KvPool
from numoe.engine.worker.options import ForwardOptions, nothing
from numoe.engine.worker.pages import CpuPages
from numoe.engine.worker.weights import DenseWeights, PackedMatrix

LOGITS_AT_ONCE = 16
"""Rows of logits that are computed together; more are done in turns."""


class CpuForward:
    """Weights, KV pool, buffers and programs of the attention side; `run` computes a batch's logits."""

    def __init__(
        self, config: ModelConfig, gguf: GgufFile, mailbox: Mailbox | None, options: ForwardOptions, progress: Progress
    ) -> None:
        self.config, self.options, self._mailbox = config, options, mailbox
        self.pool = KvPool(config, options.n_pages, options.kv_type, options.keepsakes)
        what = "the KV cache (--ctx-size, --parallel)"
        touch_beside(self.pool.data, what, options.nodes, shared=bool(options.keepsakes))
        self.weights = DenseWeights(gguf, options, progress)
        self.pages = CpuPages(config, self.pool)
        self._step = record([0] * STEP_FIELDS)
        if mailbox is not None:
            self._step[SEQUENCE] = mailbox.sequence
        self._team = ThreadTeam(options.threads, options.threads_on_host, Pins(options.cpus))
        self._make_buffers()
        self._make_attention_buffers()
        self._body, self._head = Program(), Program()
        self._build_body()
        self._build_head()
        self._body_table, self._head_table = self._body.table(), self._head.table()
        self._whole_table = aligned_copy(np.concatenate([self._body_table, self._head_table]))
        self._is_answered = False  # whether every shard is known to have answered the last request

    # --- running ----------------------------------------------------------------------------------

    def run(self, batch: Batch, meanwhile: Callable[[], None] = nothing) -> HostLogits:
        """As `Forward.run`."""
        meanwhile()
        if self._mailbox is not None and not self._is_answered:
            self._mailbox.await_replies(self.options.shard_bound_s)
        self._is_answered = False
        step, rows = self._step, np.ascontiguousarray(batch.logit_rows, np.int32)
        step[TIMES:] = 0
        step[FAILED] = 0
        step[N_ROWS] = len(batch.token_ids)
        for field, values in (
            (TOKENS, batch.token_ids),
            (POSITIONS, batch.positions),
            (SLOTS, batch.slots),
            (PAGE_TABLES, batch.page_tables),
        ):
            step[field] = address(values)
        step[PAGE_TABLE_STRIDE] = batch.page_tables.strides[0]
        logits = self._run(self._whole_table if len(rows) else self._body_table, rows[:LOGITS_AT_ONCE])
        if step[FAILED]:
            raise LateShardError(int(step[FAILED]) - 1)
        self._is_answered = True
        if len(rows) > LOGITS_AT_ONCE:
            starts = range(LOGITS_AT_ONCE, len(rows), LOGITS_AT_ONCE)
            turns = (self._run(self._head_table, rows[start : start + LOGITS_AT_ONCE]).copy() for start in starts)
            logits = np.concatenate([logits.copy(), *turns])
        return HostLogits(logits)

    def _run(self, table: npt.NDArray[np.int64], rows: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Run a program that ends with the head, or the body alone without any rows; the logits of these rows."""
        self._step[N_LOGITS], self._step[LOGIT_ROWS] = len(rows), address(rows)
        self._team.run(table, self._step)
        return self._logit_rows.array()[: len(rows), : self.config.vocab]

    def attach_experts(self, folder: Path) -> None:
        """Nothing to do: experts are reached through the mailbox alone."""

    def times_ms(self) -> dict[str, float]:
        """Where the last step's time went, in milliseconds."""
        return {part: self._step[TIMES + i] / 1e6 for i, part in enumerate(PARTS)}

    @property
    def kv_identity(self) -> bytes:
        """As `Forward.kv_identity`."""
        return self.pool.identity

    @property
    def few_rows(self) -> int:
        """As `Forward.few_rows`: a row is computed alike in every step."""
        return 0

    @property
    def slice(self) -> WeightSlice | None:
        """The weights in shared memory, None where they are the process's own."""
        return self.weights.slice

    @property
    def ran_on(self) -> list[int]:
        """The processor that each of the team's threads ran on last."""
        return self._team.ran_on

    def close(self) -> None:
        """End the team's threads."""
        self._team.close()

    # --- building ---------------------------------------------------------------------------------

    def _make_buffers(self) -> None:
        config, rows = self.config, self.options.max_rows
        self._x = Rows(rows, config.hidden)
        self._normed, self._normed_q8 = Rows(rows, config.hidden), Rows(rows, config.hidden, "q8")
        self._q = Rows(rows, config.n_heads * config.head_dim)
        self._k = Rows(rows, config.n_kv_heads * config.head_dim)
        self._v = Rows(rows, config.n_kv_heads * config.head_dim)
        self._attended = Rows(rows, self._q.cols)
        self._attended_q8 = Rows(rows, self._q.cols, "q8")
        self._rope = Rows(rows, config.rope.dims)
        self._last, self._last_q8 = Rows(LOGITS_AT_ONCE, config.hidden), Rows(LOGITS_AT_ONCE, config.hidden, "q8")
        self._logit_rows = Rows(LOGITS_AT_ONCE, -(-config.vocab // 16) * 16)
        self._tile_bytes = 64 * dense.ADDED_GROUPS * rows
        self._tiles = aligned_bytes(self.options.threads * self._tile_bytes)
        if config.dense_ffn:
            self._gate, self._up = Rows(rows, config.dense_ffn), Rows(rows, config.dense_ffn)
            self._gate_q8 = Rows(rows, config.dense_ffn, "q8")
        if self._mailbox and config.moe:
            layout, base = self._mailbox.layout, self._mailbox.base
            self._box = Rows(rows, config.hidden, base=base + layout.f32_rows)
            self._box_q8 = Rows(rows, config.hidden, "q8", base=base + layout.q8_rows)
            self._router = Rows(rows, -(-config.moe.n_experts // 16) * 16)

    def _make_attention_buffers(self) -> None:
        config, options = self.config, self.options
        self._group = config.n_heads // config.n_kv_heads
        self._part_bytes = 4 * self._group * (config.head_dim + attention.STATE_FLOATS)
        self._attend_scratch_bytes = align(2 * self._part_bytes + attention.scratch_bytes(self._group))
        self._attend_scratch = aligned_bytes(options.threads * self._attend_scratch_bytes)
        self._q8_head_bytes = activation_bytes(config.head_dim, "q8") if config.head_dim % 32 == 0 else 0
        self._q8 = aligned_bytes(options.max_rows * config.n_heads * self._q8_head_bytes)
        # With fewer (row, KV head) pairs than this, a sequence's pages are shared out among the threads.
        self._split_below = 2 * options.threads if options.threads > 1 else 0
        self._attend_parts = aligned_bytes(self._split_below * pages_for(options.context) * self._part_bytes)

    def _matrix(self, name: str) -> PackedMatrix:
        return self.weights.matrices[name]

    def _build_body(self) -> None:
        config, program = self.config, self._body
        frequencies, magnitude = rope_frequencies(config.rope, np.float64)
        self._frequencies = aligned_copy(frequencies)
        rope = self._rope
        program.add(
            attention.rope_table,
            address(self._frequencies), len(self._frequencies), float(magnitude), rope.base, rope.stride,
            wait=False,
        )  # fmt: skip
        table = self._matrix("token_embd.weight")
        program.add(
            dense.embed,
            table.unpack, table.address, table.shape.group_bytes, table.shape.blocks, self._x.base, self._x.stride,
        )  # fmt: skip
        for layer in range(config.n_layers):
            self._add_attention(layer)
            if f"blk.{layer}.ffn_gate_inp.weight" in self.weights.matrices:
                self._add_experts(layer)
            else:
                self._add_dense_ffn(layer)

    def _build_head(self) -> None:
        program, last, config = self._head, self._last, self.config
        program.add(dense.gather_logit_rows, self._x.base, self._x.stride, last.base, last.stride, config.hidden)
        output = self.weights.matrices.get("output.weight") or self._matrix("token_embd.weight")
        self._add_norm(program, "output_norm.weight", last, last, self._last_q8 if output.is_q8 else None, N_LOGITS)
        self._add_matmul(program, output, last, self._last_q8, self._logit_rows, count=N_LOGITS)

    def _add_norm(
        self, program: Program, name: str, x: Rows, out: Rows, out_q8: Rows | None, count: int = N_ROWS
    ) -> None:
        weight = self.weights.vectors[name]
        program.add(
            dense.rms_norm,
            count, x.base, x.stride, address(weight), len(weight), float(self.config.rms_eps), out.base, out.stride,
            out_q8.base if out_q8 else 0, out_q8.stride if out_q8 else 0,
        )  # fmt: skip

    def _add_matmul(
        self, program: Program, matrix: PackedMatrix, x: Rows, x_q8: Rows, out: Rows,
        *, add: bool = False, wait: bool = True, count: int = N_ROWS,
    ) -> None:  # fmt: skip
        shape, rows = matrix.shape, x_q8 if matrix.is_q8 else x
        program.add(
            dense.matmul,
            count, matrix.product, matrix.address, shape.groups, shape.group_bytes, shape.blocks, rows.pointers,
            out.base, out.stride, address(self._tiles) if add else 0, self._tile_bytes, wait=wait,
        )  # fmt: skip

    def _add_attention(self, layer: int) -> None:
        config, program, prefix, pool = self.config, self._body, f"blk.{layer}.", self.pool
        q, k, v, o = (self._matrix(f"{prefix}attn_{part}.weight") for part in ("q", "k", "v", "output"))
        normed_q8 = self._normed_q8 if any(m.is_q8 for m in (q, k, v)) else None
        self._add_norm(program, prefix + "attn_norm.weight", self._x, self._normed, normed_q8)
        for matrix, out, wait in ((q, self._q, False), (k, self._k, False), (v, self._v, True)):
            self._add_matmul(program, matrix, self._normed, self._normed_q8, out, wait=wait)
        k_is_q8, v_is_q8 = (int(kind == "q8_0") for kind in (pool.kind.keys, pool.kind.values))
        norms = [self.weights.vectors.get(f"{prefix}attn_{part}_norm.weight") for part in ("q", "k")]
        program.add(
            attention.rope_and_append,
            self._q.base, self._q.stride, self._k.base, self._k.stride, self._v.base, self._v.stride,
            config.n_heads, config.n_kv_heads, config.head_dim, self._rope.base, self._rope.stride,
            config.rope.dims // 2, int(config.rope.style == "neox"),
            *(0 if norm is None else address(norm) for norm in norms), float(config.rms_eps),
            pool.layer_address(layer), pool.page_bytes, pool.head_bytes, pool.key_bytes, k_is_q8, v_is_q8,
            address(self._q8) if k_is_q8 else 0, self._q8_head_bytes,
        )  # fmt: skip
        arguments = self._attend_arguments(layer)
        program.add(attention.attend, *arguments)
        program.add(attention.attend_merge, *arguments)
        if o.is_q8:
            attended, out = self._attended, self._attended_q8
            program.add(dense.quantize, attended.base, attended.stride, attended.cols, out.base, out.stride)
        self._add_matmul(program, o, self._attended, self._attended_q8, self._x, add=True)

    def _attend_arguments(self, layer: int) -> tuple[float, ...]:
        config, pool = self.config, self.pool
        return (
            self._q.base, self._q.stride, self._attended.base, self._attended.stride,
            config.n_kv_heads, self._group, config.head_dim, 1.0 / math.sqrt(config.head_dim),
            pool.layer_address(layer), pool.page_bytes, pool.head_bytes,
            address(self._attend_scratch), self._attend_scratch_bytes, address(self._attend_parts), self._part_bytes,
            pages_for(self.options.context), self._split_below,
            pool.key_bytes, int(pool.kind.keys == "q8_0"), int(pool.kind.values == "q8_0"),
            product_kernel(QuantType.Q8_0).address, address(self._q8), self._q8_head_bytes,
        )  # fmt: skip

    def _add_dense_ffn(self, layer: int) -> None:
        program, prefix = self._body, f"blk.{layer}."
        gate, up, down = (self._matrix(f"{prefix}ffn_{part}.weight") for part in ("gate", "up", "down"))
        normed_q8 = self._normed_q8 if gate.is_q8 or up.is_q8 else None
        self._add_norm(program, prefix + "ffn_norm.weight", self._x, self._normed, normed_q8)
        self._add_matmul(program, gate, self._normed, self._normed_q8, self._gate, wait=False)
        self._add_matmul(program, up, self._normed, self._normed_q8, self._up)
        program.add(dense.swiglu, self._gate.base, self._up.base, self._gate.stride, self._gate.cols)
        if down.is_q8:
            out = self._gate_q8
            program.add(dense.quantize, self._gate.base, self._gate.stride, self._gate.cols, out.base, out.stride)
        self._add_matmul(program, down, self._gate, self._gate_q8, self._x, add=True)

    def _add_experts(self, layer: int) -> None:
        moe, program, prefix, mailbox = self.config.moe, self._body, f"blk.{layer}.", self._mailbox
        if moe is None or mailbox is None:
            raise UnavailableError(f"layer {layer} has routed experts, but there are no expert shards")
        layout, router = mailbox.layout, self._matrix(prefix + "ffn_gate_inp.weight")
        self._add_norm(program, prefix + "ffn_norm.weight", self._x, self._box, self._box_q8)
        self._add_matmul(program, router, self._box, self._box_q8, self._router)
        program.add(
            exchange.route_softmax,
            self._router.base, self._router.stride, moe.n_experts, moe.n_used, int(moe.normalize_weights),
            float(moe.weights_scale), mailbox.base + layout.ids, mailbox.base + layout.weights,
        )  # fmt: skip
        looks, bound = handoff_looks(self.options.threads_on_host), int(self.options.shard_bound_s * 1e9)
        program.add(exchange.exchange, mailbox.base, layer, layout.shards, looks, bound, part="wait", may_fail=True)
        program.add(
            exchange.add_partials,
            self._x.base, self._x.stride, self.config.hidden,
            mailbox.base + layout.partials, layout.partial_bytes, layout.shards,
        )  # fmt: skip
