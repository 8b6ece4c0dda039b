"""Checks of Ray, ports, stores and the cache: against real sockets, folders and an S3 server."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from numoe.deploy.doctor import services
from numoe.deploy.doctor.services import check_cache, check_port, check_ray, check_store
from numoe.deploy.raylets import PRIVATE_TEMP, Raylet
from tests.s3 import CannotStartError, S3Server


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_no_cluster() -> None:
    found = check_ray([])
    assert (found.state, found.values["address"], found.values["own"]) == ("ok", None, 0)
    assert found.values["version"] in found.text


def test_a_cluster_that_runs_is_joined_and_those_of_other_servers_are_not(listener: int) -> None:
    head = f"127.0.0.1:{listener}"
    others = [Raylet(1, head, f"{PRIVATE_TEMP}/9"), Raylet(3, head, "/tmp/numoe-ray-54321/8")]
    found = check_ray([*others, Raylet(2, head, "/tmp/ray")])
    assert (found.state, found.values["address"], found.values["own"]) == ("ok", head, 2)
    assert check_ray(others).values["address"] is None


def test_a_cluster_whose_head_has_died_is_not_joined() -> None:
    found = check_ray([Raylet(2, "127.0.0.1:1", "/tmp/ray")])
    assert (found.state, found.values["address"], found.values["own"]) == ("warning", None, 0)
    assert "starts its own" in found.text
    assert "ray stop" in found.cure


def test_an_address_where_nobody_answers(monkeypatch: pytest.MonkeyPatch, listener: int) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listener}")
    assert check_ray([]).state == "ok"
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:1")
    found = check_ray([])
    assert (found.state, found.values["address"]) == ("error", "ray://127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert "starts its own" in check_ray([Raylet(2, "10.0.0.1:6379", "/tmp/ray")]).text


def test_without_ray_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_version", lambda _: None)
    assert (check_ray([]).state, check_ray([]).cure) == ("error", "pip install ray")


def test_a_full_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_LEAST_FREE", 1 << 60)
    assert "TMPDIR" in check_ray([]).cure
    assert "XDG_CACHE_HOME" in check_cache().cure


def test_the_folder_of_rays_logs_is_looked_at_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(services, "_LEAST_FREE", 1 << 60)
    monkeypatch.setattr(services, "PRIVATE_TEMP", str(tmp_path))
    assert f"{tmp_path} has" in check_ray([]).text


def test_an_address_that_others_reach_needs_protection() -> None:
    assert "wants TLS and a token" in check_port("0.0.0.0:0").text
    assert "TLS" not in check_port("127.0.0.1:0").text


def test_a_free_port(listener: int) -> None:
    found = check_port("127.0.0.1:0")
    assert (found.state, found.values) == ("ok", {"address": "127.0.0.1:0", "held_by": None, "numoe": False})


def test_a_port_that_is_held_is_an_error_with_its_holder(listener: int) -> None:
    found = check_port(f"127.0.0.1:{listener}")
    assert (found.state, found.values["held_by"], found.values["numoe"]) == ("error", os.getpid(), False)
    assert f"process {os.getpid()}" in found.text


def test_a_socket_that_is_held(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        found = check_port(f"unix:{path}")
    assert (found.state, found.values["held_by"]) == ("error", os.getpid())


@pytest.mark.parametrize("listen", ["nonsense", "127.0.0.1:99999", "192.0.2.1:50051"])
def test_an_address_that_is_none(listen: str) -> None:
    assert check_port(listen).state == "error"


def test_no_store_is_no_fault() -> None:
    assert (check_store("none").state, check_store("none").values["url"]) == ("ok", None)


def test_the_store_of_a_server_that_is_told_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    found = check_store()
    assert (found.state, found.values["url"]) == ("ok", str(tmp_path / "numoe/store"))


def test_a_folder_is_a_store_and_is_left_as_it_was(tmp_path: Path) -> None:
    found = check_store(str(tmp_path / "store"))
    assert found.state == "ok"
    assert found.values["milliseconds"] > 0
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file() and not path.name.startswith(".")]


@pytest.mark.parametrize("url", ["ftp://somewhere", "s3://", "/proc/1/store"])
def test_a_store_that_cannot_be_opened(url: str) -> None:
    found = check_store(url)
    assert (found.state, found.values["url"]) == ("error", url)
    assert found.cure


def test_a_store_that_nobody_serves() -> None:
    found = check_store(
        "s3://bucket/x", endpoint="http://127.0.0.1:1", access_key_id="a", secret_access_key="b", retries=0
    )
    assert found.state == "error"
    assert "AWS_ENDPOINT_URL" in found.cure


def test_an_s3_server(tmp_path: Path) -> None:
    try:
        server = S3Server.start(tmp_path / "s3")
    except CannotStartError as reason:
        pytest.skip(str(reason))
    with server:
        assert check_store(server.url("doctor"), **server.options).state == "ok"
        refused = check_store(server.url("doctor"), **server.options | {"secret_access_key": "wrong"})
        assert refused.state == "error"
        assert "AWS_ACCESS_KEY_ID" in refused.cure


def test_the_cache_folder(tmp_path: Path) -> None:
    assert check_cache(tmp_path / "new").state == "ok"
    (tmp_path / "file").write_text("")
    found = check_cache(tmp_path / "file")
    assert (found.state, found.values) == ("warning", {"folder": str(tmp_path / "file")})
