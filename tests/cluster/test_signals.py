"""What signals do to an actor's process."""

from __future__ import annotations

import signal
import subprocess
import sys

ACTOR = """
import os, signal, threading, time
from numoe.actors.identity import identity

signal.signal(signal.SIGTERM, lambda *_: print("finishing first", flush=True))  # as Ray does
thread = threading.Thread(target=identity)
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)
"""


def test_an_actor_dies_of_sigterm_at_once() -> None:
    ended = subprocess.run([sys.executable, "-c", ACTOR], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGTERM, "", "")
