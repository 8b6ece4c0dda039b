"""AdminService: what runs where, and how to stop it."""

# ruff: noqa: N802, ARG002 -- gRPC gives the methods their names and arguments
from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import Any, TypeVar

import grpc

from numoe.actors.gateway.errors import answers_errors
from numoe.actors.gateway.interfaces import EngineClient, ServerContext
from numoe.actors.gateway.lifecycle import Lifecycle
from numoe.actors.gateway.model import model_message
from numoe.actors.gateway.slots import slot_message
from numoe.actors.gateway.streams import RequestStreams
from numoe.actors.gateway.validation import Violations
from numoe.cluster.status import ActorInfo, ActorPlacement
from numoe.engine.errors import UnavailableError
from numoe.engine.requests import CacheStatus, WorkerStatus
from numoe.v1 import admin_pb2 as pb
from numoe.v1 import admin_pb2_grpc

DEFAULT_DRAIN_S = 30.0
ENGINE_TIMEOUT_S = 5.0  # a hung worker must not hide the rest of the status

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

_SERVER_STATES = {
    "starting": pb.SERVER_STATE_STARTING,
    "serving": pb.SERVER_STATE_SERVING,
    "draining": pb.SERVER_STATE_DRAINING,
}
_ROLES = {
    "gateway": pb.ACTOR_ROLE_GATEWAY,
    "attention": pb.ACTOR_ROLE_ATTENTION,
    "expert": pb.ACTOR_ROLE_EXPERT,
    "supervisor": pb.ACTOR_ROLE_SUPERVISOR,
}
_ACTOR_STATES = {
    "starting": pb.ACTOR_STATE_STARTING,
    "running": pb.ACTOR_STATE_RUNNING,
    "restarting": pb.ACTOR_STATE_RESTARTING,
    "draining": pb.ACTOR_STATE_DRAINING,
    "dead": pb.ACTOR_STATE_DEAD,
}


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Shows the server's state and begins its shutdown."""

    def __init__(
        self, context: ServerContext, engine: EngineClient, streams: RequestStreams, lifecycle: Lifecycle
    ) -> None:
        self._context = context
        self._engine = engine
        self._streams = streams
        self._lifecycle = lifecycle

    @answers_errors
    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        """Tell as much as can be told: the parts of those who are down or hang are empty."""
        response = pb.GetStatusResponse(
            version=self._context.version,
            state=_SERVER_STATES[self._lifecycle.state],
            uptime_seconds=self._lifecycle.uptime_s,
            model=model_message(self._context),
            queue=pb.QueueStatus(streams=len(self._streams)),
        )
        actors, worker = await asyncio.gather(_soon(self._engine.actors()), _soon(self._engine.status()))
        response.actors.extend(map(actor_message, actors or ()))
        if worker is not None:
            _add_worker(response, worker)
        return response

    @answers_errors
    async def Shutdown(self, request: pb.ShutdownRequest, context: Context) -> pb.ShutdownResponse:
        """Refuse new requests from now on, and have everything stopped."""
        deadline_s, violations = DEFAULT_DRAIN_S, Violations()
        if request.HasField("drain_deadline"):
            deadline_s = violations.duration("drain_deadline", request.drain_deadline)
        violations.raise_if_any()
        streams = len(self._streams)
        await self._engine.shutdown(deadline_s, keep_weights=request.keep_weights)
        await self._lifecycle.set_draining()  # only now: who is not being stopped goes on serving
        return pb.ShutdownResponse(streams=streams)


async def _soon(answer: Awaitable[T]) -> T | None:
    """An answer, or None of those who are down or hang."""
    with contextlib.suppress(UnavailableError, TimeoutError):
        return await asyncio.wait_for(answer, ENGINE_TIMEOUT_S)
    return None


def actor_message(actor: ActorInfo) -> pb.ActorStatus:
    """A process, as the API tells of it."""
    return pb.ActorStatus(
        role=_ROLES[actor.role],
        pid=actor.pid,
        host=actor.host,
        numa_node=actor.numa_node,
        state=_ACTOR_STATES[actor.state],
        restarts=actor.restarts,
        placement=_placement_message(actor.placement) if actor.placement else None,
    )


def _placement_message(placement: ActorPlacement) -> pb.Placement:
    return pb.Placement(
        nodes=placement.nodes,
        weight_bytes=placement.weight_bytes,
        memory=placement.medium,
        on_nodes=placement.on_nodes,
        huge_pages=placement.huge,
        cpus=placement.cpus,
        ran_on=placement.ran_on,
        read_bytes_per_second=placement.read_bytes_s,
        bandwidth_share=placement.bandwidth_share,
        problem=placement.problem or None,
    )


def _cache_message(cache: CacheStatus) -> pb.CacheStatus:
    return pb.CacheStatus(
        ram_bytes=cache.ram_bytes,
        ram_limit_bytes=cache.ram_limit,
        store_url=cache.store_url or None,
        store_bytes=cache.store_bytes,
        store_limit_bytes=cache.store_limit or None,
        pending_chunks=cache.pending,
        dropped_chunks=cache.dropped,
        hits_pages=cache.hits_pages,
        hits_ram=cache.hits_ram,
        hits_store=cache.hits_store,
        misses=cache.misses,
        store_error=cache.store_error or None,
    )


def _add_worker(response: pb.GetStatusResponse, worker: WorkerStatus) -> None:
    response.slots.extend(map(slot_message, worker.slots))
    response.cache.CopyFrom(_cache_message(worker.cache))
    response.queue.queued, response.queue.limit = worker.queued, worker.queue_limit
    response.kv.pages_used, response.kv.pages_total = worker.kv_pages_used, worker.kv_pages_total
    response.kv.pages_cached = worker.kv_pages_cached
    if worker.steps:
        response.step.CopyFrom(pb.StepStatus(steps=worker.steps, last_ms=worker.step_ms))
