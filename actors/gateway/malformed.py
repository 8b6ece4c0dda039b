"""Requests that are no protobuf messages: refused as a bad argument, where grpc.aio says UNKNOWN."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError

OURS = "/numoe.v1."


class Malformed(NamedTuple):
    """Stands for a request that could not be decoded; `answers_errors` refuses it."""

    reason: str


class MalformedRequests(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic only in its stubs
    """Hands undecodable requests of numoe's services to their handlers as `Malformed`."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the decoder of the method called."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(OURS):
            return handler
        decode = handler.request_deserializer

        def decode_or_say_why(data: bytes) -> object:
            try:
                return decode(data)
            except DecodeError as error:
                return Malformed(str(error))

        return handler._replace(request_deserializer=decode_or_say_why)
