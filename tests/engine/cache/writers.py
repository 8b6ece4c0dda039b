"""Processes that save the same name at the same moment.

    python writers.py TALK COUNT STORE_URL OPTIONS

Prints how each ended. They are forks of this process, which has no thread and no connection yet.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from numoe.engine.cache.snapshots import Progress
from numoe.engine.errors import PreconditionError
from numoe.engine.store import open_store
from tests.engine.cache.support import Saver, Talk

DONE, OVERTAKEN, FAILED = range(3)


def save(talk: Talk, number: int, start: int, url: str, options: dict[str, str]) -> int:
    saver = Saver(open_store(url, deadline=60.0, **options), talk.pages, talk.origin)
    conversation, objects = talk.salted(str(number).encode())
    saver.hold(objects)
    os.read(start, 1)  # ends when the parent has forked all
    try:
        saver.snapshots.save(conversation, "chat", Progress())
    except PreconditionError:
        return OVERTAKEN
    return DONE


def main() -> None:
    talk, count, url, options = Talk.read(Path(sys.argv[1])), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    start, go = os.pipe()
    children = []
    for number in range(count):
        if (pid := os.fork()) == 0:
            os.close(go)
            try:
                os._exit(save(talk, number, start, url, options))
            finally:
                traceback.print_exc()
                os._exit(FAILED)
        children.append(pid)
    os.close(go)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]))


if __name__ == "__main__":
    main()
