"""What numoe stands on besides the hardware: Ray, a port, an object store, a folder for compiled kernels."""

from __future__ import annotations

import importlib.metadata
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from numoe.actors.gateway.listen import ListenAddress, parse_listen, require_free
from numoe.cluster.endpoint import is_loopback
from numoe.deploy.commands.caching import NO_STORE, default_store
from numoe.deploy.doctor.check import Check, error, gb, ok, warning
from numoe.deploy.raylets import PRIVATE_TEMP, Raylet, find_raylets, head_answers
from numoe.engine.cpu.isa import cache_root, spare_kernels
from numoe.engine.errors import AccessError, InputError, NumoeError, ResourceError
from numoe.engine.store import open_store

_STORE_ANSWERS_WITHIN_S = 10.0
_LEAST_FREE = 1 << 30
_PROBE = b"numoe doctor"
_OTHER_PORT = "end it, or choose another address with --listen"


def check_ray(raylets: Sequence[Raylet] | None = None) -> Check:
    """Ray's version, which cluster `numoe serve` would join, and room for its session."""
    raylets = find_raylets() if raylets is None else raylets
    wanted = os.environ.get("RAY_ADDRESS", "")
    shared = [raylet.gcs_address for raylet in raylets if raylet.may_be_joined]
    private = sum(raylet.private for raylet in raylets)
    headless = sorted({raylet.gcs_address for raylet in raylets if not raylet.private} - set(shared))
    folder = PRIVATE_TEMP if Path(PRIVATE_TEMP).is_dir() else tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    values = {"version": _version("ray"), "address": wanted or next(iter(shared), None), "own": private}
    if values["version"] is None:
        return error("ray", "not installed", "pip install ray", **values)
    text = f"Ray {values['version']}"
    if wanted and wanted != "local" and not head_answers(wanted):
        return error("ray", f"{text}; nothing answers at RAY_ADDRESS={wanted}", "unset it, or `ray start`", **values)
    if values["address"] and wanted != "local":
        text = f"{text}, the cluster at {values['address']} would be joined"
    else:
        text = f"{text}, no cluster here: numoe starts its own"
    if private:
        text = f"{text}; {private} of other numoe servers"
    if headless:
        text = f"{text}; a node is here of a cluster whose head at {headless[0]} does not answer"
        return warning("ray", text, "`ray stop`, or wait a minute: Ray ends it by itself", **values)
    if free < _LEAST_FREE:
        cure = "free some, or set TMPDIR to a folder with more"
        return warning("ray", f"{text}; {folder} has {gb(free)} left for its logs", cure, **values)
    return ok("ray", text, **values)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_port(listen: str) -> Check:
    """Whether `numoe serve` could listen on an address, or a server does."""
    values: dict[str, Any] = {"address": listen, "held_by": None, "numoe": False}
    try:
        address = parse_listen(listen)
        require_free(address)
    except InputError as refused:
        return error("port", str(refused), "give another address with --listen", **values)
    except ResourceError:
        holder = _holder(address)
        if holder is None:
            return error("port", f"{address} is held by a process that cannot be seen", _OTHER_PORT, **values)
        command = " ".join(holder.cmdline()) or holder.name()
        values |= {"held_by": holder.pid, "numoe": "GatewayActor" in command}
        if values["numoe"]:
            return ok("port", f"{address}: a numoe server listens (process {holder.pid})", **values)
        text = f"{address} is held by process {holder.pid} ({command[:60]})"
        return error("port", text, _OTHER_PORT, **values)
    if address.path or is_loopback(address.host):
        return ok("port", f"{address} is free", **values)
    return ok("port", f"{address} is free; others reach it: `numoe serve` wants TLS and a token there", **values)


def _holder(address: ListenAddress) -> psutil.Process | None:
    """The process that listens there, if it can be seen."""
    try:
        for connection in psutil.net_connections("unix" if address.path else "tcp"):
            place: Any = connection.laddr  # a path, an address, or nothing
            here = place == address.path if address.path else place and place.port == address.port
            if here and connection.pid and (address.path or connection.status == psutil.CONN_LISTEN):
                return psutil.Process(connection.pid)
    except psutil.Error:
        pass
    return None


def check_store(url: str | None = None, **options: Any) -> Check:
    """Create, read and remove an object in a store, by default where serve keeps its own.

    options: as `open_store` takes them.
    """
    url = default_store() if url is None else url
    if url == NO_STORE:
        return ok("store", "none: nothing outlives a server", url=None, milliseconds=None)
    values: dict[str, Any] = {"url": url, "milliseconds": None}
    key, began = f"doctor/{secrets.token_hex(8)}", time.perf_counter()
    try:
        store = open_store(url, deadline=_STORE_ANSWERS_WITHIN_S, **options)
        created = store.put_new(key, _PROBE)
        try:
            whole = created and store.get(key) == _PROBE and not store.put_new(key, b"another")
        finally:
            store.delete(key)
        gone = not store.exists(key)
    except AccessError as refused:
        cure = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or GOOGLE_…, AZURE_…), or the folder's owner"
        return error("store", str(refused), cure, **values)
    except ResourceError as refused:
        return error("store", str(refused), "make room, or name another store with --store", **values)
    except NumoeError as refused:
        return error("store", str(refused), "see the URL, AWS_ENDPOINT_URL, and whether this host reaches it", **values)
    values["milliseconds"] = round(1e3 * (time.perf_counter() - began), 1)
    if not (whole and gone):
        cure = "use a store that honours If-None-Match and reads what was written, as S3, GCS, Azure and folders do"
        return error("store", f"{url} does not keep objects as they were written", cure, **values)
    return ok("store", f"{url}: created, read and removed an object in {values['milliseconds']} ms", **values)


def check_cache(folder: Path | None = None) -> Check:
    """Whether compiled kernels can be kept."""
    folder = cache_root() if folder is None else folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as refused:
        text = f"{folder} cannot be written ({refused.strerror}): compiled kernels are kept in {spare_kernels()}"
        return warning("cache", text, "make it writable, or set XDG_CACHE_HOME to another folder", folder=str(folder))
    if free < _LEAST_FREE:
        cure = "free some, or set XDG_CACHE_HOME to a folder with more"
        return warning("cache", f"{folder} has {gb(free)} left", cure, folder=str(folder), free_bytes=free)
    return ok("cache", f"{folder}, {gb(free)} free", folder=str(folder), free_bytes=free)
