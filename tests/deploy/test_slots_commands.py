"""numoe slots, and numoe generate in a slot, against a gateway with a scripted worker."""

import json
import signal
import subprocess
import sys
import time

import pytest

from numoe.deploy.client import Client
from numoe.engine.errors import DataLossError, PreconditionError
from numoe.engine.requests import SnapshotInfo
from numoe.v1 import slots_pb2 as pb
from tests.deploy.test_client_commands import APP, background

STORED = (
    SnapshotInfo(name="chat", tokens=600, computed=599, bytes=7_000_000, created=time.time() - 7300),
    SnapshotInfo(name="other", tokens=1, computed=1, bytes=0, created=1e9, mismatch="KV cache type is q8_0 there"),
)


def test_slots_are_listed() -> None:
    with background() as server:
        first, second = json.loads(server.run("slots", "list", "--json").stdout)["slots"]
        assert first == {
            "slot": 0, "state": "decode", "request_id": "a", "tokens": 7, "computed": 0, "cached": 0,
            "snapshot": None, "last_used": None,
        }  # fmt: skip
        assert second.items() >= {"computed": 599, "cached": 512, "snapshot": "chat", "last_used": 1e9}.items()
        shown = server.run("slots", "list")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert all(word in shown.stdout for word in ("decode", "idle", "599", "512", "chat", " d ago"))


@pytest.mark.parametrize(("command", "words"), [("save", "is saved as chat"), ("restore", "holds chat")])
def test_save_and_restore_say_what_was_moved(command: str, words: str) -> None:
    with background() as server:
        report = json.loads(server.run("slots", command, "3", "chat", "--json").stdout)
        assert report == {
            "slot": 3, "snapshot": "chat", "tokens": 600, "computed": 599, "chunks": 3, "bytes": 3000,
            "moved_chunks": 2, "moved_bytes": 2000, "seconds": 0.25,
        }  # fmt: skip
        shown = server.run("slots", command, "3", "chat", "--wait", "7")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert shown.stdout.startswith(f"slot 3 {words}: 600 tokens, 3.0 kB in 3 chunks; 2.0 kB in 2 chunks")
        (at_once, waiting) = (operation[-1] for operation in server.engine.operations)
        assert at_once is None
        assert waiting > time.time()


def test_erase_fork_and_rm() -> None:
    with background() as server:
        assert server.run("slots", "erase", "1").stdout == "slot 1 is empty\n"
        assert server.run("slots", "fork", "0", "2").stdout == "slot 2 holds what slot 0 holds: 600 tokens\n"
        assert server.run("slots", "rm", "chat").stdout == "snapshot chat is removed\n"
        assert server.engine.operations == [("erase", 1, None), ("fork", 0, 2, None), ("remove", "chat")]
        assert json.loads(server.run("slots", "fork", "0", "2", "--json").stdout)["slot"] == 2
        assert json.loads(server.run("slots", "rm", "chat", "--json").stdout) == {"removed": "chat"}


def test_snapshots_are_listed_with_those_of_other_models() -> None:
    with background(stored=STORED) as server:
        shown = server.run("slots", "snapshots").stdout
        assert all(word in shown for word in ("chat", "600", "7.0 MB", "2 h ago", "yes", "KV cache type is q8_0 there"))
        listed = json.loads(server.run("slots", "snapshots", "--json").stdout)["snapshots"]
        assert [entry["name"] for entry in listed] == ["chat", "other"]
        assert [entry["mismatch"] for entry in listed] == [None, STORED[1].mismatch]
    with background() as server:
        assert server.run("slots", "snapshots").stdout == "none\n"


@pytest.mark.parametrize("error", [DataLossError("chunk 12ab is damaged"), PreconditionError("slot 0 is busy")])
def test_an_error_is_one_line_with_exit_code_1(error: Exception) -> None:
    with background(slot_error=error) as server:
        for arguments in (("save", "0", "a"), ("restore", "0", "a"), ("erase", "0"), ("snapshots",), ("rm", "a")):
            done = server.run("slots", *arguments)
            assert (done.returncode, done.stdout, done.stderr) == (1, "", f"numoe: {error}\n")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("slots", "save", "-1", "a"), "SLOT -1"),
        (("slots", "save", "0", "../a"), "cannot name a snapshot"),
        (("slots", "erase", "0", "--wait", "1e9"), "--wait 1e+09"),
        (("slots", "fork", "1", "1"), "the slot itself"),
        (("generate", "hi", "--slot", "-2"), "--slot -2"),
        (("generate", "hi", "--slot-wait", "5"), "without slot_id"),
    ],
)
def test_bad_values_are_one_line(arguments: tuple[str, ...], word: str) -> None:
    with background() as server:
        done = server.run(*arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert word in done.stderr
        assert server.engine.operations == []


def test_ctrl_c_cancels_the_operation() -> None:
    with background(hang=True) as server:
        command = [sys.executable, "-c", APP, "slots", "save", "0", "chat", "--address", server.address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            end = time.monotonic() + 60
            while not server.engine.started.is_set() and time.monotonic() < end:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        assert (process.returncode, output, errors) == (130, "", "numoe: interrupted\n")
        while not server.engine.cancelled and time.monotonic() < end:
            time.sleep(0.01)
        assert server.engine.cancelled == [server.engine.operations[0][1]]


def test_leaving_the_stream_cancels_the_operation() -> None:
    with background(hang=True) as server, Client(server.address) as client:
        stream = client.save_slot(pb.SaveSlotRequest(slot=0, name="chat"))
        assert next(stream).progress.chunks == 3
        stream.close()  # type: ignore[attr-defined]
        end = time.monotonic() + 60
        while not server.engine.cancelled and time.monotonic() < end:
            time.sleep(0.01)
        assert server.engine.cancelled


def test_generate_names_its_slot() -> None:
    with background() as server:
        server.run("generate", "hi", "--slot", "0", "--slot-wait", "2.5")
        (request,) = server.engine.requests
        assert request.slot == 0
        assert request.slot_deadline <= time.time() + 2.5
