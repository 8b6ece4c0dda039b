"""A save that is killed at any store operation leaves the old snapshot or the new one, whole and of use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from numoe.engine.errors import NotFoundError
from numoe.engine.store import open_store
from tests.engine.cache import killed
from tests.engine.cache.conftest import Story
from tests.engine.worker.served import Served, served
from tests.s3 import S3Server

ROOT = Path(__file__).parents[3]


def kill_all(story: Story, mode: str, url: str, options: dict[str, str]) -> int:
    """Save and be killed at every point; how many there are."""
    done = subprocess.run(
        [sys.executable, killed.__file__, *story.files, mode, url, json.dumps(options)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
        check=True,
    )  # fmt: skip
    codes = [int(line) for line in done.stdout.split()]
    assert codes[-1] == 0
    assert set(codes[:-1]) == {-signal.SIGKILL}
    return len(codes)


def found_by(server: Served, story: Story, point: int) -> int | None:
    """Which snapshot is there, 0 the old and 1 the new, after it has been restored and gone on with; None for none."""
    try:
        report = server.engine.slots.restore("r", 0, f"chat-{point}", None)
    except NotFoundError:
        return None
    number = [len(text) for text in story.texts].index(report.tokens)
    text = story.texts[number]
    assert report.computed == len(text) - 1
    assert report.moved_chunks == report.chunks
    cached, answer = server.ask([*text, 5, 6, 7], slot=0, cache_salt=str(point).encode())
    assert (cached, answer) == (len(text) - 1, story.answers[number])
    return number


@pytest.mark.parametrize("mode", ["first", "replaced"])
@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_killed_save_leaves_the_old_or_the_new_snapshot(
    story: Story, tmp_path: Path, request: pytest.FixtureRequest, kind: str, mode: str
) -> None:
    url, options = str(tmp_path / "store"), {}
    if kind == "s3":
        s3: S3Server = request.getfixturevalue("s3_server")
        url, options = s3.url(f"killed-{mode}"), s3.options
    points = kill_all(story, mode, url, options)
    assert points > 20
    before = 0 if mode == "replaced" else None
    with served(story.model, open_store(url, deadline=60.0, **options), ram=0) as server:
        found = [found_by(server, story, point) for point in range(1, points + 1)]
        assert found[0] == before
        assert found[-1] == 1
        assert set(found) == {before, 1}
        assert found == sorted(found, key=lambda number: number == 1), "the new one is lost again"
        # Nobody is locked out: the same names can be saved, chunks of killed saves are used or written again.
        for point in (1, points // 2, points):
            report = server.engine.slots.save("s", 0, f"chat-{point}", None)
            assert server.engine.slots.restore("r", 1, f"chat-{point}", None).computed == report.computed
