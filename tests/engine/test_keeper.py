"""Descriptors that another process keeps."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from numoe.engine.keeper import Keeper, Keepsakes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keeper"


@pytest.fixture
def keeper(path: Path) -> Iterator[Keeper]:
    keeper = Keeper(path)
    yield keeper
    keeper.close()


def memory(content: bytes) -> int:
    descriptor = os.memfd_create("test")
    os.write(descriptor, content)
    return descriptor


def read(descriptor: int) -> bytes:
    return os.pread(descriptor, 100, 0)


def _work_and_die(path: Path) -> None:
    Keepsakes(path).put("kv", b"layout", memory(b"computed"))
    os.kill(os.getpid(), signal.SIGKILL)


def test_memory_outlives_its_process(keeper: Keeper, path: Path) -> None:
    worker = multiprocessing.get_context("fork").Process(target=_work_and_die, args=(path,))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    found = Keepsakes(path).get("kv", b"layout")
    assert found is not None
    assert read(found[1]) == b"computed"
    assert not os.get_inheritable(found[1])


def test_the_same_memory_has_the_same_identity_and_other_memory_another(keeper: Keeper, path: Path) -> None:
    first = Keepsakes(path).put("kv", b"layout", memory(b"1"))
    assert [Keepsakes(path).get("kv", b"layout")[0] for _ in range(2)] == [first, first]
    second = Keepsakes(path).put("kv", b"layout", memory(b"2"))
    assert second != first
    found = Keepsakes(path).get("kv", b"layout")
    assert found is not None
    assert (found[0], read(found[1])) == (second, b"2")


def test_what_lies_there_otherwise_is_dropped(keeper: Keeper, path: Path) -> None:
    Keepsakes(path).put("kv", b"one layout", memory(b"1"))
    assert Keepsakes(path).get("kv", b"another") is None
    assert Keepsakes(path).get("kv", b"one layout") is None
    assert Keepsakes(path).get("weights", b"one layout") is None


def test_memory_that_is_of_no_use_can_be_dropped(keeper: Keeper, path: Path) -> None:
    Keepsakes(path).put("kv", b"layout", memory(b"1"))
    successor = Keepsakes(path)
    assert successor.get("kv", b"layout") is not None
    successor.drop("kv")
    assert Keepsakes(path).get("kv", b"layout") is None


def test_another_keeper_gets_it_from_the_worker(path: Path) -> None:
    keeper, worker = Keeper(path), Keepsakes(path)
    identity = worker.put("kv", b"layout", memory(b"1"))
    keeper.close()
    keeper = Keeper(path)
    assert Keepsakes(path).get("kv", b"layout") is None
    worker.hand_over()
    found = Keepsakes(path).get("kv", b"layout")
    assert found is not None
    assert (found[0], read(found[1])) == (identity, b"1")
    keeper.close()


def test_a_keeper_lets_go(keeper: Keeper, path: Path) -> None:
    worker = Keepsakes(path)
    for number in range(20):
        descriptor = memory(b"1")
        worker.put(str(number), b"", descriptor)
        os.close(descriptor)
    held = [descriptor for _, descriptor in keeper._kept.values()]
    assert len(held) == 20
    keeper.forget()
    for descriptor in held:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_a_worker_goes_on_without_a_keeper(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker = Keepsakes(path)
    assert worker.get("kv", b"layout") is None
    assert len(worker.put("kv", b"layout", memory(b"1"))) == 16
    assert "may not outlive" in caplog.text
    assert not Keepsakes()
    assert Keepsakes().get("kv", b"layout") is None


@pytest.mark.parametrize("message", [b"", b"\xc1", b"\x81\xa4type\xa4_Put", b"x" * 5000])
def test_nonsense_gets_no_answer_and_does_no_harm(keeper: Keeper, path: Path, message: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        caller.connect(str(path))
        socket.send_fds(caller, [message], [0])
        caller.shutdown(socket.SHUT_WR)
        assert caller.recv(100) == b""
    Keepsakes(path).put("kv", b"layout", memory(b"1"))
    assert Keepsakes(path).get("kv", b"layout") is not None
