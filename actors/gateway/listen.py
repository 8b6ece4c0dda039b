"""Listen addresses: HOST:PORT, [IPV6]:PORT or unix:PATH, and what they need to be listened on."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from numoe.cluster.endpoint import Endpoint, is_loopback
from numoe.engine.errors import InputError, ResourceError


class ListenAddress(NamedTuple):
    """Where to listen: a host and a port (0: any free one), or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_listen(text: str) -> ListenAddress:
    """Parse a listen address. Raises InputError."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path or len(os.fsencode(path)) > 100:  # sun_path holds 108 bytes
            raise InputError(f"{text!r}: a Unix socket needs a path of 1 to 100 bytes")
        return ListenAddress(path=path)
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host.strip("[]")
    if not colon or not bare or (":" in bare and not bracketed) or not (port.isascii() and port.isdigit()):
        raise InputError(f"{text!r} is no address: give HOST:PORT, such as 127.0.0.1:50051")
    if int(port) > 65535:
        raise InputError(f"{text!r}: a port is a number from 0 to 65535")
    return ListenAddress(host=bare, port=int(port))


def require_protected(endpoint: Endpoint) -> None:
    """Raise InputError for an address that others than this host's users reach, unless it is protected."""
    address = parse_listen(endpoint.listen)
    if endpoint.insecure or endpoint.is_protected or address.path or is_loopback(address.host):
        return
    raise InputError(
        f"{address} can be reached from other hosts: give --tls-cert, --tls-key and --token-file (or --tls-client-ca), "
        f"listen on 127.0.0.1 and let `ssh -L {address.port}:127.0.0.1:{address.port}` reach it, "
        "or, where everybody on the network may use and stop the server, say --insecure-listen"
    )


def require_free(address: ListenAddress) -> None:
    """Raise ResourceError if something listens there, InputError if nothing can.

    gRPC would log the first at length, and would take a Unix socket away from its server.
    """
    if address.path:
        _require_free_path(Path(address.path))
        return
    try:
        candidates = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise InputError(f"{address.host!r} is no host name or address of this machine: {error}") from error
    for family, kind, protocol, _, target in candidates:
        with closing(socket.socket(family, kind, protocol)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does, for TIME_WAIT
            try:
                probe.bind(target)
                # Two sockets with SO_REUSEADDR may bind one port as long as neither listens.
                probe.listen(1)
            except OSError as error:
                raise bind_error(address, error) from error


def bind_error(address: ListenAddress, error: OSError | RuntimeError) -> ResourceError | InputError:
    """Make the NumoeError of a failed bind, with its cure."""
    code = error.errno if isinstance(error, OSError) else errno.EADDRINUSE
    if code == errno.EADDRINUSE:
        return ResourceError(
            f"port {address.port} on {address.host} is in use: "
            f"stop what listens there (`numoe stop`) or choose another with --listen"
        )
    if code in {errno.EACCES, errno.EPERM}:
        return ResourceError(f"port {address.port} needs privileges: choose one above 1023 with --listen")
    return InputError(f"cannot listen on {address}: {error}; choose an address of this machine with --listen")


def _require_free_path(path: Path) -> None:
    if not path.exists():
        if not path.parent.is_dir():
            raise InputError(f"cannot listen on {path}: there is no folder {path.parent}")
        return
    if not path.is_socket():
        raise ResourceError(f"{path} exists and is no socket: choose another path with --listen")
    with closing(socket.socket(socket.AF_UNIX)) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()  # left by a server that died
        except OSError as error:
            raise ResourceError(f"cannot listen on {path}: {error}; choose another with --listen") from error
        else:
            raise ResourceError(f"{path} is in use: `numoe stop` it or choose another path with --listen")
