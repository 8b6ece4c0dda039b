"""Bearer tokens: the file that lists them, and the interceptor that asks callers for one."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
from grpc_status import rpc_status

from numoe.actors.gateway.errors import UnauthenticatedError, status_of
from numoe.cluster.endpoint import read_tokens
from numoe.engine.errors import NumoeError, UnavailableError
from numoe.engine.private import Stamp

EXEMPT = "/grpc.health.v1.Health/"

logger = logging.getLogger(__name__)


class TokenFile:
    """The tokens that a server accepts: those that are in the file when a call comes.

    Raises NumoeError for a file that cannot be used.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._read()

    def accepts(self, token: bytes) -> bool:
        """Whether the file holds a token; the time it takes does not tell how much of it was right.

        Raises UnavailableError as long as the file cannot be used.
        """
        if self._stamp is None or self._stamp != Stamp.at(self._path):
            try:
                self._read()
            except NumoeError as error:
                logger.warning("nobody is let in: %s", error)
                raise UnavailableError(
                    "this server's token file cannot be used: let its owner see that it is there, has a token, and "
                    "that nobody else may read it (chmod 600)"
                ) from None
        given, found = sha256(token).digest(), False
        for digest in self._digests:
            found |= hmac.compare_digest(digest, given)
        return found

    def _read(self) -> None:
        self._stamp: Stamp | None = None
        tokens, self._stamp = read_tokens(self._path)
        self._digests = [sha256(token).digest() for token in tokens]


class TokenRequired(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic only in its stubs
    """Refuses calls without a token of the file, health checks excepted, before a byte of theirs is read."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Let a call pass, or answer it with UNAUTHENTICATED."""
        if not handler_call_details.method.startswith(EXEMPT):
            try:
                self._check(handler_call_details.invocation_metadata or ())
            except NumoeError as error:
                return _refusing(error)
        return await continuation(handler_call_details)

    def _check(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        values = [value for name, value in metadata if name == "authorization"]
        if not values:
            raise UnauthenticatedError(
                "this server wants a token: send the metadata `authorization: Bearer TOKEN`"
                " (numoe's commands: --token-file or NUMOE_TOKEN_FILE)"
            )
        value = values[0].encode() if isinstance(values[0], str) else values[0]
        scheme, _, token = value.partition(b" ")
        if len(values) > 1 or scheme.lower() != b"bearer":
            raise UnauthenticatedError("give one authorization, of the form `Bearer TOKEN`")
        if not self._tokens.accepts(token.strip()):
            raise UnauthenticatedError(
                "the token is not one of this server's: ask its owner for one of those in its --token-file"
            )


def _refusing(error: NumoeError) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that refuses: streaming, as such a one is called before any message is there."""

    async def refuse(_requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort_with_status(rpc_status.to_status(status_of(error)))  # type: ignore[attr-defined]

    return grpc.stream_stream_rpc_method_handler(refuse)
