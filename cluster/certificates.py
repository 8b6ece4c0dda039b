"""PEM files of certificates and keys, checked before they are used, as what uses them says little."""

from __future__ import annotations

import ssl
from pathlib import Path

from numoe.engine.errors import InputError, NotFoundError
from numoe.engine.private import read_secret


def add_pair(context: ssl.SSLContext, cert: str, key: str) -> bytes:
    """Load a certificate chain and its key; the key's bytes.

    Raises InputError unless they belong together, and as `read_secret`.
    """
    secret, _ = read_secret(Path(key))
    try:
        context.load_cert_chain(_existing(cert), key, password=lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InputError(f"{key} is not the key of the certificate {cert}") from None
        if b"ENCRYPTED" in secret:
            raise InputError(f"{key} is encrypted: decrypt it with `openssl pkey -in {key}`") from None
        raise InputError(f"{cert} and {key} are no PEM certificate and key: {error.reason or error}") from None
    return secret


def add_authorities(context: ssl.SSLContext, path: str) -> bytes:
    """Load the certificates whose signatures are trusted; the file's bytes. Raises InputError for a file without."""
    try:
        context.load_verify_locations(_existing(path))
    except ssl.SSLError as error:
        raise InputError(f"{path} holds no PEM certificates: {error.reason or error}") from None
    return Path(path).read_bytes()


def _existing(path: str) -> str:
    if not Path(path).is_file():
        raise NotFoundError(f"there is no file {path}")
    return path
