"""Stores that are full, unreachable, foreign or misspelt say so, within their deadline, and how to cure it."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from numoe.engine.errors import (
    AccessError,
    InputError,
    NotFoundError,
    NumoeError,
    PreconditionError,
    ResourceError,
    UnavailableError,
    UnsupportedError,
)
from numoe.engine.store import Store, open_store
from numoe.engine.store.failures import MissingStoreError, store_error, timeout_error
from tests.s3 import S3Server

CAPTURED = {"capture_output": True, "text": True}
KEYS = {"access_key_id": "key", "secret_access_key": "secret", "region": "us-east-1"}
OPERATIONS: dict[str, Callable[[Store], object]] = {
    "put_new": lambda store: store.put_new("a", b"1"),
    "put_if": lambda store: store.put_if("a", b"1", None),
    "get": lambda store: store.get("a"),
    "head": lambda store: store.head("a"),
    "list": lambda store: store.list(),
    "delete": lambda store: store.delete("a"),
    "check": lambda store: store.check(),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield listener.getsockname()[1]


@each_operation
def test_a_closed_port_is_unavailable(operation: Callable[[Store], object]) -> None:
    store = open_store("s3://b/p", endpoint="http://127.0.0.1:9", deadline=5.0, retries=1, **KEYS)
    with pytest.raises(UnavailableError, match=r"s3://b/p.*check that the store runs"):
        operation(store)


@each_operation
def test_silence_is_unavailable_within_the_deadline(silent_port: int, operation: Callable[[Store], object]) -> None:
    store = open_store("s3://b/p", endpoint=f"http://127.0.0.1:{silent_port}", deadline=0.5, **KEYS)
    start = time.monotonic()
    with pytest.raises(UnavailableError, match=r"did not end within 0.5 s|check that the store runs"):
        operation(store)
    assert time.monotonic() - start < 5  # half a second, on a busy machine


@each_operation
@pytest.mark.parametrize("wrong", ["access_key_id", "secret_access_key"])
def test_wrong_credentials_are_called_so(
    s3_server: S3Server, operation: Callable[[Store], object], wrong: str
) -> None:
    store = open_store(s3_server.url("p"), **s3_server.options | {wrong: "mistaken"})
    with pytest.raises(AccessError, match=r"check the credentials .*AWS_ACCESS_KEY_ID"):
        operation(store)


def test_missing_credentials_are_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    with pytest.raises(AccessError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        open_store("s3://b/p", endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("url", "environment", "cure"),
    [
        ("gs://b/p", {"GOOGLE_APPLICATION_CREDENTIALS": "/there/is/none"}, "GOOGLE_APPLICATION_CREDENTIALS"),
        ("gs://b/p", {"GOOGLE_SERVICE_ACCOUNT_KEY": "{}"}, "GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://c/p", {}, "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
        ("az://c/p", {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": "!"}, "AZURE_STORAGE"),
    ],
)
def test_every_cloud_says_which_credentials_it_wants(
    monkeypatch: pytest.MonkeyPatch, url: str, environment: dict[str, str], cure: str
) -> None:
    for name in [name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AccessError, match=f"check the credentials .*{cure}"):
        open_store(url)


def test_a_cloud_that_is_silent_may_have_been_asked_for_credentials() -> None:
    assert "AZURE_STORAGE_ACCOUNT_KEY" in str(timeout_error("checking it", "az://c/p", 10))
    assert "credentials" not in str(timeout_error("checking it", "/a/folder", 10))


def test_the_environment_says_where_and_who(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(s3_server.url("environment"))
    assert store.put_new("a", b"1")
    assert open_store(s3_server.url("environment"), **s3_server.options).get("a") == b"1"


@pytest.mark.parametrize(
    ("url", "name", "rest"),
    [
        ("s3://b/p", "AWS_ENDPOINT_URL", {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "a"}),
        ("gs://b/p", "GOOGLE_BASE_URL", {"GOOGLE_BEARER_TOKEN": "a"}),
        ("az://c/p", "AZURE_ENDPOINT", {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": "YQ=="}),
    ],
)
@pytest.mark.parametrize("told", ["environment", "option"])
def test_every_cloud_may_have_its_server_elsewhere(
    monkeypatch: pytest.MonkeyPatch, url: str, name: str, rest: dict[str, str], told: str
) -> None:
    """One of this host may be without TLS, wherever that is said; it gets the requests, others none."""
    for other in [other for other in os.environ if other.startswith(("AWS_", "AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(other)
    for variable, value in rest.items():
        monkeypatch.setenv(variable, value)
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        server.settimeout(10)
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        options = {"endpoint": endpoint} if told == "option" else {}
        if told == "environment":
            monkeypatch.setenv(name, endpoint)
        store = open_store(url, deadline=5.0, retries=0, **options)
        asking = pool.submit(store.check)
        peer, _ = server.accept()
        with peer:
            assert peer.recv(1 << 16).startswith(b"GET /")
        assert isinstance(asking.exception(), UnavailableError)


def test_an_answer_in_xml_is_told_without_its_request() -> None:
    said = '<Error><Code>BlobNotFound</Code><Message>It is not there.\\nRequestId:1\\nTime:2</Message></Error>'
    assert "failed: BlobNotFound (It is not there.); check" in str(store_error(OSError(said), "reading a", "az://c"))


@pytest.mark.parametrize(
    ("url", "options", "reason"),
    [
        ("", {}, "empty"),
        ("ftp://host/x", {}, "give a folder, s3://BUCKET"),
        ("file://host/x", {}, "three slashes"),
        ("s3:///x", {}, "s3://BUCKET/PREFIX"),
        ("s3://key:secret@b/x", {}, "keys do not belong into a URL"),
        ("s3://b/x", {"endpoint": "http://example.com", **KEYS}, "not encrypted"),
        ("s3://b/x", {"endpiont": "https://example.com", **KEYS}, "endpiont"),
        ("memory://", {"region": "x"}, "no option region"),
        ("memory://", {"deadline": 0.0}, "deadline of 0.0 s"),
        ("memory://", {"retries": -1}, "-1 retries"),
    ],
)
def test_urls_and_options_that_make_no_sense_are_refused(url: str, options: dict, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        open_store(url, **options)
    assert "secret" not in str(caught.value)


def test_clouds_open_without_being_asked() -> None:
    assert repr(open_store("gs://bucket/prefix", skip_signature=True)) == "RemoteStore('gs://bucket/prefix')"
    assert open_store("az://container/prefix", account_name="somebody", skip_signature=True).deadline == 30.0
    assert open_store("s3://b/x", endpoint="http://example.com", allow_http=True, **KEYS).url == "s3://b/x"


@pytest.mark.parametrize("form", ["path", "text", "url", "relative"])
def test_a_folder_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my store"
    forms = {"path": folder, "text": str(folder), "url": folder.as_uri(), "relative": "my store"}
    open_store(forms[form]).put_new("a/b", b"1")
    assert (folder / "a" / "b").read_bytes() == b"1"
    assert stat.S_IMODE((folder / "a" / "b").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = open_store(tmp_path / "file")
    with pytest.raises(InputError, match="check the store's URL"):
        store.check()


def test_a_folder_that_vanished_is_unavailable_until_it_is_back(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    store.put_new("a/b", b"1")
    (tmp_path / "s").rename(tmp_path / "gone")
    for use in (store.list, lambda: store.get("a/b"), lambda: store.put_new("c", b"1"), lambda: store.delete("a/b")):
        with pytest.raises(UnavailableError, match="the folder is not there"):
            use()
    assert not (tmp_path / "s").exists()
    (tmp_path / "gone").rename(tmp_path / "s")
    assert store.get("a/b") == b"1"


def test_a_bucket_that_is_not_there_is_no_missing_object(s3_server: S3Server) -> None:
    store = open_store("s3://no-such-bucket/x", deadline=60.0, **s3_server.options)
    for use in (store.list, lambda: store.get("a/b"), lambda: store.get_versioned("a/b")):
        with pytest.raises(UnavailableError, match="make the bucket"):
            use()
    with pytest.raises(NotFoundError, match="NoSuchBucket"):
        store.check()


def test_a_folder_that_cannot_be_made_is_made_once_it_can(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = open_store(tmp_path / "file" / "s")
    with pytest.raises(InputError, match="opening it failed"):
        store.check()
    (tmp_path / "file").unlink()
    store.check()
    assert store.put_new("a", b"1")


FULL = """
import resource, signal, sys
from numoe.engine.errors import ResourceError
from numoe.engine.store import open_store
store = open_store(sys.argv[1])
first = store.put_if("slots/a", b"old", None)
store.put_new("chunks/small", b"1" * 1000)
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
big = b"1" * 2_000_000
for write in (lambda: store.put_new("chunks/big", big), lambda: store.put_if("slots/a", big, first)):
    try:
        write()
    except ResourceError as error:
        print(error)
