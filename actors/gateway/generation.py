"""GenerationService: one call is one request to the worker and one stream of its events."""

# ruff: noqa: N802, ARG002 -- gRPC gives the methods their names and arguments
from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import grpc

from numoe.actors.gateway.errors import answers_errors
from numoe.actors.gateway.interfaces import EngineClient, ServerContext
from numoe.actors.gateway.lifecycle import Lifecycle
from numoe.actors.gateway.prompts import generation_request
from numoe.actors.gateway.replies import Replies
from numoe.actors.gateway.streams import RequestStream, RequestStreams
from numoe.actors.gateway.validation import checked_request_id, request_id_of
from numoe.engine.errors import NotFoundError, NumoeError
from numoe.engine.requests import GenerationRequest
from numoe.v1 import generation_pb2 as pb
from numoe.v1 import generation_pb2_grpc

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Submits requests, relays their events, and aborts those whose caller is gone."""

    def __init__(
        self, context: ServerContext, engine: EngineClient, streams: RequestStreams, lifecycle: Lifecycle
    ) -> None:
        self._context = context
        self._engine = engine
        self._streams = streams
        self._lifecycle = lifecycle
        self._aborts: set[asyncio.Task[None]] = set()

    @answers_errors
    async def Generate(  # type: ignore[override]  # grpc.aio takes a coroutine that writes, too
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        """Serve one request from its validation to its last message."""
        arrived, deadline = time.monotonic(), _deadline(context)
        self._lifecycle.require_serving()
        request_id = request_id_of(request)
        # Opened before the prompt is tokenized, so that draining waits for it.
        with self._streams.open(request_id, self._abort_soon) as stream:
            generation = await generation_request(self._context, request, request_id, deadline)
            replies = Replies(generation, self._context.tokenizer, request.stopping.strings, arrived)
            await self._submit(generation)
            try:
                await _relay(stream, replies, context)
            finally:
                # Cancelled, expired, stopped at a stop string, or failed.
                if not replies.worker_finished:
                    self._abort_soon(request_id)
        if replies.error is not None:
            raise replies.error

    @answers_errors
    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """End a request of any caller who knows its id."""
        request_id = checked_request_id(request.request_id)
        if request_id not in self._streams:
            raise NotFoundError(f"no request {request_id!r} is running here; it may have ended")
        await self._engine.abort(request_id)
        return pb.AbortResponse()

    async def _submit(self, generation: GenerationRequest) -> None:
        try:
            await self._engine.submit(generation)
        except NumoeError:
            raise  # refused: there is nothing to abort
        except BaseException:  # cancelled half-way, perhaps after the worker took it
            self._abort_soon(generation.request_id)
            raise

    def _abort_soon(self, request_id: str) -> None:
        """Abort without waiting: the caller may itself be in the middle of being cancelled."""
        task = asyncio.get_running_loop().create_task(self._abort(request_id))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def _abort(self, request_id: str) -> None:
        try:
            await self._engine.abort(request_id)
        except NumoeError as error:
            logger.warning("request %s could not be aborted: %s", request_id, error)


async def _relay(stream: RequestStream, replies: Replies, context: Context) -> None:
    while not replies.ended:
        for message in replies.translate(await stream.next_events()):
            await context.write(message)


def _deadline(context: Context) -> float | None:
    """`time.time()` when the call expires."""
    remaining = context.time_remaining()
    return None if remaining is None else time.time() + remaining
