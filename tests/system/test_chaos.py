"""Processes of a server are killed and stopped at random, for a short time; `numoe bench chaos --minutes N` goes on."""

from __future__ import annotations

import json
from pathlib import Path

from tests.system.harness import numoe


def test_no_stream_shows_that_processes_die_and_nothing_is_left(tiny_model: Path) -> None:
    sizes = ("--shards", 2, "--minutes", 0.15, "--max-tokens", 200, "--seed", 5)
    result = numoe("bench", "chaos", tiny_model, *sizes, "--json", timeout=300)
    assert result.stdout, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["wrong"] == []
    assert report["left"] == []
    assert result.returncode == 0
    assert report["strikes"] >= 3
    assert report["equal"] >= 8, "each stream has ended at least once"
