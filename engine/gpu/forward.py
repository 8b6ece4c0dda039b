"""The forward pass of the attention side on a GPU.

A step of up to GRAPH_ROWS rows is one CUDA graph, captured the first time that number of rows comes:
embedding, all layers with the hand-off to the shards, head, likeliest tokens. No Python and no thread
of the host runs between its kernels. More rows (prompts) run the same kernels' counterparts for many
rows, launched one by one.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from numoe.engine.errors import UnavailableError
from numoe.engine.experts.mailbox import LateShardError, Mailbox
from numoe.engine.experts.shard import ShardSlice, expert_layers, expert_names, plan_slice
from numoe.engine.formats.layouts import packed_format
from numoe.engine.gguf import GgufFile
from numoe.engine.gpu import rows as ops
from numoe.engine.gpu.attention import GpuAttention
from numoe.engine.gpu.compiler import compiling_told
from numoe.engine.gpu.device import cupy
from numoe.engine.gpu.exchange import WORDS, GpuExchange
from numoe.engine.gpu.kv_pool import GpuKvPool
from numoe.engine.gpu.logits import DeviceLogits
from numoe.engine.gpu.lookahead import Lookahead
from numoe.engine.gpu.matrices import GpuMatrix, multiply_all
from numoe.engine.gpu.pages import GpuPages
from numoe.engine.gpu.pairs import ExpertPairs
from numoe.engine.gpu.resident import ResidentExperts
from numoe.engine.gpu.step import StepInputs
from numoe.engine.gpu.streamed import StreamedExperts
from numoe.engine.gpu.vram import WeightMemory
from numoe.engine.gpu.weights import GpuWeights
from numoe.engine.kv.pages import pages_for
from numoe.engine.models.config import ModelConfig
from numoe.engine.private import write_private
from numoe.engine.progress import Progress
from numoe.engine.sampling import HostLogits, StepLogits
from numoe.engine.scheduler import Batch
from numoe.engine.worker.options import ForwardOptions, nothing
from numoe.engine.worker.weights import dense_tensor_names

if TYPE_CHECKING:
    import cupy as cp

logger = logging.getLogger(__name__)
GRAPH_ROWS = 16
"""Rows of a step that runs as a captured graph at most."""

_STREAM_FROM = "stream-from"
_ASLEEP = 0.8
"""Of a step's expected time, for how much of it the host's thread sleeps."""


class GpuForward:
    """Weights, KV pool, buffers and graphs of the attention side; `run` computes a batch's logits."""

    def __init__(
        self, config: ModelConfig, gguf: GgufFile, mailbox: Mailbox | None, options: ForwardOptions, progress: Progress
    ) -> None:
        self.config, self.options, self._mailbox = config, options, mailbox
        self._stream = cupy().cuda.Stream(non_blocking=True)
        self._took: dict[int, float] = {}  # seconds of a step, by its rows, as of the fast ones
        with self._stream, compiling_told(progress.tell):
            layers = expert_layers(config, gguf)[: options.gpu_layers] if config.moe is not None else []
            names = [*dense_tensor_names(gguf), *(name for layer in layers for name in expert_names(layer))]
            memory = WeightMemory(options.keepsakes, gguf, names)
            self.weights = GpuWeights(gguf, options.max_rows, memory, progress)
            self.pool = GpuKvPool(config, options.n_pages, options.kv_type, options.keepsakes)
            self.pages = GpuPages(config, self.pool)
            self._inputs = StepInputs(options.max_rows, options.slots, pages_for(options.context))
            self._lookahead = Lookahead(self.pool, config.n_kv_heads)
            self._attention = GpuAttention(
                config, self.pool, options.max_rows, options.slots, pages_for(options.context)
            )
            self._make_experts(gguf, layers, memory, progress)
            self._make_buffers()
            self._graphs: dict[int, cp.cuda.Graph] = {}
            self._step_ms = 0.0
            self._stream.synchronize()
            memory.keep()
            self._has_predecessor = memory.is_loaded
            if memory.is_loaded:
                progress.skip()
            self._graph(1)  # now, so that its kernels are compiled

    def _make_experts(self, gguf: GgufFile, layers: list[int], memory: WeightMemory, progress: Progress) -> None:
        """What computes routed experts: those of `layers` here, the others in the shards, or streamed from there."""
        config, options, mailbox = self.config, self.options, self._mailbox
        self._pairs: ExpertPairs | None = None
        self._resident: ResidentExperts | None = None
        self._exchange: GpuExchange | None = None
        self._streamed: StreamedExperts | None = None
        self.stream_from: int | None = None  # measured when the first batch of many rows comes
        self._folder: Path | None = None
        self._cuts: list[ShardSlice] = []
        if config.moe is not None:
            self._pairs = ExpertPairs(config, gguf, options.max_rows)
            workspace = self.weights.workspace
            self._resident = ResidentExperts(config.moe, gguf, layers, self._pairs, workspace, memory, progress)
            if mailbox is not None:
                bound_s, count = options.shard_bound_s, mailbox.layout.shards
                self._exchange = GpuExchange(mailbox, config.moe, reads_f32=_reads_f32(gguf), bound_s=bound_s)
                self._cuts = [ShardSlice(i, count, options.gpu_layers) for i in range(count)]
        self._slices = [plan_slice(config, gguf, cut) for cut in self._cuts]

    @property
    def _first_expert_layer(self) -> int:
        """The first layer whose experts the shards have."""
        return next(n for n in range(self.config.n_layers) if self._is_routed(n) and n not in self._resident_layers)

    @property
    def _resident_layers(self) -> Container[int]:
        return () if self._resident is None else self._resident

    def _is_routed(self, layer: int) -> bool:
        return f"blk.{layer}.ffn_gate_inp.weight" in self.weights.matrices

    def _make_buffers(self) -> None:
        import cupyx

        config, rows = self.config, self.options.max_rows

        def floats(cols: int, count: int = rows) -> cp.ndarray:
            return cupy().empty((count, cols), np.float32)

        self._x, self._normed = floats(config.hidden), floats(config.hidden)
        self._q, self._attended = floats(config.n_heads * config.head_dim), floats(config.n_heads * config.head_dim)
        self._k, self._v = (floats(config.n_kv_heads * config.head_dim) for _ in range(2))
        if config.moe is not None:
            self._router = floats(config.moe.n_experts)
        if config.dense_ffn:
            self._gate, self._up = floats(config.dense_ffn), floats(config.dense_ffn)
        self._last = floats(config.hidden, GRAPH_ROWS)
        self._logits = DeviceLogits(GRAPH_ROWS, config.vocab)
        self._host_words: npt.NDArray[np.uint8] = cupyx.zeros_pinned(WORDS.itemsize, np.uint8)

    # --- running ----------------------------------------------------------------------------------

    def run(self, batch: Batch, meanwhile: Callable[[], None] = nothing) -> StepLogits:
        """As `Forward.run`."""
        if self._mailbox is not None:
            self._mailbox.await_replies(self.options.shard_bound_s)
        rows = len(batch.token_ids)
        if rows > GRAPH_ROWS and self.stream_from is None:
            self.stream_from = self._measure_threshold()
            if self._folder is not None:
                self._remember_threshold(self._folder / _STREAM_FROM)
        with self._stream:
            graph = self._graph(rows) if rows <= GRAPH_ROWS else None
        start = time.perf_counter()
        with self._stream, self._stepping():
            self._inputs.load(batch)
            if graph is not None:
                graph.launch(self._stream)
            else:
                meanwhile()  # launching takes as long as the step, and waits for routing
                decode_rows = _decode_rows(batch)
                self._attention.plan(batch, decode_rows)
                self._body(rows, decode_rows)
            self._copy_words()
            if self._mailbox is not None:
                self._mailbox.wake_shards()  # while the first layer's attention runs
            try:
                if graph is not None:
                    meanwhile()
            finally:
                took = self._await_end(rows, start)
        self._check_answered()
        if graph is not None:
            before = self._took.get(rows, 0.0)
            self._took[rows] = min(took, 1.1 * before) if before else took
        if rows <= GRAPH_ROWS:
            logits: StepLogits = self._logits.of_rows(batch.logit_rows)
        else:
            logits = self._head_in_turns(len(batch.logit_rows))
        self._step_ms = 1e3 * (time.perf_counter() - start)
        return logits

    def _await_end(self, rows: int, start: float) -> float:
        """Wait for the step's kernels: asleep for most of the time that it took before, spinning for the rest.

        Returns how many seconds it has taken.

        A thread that spins takes a processor from the shards and the gateway, one that is woken comes late.
        """
        if (left := _ASLEEP * self._took.get(rows, 0.0) - (time.perf_counter() - start)) > 0:
            time.sleep(left)
        self._stream.synchronize()
        return time.perf_counter() - start

    @contextlib.contextmanager
    def _stepping(self) -> Iterator[None]:
        """Keep the shards' threads from sleeping."""
        if self._mailbox is None:
            yield
            return
        self._mailbox.begin_step()
        try:
            yield
        finally:
            self._mailbox.end_step()

    def _graph(self, rows: int) -> cp.cuda.Graph:
        """The graph of a step of `rows` rows: body, and logits of all of them."""
        if rows not in self._graphs:
            self._stream.begin_capture()
            try:
                self._body(rows)
                self._head(self._x, rows)
            finally:
                graph = self._stream.end_capture()
            self._graphs[rows] = graph
        return self._graphs[rows]

    def _head_in_turns(self, wanted: int) -> StepLogits:
        """Logits of the wanted rows of a step of many, GRAPH_ROWS at a time."""
        turns = []
        for start in range(0, wanted, GRAPH_ROWS):
            count = min(GRAPH_ROWS, wanted - start)
            with self._stream:
                ops.gather(self._x, self._inputs.logit_rows[start:], self._last, count)
                self._head(self._last, count)
                self._stream.synchronize()
            turn = self._logits.of_rows(np.arange(count, dtype=np.int32))
            if wanted <= GRAPH_ROWS:
                return turn
            turns.append(np.array(turn))
        return HostLogits(np.concatenate(turns or [np.empty((0, self.config.vocab), np.float32)]))

    def _copy_words(self) -> None:
        if self._exchange is not None:
            self._exchange.words.data.copy_to_host_async(self._host_words.ctypes.data, self._host_words.nbytes)

    def _check_answered(self) -> None:
        """Raise LateShardError if the copied words say that a shard was late."""
        if failed := int(self._words()["failed"]):
            raise LateShardError(failed - 1)

    def _words(self) -> np.void:
        words: np.void = self._host_words.view(WORDS)[0]
        return words

    def times_ms(self) -> dict[str, float]:
        """Where the last step's time went, in milliseconds."""
        words = self._words()
        experts, wait = int(words["experts"]) / 1e6, int(words["wait"]) / 1e6
        return {"attention": max(0.0, self._step_ms - experts - wait), "experts": experts, "wait": wait}

    @property
    def kv_identity(self) -> bytes:
        """As `Forward.kv_identity`."""
        return self.pool.identity

    @property
    def few_rows(self) -> int:
        """As `Forward.few_rows`: the rows of a graph."""
        return GRAPH_ROWS

    @property
    def slice(self) -> None:
        """The weights are in VRAM."""
        return None

    @property
    def ran_on(self) -> tuple[int, ...]:
        """No thread computes."""
        return ()

    def attach_experts(self, folder: Path) -> None:
        """Map the shards' weights in `folder`, which are there now, to stream them for large batches.

        From how many rows on is what a worker before has measured, if there was one: prompts are computed as they were.
        """
        self._folder = folder
        with contextlib.suppress(FileNotFoundError, ValueError):  # not written, or not to the end
            self.stream_from = int((folder / _STREAM_FROM).read_bytes())
        if self._pairs is not None and self._cuts:
            with self._stream:
                self._streamed = StreamedExperts(
                    self.config, folder, self._cuts, self._slices, self._pairs, beside=self._has_predecessor
                )

    def close(self) -> None:
        """Give host memory that CUDA has pinned back to the host alone."""
        self._stream.synchronize()
        for part in (self._exchange, self._streamed):
            if part is not None:
                part.close()

    # --- the step's kernels -----------------------------------------------------------------------

    def _body(self, rows: int, decode_rows: int = 0) -> None:
        """Embedding and all layers, on the current stream; the first `decode_rows` rows are of a sequence each."""
        if self._exchange is not None:
            self._exchange.begin()
        if streamed := self._streamed_for(rows):
            streamed.begin()
        self._attention.begin(self._inputs.positions, rows)
        self.weights.matrices["token_embd.weight"].embed(self._inputs.tokens, self._x, rows)
        for layer in range(self.config.n_layers):
            self._attend(layer, rows, decode_rows)
            if self._is_routed(layer):
                self._experts(layer, rows)
            else:
                self._dense_ffn(layer, rows)

    def _head(self, x: cp.ndarray, rows: int) -> None:
        """Final norm, logits and what sampling wants to know of rows of x."""
        self._norm("output_norm.weight", x, self._last, rows)
        self._output.multiply(self._last, self._logits.device, rows)
        self._logits.prepare(rows)

    @property
    def _output(self) -> GpuMatrix:
        return self.weights.matrices.get("output.weight") or self.weights.matrices["token_embd.weight"]

    def _norm(self, name: str, x: cp.ndarray, out: cp.ndarray, rows: int) -> None:
        ops.rms_norm(x, self.weights.vectors[name], self.config.rms_eps, out, rows)

    def _attend(self, layer: int, rows: int, decode_rows: int) -> None:
        prefix, matrices, vectors = f"blk.{layer}.", self.weights.matrices, self.weights.vectors
        self._norm(prefix + "attn_norm.weight", self._x, self._normed, rows)
        outputs = (("q", self._q), ("k", self._k), ("v", self._v))
        multiply_all([(matrices[f"{prefix}attn_{part}.weight"], out) for part, out in outputs], self._normed, rows)
        q_norm, k_norm = (vectors.get(f"{prefix}attn_{part}_norm.weight") for part in ("q", "k"))
        self._attention.run(
            layer, self._q, self._k, self._v, q_norm, k_norm, self._inputs, self._attended, rows,
            decode_rows=decode_rows,
        )  # fmt: skip
        matrices[prefix + "attn_output.weight"].multiply(self._attended, self._x, rows, add=True)

    def _dense_ffn(self, layer: int, rows: int) -> None:
        prefix, matrices = f"blk.{layer}.", self.weights.matrices
        self._norm(prefix + "ffn_norm.weight", self._x, self._normed, rows)
        both = (("gate", self._gate), ("up", self._up))
        multiply_all([(matrices[f"{prefix}ffn_{part}.weight"], out) for part, out in both], self._normed, rows)
        ops.swiglu(self._gate, self._up, self._gate, rows)
        matrices[prefix + "ffn_down.weight"].multiply(self._gate, self._x, rows, add=True)

    def _experts(self, layer: int, rows: int) -> None:
        prefix = f"blk.{layer}."
        self._norm(prefix + "ffn_norm.weight", self._x, self._normed, rows)
        router = self.weights.matrices[prefix + "ffn_gate_inp.weight"]
        router.multiply(self._normed, self._router, rows, share_x=True)
        if self._resident is not None and layer in self._resident:
            self._resident.run(layer, self._x, self._normed, self._router, rows)
            return
        if self._exchange is None:
            raise UnavailableError(f"layer {layer} has routed experts, but there are no expert shards")
        if streamed := self._streamed_for(rows):
            streamed.run(self._x, self._normed, self._router, rows)
            return
        self._exchange.send(self._normed, self._router, rows, layer)
        if rows <= GRAPH_ROWS:
            self._look_ahead(layer + 1, rows)
        self._exchange.receive(self._x, rows)

    def _look_ahead(self, layer: int, rows: int) -> None:
        """While the shards work, fetch what comes next to the GPU's cache: a layer, or the head behind the last one."""
        matrices, prefix = self.weights.matrices, f"blk.{layer}."
        if layer == self.config.n_layers:
            self._lookahead.run([self._output], None, self._inputs, rows)
        else:
            names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp")
            coming = [matrix for name in names if (matrix := matrices.get(f"{prefix}{name}.weight"))]
            self._lookahead.run(coming, layer, self._inputs, rows)

    def _streamed_for(self, rows: int) -> StreamedExperts | None:
        """What multiplies the experts of a step of so many rows on the GPU; None if the shards do."""
        return self._streamed if self.stream_from is not None and rows >= self.stream_from else None

    def _measure_threshold(self) -> int:
        """The rows from which on streaming a layer's experts takes less time than the shards do.

        Shards take a + b rows, found from two numbers of rows with random routing.
        """
        if self._exchange is None or self._streamed is None:
            return sys.maxsize
        generator, most = cupy().random.default_rng(0), self.options.max_rows
        fewer, more = min(64, most), min(256, most)
        if fewer == more:
            return sys.maxsize
        with self._stream, self._stepping():
            for array in (self._normed, self._router):
                array[:more] = generator.standard_normal((more, array.shape[1]), np.float32)
            self._x[:more] = 0
            took = {rows: min(self._time_shards(rows) for _ in range(3)) for rows in (fewer, more)}
        per_row = max((took[more] - took[fewer]) / (more - fewer), 1e-9)
        streaming = self._streamed.layer_seconds()
        return max(GRAPH_ROWS + 1, fewer + int((streaming - took[fewer]) / per_row))

    def _remember_threshold(self, path: Path) -> None:
        """Let successors compute prompts as this worker does."""
        try:
            write_private(path, str(self.stream_from).encode())
        except OSError as error:
            logger.warning("another worker may compute prompts otherwise: %s: %s", path, error.strerror)

    def _time_shards(self, rows: int) -> float:
        """Seconds that the shards take for a layer of `rows` rows."""
        assert self._exchange is not None
        self._stream.synchronize()
        start = time.perf_counter()
        self._exchange.begin()
        self._exchange.send(self._normed, self._router, rows, self._first_expert_layer)
        self._exchange.receive(self._x, rows)
        self._copy_words()
        self._stream.synchronize()
        self._check_answered()
        return time.perf_counter() - start


def _decode_rows(batch: Batch) -> int:
    """How many rows at the front are the only ones of their sequence."""
    followed = batch.slots[1:] == batch.slots[:-1]
    return int(followed.argmax()) if followed.any() else len(batch.slots)


def _reads_f32(gguf: GgufFile) -> bool:
    """Whether any expert's weights are multiplied with float32 rows."""
    experts = (info.qtype for name, info in gguf.tensors.items() if "_exps." in name)
    return any(packed_format(qtype).activations == "f32" for qtype in experts)
