"""Where a server listens, and whom it answers."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from numoe.engine.errors import InputError
from numoe.engine.private import Stamp, read_secret

MAX_TOKENS = 1000
_TOKEN = re.compile(rb"[A-Za-z0-9._~+/-]+=*")  # RFC 6750


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """The gateway's address and what protects it; None asks for nothing.

    listen: HOST:PORT or unix:PATH. tls_cert, tls_key: PEM files of the server's certificate chain and its key.
    tls_client_ca: a PEM file; callers must show a certificate that one of its authorities signed.
    token_file: the bearer tokens, of which callers must send one. insecure: listen on any address, whatever
    of these is missing.
    """

    listen: str
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    token_file: str | None = None
    insecure: bool = False

    @property
    def is_protected(self) -> bool:
        """Whether nobody else can read what is said, or call without being known."""
        return self.tls_cert is not None and (self.token_file or self.tls_client_ca) is not None


ANY_PORT = Endpoint(listen="127.0.0.1:0")
"""Loopback, any free port."""


def read_tokens(path: Path) -> tuple[list[bytes], Stamp]:
    """The tokens of a file, one a line; what follows a # is a comment.

    Raises InputError for a line that is no token or a file without one, and as `read_secret`.
    """
    content, stamp = read_secret(path)
    tokens = []
    for number, line in enumerate(content.splitlines(), 1):
        token = line.partition(b"#")[0].strip()
        if not token:
            continue
        if not _TOKEN.fullmatch(token):
            raise InputError(f"line {number} of {path} is no token: use letters, digits and ._~+/-, as RFC 6750 says")
        tokens.append(token)
    if not tokens:
        raise InputError(f"{path} holds no token: write one with `openssl rand -hex 32 > {path}; chmod 600 {path}`")
    if len(tokens) > MAX_TOKENS:
        raise InputError(f"{path} holds {len(tokens)} tokens; at most {MAX_TOKENS} are allowed")
    return tokens, stamp


def is_loopback(host: str) -> bool:
    """Whether a host name or address is only this host's. Raises InputError for one that is unknown."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(f"{host!r} is no host name or address: {error}") from error
    return all(_is_loopback_address(str(target[0])) for *_, target in found)


def _is_loopback_address(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback
