"""The gateway actor: the gRPC server inside Ray, and its way to the other actors."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayTaskError

from numoe.actors.gateway.interfaces import Limits, ModelInfo, ServerContext
from numoe.actors.gateway.order import PushOrder
from numoe.actors.gateway.server import GatewayServer, build_server
from numoe.actors.gateway.streams import RequestStreams
from numoe.actors.identity import Identity, identity
from numoe.cluster.endpoint import Endpoint
from numoe.cluster.plan import Plan
from numoe.cluster.status import ActorInfo
from numoe.engine.errors import NumoeError, UnavailableError
from numoe.engine.gguf import GgufFile
from numoe.engine.models.config import ModelConfig
from numoe.engine.requests import Event, GenerationRequest, SlotReport, SnapshotInfo, WorkerStatus

SLOT_OPERATIONS = 8
"""At once, as each holds a thread of the worker's, which others need for requests and to end operations."""
T = TypeVar("T")


class RayEngineClient:
    """The gateway's way to the attention worker and the supervisor, over Ray calls."""

    def __init__(self, worker: Any, supervisor: Any) -> None:
        self._worker, self._supervisor = worker, supervisor
        self._slot_operations = asyncio.Semaphore(SLOT_OPERATIONS)

    async def submit(self, request: GenerationRequest) -> None:
        """Queue a request."""
        await _call(self._worker.submit.remote(request))

    async def abort(self, request_id: str) -> None:
        """End a request."""
        await _call(self._worker.abort.remote(request_id))

    async def save_slot(self, operation: str, slot: int, name: str, wait_until: float | None) -> SlotReport:
        """Make a snapshot of a slot."""
        report: SlotReport = await self._operate(self._worker.save_slot, operation, slot, name, wait_until)
        return report

    async def restore_slot(self, operation: str, slot: int, name: str, wait_until: float | None) -> SlotReport:
        """Put a snapshot into a slot."""
        report: SlotReport = await self._operate(self._worker.restore_slot, operation, slot, name, wait_until)
        return report

    async def cancel_slot_operation(self, operation: str) -> None:
        """End a save or restore."""
        await _call(self._worker.cancel_slot_operation.remote(operation))

    async def erase_slot(self, operation: str, slot: int, wait_until: float | None) -> SlotReport:
        """Empty a slot."""
        report: SlotReport = await self._operate(self._worker.erase_slot, operation, slot, wait_until)
        return report

    async def fork_slot(self, operation: str, slot: int, target: int, wait_until: float | None) -> SlotReport:
        """Make two slots hold the same."""
        report: SlotReport = await self._operate(self._worker.fork_slot, operation, slot, target, wait_until)
        return report

    async def snapshots(self) -> tuple[SnapshotInfo, ...]:
        """The store's snapshots."""
        found: tuple[SnapshotInfo, ...] = await self._operate(self._worker.snapshots)
        return found

    async def remove_snapshot(self, name: str) -> None:
        """Remove a snapshot."""
        await self._operate(self._worker.remove_snapshot, name)

    async def _operate(self, method: Any, *args: Any) -> Any:
        """Call the worker; a caller who leaves does not make room for others before the worker is done."""
        await self._slot_operations.acquire()
        work = asyncio.ensure_future(_call(method.remote(*args)))
        work.add_done_callback(self._operated)
        return await asyncio.shield(work)

    def _operated(self, work: asyncio.Future[Any]) -> None:
        self._slot_operations.release()
        if not work.cancelled():
            work.exception()  # heard, even where nobody waits for it

    async def status(self) -> WorkerStatus:
        """What the worker is doing."""
        status: WorkerStatus = await _call(self._worker.status.remote())
        return status

    async def actors(self) -> list[ActorInfo]:
        """The server's processes."""
        found: list[ActorInfo] = await _call(self._supervisor.actors.remote())
        return found

    async def shutdown(self, deadline_s: float, *, keep_weights: bool) -> None:
        """Begin to stop the server."""
        await _call(self._supervisor.shutdown.remote(deadline_s, keep_weights=keep_weights))


async def _call(reference: Awaitable[T]) -> T:
    """Await a Ray call; numoe's own errors as they were raised, a dead actor as UnavailableError."""
    try:
        return await reference
    except RayTaskError as error:
        if isinstance(error.cause, NumoeError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise UnavailableError(f"a worker of this server is gone: {error}") from None


class GatewayActor:
    """Ray actor, asyncio. `initialize` binds the port, `serve` opens it, `stop` closes it."""

    def __init__(self, plan: Plan, endpoint: Endpoint) -> None:
        self._plan, self._endpoint = plan, endpoint
        self._server: GatewayServer | None = None
        self._order = PushOrder()
        limits = Limits()
        self._streams = RequestStreams(max_streams=limits.max_streams, backlog=limits.stream_backlog)

    async def identity(self) -> Identity:
        """Who this process is."""
        return identity()

    async def initialize(self, worker: Any, supervisor: Any) -> str:
        """Read the tokenizer and bind the port; the address."""
        context = await asyncio.to_thread(server_context, self._plan)
        client = RayEngineClient(worker, supervisor)
        self._server = build_server(context, client, self._streams, self._endpoint)
        await self._server.start()
        return self._server.address

    async def serve(self) -> None:
        """Take requests from now on."""
        assert self._server is not None
        await self._server.set_ready()

    async def deliver(self, number: int, events: Sequence[Event]) -> None:
        """Route the events of one step, the worker's push number `number`."""
        for ready in self._order.accept(number, events):
            self._streams.deliver(ready)

    async def drain(self, deadline_s: float) -> None:
        """Take no new requests and let the running ones finish."""
        if self._server is not None:
            await self._server.drain(deadline_s)

    async def stop(self, message: str) -> None:
        """End what still runs, with `message` if it is not empty, and close the port."""
        if message:
            self._streams.fail_all(message)
        if self._server is not None:
            await self._server.stop()


def server_context(plan: Plan) -> ServerContext:
    """The tokenizer, templates and facts of a model file."""
    from numoe.engine.text import ChatTemplate, Tokenizer

    with GgufFile.open(plan.model) as gguf:
        config, metadata = ModelConfig.from_gguf(gguf), gguf.metadata
        tokenizer = Tokenizer.from_metadata(metadata)
        parameters = sum(info.rows * info.shape[-1] for info in gguf.tensors.values())
        sizes: dict[str, int] = {}
        for info in gguf.tensors.values():
            sizes[info.qtype.name] = sizes.get(info.qtype.name, 0) + info.nbytes
        model = ModelInfo(
            name=str(metadata.get("general.name") or gguf.path.stem),
            architecture=config.architecture,
            context_tokens=plan.context,
            vocab_size=config.vocab,
            trained_context_tokens=config.context,
            parameters=parameters,
            layers=config.n_layers,
            experts=config.moe.n_experts if config.moe else 0,
            experts_used=config.moe.n_used if config.moe else 0,
            weight_format=max(sizes, key=lambda name: sizes[name]),
            file_bytes=gguf.size_bytes,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
        )
        return ServerContext(
            tokenizer=tokenizer,
            model=model,
            version=importlib.metadata.version("numoe"),
            chat_template=ChatTemplate.from_metadata(metadata),
            limits=Limits.for_context(plan.context),
            outlasts_context=plan.cache.keep is not None,
            slots=plan.slots,
            has_store=bool(plan.cache.store_url),
        )
