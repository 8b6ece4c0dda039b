"""The server's certificate: checked before anything starts, and read again when its files change."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import grpc

from numoe.cluster.certificates import add_authorities, add_pair
from numoe.cluster.endpoint import Endpoint
from numoe.engine.errors import InputError, NumoeError
from numoe.engine.private import Stamp

logger = logging.getLogger(__name__)


class CertificateFiles:
    """The PEM files of a server: its certificate chain, its key, and perhaps the authorities of its clients.

    Raises NumoeError for files that do not fit together, or a key that others may read.
    """

    def __init__(self, cert: str, key: str, client_ca: str | None) -> None:
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._stamps = self._look()
        self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """The credentials of a server: each new connection gets what the files hold when it comes."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            self._renewed,  # type: ignore[arg-type]  # the stubs forget None
            require_client_authentication=self._client_ca is not None,
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """A changed configuration, or None for the one before. Files that are wrong change nothing."""
        try:
            stamps = self._look()
            if stamps == self._stamps:
                return None
            self._stamps = stamps
            self._read()
        except (NumoeError, OSError) as error:  # in the middle of being replaced, perhaps
            logger.warning("the certificate is not renewed: %s", error)
            return None
        return self._configuration()

    def _look(self) -> list[Stamp | None]:
        return [None if path is None else Stamp.at(Path(path)) for path in (self._cert, self._key, self._client_ca)]

    def _read(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._pair = add_pair(context, self._cert, self._key), Path(self._cert).read_bytes()
        self._authorities = None if self._client_ca is None else add_authorities(context, self._client_ca)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([self._pair], root_certificates=self._authorities)


def certificate_files(endpoint: Endpoint) -> CertificateFiles | None:
    """The checked files of an endpoint, None for one without TLS. Raises NumoeError."""
    if (endpoint.tls_cert is None) != (endpoint.tls_key is None):
        given, missing = ("--tls-cert", "--tls-key") if endpoint.tls_cert else ("--tls-key", "--tls-cert")
        raise InputError(f"{given} goes with {missing}: give both")
    if endpoint.tls_cert is None or endpoint.tls_key is None:
        if endpoint.tls_client_ca is not None:
            raise InputError("--tls-client-ca needs TLS: give --tls-cert and --tls-key too")
        return None
    return CertificateFiles(endpoint.tls_cert, endpoint.tls_key, endpoint.tls_client_ca)
