"""Many writers of one name: each is told the truth, and what remains is whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from numoe.engine.cache.snapshots import Progress
from numoe.engine.errors import PreconditionError
from numoe.engine.store import Store, open_store
from numoe.engine.store.manifest import Manifest
from tests.engine.cache import writers
from tests.engine.cache.conftest import Story
from tests.engine.cache.support import Saver, Talk
from tests.s3 import S3Server

WRITERS = 16
ROOT = Path(__file__).parents[3]


def read_back(talk: Talk, store: Store) -> Manifest:
    """The snapshot, all of its chunks read and verified by a server that knows nothing yet."""
    saver = Saver(store, talk.pages, talk.origin)
    manifest = saver.snapshots.manifest("chat")
    for number, key in enumerate(manifest.keys):
        layers = saver.cache.read(key, min(256, manifest.computed - 256 * number)).layers
        assert tuple(map(bytes, layers)) == talk.layers[number]
    saver.close()
    return manifest


class AllLook:
    """A store whose user sees the snapshot as it is when all others look at it too."""

    def __init__(self, store: Store, together: threading.Barrier) -> None:
        self._store, self._together = store, together

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get_versioned(self, key: str) -> tuple[memoryview, str]:
        try:
            return self._store.get_versioned(key)
        finally:
            self._together.wait()


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("forced", [False, True], ids=["free", "forced"])
def test_threads_that_save_one_name(
    story: Story, open_again: Callable[[], Store], there: bool, forced: bool
) -> None:
    talk, together = Talk.read(story.files[1]), threading.Barrier(WRITERS)

    def save(number: int, store: Any) -> bool:
        saver = Saver(store, talk.pages, talk.origin)
        conversation, objects = talk.salted(str(number).encode())
        saver.hold(objects)
        try:
            if not forced:
                together.wait()
            saver.snapshots.save(conversation, "chat", Progress())
        except PreconditionError:
            return False
        finally:
            saver.close()
        return True

    if there:
        earlier = Saver(open_again(), talk.pages, talk.origin)
        conversation, objects = talk.salted(b"earlier")
        earlier.hold(objects)
        earlier.snapshots.save(conversation, "chat", Progress())
        earlier.close()
    with ThreadPoolExecutor(WRITERS) as pool:
        stores = [AllLook(open_again(), together) if forced else open_again() for _ in range(WRITERS)]
        done = [number for number, good in enumerate(pool.map(save, range(WRITERS), stores)) if good]
    assert len(done) == 1 if forced else done
    assert int(read_back(talk, open_again()).salt) in done


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_processes_that_save_one_name(
    story: Story, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    url, options = str(tmp_path / "store"), {}
    if kind == "s3":
        s3: S3Server = request.getfixturevalue("s3_server")
        url, options = s3.url("race"), s3.options
    command = [sys.executable, writers.__file__, story.files[1], str(WRITERS), url, json.dumps(options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    codes = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    assert set(codes) <= {writers.DONE, writers.OVERTAKEN}
    found = int(read_back(Talk.read(story.files[1]), open_store(url, deadline=60.0, **options)).salt)
    assert codes[found] == writers.DONE
