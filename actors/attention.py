"""The actor that runs attention, the scheduler and sampling."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numoe.actors.identity import Identity, identity
from numoe.actors.placement import describe, reporter_of
from numoe.cluster.plan import Plan
from numoe.cluster.status import ActorPlacement
from numoe.engine.errors import NumoeError
from numoe.engine.keeper import SOCKET, Keepsakes
from numoe.engine.private import write_private
from numoe.engine.progress import Progress
from numoe.engine.requests import Event, GenerationRequest, SlotReport, SnapshotInfo, WorkerStatus

if TYPE_CHECKING:
    from numoe.engine.gguf import GgufFile
    from numoe.engine.worker.options import Forward

logger = logging.getLogger(__name__)

_JOURNAL, _GPU = "pages", "gpu"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_GPU_SHARD_BOUND_S = 0.8  # nobody is served by a GPU that waits for a shard which has died


class AttentionActor:
    """Ray actor. `__init__` is cheap; `initialize` loads; `run` steps until `stop`."""

    def __init__(self, plan: Plan, folder: str) -> None:
        self._plan, self._folder = plan, Path(folder)
        self._keepsakes = Keepsakes(self._folder / SOCKET)
        self._gguf: GgufFile | None = None
        self._gateway: Any = None
        self._connection, self._pushes, self._pushing = 0, 0, threading.Lock()
        self._loop: Future[None] | None = None
        self._starting = threading.Lock()

    def identity(self) -> Identity:
        """Who this process is."""
        return identity()

    def prepare(self) -> None:
        """Do what takes long and needs neither shards nor GPU: importing, kernels, reading the model's header."""
        import numoe.engine.worker.engine  # noqa: F401
        from numoe.engine.gguf import GgufFile
        from numoe.engine.gpu.device import import_libraries
        from numoe.engine.kernels import compile_kernel, needed_kernels

        _forward_of(self._plan)
        if self._plan.gpu:
            import_libraries()
        self._gguf = GgufFile.open(self._plan.model)
        for name in needed_kernels(self._gguf):
            if name.startswith("pages:" if self._plan.gpu else ("product:", "step:", "pages:", "loop:team", "unpack:")):
                compile_kernel(name)

    def open_mailbox(self, *, create: bool) -> None:
        """Make the mailbox that the shards attach to, or take the place of the worker that made it."""
        from numoe.engine.experts.mailbox import Mailbox

        if self._plan.gpu:
            _use_gpu_of(self._folder / _GPU, first=create)
        layout, path = self._plan.mailbox, str(self._folder / "mailbox")
        self._mailbox = None
        if layout is not None:
            self._mailbox = Mailbox.create(path, layout) if create else Mailbox.attach(path, layout)
            self._mailbox.take_over()

    def initialize(self) -> None:
        """Load everything but the experts and build the forward pass."""
        from numoe.engine.gguf import GgufFile
        from numoe.engine.models.config import ModelConfig
        from numoe.engine.weights import CachedPages
        from numoe.engine.worker.options import ForwardOptions, SharedWeights

        plan, folder = self._plan, self._folder
        self._gguf = self._gguf or GgufFile.open(plan.model)
        options = ForwardOptions(
            max_rows=plan.max_rows,
            slots=plan.slots,
            n_pages=plan.n_pages,
            context=plan.context,
            threads=plan.attention_threads,
            threads_on_host=plan.threads_on_host,
            kv_type=plan.kv_type,
            shared=None if plan.gpu else SharedWeights(folder, plan.dense_slice, CachedPages.load(folder)),
            gpu_layers=plan.gpu_layers,
            cpus=plan.attention.cpus,
            nodes=plan.attention.memory,
            keepsakes=self._keepsakes,
            **({"shard_bound_s": _GPU_SHARD_BOUND_S} if plan.gpu else {}),
        )
        self._progress = Progress(plan.dense_bytes + plan.gpu_expert_bytes)
        config = ModelConfig.from_gguf(self._gguf)
        self._forward = _forward_of(plan)(config, self._gguf, self._mailbox, options, self._progress)
        weights = self._forward.slice
        self._reporter = reporter_of(weights, plan.attention) if weights else None

    def attach_experts(self) -> None:
        """The shards have loaded: what needs their weights, or what they read of the model, may look at them."""
        from numoe.engine.kv.journal import PageJournal
        from numoe.engine.scheduler import Scheduler, SchedulerConfig
        from numoe.engine.store.portable import kv_type_name
        from numoe.engine.worker.engine import Engine

        plan = self._plan
        assert self._gguf is not None
        self._forward.attach_experts(self._folder)
        tiers = _tiers(plan, self._gguf, self._folder)
        self._gguf.close()
        sizes = plan.n_pages, plan.slots, plan.context
        journal = PageJournal.open(self._folder / _JOURNAL, self._forward.kv_identity, *sizes)
        self._goes_on = not journal.is_empty
        scheduler = Scheduler(
            SchedulerConfig(
                slots=plan.slots,
                context=plan.context,
                chunk_tokens=plan.chunk,
                queue_limit=plan.queue,
                n_pages=plan.n_pages,
                fingerprint=tiers["origin"].fingerprint if tiers else b"",
                kv_type=kv_type_name(plan.kv_type),
                caches=bool(tiers.get("ram") or tiers.get("tier")),
                keep=plan.cache.keep,
                few_rows=self._forward.few_rows,
            ),
            journal=journal,
        )
        self._engine = Engine(scheduler, self._forward, self._push, **tiers)
        self._resume()

    def _resume(self) -> None:
        """Offer what an earlier server kept, as far as a worker of this one has not gone on with it."""
        cache = self._plan.cache
        if cache.prompt_cache_file and not self._goes_on:
            self._engine.slots.load_file(Path(cache.prompt_cache_file))
        if cache.resume:
            self._engine.resume()

    def progress(self) -> dict[str, Any]:
        """How far loading has come: see `Progress.report`; zeros before `initialize`."""
        progress = getattr(self, "_progress", None)
        return (progress or Progress(0)).report()

    def placement(self) -> ActorPlacement | None:
        """Where weights and threads of attention on CPUs are; None on a GPU."""
        if self._reporter is None:
            return None
        return describe(self._plan.attention, self._reporter, self._forward.ran_on)

    def connect(self, gateway: Any, connection: int) -> None:
        """Send events to this gateway actor from now on, with this number; what another one asked for ends.

        gateway: None if there is none.
        """
        with self._pushing:
            self._gateway = None
        self._engine.abandon()
        with self._pushing:
            self._gateway, self._connection, self._pushes = gateway, connection, 0

    def settle(self) -> None:
        """The gateway has handed over all that a worker before has left."""
        self._engine.settle()

    def hand_over(self) -> None:
        """Another supervisor has come: have it keep what shall outlive this process."""
        self._keepsakes.hand_over()

    def _push(self, events: list[Event]) -> None:
        """One message per step, whatever the batch size; nothing waits for its arrival."""
        with self._pushing:  # a step and a slot's operation may come at once
            if self._gateway is not None:
                self._gateway.deliver.remote(self._connection, self._pushes, events)
                self._pushes += 1

    def run(self) -> None:
        """Run steps until `stop`; while this is pending, the worker is alive. Who calls again waits with the first."""
        with self._starting:
            if self._loop is None:
                self._loop = ThreadPoolExecutor(1, "numoe-steps").submit(self._engine.run)
        self._loop.result()

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request."""
        self._engine.submit(request)

    def abort(self, request_id: str) -> None:
        """End a request."""
        self._engine.abort(request_id)

    def pulse(self) -> str:
        """Answers as long as the worker can; why it is to be taken for hung all the same, empty if it is not."""
        return self._engine.why_stuck()

    def status(self) -> WorkerStatus:
        """What the worker is doing."""
        return self._engine.status()

    def save_slot(self, operation: str, slot: int, name: str, wait_until: float | None) -> SlotReport:
        """See `SlotOperations.save`, and so on below."""
        return self._engine.slots.save(operation, slot, name, wait_until)

    def restore_slot(self, operation: str, slot: int, name: str, wait_until: float | None) -> SlotReport:
        """Give a slot a snapshot's conversation."""
        return self._engine.slots.restore(operation, slot, name, wait_until)

    def erase_slot(self, operation: str, slot: int, wait_until: float | None) -> SlotReport:
        """Forget a slot's conversation."""
        return self._engine.slots.erase(operation, slot, wait_until)

    def fork_slot(self, operation: str, slot: int, target: int, wait_until: float | None) -> SlotReport:
        """Let another slot hold the same."""
        return self._engine.slots.fork(operation, slot, target, wait_until)

    def cancel_slot_operation(self, operation: str) -> None:
        """End a save or restore."""
        self._engine.slots.cancel(operation)

    def snapshots(self) -> tuple[SnapshotInfo, ...]:
        """The snapshots of the store."""
        return self._engine.slots.snapshots()

    def remove_snapshot(self, name: str) -> None:
        """Remove a snapshot."""
        self._engine.slots.remove(name)

    def begin_logits(self, token_ids: Sequence[int], chunk: int) -> None:
        """Start over with the logits of a sequence: see `Engine.logits`."""
        self._logits = self._engine.logits(token_ids, chunk)

    def next_logits(self) -> Any:
        """The next rows, float32 [rows, vocab], or None at the end."""
        return next(self._logits, None)

    def measure_prefill(self, token_ids: Sequence[int], start: int) -> Any:
        """A prompt's `Measurement`, in steps of the plan's chunk: see `Engine.measure_prefill`."""
        return self._engine.measure_prefill(token_ids, start, self._plan.chunk)

    def measure_decode(self, token_id: int, start: int, count: int) -> Any:
        """An answer's `Measurement`: see `Engine.measure_decode`."""
        return self._engine.measure_decode(token_id, start, count)

    def stop(self, save_s: float = 0.0, why: str = "") -> str:
        """End the step loop, then the shards' loops; conversations are saved for at most `save_s` seconds.

        why: what requests that still run are told. Returns what is lost, empty if nothing is.
        """
        cache, until = self._plan.cache, time.monotonic() + save_s
        self._engine.stop(why)
        if cache.prompt_cache_file:
            try:
                self._engine.slots.save_file(Path(cache.prompt_cache_file), all_tokens=cache.prompt_cache_all)
            except NumoeError:
                logger.exception("the prompt cache file was not written")
        lost = self._engine.close(save_until=until if cache.resume else None)
        if self._mailbox is not None:
            self._mailbox.stop_shards()
        return lost


