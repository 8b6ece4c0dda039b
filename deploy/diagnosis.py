"""Why a server cannot be reached: asked of it with sockets, as gRPC's own words differ from version to version."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator

from numoe.deploy.credentials import Credentials
from numoe.engine.errors import AccessError, InputError, NumoeError, UnavailableError

_TIMEOUT_S = 5.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_UNTRUSTED, _NAME, _EXPIRED, _NOT_YET = {18, 19, 20, 21}, {62, 64}, {10}, {9}  # OpenSSL's X509_V_ERR_*


def why_unreachable(address: str, credentials: Credentials) -> NumoeError:
    """Make the error that names the cure, after a connection that failed."""
    try:
        with _connected(address):
            pass
    except OSError:
        return UnavailableError(
            f"no numoe server answers at {address}: start one with `numoe serve MODEL.gguf`, "
            f"or name another with --address or NUMOE_ADDRESS"
        )
    if not credentials.uses_tls:
        if _speaks_tls(address):
            return AccessError(
                f"the server at {address} speaks TLS: give its authority's certificate with --tls-ca or NUMOE_TLS_CA "
                "(or --tls if a public authority signed it)"
            )
        return UnavailableError(f"what listens at {address} does not answer as a numoe server")
    return _why_no_tls(address, credentials)


def _why_no_tls(address: str, credentials: Credentials) -> NumoeError:
    host = credentials.name or _host(address)
    try:
        with _secured(address, credentials.context(), host) as stream:
            stream.sendall(_PREFACE)
            if stream.recv(1):
                return UnavailableError(f"the server at {address} closed the connection: try again")
    except ssl.SSLCertVerificationError as error:
        return _why_not_trusted(address, credentials, host, error)
    except ssl.SSLError as error:
        if error.reason is None or "ALERT" not in error.reason:
            return InputError(f"the server at {address} does not speak TLS: leave out --tls and the like")
    except OSError:
        pass  # some servers close the connection instead of saying that they want a certificate
    if credentials.cert is None:
        return AccessError(
            f"the server at {address} wants a certificate of its clients: give one with --tls-cert and --tls-key, "
            "signed by an authority of its --tls-client-ca"
        )
    return AccessError(
        f"the server at {address} refuses the certificate {credentials.cert}: "
        "it must be signed by an authority of its --tls-client-ca, and not have expired"
    )


def _why_not_trusted(
    address: str, credentials: Credentials, host: str, error: ssl.SSLCertVerificationError
) -> NumoeError:
    if error.verify_code in _NAME:
        names = ", ".join(_names(address, credentials)) or "nothing"
        return AccessError(
            f"the certificate of {address} is for {names}, not for {host}: "
            "use such a name in --address, or give it with --tls-name"
        )
    if error.verify_code in _UNTRUSTED:
        trusted = credentials.ca or "the public authorities"
        return AccessError(
            f"the certificate of {address} is signed by none of {trusted}: "
            "give the certificate of the authority that signed it with --tls-ca"
        )
    if error.verify_code in _EXPIRED | _NOT_YET:
        state = "has expired" if error.verify_code in _EXPIRED else "is not valid yet"
        return AccessError(f"the certificate of {address} {state}: renew it, or set the clock of this machine")
    return AccessError(f"the certificate of {address} is not accepted: {error.verify_message}")


def _names(address: str, credentials: Credentials) -> list[str]:
    """What the server's certificate is for."""
    context = credentials.context()
    context.check_hostname = False
    with contextlib.suppress(OSError), _secured(address, context, None) as stream:
        return [str(entry[1]) for entry in (stream.getpeercert() or {}).get("subjectAltName", ())]
    return []


def _speaks_tls(address: str) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with _secured(address, context, None):
            return True
    except ssl.SSLError as error:
        return error.reason is not None and "ALERT" in error.reason
    except OSError:
        return False


@contextlib.contextmanager
def _secured(address: str, context: ssl.SSLContext, host: str | None) -> Iterator[ssl.SSLSocket]:
    with _connected(address) as plain, context.wrap_socket(plain, server_hostname=host) as stream:
        yield stream


@contextlib.contextmanager
def _connected(address: str) -> Iterator[socket.socket]:
    if address.startswith("unix:"):
        stream = socket.socket(socket.AF_UNIX)
        stream.settimeout(_TIMEOUT_S)
        with stream:
            stream.connect(address.removeprefix("unix:").removeprefix("//"))
            yield stream
        return
    with socket.create_connection((_host(address), int(address.rpartition(":")[2])), _TIMEOUT_S) as stream:
        yield stream


def _host(address: str) -> str:
    return "localhost" if address.startswith("unix:") else address.rpartition(":")[0].strip("[]")
