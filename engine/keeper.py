"""Memory that outlives the process which made it: a keeper holds the descriptors that name it for the next one.

Memory behind a descriptor (a memfd, or memory of a GPU that the driver exports) lives as long as any process has
the descriptor open, whether that uses the memory or not. So a worker gives its descriptors to a `Keeper` in another
process, and the worker that takes its place asks for them: keys and values, and weights in a GPU's memory, are there
at once, bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Final

import msgspec

logger = logging.getLogger(__name__)
SOCKET: Final = "keeper"
"""The name of a server's keeper in its folder."""
_ANSWER_S: Final = 5.0
_PAUSE_S: Final = 0.2
_MESSAGE_BYTES: Final = 4096
_IDENTITY_BYTES: Final = 16


class Kept(msgspec.Struct, frozen=True):
    """What a descriptor names.

    layout: what lies there and how: whoever expects another has no use for it. identity: of this very memory.
    """

    layout: bytes
    identity: bytes


class _Put(msgspec.Struct, frozen=True, tag=True):
    name: str
    kept: Kept


class _Get(msgspec.Struct, frozen=True, tag=True):
    name: str


class _Drop(msgspec.Struct, frozen=True, tag=True):
    name: str


_call_decoder = msgspec.msgpack.Decoder(_Put | _Get | _Drop)
_answer_decoder = msgspec.msgpack.Decoder(Kept | None)


class Keeper:
    """Holds descriptors by name, for processes that may enter the folder of the socket at `path`, until `close`."""

    def __init__(self, path: Path) -> None:
        self._kept: dict[str, tuple[Kept, int]] = {}
        self._lock, self._closed = threading.Lock(), False
        path.unlink(missing_ok=True)  # of a keeper that has died
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(str(path))
        path.chmod(0o600)
        self._socket.listen()
        threading.Thread(target=self._serve, name="numoe-keeper", daemon=True).start()

    def forget(self) -> None:
        """Hold nothing any more."""
        with self._lock:
            for _, descriptor in self._kept.values():
                os.close(descriptor)
            self._kept.clear()

    def close(self) -> None:
        """Take and give nothing any more: memory that nobody else uses is free."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.forget()

    def _serve(self) -> None:
        while not self._closed:
            try:
                caller, _ = self._socket.accept()
            except OSError as error:
                if not self._closed:
                    logger.warning("nobody can be answered for a moment: %s", error)
                    time.sleep(_PAUSE_S)
                continue
            with caller, contextlib.suppress(OSError, msgspec.DecodeError):  # who calls wrongly gets no answer
                caller.settimeout(_ANSWER_S)
                self._answer(caller)

    def _answer(self, caller: socket.socket) -> None:
        message, descriptors = _receive(caller)
        try:
            call = _call_decoder.decode(message)
            with self._lock:
                before = self._kept.get(call.name)
                given: list[int] = []
                if isinstance(call, _Get):
                    given = [before[1]] if before else []
                elif before:
                    os.close(before[1])
                    del self._kept[call.name]
                if isinstance(call, _Put) and descriptors and not self._closed:
                    self._kept[call.name] = call.kept, descriptors.pop()
                _send(caller, msgspec.msgpack.encode(before[0] if before else None), given)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


class Keepsakes:
    """A worker's way to the keeper at `path`; without one nothing outlives the worker.

    Where the keeper does not answer, the log says so and the worker goes on without it.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._own: dict[str, tuple[Kept, int]] = {}

    def __bool__(self) -> bool:
        return self._path is not None

    def get(self, name: str, layout: bytes) -> tuple[bytes, int] | None:
        """The identity and a descriptor of what a predecessor has kept under a name; None if it is not of this layout.

        It is this worker's, then, as if it had made it; memory of another layout is kept no longer.
        """
        kept, descriptors = self._call(_Get(name))
        if kept is None or not descriptors:
            return None
        if kept.layout != layout:
            os.close(descriptors[0])
            self._call(_Drop(name))
            return None
        self._own[name] = kept, descriptors[0]
        return kept.identity, descriptors[0]

    def put(self, name: str, layout: bytes, descriptor: int) -> bytes:
        """Have memory kept under a name; its identity. The descriptor stays open, for `hand_over`."""
        kept = Kept(layout, secrets.token_bytes(_IDENTITY_BYTES))
        self._own[name] = kept, descriptor
        self._call(_Put(name, kept), descriptor)
        return kept.identity

    def drop(self, name: str) -> None:
        """What is kept under a name is of no use."""
        _, descriptor = self._own.pop(name)
        os.close(descriptor)
        self._call(_Drop(name))

    def hand_over(self) -> None:
        """Another keeper has taken the place of the one before: have it keep everything."""
        for name, (kept, descriptor) in list(self._own.items()):
            self._call(_Put(name, kept), descriptor)

    def _call(self, call: _Put | _Get | _Drop, *descriptors: int) -> tuple[Kept | None, list[int]]:
        if self._path is None:
            return None, []
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                connection.settimeout(_ANSWER_S)
                connection.connect(str(self._path))
                _send(connection, msgspec.msgpack.encode(call), descriptors)
                message, received = _receive(connection)
                return _answer_decoder.decode(message), received
        except (OSError, msgspec.DecodeError) as error:
            logger.warning("the worker's memory may not outlive it: its keeper does not answer (%s)", error)
            return None, []


def _send(connection: socket.socket, message: bytes, descriptors: list[int] | tuple[int, ...]) -> None:
    socket.send_fds(connection, [message], descriptors)


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    message, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 1)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - it takes no keyword
    return message, descriptors