def _tiers(plan: Plan, gguf: GgufFile, folder: Path) -> dict[str, Any]:
    """What `Engine` needs of the prompt cache beyond the pages; nothing where there is none."""
    cache = plan.cache
    if not (cache.store_url or cache.cache_ram_bytes or cache.prompt_cache_file):
        return {}
    from numoe.engine.cache import RamTier, StoreTier
    from numoe.engine.store import open_store
    from numoe.engine.store.fingerprint import ModelFingerprint
    from numoe.engine.store.manifest import Origin
    from numoe.engine.store.portable import kv_type_name
    from numoe.engine.weights import linked_contents

    read = linked_contents(folder, gguf.tensors)
    fingerprint = ModelFingerprint.from_gguf(gguf, read=read, threads=plan.attention_threads)
    tiers: dict[str, Any] = {
        "origin": Origin.of(fingerprint, kv_type_name(plan.kv_type)), "rounding": _rounding(plan),
    }  # fmt: skip
    if cache.cache_ram_bytes:
        tiers["ram"] = RamTier(cache.cache_ram_bytes)
    if cache.store_url:
        options: dict[str, Any] = {"endpoint": cache.store_endpoint} if cache.store_endpoint else {}
        tiers["tier"] = StoreTier(open_store(cache.store_url, **options), cache.store_limit_bytes)
    return tiers


def _rounding(plan: Plan) -> bytes:
    """What decides how sums are rounded: the machine code, the GPU, and how the experts are divided."""
    from numoe.engine.cpu.isa import choose_isa, kernel_cache_dir
    from numoe.engine.store.chunks import rounding_of

    gpu = plan.gpu and (plan.gpu.name, plan.gpu.capability, plan.gpu.sms)
    return rounding_of(kernel_cache_dir(choose_isa()).name, gpu, len(plan.shards), plan.gpu_layers)


def _use_gpu_of(path: Path, *, first: bool) -> None:
    """Use the GPU that the server's first worker got from Ray: a spare gets none, and memory is that GPU's.

    Works as long as the process has not called CUDA.
    """
    if first:
        write_private(path, os.environ.get(_VISIBLE, "").encode())
    elif visible := path.read_text():
        os.environ[_VISIBLE] = visible
    else:
        os.environ.pop(_VISIBLE, None)


def _forward_of(plan: Plan) -> Callable[..., Forward]:
    """The forward pass for where attention runs."""
    if plan.gpu:
        from numoe.engine.gpu.forward import GpuForward

        return GpuForward
    from numoe.engine.worker.forward import CpuForward

    return CpuForward
