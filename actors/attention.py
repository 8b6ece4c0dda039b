"""The actor that runs attention, the scheduler and sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numoe.actors.identity import Identity, identity
from numoe.cluster.plan import Plan
from numoe.engine.requests import Event, GenerationRequest, WorkerStatus

if TYPE_CHECKING:
    from numoe.engine.worker.options import Forward


class AttentionActor:
    """Ray actor. `__init__` is cheap; `initialize` loads; `run` steps until `stop`."""

    def __init__(self, plan: Plan, folder: str) -> None:
        self._plan, self._folder = plan, Path(folder)
        self._pushes = 0

    def identity(self) -> Identity:
        """Who this process is."""
        return identity()

    def create_mailbox(self) -> None:
        """Make the mailbox that the shards attach to."""
        from numoe.engine.experts.mailbox import Mailbox

        layout = self._plan.mailbox
        self._mailbox = Mailbox.create(str(self._folder / "mailbox"), layout) if layout else None

    def initialize(self) -> None:
        """Load everything but the experts and build the forward pass."""
        from numoe.engine.gguf import GgufFile
        from numoe.engine.models.config import ModelConfig
        from numoe.engine.progress import Progress
        from numoe.engine.scheduler import Scheduler, SchedulerConfig
        from numoe.engine.weights import CachedPages
        from numoe.engine.worker.engine import Engine
        from numoe.engine.worker.options import ForwardOptions, SharedWeights

        plan, folder, gguf = self._plan, self._folder, GgufFile.open(self._plan.model)
        options = ForwardOptions(
            max_rows=plan.max_rows,
            slots=plan.slots,
            n_pages=plan.n_pages,
            context=plan.context,
            threads=plan.attention_threads,
            threads_on_host=plan.threads_on_host,
            kv_type=plan.kv_type,
            shared=None if plan.gpu else SharedWeights(folder, plan.dense_slice, CachedPages.load(folder)),
        )
        self._progress = Progress(plan.dense_bytes)
        self._forward = _forward_of(plan)(ModelConfig.from_gguf(gguf), gguf, self._mailbox, options, self._progress)
        scheduler = Scheduler(
            SchedulerConfig(
                slots=plan.slots,
                context=plan.context,
                chunk_tokens=plan.chunk,
                queue_limit=plan.queue,
                n_pages=plan.n_pages,
            )
        )
        self._engine = Engine(scheduler, self._forward, self._push)
        self._gateway: Any = None
        gguf.close()

    def attach_experts(self) -> None:
        """The shards have loaded: what needs their weights may look at them."""
        self._forward.attach_experts(self._folder)

    def progress(self) -> tuple[int, int, float]:
        """Bytes loaded, bytes to load, seconds; zeros before `initialize`."""
        progress = getattr(self, "_progress", None)
        return progress.snapshot() if progress else (0, 0, 0.0)

    def connect(self, gateway: Any) -> None:
        """Send events to this gateway actor from now on."""
        self._gateway = gateway

    def _push(self, events: list[Event]) -> None:
        """One message per step, whatever the batch size; nothing waits for its arrival."""
        if self._gateway is not None:
            self._gateway.deliver.remote(self._pushes, events)
            self._pushes += 1

    def run(self) -> None:
        """Run steps until `stop`; while this is pending, the worker is alive."""
        self._engine.run()

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request."""
        self._engine.submit(request)

    def abort(self, request_id: str) -> None:
        """End a request."""
        self._engine.abort(request_id)

    def status(self) -> WorkerStatus:
        """What the worker is doing."""
        return self._engine.status()

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

    def stop(self) -> None:
        """End the step loop, then the shards' loops."""
        self._engine.stop()
        if self._mailbox is not None:
            self._mailbox.stop_shards()


def _forward_of(plan: Plan) -> Callable[..., Forward]:
    """The forward pass for where attention runs."""
    if plan.gpu:
        from numoe.engine.gpu.forward import GpuForward

        return GpuForward
    from numoe.engine.worker.forward import CpuForward

    return CpuForward
