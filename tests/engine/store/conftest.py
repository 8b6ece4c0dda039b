"""Stores of every kind: each test that takes `store` runs on a folder, in memory and on an S3 server."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from numoe.engine.store import Store, open_store
from tests.s3 import CannotStartError, S3Server

KINDS = ("folder", "memory", "s3")
_prefixes = itertools.count()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    try:
        server = S3Server.start(tmp_path_factory.mktemp("s3"))
    except CannotStartError as error:
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture
def open_again(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Opens the test's store as another process would; indirectly parametrised by its kind."""
    if request.param == "folder":
        return lambda: open_store(tmp_path / "store", deadline=60.0)
    if request.param == "memory":
        store = open_store("memory://", deadline=60.0)
        return lambda: store
    server: S3Server = request.getfixturevalue("s3_server")
    url = server.url(f"test-{next(_prefixes)}/deep")
    return lambda: open_store(url, deadline=60.0, **server.options)


@pytest.fixture
def store(open_again: Callable[[], Store]) -> Store:
    return open_again()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "open_again" in metafunc.fixturenames:
        metafunc.parametrize("open_again", KINDS, indirect=True)
