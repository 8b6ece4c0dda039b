"""The flags that say who may reach a server, and how a client reaches it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from numoe.deploy.client import DEFAULT_ADDRESS, Client, default_address
from numoe.deploy.credentials import Credentials

if TYPE_CHECKING:
    from numoe.cluster.endpoint import Endpoint


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where a server listens and whom it answers.

    Parameters
    ----------
    listen
        HOST:PORT, or unix:PATH. An address that other hosts reach needs TLS and tokens (or --tls-client-ca).
    tls_cert
        A PEM file with the server's certificate chain. A changed file counts for new connections.
    tls_key
        A PEM file with its key, which nobody else may read.
    tls_client_ca
        A PEM file with certificates: clients must show one that one of these has signed (mutual TLS).
    token_file
        A file of bearer tokens, one a line, # for comments, which nobody else may read. Clients must send one
        of them; health checks need none. A changed file counts from the next call on.
    insecure_listen
        Listen on any address without TLS and tokens: everybody who reaches it may use and stop the server.

    """

    listen: str = DEFAULT_ADDRESS
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    token_file: str | None = None
    insecure_listen: Annotated[bool, Parameter(negative=())] = False

    def endpoint(self) -> Endpoint:
        """The same with absolute paths, as other processes need them."""
        from numoe.cluster.endpoint import Endpoint

        return Endpoint(
            listen=self.listen,
            tls_cert=_absolute(self.tls_cert),
            tls_key=_absolute(self.tls_key),
            tls_client_ca=_absolute(self.tls_client_ca),
            token_file=_absolute(self.token_file),
            insecure=self.insecure_listen,
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Connection:
    """How a server is reached.

    Parameters
    ----------
    address
        The server, HOST:PORT or unix:PATH; 127.0.0.1:50051 if not given.
    token_file
        A file whose first line is a token that the server accepts.
    tls
        Speak TLS, and trust what the public authorities have signed.
    tls_ca
        Speak TLS, and trust what the certificates in this PEM file have signed.
    tls_cert
        A PEM file with a certificate chain to show to a server that wants one.
    tls_key
        A PEM file with its key.
    tls_name
        The name that the server's certificate must have, where it is not the address's.
    insecure
        Send the token over the network even without TLS.

    """

    address: Annotated[str | None, Parameter(env_var="NUMOE_ADDRESS")] = None
    token_file: Annotated[str | None, Parameter(env_var="NUMOE_TOKEN_FILE")] = None
    tls: Annotated[bool, Parameter(negative=(), env_var="NUMOE_TLS")] = False
    tls_ca: Annotated[str | None, Parameter(env_var="NUMOE_TLS_CA")] = None
    tls_cert: Annotated[str | None, Parameter(env_var="NUMOE_TLS_CERT")] = None
    tls_key: Annotated[str | None, Parameter(env_var="NUMOE_TLS_KEY")] = None
    tls_name: Annotated[str | None, Parameter(env_var="NUMOE_TLS_NAME")] = None
    insecure: Annotated[bool, Parameter(negative=(), env_var="NUMOE_INSECURE")] = False

    def client(self) -> Client:
        """A client with these. Raises NumoeError for what cannot be used."""
        credentials = Credentials(
            token_file=self.token_file,
            tls=self.tls,
            ca=self.tls_ca,
            cert=self.tls_cert,
            key=self.tls_key,
            name=self.tls_name,
            insecure=self.insecure,
        )
        return Client(self.address or default_address(), credentials)


LOOPBACK = Listening()
"""Where a server listens if none of these flags is given."""

DEFAULT = Connection()
"""How a server is reached if none of these flags is given."""


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())
