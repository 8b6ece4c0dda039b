"""Calls of methods that nobody has, whatever bytes their names are.

grpc.aio's own loop decodes such a name as UTF-8, and if it is none, dies: one call of an unknown caller would end the
server for all. Here such calls never reach that loop. It takes names of grpcio that are not public.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc
from grpc.aio._server import Server, _augment_channel_arguments

NAME = "/unknown"
"""What stands for an unknown method's name: answering needs none."""


def tolerant_server(
    interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]], options: Sequence[tuple[str, Any]], max_calls: int
) -> grpc.aio.Server:
    """Make a grpc.aio server; its methods must be registered ones, as those of generated code are."""
    server: Any = _Server(interceptors, options, max_calls)
    return server  # type: ignore[no-any-return]


class _Server(Server):
    def __init__(self, interceptors: Sequence[Any], options: Sequence[tuple[str, Any]], max_calls: int) -> None:
        self._loop = cygrpc.get_working_loop()
        arguments = _augment_channel_arguments(options, None)
        self._server = _Calls(self._loop, None, (), interceptors, arguments, max_calls)
        self._server.interceptors = tuple(interceptors)


class _Calls(cygrpc.AioServer):  # type: ignore[misc]
    """The loop that takes calls, less those of unknown methods."""

    interceptors: tuple[Any, ...] = ()

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        if method is not None:
            future: asyncio.Future[Any] = super()._make_request_call_future(method)
            return future
        return asyncio.get_running_loop().create_task(self._refuse_unknown())

    async def _refuse_unknown(self) -> None:
        """Until the server stops, which `_request_call` raises."""
        loop, refusals = asyncio.get_running_loop(), set[asyncio.Task[None]]()
        while True:
            call = await self._request_call()
            refusal = cygrpc._handle_rpc(NAME, _Nothing(), self.interceptors, call, loop, False)  # noqa: FBT003
            task = loop.create_task(cygrpc._schedule_rpc_coro(refusal, call, loop, NAME))
            refusals.add(task)
            task.add_done_callback(refusals.discard)


class _Nothing:
    """Finds no handler for any method."""

    def resolve_handler(self, _details: object) -> None:
        """None."""
