"""Requests that are no protobuf messages: refused as a bad argument, where grpc.aio says UNKNOWN and logs a defect."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from numoe.actors.gateway.errors import Malformed, answers_errors, decoded

OURS = "/numoe.v1."


class MalformedRequests(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic only in its stubs
    """Hands undecodable requests to their handlers as `Malformed`: numoe's own refuse them, others are wrapped."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the decoder of the method called."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        decode = handler.request_deserializer

        def decode_or_say_why(data: bytes) -> object:
            try:
                return decode(data)
            except DecodeError as error:
                return Malformed(str(error))

        handler = handler._replace(request_deserializer=decode_or_say_why)
        return handler if handler_call_details.method.startswith(OURS) else _refusing(handler)


def _refusing(handler: Any) -> Any:
    """The same handler of health checks or reflection, with errors as numoe's services answer them."""
    if handler.request_streaming:

        @answers_errors
        async def relay(_: object, requests: Any, context: Any) -> None:
            async for reply in handler.stream_stream(_decoded(requests), context):
                await context.write(reply)

        return handler._replace(stream_stream=_bound(relay))
    kind = "unary_stream" if handler.response_streaming else "unary_unary"

    @answers_errors
    async def answer(_: object, request: Any, context: Any) -> Any:
        return await getattr(handler, kind)(request, context)

    return handler._replace(**{kind: _bound(answer)})


def _bound(method: Callable[..., Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    """The method without its servicer; a coroutine function, as grpc.aio wants it."""

    async def call(request: Any, context: Any) -> Any:
        return await method(None, request, context)

    return call


async def _decoded(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield decoded(request)
