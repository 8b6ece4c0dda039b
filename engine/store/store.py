"""`open_store`: the store that a URL names."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from obstore.store import MemoryStore, from_url

from numoe.engine.errors import AccessError, InputError
from numoe.engine.store.base import Store
from numoe.engine.store.failures import STORE_FAILURES, store_error
from numoe.engine.store.folder import FolderStore
from numoe.engine.store.remote import RemoteStore

REMOTE_SCHEMES: Final = ("s3", "gs", "az")
_ENDPOINTS: Final = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
}
_CREDENTIALS: Final = (
    "AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)  # fmt: skip


def open_store(
    url: str | Path, *, deadline: float = 30.0, retries: int = 3, allow_http: bool = False, **options: Any
) -> Store:
    """Open a store. Nothing is sent yet: `Store.check` tells whether it can be reached.

    url:        a folder (or file://FOLDER), s3://BUCKET/PREFIX, gs://BUCKET/PREFIX,
                az://CONTAINER/PREFIX, or memory:// (a new, empty one that ends with the process).
    deadline:   seconds after which an operation is given up.
    retries:    how often a request is sent again within them.
    allow_http: send requests unencrypted; to this host they may always be.
    options:    endpoint, the URL of the server, and what obstore's stores take, such as region,
                access_key_id, secret_access_key, session_token for s3://. What is not given comes
                from the environment: AWS_…, GOOGLE_…, AZURE_….

    Raises InputError for a URL or options that make no sense, AccessError for s3:// with an
    endpoint and without credentials.
    """
    url = os.fspath(url)
    scheme = urlsplit(url).scheme if "://" in url else ""
    if deadline <= 0 or retries < 0:
        raise InputError(f"store {url}: a deadline of {deadline} s and {retries} retries are not possible")
    if scheme in REMOTE_SCHEMES:
        return _remote(url, scheme, deadline, retries, allow_http, options)
    if options:
        raise InputError(f"store {url}: has no option {', '.join(sorted(options))}; these are for s3://, gs:// and az://")
    if scheme == "memory":
        return RemoteStore(url, deadline, MemoryStore())
    if scheme not in ("", "file"):
        raise InputError(f"store {url}: give a folder, s3://BUCKET/PREFIX, gs://…, az://… or memory://")
    return FolderStore(_folder(url, scheme), deadline)


def _folder(url: str, scheme: str) -> Path:
    if not scheme:
        if not url:
            raise InputError("the store's URL is empty; give a folder or s3://BUCKET/PREFIX")
        return Path(url).expanduser().absolute()
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise InputError(f"store {url}: write file:///FOLDER, with three slashes")
    return Path(unquote(parts.path))


def _remote(
    url: str, scheme: str, deadline: float, retries: int, allow_http: bool, options: Mapping[str, Any]  # noqa: FBT001
) -> Store:
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise InputError(f"store {scheme}://…: keys do not belong into a URL; set AWS_ACCESS_KEY_ID and its like")
    if not parts.netloc:
        raise InputError(f"store {url}: write {scheme}://BUCKET/PREFIX")
    config = {name: value for name, value in options.items() if value is not None}
    endpoint = str(config.pop("endpoint", "") or _endpoint(scheme))
    if scheme == "s3" and endpoint:
        _check_credentials(url, config)
    if endpoint:
        config["base_url" if scheme == "gs" else "endpoint"] = endpoint
    if endpoint.startswith("http://") and not allow_http:
        if not _is_loopback(endpoint):
            raise InputError(f"store {url}: {endpoint} is not encrypted; use https://, or allow http")
        allow_http = True
    client: Any = {
        "timeout": timedelta(seconds=deadline),
        "connect_timeout": timedelta(seconds=min(5.0, deadline)),
        "allow_http": allow_http,
    }
    retry: Any = {"max_retries": retries, "retry_timeout": timedelta(seconds=deadline)}
    try:
        store = from_url(url, client_options=client, retry_config=retry, **config)
    except STORE_FAILURES as error:
        raise store_error(error, "opening it", url) from error
    return RemoteStore(url, deadline, store)


def _endpoint(scheme: str) -> str:
    """What the environment says of where a store is, "" if nothing."""
    return next((os.environ[name] for name in _ENDPOINTS.get(scheme, ()) if os.environ.get(name)), "")


def _check_credentials(url: str, config: Mapping[str, Any]) -> None:
    """AccessError where neither the options nor the environment has any for s3://."""
    if not (config.keys() & {"access_key_id", "credential_provider", "skip_signature"}) and not any(
        os.environ.get(name) for name in _CREDENTIALS
    ):
        raise AccessError(f"store {url}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


def _is_loopback(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