assert store.get("slots/a") == b"old"
assert [entry.key for entry in store.list()] == ["chunks/small", "slots/a"]
store.put_if("slots/a", b"new", first)
store.put_new("chunks/more", b"1" * 1000)
"""


def test_a_full_disk_is_a_resource_error_and_harms_nothing(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", FULL, tmp_path / "s", "limit"], check=False, **CAPTURED)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("File too large; make room") == 2
    assert list((tmp_path / "s" / ".staging").iterdir()) == []


def test_a_full_file_system_is_a_resource_error_and_harms_nothing(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=1m tmpfs "$1" && shift && exec "$@"'
    command = ["unshare", "-Urm", "sh", "-c", mount, "sh", tmp_path]
    if subprocess.run([*command, "true"], check=False, **CAPTURED).returncode:
        pytest.skip("this system lets nobody mount a small file system")
    script = [sys.executable, "-c", FULL, tmp_path / "s", "disk"]
    result = subprocess.run([*command, *script], check=False, **CAPTURED)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("No space left on device; make room") == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_nobody_may_write_is_an_access_error(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    (tmp_path / "s" / ".staging").chmod(0o500)
    with pytest.raises(AccessError, match="permissions"):
        store.put_new("a", b"1")


def test_what_killed_writers_left_is_removed_and_never_listed(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    for name, age in (("old", 7200), ("new", 10)):
        left = tmp_path / "s" / ".staging" / name
        left.write_bytes(b"half")
        os.utime(left, (time.time() - age,) * 2)
    assert list(store.list()) == []
    open_store(tmp_path / "s")
    assert [left.name for left in (tmp_path / "s" / ".staging").iterdir()] == ["new"]


def test_waiting_for_another_process_ends(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s", deadline=0.2)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path / "s" / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(UnavailableError, match=r"waiting to change a did not end within 0.2 s"):
            store.put_new("a", b"1")
        holder.kill()
    assert store.put_new("a", b"1") is True


GENERIC = "Generic S3 error: Error performing PUT http://h/b in 1ms - Server returned non-2xx status code: "


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ResourceError),
        (OSError(errno.EACCES, "Permission denied"), AccessError),
        (OSError(errno.EROFS, "Read-only file system"), AccessError),
        (OSError(errno.EIO, "Input/output error"), UnavailableError),
        (OSError(errno.ESTALE, "Stale file handle"), UnavailableError),
        (FileNotFoundError("Object at location x not found"), NotFoundError),
        (NotImplementedError("Operation not yet implemented"), UnsupportedError),
        (Exception(GENERIC + "507 Insufficient Storage: "), ResourceError),
        (Exception(GENERIC + "500 x: <Error><Code>XMinioStorageFull</Code><Message>full</Message>"), ResourceError),
        (Exception(GENERIC + "403 Forbidden: <Error><Code>InvalidAccessKeyId</Code>"), AccessError),
        (Exception(GENERIC + "404 Not Found: <Error><Code>NoSuchBucket</Code>"), MissingStoreError),
        (Exception(GENERIC + "409 Conflict: <Error><Code>ConditionalRequestConflict</Code>"), PreconditionError),
        (Exception(GENERIC + "501 Not Implemented: "), UnsupportedError),
        (Exception(GENERIC + "503 Slow Down: "), UnavailableError),
        (Exception("Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token"), AccessError),
        (Exception("Generic MicrosoftAzure error: Account must be specified"), AccessError),
        (Exception("Generic MicrosoftAzure error: Invalid Access Key: Invalid symbol 33, offset 9."), AccessError),
    ],
)
def test_every_failure_has_its_error_and_a_cure(error: Exception, kind: type[NumoeError]) -> None:
    found = store_error(error, "writing x", "s3://b")
    assert type(found) is kind
    assert str(found).startswith("store s3://b: writing x failed: ")
    assert "; " in str(found)
    assert "\n" not in str(found)
