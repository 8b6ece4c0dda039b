"""What `numoe bench chaos` excuses, and what it counts; its runs are in tests/system/test_chaos.py."""

from __future__ import annotations

import mmap
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from numoe.deploy.answers import Answer
from numoe.deploy.commands.bench.chaos import _report, _text
from numoe.deploy.commands.bench.repeats import Absences, Pause, difference
from numoe.deploy.commands.bench.strikes import Strike, users_of


@pytest.mark.parametrize(
    ("start", "answered", "is_excused"),
    [
        (90.0, 0.0, True),  # under way when the gateway was struck
        (101.0, 0.0, True),  # begun while it was away
        (101.0, 90.0, True),  # what was answered was the one before
        (104.0, 103.0, False),  # another gateway had answered already
        (121.0, 0.0, False),  # away for too long
    ],
)
def test_only_calls_that_a_strike_on_the_gateway_may_have_ended_are_excused(
    start: float, answered: float, is_excused: bool
) -> None:
    absences = Absences([Strike(100.0, "gateway", "kill"), Strike(103.5, "expert", "kill")])
    absences.answered(answered)
    assert absences.excuse(start) is is_excused


def test_strikes_on_others_excuse_nothing() -> None:
    strikes = [Strike(100.0, role, "kill") for role in ("expert", "attention", "supervisor")]
    assert not Absences(strikes).excuse(99.0)


def test_pauses_are_counted_for_what_caused_them() -> None:
    strikes = [
        Strike(10.0, "expert", "kill"),
        Strike(30.0, "gateway", "stop", alone=True),
        Strike(40.0, "expert", "kill", alone=True),
    ]
    pauses = [
        Pause(11.0, 0.9),  # its last token came when the strike was on its way
        Pause(20.0, 5.0),  # nobody was struck in it
        Pause(33.5, 4.0),
        Pause(41.0, 1.0),
        Pause(44.5, 4.6),
    ]
    stream: Any = SimpleNamespace(pauses=pauses, equal=3, lost=1, wrong=[])
    report = _report(strikes, [stream], [])
    assert report["roles"]["expert"] == {
        "killed": 2, "stopped": 0, "pause_s_p50": 1.0, "pause_s_p99": pytest.approx(4.528), "pause_s_max": 4.6,
        "alone": {
            "strikes": 1, "pause_s_p50": pytest.approx(2.8), "pause_s_p99": pytest.approx(4.564), "pause_s_max": 4.6,
            "pauses_above_3_s": 1,
        },
    }  # fmt: skip
    assert report["roles"]["gateway"]["alone"]["pauses_above_3_s"] == 1
    table = _text(report).splitlines()
    assert {len(line) for line in table[1:4]} == {len(table[1])}, "columns lie below each other"


def test_an_answer_with_the_right_tokens_and_another_text_is_another() -> None:
    want = Answer(text="once upon", token_ids=[1, 2, 3])
    assert "only the first 4 of 9" in difference(Answer(text="once", token_ids=[1, 2, 3]), want)
    assert "of 3 tokens the first 2 are" in difference(Answer(text="once upon", token_ids=[1, 2, 4]), want)


def test_a_process_that_has_a_servers_memory_is_found(tmp_path: Path) -> None:
    (tmp_path / "mailbox").write_bytes(bytes(mmap.PAGESIZE))
    code = (
        "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); "
        "print('here', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "mailbox")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (tmp_path / "mailbox").unlink()
        assert users_of(tmp_path) == {process.pid}
        process.communicate()
    while users_of(tmp_path):
        time.sleep(0.01)
