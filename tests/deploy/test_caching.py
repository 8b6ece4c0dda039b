"""The flags of `numoe serve` that say what outlives a request."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from numoe.cluster.plan import CacheOptions
from numoe.deploy.commands.caching import DEFAULT_STORE_LIMIT, Caching, parse_size
from numoe.engine.errors import InputError, NumoeError

MEMORY = psutil.virtual_memory().total


@pytest.fixture(autouse=True)
def data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


def test_the_default_is_a_folder_of_the_user_and_a_bounded_share_of_memory(data_home: Path) -> None:
    assert Caching().options() == CacheOptions(
        store_url=str(data_home / "numoe" / "store"),
        store_limit_bytes=DEFAULT_STORE_LIMIT,
        cache_ram_bytes=min(8 << 30, MEMORY // 4),
        resume=True,
    )
    assert (data_home / "numoe" / "store").stat().st_mode & 0o777 == 0o700


def test_without_a_home_nothing_is_stored_and_serving_goes_on(
    data_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_home.write_text("a file where the folder would be")
    options = Caching().options()
    assert (options.store_url, options.resume) == ("", False)
    assert "nothing outlives this server" in capsys.readouterr().err


def test_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for caching in (Caching(store="here"), Caching(slot_save_path="here"), Caching(store=f"{tmp_path}/here")):
        options = caching.options()
        assert (options.store_url, options.resume) == (str(tmp_path / "here"), True)
    assert Caching(store="none").options().store_url == ""
    memory = Caching(store="memory://").options()
    assert (memory.store_url, memory.resume) == ("memory://", False)
    assert not Caching(store="here", resume=False).options().resume


@pytest.mark.parametrize("url", ["s3://bucket/prefix", "gs://bucket/prefix", "az://container/prefix"])
def test_a_store_that_is_down_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_ACCOUNT_NAME", "GOOGLE_BEARER_TOKEN"):
        monkeypatch.setenv(name, "a")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    options = Caching(store=url, store_endpoint="http://127.0.0.1:1").options()
    assert (options.store_url, options.store_endpoint) == (url, "http://127.0.0.1:1")
    assert "going on without the store" in capsys.readouterr().err


def test_llama_servers_spellings(tmp_path: Path) -> None:
    file = tmp_path / "prompt.bin"
    options = Caching(store="none", cache_ram=100, prompt_cache=str(file), prompt_cache_all=True, keep=-1).options()
    assert (options.cache_ram_bytes, options.prompt_cache_file) == (100 << 20, str(file))
    assert (options.prompt_cache_all, options.keep) == (True, -1)
    assert Caching(store="none", cache_ram=-1).options().cache_ram_bytes == MEMORY
    assert Caching(store="none", cache_ram=0).options().cache_ram_bytes == 0
    assert Caching(store="none").options().keep is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"store": "ftp://host/x"}, "s3://BUCKET/PREFIX"),
        ({"store": "s3://"}, "s3://BUCKET/PREFIX"),
        ({"store": ""}, "URL is empty"),
        ({"store": "/proc/1/nothing"}, "opening it failed"),
        ({"store": "a", "slot_save_path": "b"}, "--slot-save-path is the same as --store"),
        ({"slot_save_path": "s3://bucket/x"}, "--store takes URLs"),
        ({"store": "none", "store_endpoint": "http://127.0.0.1:1"}, "--store-endpoint is for"),
        ({"store": "memory://", "store_endpoint": "http://127.0.0.1:1"}, "--store-endpoint is for"),
        ({"store": "s3://bucket/x", "store_endpoint": "127.0.0.1:1"}, "is no URL"),
        ({"store": "none", "cache_store_limit": "1G"}, "--cache-store-limit needs a store"),
        ({"store": "memory://", "cache_store_limit": "much"}, "'much' is no size"),
        ({"store": "none", "resume": True}, "--resume needs a store"),
        ({"store": "memory://", "resume": True}, "--resume needs a store"),
        ({"store": "none", "cache_ram": -2}, "--cache-ram -2"),
        ({"store": "none", "keep": -2}, "--keep -2"),
        ({"store": "none", "prompt_cache_all": True}, "needs --prompt-cache FILE"),
        ({"store": "none", "prompt_cache": "/nowhere/file"}, "there is no folder /nowhere"),
        ({"store": "none", "prompt_cache": "/proc"}, "is no file"),
    ],
)
def test_what_makes_no_sense_is_named(flags: dict, message: str) -> None:
    with pytest.raises(NumoeError, match=message):
        Caching(**flags).options()


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1000", 1000), ("0", 0), ("64G", 64 << 30), ("64GiB", 64 << 30), ("64 gb", 64 * 10**9), ("1.5T", 3 << 39)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "G", "-1", "1P", "1e9", "0x10", "1 G B"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InputError, match="no size"):
        parse_size(text)


def test_no_limit_has_two_spellings() -> None:
    for text in ("none", "0"):
        assert Caching(store="memory://", cache_store_limit=text).options().store_limit_bytes is None
