"""AdminService: what runs where, and how to stop it."""

# ruff: noqa: N802, ARG002 -- gRPC gives the methods their names and arguments
from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Any

import grpc

from numoe.actors.gateway.errors import BadRequestError, Violation, answers_errors
from numoe.actors.gateway.interfaces import EngineClient, ServerContext
from numoe.actors.gateway.lifecycle import Lifecycle
from numoe.actors.gateway.model import model_message
from numoe.actors.gateway.streams import RequestStreams
from numoe.cluster.status import ActorInfo
from numoe.engine.errors import UnavailableError
from numoe.engine.requests import WorkerStatus
from numoe.v1 import admin_pb2 as pb
from numoe.v1 import admin_pb2_grpc

DEFAULT_DRAIN_S = 30.0
MAX_DRAIN_S = 86_400.0
ENGINE_TIMEOUT_S = 5.0  # a hung worker must not hide the rest of the status

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
_SLOT_STATES = {
    "idle": pb.SLOT_STATE_IDLE,
    "prefill": pb.SLOT_STATE_PREFILL,
    "decode": pb.SLOT_STATE_DECODE,
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
        """Tell as much as can be told: the worker's part is empty while it is down or hangs."""
        response = pb.GetStatusResponse(
            version=self._context.version,
            state=_SERVER_STATES[self._lifecycle.state],
            uptime_seconds=self._lifecycle.uptime_s,
            model=model_message(self._context),
            queue=pb.QueueStatus(streams=len(self._streams)),
        )
        with contextlib.suppress(UnavailableError, TimeoutError):
            async with asyncio.timeout(ENGINE_TIMEOUT_S):
                response.actors.extend(_actor_message(actor) for actor in await self._engine.actors())
                _add_worker(response, await self._engine.status())
        return response

    @answers_errors
    async def Shutdown(self, request: pb.ShutdownRequest, context: Context) -> pb.ShutdownResponse:
        """Refuse new requests from now on, and have everything stopped."""
        deadline_s = DEFAULT_DRAIN_S
        if request.HasField("drain_deadline"):
            deadline_s = request.drain_deadline.seconds + request.drain_deadline.nanos / 1e9
        if not (math.isfinite(deadline_s) and 0 <= deadline_s <= MAX_DRAIN_S):
            raise BadRequestError(
                [Violation("drain_deadline", f"is {deadline_s:g} s, not from 0 to {MAX_DRAIN_S:g} s")]
            )
        streams = len(self._streams)
        await self._lifecycle.set_draining()
        await self._engine.shutdown(deadline_s)
        return pb.ShutdownResponse(streams=streams)


def _actor_message(actor: ActorInfo) -> pb.ActorStatus:
    return pb.ActorStatus(
        role=_ROLES[actor.role],
        pid=actor.pid,
        host=actor.host,
        numa_node=actor.numa_node,
        state=_ACTOR_STATES[actor.state],
        restarts=actor.restarts,
    )


def _add_worker(response: pb.GetStatusResponse, worker: WorkerStatus) -> None:
    for slot in worker.slots:
        response.slots.add(
            slot=slot.slot,
            state=_SLOT_STATES.get(slot.state, pb.SLOT_STATE_UNSPECIFIED),
            request_id=slot.request_id or None,
            tokens=slot.tokens,
        )
    response.queue.queued, response.queue.limit = worker.queued, worker.queue_limit
    response.kv.pages_used, response.kv.pages_total = worker.kv_pages_used, worker.kv_pages_total
    response.kv.pages_cached = worker.kv_pages_cached
    if worker.steps:
        response.step.CopyFrom(pb.StepStatus(steps=worker.steps, last_ms=worker.step_ms))
