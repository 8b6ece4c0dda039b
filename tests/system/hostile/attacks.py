"""What hostile and broken clients do, as values: each knows how to do itself to a server."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc

CODES = grpc.StatusCode
REFUSALS = {
    CODES.OK, CODES.CANCELLED, CODES.INVALID_ARGUMENT, CODES.DEADLINE_EXCEEDED, CODES.NOT_FOUND, CODES.ALREADY_EXISTS,
    CODES.RESOURCE_EXHAUSTED, CODES.FAILED_PRECONDITION, CODES.UNIMPLEMENTED, CODES.UNAUTHENTICATED,
}  # fmt: skip
"""How a call may end, whatever was sent: never as the server's own fault."""

SERVICES = {
    "Generation": ("Generate", "Abort"),
    "Tokenizer": ("Tokenize", "Detokenize", "ApplyTemplate"),
    "Model": ("GetModel", "ListModels"),
    "Slot": ("ListSlots", "SaveSlot", "RestoreSlot", "EraseSlot", "ForkSlot", "ListSnapshots", "RemoveSnapshot"),
    "Admin": ("GetStatus",),
}
METHODS = [f"/numoe.v1.{name}Service/{method}" for name, methods in SERVICES.items() for method in methods]
REFLECTION, HEALTH = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "/grpc.health.v1.Health/Check"
SHUTDOWN = "/numoe.v1.AdminService/Shutdown"
UNKNOWN = ["/", "//", "/numoe.v1.AdminService", "/numoe.v1.AdminService/", "/x/y", "/numoe.v1.adminservice/GetStatus"]
HELD = 6
REPLY_S = 0.02  # how long a raw connection listens for what the server says


@dataclass
class Target:
    """A server, a channel to it, and what is held open there."""

    address: str
    token: str
    held: deque[Any] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(self.address, [("grpc.max_metadata_size", 1 << 20)])

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),)

    def call(self, method: str, message: bytes, metadata: Iterable[tuple[str, str]], timeout: float) -> Any:
        """Begin a call with bytes of any kind."""
        return self.channel.unary_stream(method, None, None)(message, metadata=tuple(metadata), timeout=timeout)

    def hold(self, call: Any) -> None:
        """Keep a call open, without reading, until some more have come."""
        self.held.append(call)
        if len(self.held) > HELD:
            self.held.popleft().cancel()

    def release(self) -> None:
        """Let go of what is held open."""
        while self.held:
            self.held.popleft().cancel()

    def close(self) -> None:
        self.release()
        self.channel.close()

    def raw(self, pieces: Iterable[bytes], *, pause_s: float = 0.0, reset: bool = False) -> None:
        """Send bytes over a connection of their own, and leave."""
        host, port = self.address.split(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 5) as stream:
            if reset:
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            for piece in pieces:
                stream.sendall(piece)
                time.sleep(pause_s)
            stream.settimeout(REPLY_S)
            while stream.recv(1 << 16):
                pass


def ending(call: Any, messages: int = 1 << 30) -> grpc.StatusCode:
    """Read a call to its end, or cancel it after some messages; how it ended."""
    try:
        for number, _ in enumerate(call, 1):
            if number >= messages:
                call.cancel()
    except grpc.RpcError as error:
        return error.code()
    return CODES.OK


@dataclass(frozen=True)
class Message:
    """Bytes as the message of a call, with a token or without."""

    method: str
    message: bytes
    known: bool

    def send(self, target: Target) -> None:
        code = ending(target.call(self.method, self.message, target.metadata if self.known else (), 10))
        if self.known or self.method == HEALTH:
            assert code in REFUSALS - {CODES.UNAUTHENTICATED, CODES.DEADLINE_EXCEEDED}, code
        else:
            assert code in {CODES.UNAUTHENTICATED, CODES.RESOURCE_EXHAUSTED}, code


@dataclass(frozen=True)
class Cancelled:
    """A generation that is left after some messages, or whose deadline passes."""

    request: bytes
    messages: int
    timeout_ms: float

    def send(self, target: Target) -> None:
        call = target.call(METHODS[0], self.request, target.metadata, self.timeout_ms / 1e3)
        code = ending(call, self.messages)
        assert code in REFUSALS, code


@dataclass(frozen=True)
class Unread:
    """A generation that is not read, and left after some others."""

    request: bytes

    def send(self, target: Target) -> None:
        target.hold(target.call(METHODS[0], self.request, target.metadata, 60))


@dataclass(frozen=True)
class Metadata:
    """A call with any metadata."""

    entries: tuple[tuple[str, str], ...]
    size: int

    def send(self, target: Target) -> None:
        entries = [*self.entries, ("x-large", "y" * self.size)]
        code = ending(target.call("/numoe.v1.AdminService/GetStatus", b"", entries, 10))
        assert code in REFUSALS, code


@dataclass(frozen=True)
class Raw:
    """Bytes on a connection, in pieces."""

    pieces: tuple[bytes, ...]
    pause_ms: float
    reset: bool

    def send(self, target: Target) -> None:
        target.raw(self.pieces, pause_s=self.pause_ms / 1e3, reset=self.reset)
