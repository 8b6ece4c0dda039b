"""Runs the `numoe` command as users do, and looks at what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from numoe.engine import shm
from numoe.engine.weights import source_fingerprint, stored_slices

NUMOE = str(Path(sysconfig.get_path("scripts")) / "numoe")
SHM = shm.ROOT
STARTED = re.compile(r"at ([\d.]+:\d+) ")


def numoe(*args: object, stdin: str | None = None, timeout: float = 180) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    command = [NUMOE, *(str(arg) for arg in args)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)


class ServeProcess:
    """A `numoe serve` that is up, without a store unless `flags` name one; `address` is where.

    output: what it wrote to stdout afterwards, once it was stopped.
    """

    def __init__(self, model: Path, *flags: object, listen: str = "127.0.0.1:0") -> None:
        store = [] if "--store" in flags else ["--store", "none"]
        command = [NUMOE, "serve", str(model), "--listen", listen, *store, *(str(flag) for flag in flags)]
        before = set(SHM.glob("*"))
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = STARTED.search(line)
        if found is None:
            raise AssertionError(f"numoe serve said {line!r} and {self.process.communicate()[1]!r}")
        self.address = found.group(1)
        self._source = source_fingerprint([model])
        self.pids = {p.pid for p in psutil.Process(self.process.pid).children(recursive=True)}
        self._folders = [folder for folder in set(SHM.glob("*")) - before if self._may_own(folder)]

    def generate(self, *args: object) -> dict:
        """The JSON that `numoe generate` prints, greedy unless told otherwise."""
        result = numoe("generate", *args, "--address", self.address, "--json")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def status(self) -> dict:
        """The JSON that `numoe status` prints."""
        return json.loads(numoe("status", "--json", "--address", self.address).stdout)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 60) -> tuple[int, str]:
        """Send a signal, unless it is ending anyway; the exit code and what it wrote to stderr."""
        if not self.is_stopping:
            self.process.send_signal(number)
        try:
            self.output, errors = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, errors

    @property
    def is_stopping(self) -> bool:
        """Whether it has stopped listening."""
        host, port = self.address.split(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) != 0

    def left_over(self, patience: float = 10) -> list[str]:
        """Processes, shared-memory files and weights that outlive the server."""
        end = time.monotonic() + patience
        while (found := [*self._living(), *self._shared(), *self._weights()]) and time.monotonic() < end:
            time.sleep(0.2)
        return found

    def _shared(self) -> list[str]:
        return [str(folder) for folder in self._folders if folder.exists()]

    def _may_own(self, folder: Path) -> bool:
        """Whether a folder that came while this server started is not another test's or server's."""
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            owners = [pid for pid, _ in shm.owners_of(folder) or ()]
            private = any("numoe-ray" in " ".join(psutil.Process(pid).parent().cmdline()) for pid in owners)
            return not folder.name.startswith("test-") and (not private or bool(self.pids & set(owners)))
        return False

    def _weights(self) -> list[str]:
        return [str(w.path) for w in stored_slices() if w.fingerprint == self._source and not w.in_use]

    def _living(self) -> Iterator[str]:
        for pid in self.pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    yield f"{pid} {process.name()}"


