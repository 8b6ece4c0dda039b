"""The flags that say what outlives a request: slots, snapshots and prompt caches."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from numoe.engine.errors import InputError, NumoeError, UnavailableError

if TYPE_CHECKING:
    from numoe.cluster.plan import CacheOptions

NO_STORE = "none"
DEFAULT_RAM_MIB = 8192
DEFAULT_STORE_LIMIT = 64 << 30
_CHECK_S = 10.0
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?B)?|B)?", re.IGNORECASE)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Caching:
    """What outlives a request.

    Parameters
    ----------
    store
        Where slots are saved and prompts that were read are kept: a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX,
        az://CONTAINER/PREFIX, memory:// (until the server ends), or "none". Credentials come from the environment.
        If not given, numoe/store in $XDG_DATA_HOME (~/.local/share).
    store_endpoint
        URL of the s3://, gs:// or az:// server, where it is not Amazon's, Google's or Microsoft's.
    cache_store_limit
        Bytes of prompts in the store at most, such as 500G; the least recently used go first, the end of a
        conversation before its beginning. 64G if not given, "none" or 0 for no limit. Snapshots are never removed
        for it.
    cache_ram
        MiB of host memory for prompts at most, never more than the model leaves free. -1 for no other limit, 0 for
        none; 8192 if not given, but at most a quarter of the memory.
    resume
        Save slots some seconds after they became idle, and all when the server stops; offer them again when it starts,
        whatever ended the server before. The default with a store.
    slot_save_path
        A folder; the same as --store, for users of llama-server. What llama-server has saved there cannot be read.
    prompt_cache
        A file: slot 0 begins with the state in it, if there is one, and the state of slot 0's prompt is written into
        it when the server stops.
    prompt_cache_all
        Write the generated tokens' state into that file too.
    keep
        When the context is full, go on without its middle: with this many tokens of the prompt (-1: all of it) and
        what came last. If not given, the answer ends there, with the reason "length".

    """

    store: str | None = None
    store_endpoint: str | None = None
    cache_store_limit: str | None = None
    cache_ram: int | None = None
    resume: bool | None = None
    slot_save_path: str | None = None
    prompt_cache: str | None = None
    prompt_cache_all: Annotated[bool, Parameter(negative=())] = False
    keep: int | None = None

    def options(self) -> CacheOptions:
        """The same, checked and complete. Raises NumoeError for what makes no sense or cannot be used."""
        from numoe.cluster.plan import CacheOptions

        if self.prompt_cache_all and self.prompt_cache is None:
            raise InputError("--prompt-cache-all needs --prompt-cache FILE")
        if self.keep is not None and self.keep < -1:
            raise InputError(f"--keep {self.keep} is not possible: give a number of tokens, or -1 for the whole prompt")
        url = self._store_url()
        return CacheOptions(
            store_url=url,
            store_endpoint=self.store_endpoint or "",
            store_limit_bytes=self._store_limit(url),
            cache_ram_bytes=self._ram_bytes(),
            resume=self._resumes(url),
            prompt_cache_file="" if self.prompt_cache is None else _writable_file(self.prompt_cache),
            prompt_cache_all=self.prompt_cache_all,
            keep=self.keep,
        )

    def _store_url(self) -> str:
        """The store's URL with an absolute path, "" for none."""
        if self.store is not None and self.slot_save_path is not None:
            raise InputError("--slot-save-path is the same as --store: give one of them")
        if self.slot_save_path is not None and "://" in self.slot_save_path:
            raise InputError(f"--slot-save-path {self.slot_save_path} is no folder; --store takes URLs")
        url = self.slot_save_path if self.store is None else self.store
        if self.store_endpoint is not None:
            if not (url or "").startswith(("s3://", "gs://", "az://")):
                raise InputError("--store-endpoint is for --store s3://BUCKET/PREFIX, gs://… and az://CONTAINER/PREFIX")
            if not re.match(r"https?://.", self.store_endpoint):
                raise InputError(f"--store-endpoint {self.store_endpoint} is no URL: give http(s)://HOST:PORT")
        if url == NO_STORE:
            return ""
        if url is None:
            return _usable_default_store()
        found = url if "://" in url or not url else str(Path(url).expanduser().absolute())
        _check_store(found, self.store_endpoint)
        return found

    def _store_limit(self, url: str) -> int | None:
        if self.cache_store_limit is None:
            return DEFAULT_STORE_LIMIT
        if not url:
            raise InputError("--cache-store-limit needs a store: give --store")
        return None if self.cache_store_limit.lower() == NO_STORE else parse_size(self.cache_store_limit) or None

    def _ram_bytes(self) -> int:
        import psutil

        total = psutil.virtual_memory().total
        if self.cache_ram is None:
            return min(DEFAULT_RAM_MIB << 20, total // 4)
        if self.cache_ram < -1:
            raise InputError(f"--cache-ram {self.cache_ram} is not possible: give MiB, 0 for none or -1 for no limit")
        return total if self.cache_ram == -1 else min(self.cache_ram << 20, total)

    def _resumes(self, url: str) -> bool:
        lasting = bool(url) and not url.startswith("memory:")
        if self.resume and not lasting:
            raise InputError("--resume needs a store that outlives the server: give --store a folder or s3://…")
        return lasting if self.resume is None else self.resume


NO_FLAGS = Caching()
"""What `numoe serve` takes if none of these flags is given."""


def parse_size(text: str) -> int:
    """Bytes of "64G" or "64GiB" (both 2^36), "64GB" (64·10^9), "1000". Raises InputError."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise InputError(f"{text!r} is no size: give a number with K, M, G or T, such as 64G")
    number, unit, ending = found.groups()
    base = 1000 if (ending or "").upper() == "B" else 1024
    return int(float(number) * base ** ("KMGT".index(unit.upper()) + 1 if unit else 0))


def default_store() -> str:
    """The folder of the user's data that is the store if none is named. InputError for a user without a home."""
    base = os.environ.get("XDG_DATA_HOME", "")
    try:
        data = Path(base) if base.startswith("/") else Path.home() / ".local" / "share"
    except RuntimeError as error:
        raise InputError(str(error)) from None
    return str(data / "numoe" / "store")


def _usable_default_store() -> str:
    """The default store; "" with a warning where it cannot be used."""
    try:
        folder = default_store()
        _check_store(folder, None)
    except NumoeError as error:
        print(f"numoe: nothing outlives this server: {error} (--store FOLDER, or none)", file=sys.stderr)
        return ""
    return folder


def _check_store(url: str, endpoint: str | None) -> None:
    """Raise what opening and reading it raises; one that cannot be reached now is worth a warning only."""
    from numoe.engine.store import open_store

    options: dict[str, Any] = {} if endpoint is None else {"endpoint": endpoint}
    try:
        open_store(url, deadline=_CHECK_S, retries=1, **options).check()
    except UnavailableError as error:
        print(f"numoe: going on without the store for now: {error}", file=sys.stderr)


def _writable_file(name: str) -> str:
    """The absolute path of a file that can be written."""
    path = Path(name).expanduser().absolute()
    if path.exists() and not path.is_file():
        raise InputError(f"--prompt-cache {name} is no file")
    if not path.parent.is_dir():
        raise InputError(f"--prompt-cache {name}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"--prompt-cache {name} cannot be written: check its permissions")
    return str(path)
