"""Without its store a server answers as ever and reports no save as done; when the store is back it catches up."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from numoe.engine.errors import NotFoundError, NumoeError, UnavailableError
from numoe.engine.store import Store, open_store
from tests.engine.cache import disk
from tests.engine.cache.conftest import Story
from tests.engine.cache.support import Interrupted
from tests.engine.worker.served import PATIENCE_S, Served, served
from tests.s3 import CannotStartError, S3Server

OTHERS = [[(start + 3 * i) % 250 for i in range(700)] for start in range(3)]
"""Prompts that need all pages and slots."""
ROOT = Path(__file__).parents[3]


@pytest.fixture
def own_s3(tmp_path: Path) -> Iterator[S3Server]:
    """A server that a test may stop."""
    try:
        server = S3Server.start(tmp_path / "s3")
    except CannotStartError as error:
        pytest.skip(str(error))
    with server:
        make_ready(server)
        yield server


def make_ready(s3: S3Server) -> None:
    """The first write takes a server long."""
    open_store(s3.url("ready"), deadline=60.0, **s3.options).put_new(secrets.token_hex(8), b"1")


def run_again(s3: S3Server) -> None:
    s3.run()
    make_ready(s3)


@contextmanager
def hanging(s3: S3Server) -> Iterator[None]:
    """The server takes connections and answers nothing."""
    s3.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        s3.process.send_signal(signal.SIGCONT)


@contextmanager
def stopped(s3: S3Server) -> Iterator[None]:
    """The server is not there."""
    s3.kill()
    try:
        yield
    finally:
        run_again(s3)


def soon_impatient(s3: S3Server) -> Store:
    return open_store(s3.url("here"), deadline=2.0, retries=0, **s3.options)


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 2 * PATIENCE_S
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def caught_up(server: Served) -> bool:
    """Whether nothing waits for the store any more."""
    status = server.engine.status().cache
    return not status.pending and not status.store_error


def goes_on(server: Served, story: Story, expected: type[NumoeError]) -> None:
    """Requests are answered, what was said is found in memory, and a save fails as it should."""
    text = story.texts[0]
    assert server.ask([*text, 5, 6, 7], slot=0)[1] == story.answers[0]
    with pytest.raises(expected):
        server.engine.slots.save("s", 0, "lost", None)
    for other in OTHERS:
        server.ask(other, max_tokens=1)
    cached, answer = server.ask([*text, 5, 6, 7])
    assert answer == story.answers[0]
    assert cached >= 256, "host memory was not asked"
    with pytest.raises(expected):
        server.engine.slots.save("s", 0, "lost", None)


def restored_elsewhere(story: Story, store: Store, name: str) -> None:
    """A fresh server restores a snapshot and goes on with it."""
    with served(story.model, store, ram=0) as server:
        report = server.engine.slots.restore("r", 0, name, None)
        text = story.texts[0]
        assert report.computed >= len(text) - 1
        cached, answer = server.ask([*text, 5, 6, 7], slot=0)
        assert (cached, answer) == (min(report.computed, len(text) + 2), story.answers[0])


def test_a_store_that_is_away_from_the_start_on(story: Story, own_s3: S3Server) -> None:
    store = soon_impatient(own_s3)
    with ExitStack() as away:
        away.enter_context(stopped(own_s3))
        with served(story.model, store) as server:
            goes_on(server, story, UnavailableError)
            away.close()
            catches_up(server, story, store)
    restored_elsewhere(story, store, "chat")


@pytest.mark.parametrize("outage", [stopped, hanging])
def test_a_store_that_goes_away_and_comes_back(story: Story, own_s3: S3Server, outage: Callable) -> None:
    store = soon_impatient(own_s3)
    with served(story.model, store) as server:
        server.ask(story.texts[0], slot=0)
        server.engine.slots.save("s", 0, "chat", None)
        with outage(own_s3):
            goes_on(server, story, UnavailableError)
            with pytest.raises(UnavailableError):
                server.engine.slots.restore("r", 1, "chat", None)
            with pytest.raises(UnavailableError):
                server.engine.slots.snapshots()
        catches_up(server, story, store)
    restored_elsewhere(story, store, "chat")


def test_a_store_that_dies_before_a_save_is_done(story: Story, own_s3: S3Server) -> None:
    store = soon_impatient(own_s3)
    dying = Interrupted(store, "put_if", 1, own_s3.kill)
    with served(story.model, dying) as server:  # type: ignore[arg-type]
        server.engine.slots.load_file(story.files[0], slot=0)
        with pytest.raises(UnavailableError):
            server.engine.slots.save("s", 0, "chat", None)
        run_again(own_s3)
        wait_until(lambda: caught_up(server))
        with pytest.raises(NotFoundError):
            server.engine.slots.restore("r", 1, "chat", None)
        server.engine.slots.save("s", 0, "chat", None)
    restored_elsewhere(story, store, "chat")


def test_a_conversation_that_lost_its_slot_during_an_outage_is_offered_after_a_restart(
    story: Story, own_s3: S3Server
) -> None:
    store = soon_impatient(own_s3)
    text = story.texts[0]
    with served(story.model, store, slots=1) as server:
        with stopped(own_s3):
            server.ask(text)
            server.ask(OTHERS[0], max_tokens=1)  # takes its slot
        wait_until(lambda: len(store.list("resumable")) == 1)
    with served(story.model, store, slots=1, ram=0, resume=True) as server:
        slot = server.engine.status().slots[0]
        assert slot.computed == len(text) + 7
        cached, _ = server.ask([*text, 5, 6, 7])
        assert cached == len(text)


def catches_up(server: Served, story: Story, store: Store) -> None:
    """The store is back: what came meanwhile is written, and a save works."""
    wait_until(lambda: caught_up(server))
    with pytest.raises(NotFoundError):
        server.engine.slots.restore("r", 1, "lost", None)
    assert len(store.list("chunks")) >= 2 * len(OTHERS), "what came meanwhile was never written"
    server.ask([*story.texts[0], 5, 6, 7], max_tokens=1, slot=0)
    server.engine.slots.save("s", 0, "chat", None)


def test_full_and_read_only_disks(tmp_path: Path) -> None:
    """On a small file system, which fills up, has room again, becomes read-only, and writable again."""
    mount = 'mount -t tmpfs -o size=4m tmpfs "$1" && shift && exec "$@"'
    command = ["unshare", "-Urm", "sh", "-c", mount, "sh", tmp_path]
    if subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a small file system")
    done = subprocess.run(
        [*command, sys.executable, disk.__file__, tmp_path], check=False, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["room", "full", "room", "read-only", "room", "restored"]
