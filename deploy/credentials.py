"""What a client shows to a server, and what it wants to see: tokens and certificates."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from numoe.cluster.certificates import add_authorities, add_pair
from numoe.cluster.endpoint import is_loopback, read_tokens
from numoe.engine.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """Files and names by which client and server know each other; None where there is none.

    token_file: its first token is sent. tls: speak TLS, as each of the following asks for too. ca: PEM file of
    authorities to trust, the public ones if None. cert, key: PEM files to show. name: what the server's
    certificate must be for, if not the address's host. insecure: send the token even where others can read it.
    """

    token_file: str | None = None
    tls: bool = False
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    name: str | None = None
    insecure: bool = False

    @property
    def uses_tls(self) -> bool:
        """Whether TLS is spoken."""
        return self.tls or any((self.ca, self.cert, self.key, self.name))

    def context(self) -> ssl.SSLContext:
        """The same for Python's sockets. Raises NumoeError for files that will not do."""
        return self._load()[0]

    def channel(self, address: str, options: list[tuple[str, Any]]) -> grpc.Channel:
        """A channel to HOST:PORT or unix:PATH. Raises NumoeError for what cannot be used."""
        if self.uses_tls:
            _, authorities, pair = self._load()
            if self.name:
                options = [*options, ("grpc.ssl_target_name_override", self.name)]
            key, chain = pair or (None, None)
            channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(authorities, key, chain), options)
        else:
            channel = grpc.insecure_channel(address, options)
        if self.token_file is None:
            return channel
        if not self.uses_tls and not self.insecure and not is_local(address):
            raise InputError(
                f"others could read the token on its way to {address}: speak TLS (--tls-ca, or --tls), "
                "or, if the network is yours alone, say --insecure"
            )
        tokens, _ = read_tokens(Path(self.token_file))
        return grpc.intercept_channel(channel, _WithToken(tokens[0].decode()))

    def _load(self) -> tuple[ssl.SSLContext, bytes | None, tuple[bytes, bytes] | None]:
        context = ssl.create_default_context() if self.ca is None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols(["h2"])
        authorities = None if self.ca is None else add_authorities(context, self.ca)
        if (self.cert is None) != (self.key is None):
            raise InputError("--tls-cert and --tls-key go together: give both")
        if self.cert is None or self.key is None:
            return context, authorities, None
        return context, authorities, (add_pair(context, self.cert, self.key), Path(self.cert).read_bytes())


def is_local(address: str) -> bool:
    """Whether what is sent to HOST:PORT or unix:PATH stays on this host."""
    return address.startswith("unix:") or is_loopback(address.rpartition(":")[0].strip("[]"))


class _Call(NamedTuple):
    """What an interceptor may change of a call."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _WithToken(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    """Adds a bearer token to every call."""

    def __init__(self, token: str) -> None:
        self._entry = ("authorization", f"Bearer {token}")

    def _intercept(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        metadata = [*(details.metadata or ()), self._entry]
        call = _Call(
            details.method, details.timeout, metadata, details.credentials, details.wait_for_ready, details.compression
        )
        return continuation(call, request)

    intercept_unary_unary = _intercept  # type: ignore[assignment]
    intercept_unary_stream = _intercept  # type: ignore[assignment]
