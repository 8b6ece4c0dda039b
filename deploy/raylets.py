"""Which Ray clusters have a node on this host."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass

import psutil

PRIVATE_TEMP = f"{tempfile.gettempdir()}/numoe-ray-{os.getuid()}"
"""Folder of the Rays that numoe starts for itself, each in a folder of its own there."""


@dataclass(frozen=True)
class Raylet:
    """A cluster's node on this host, and its session's folder."""

    pid: int
    gcs_address: str
    folder: str

    @property
    def private(self) -> bool:
        """Whether a numoe started it for itself, so that it goes when that one does."""
        return self.folder.startswith(PRIVATE_TEMP)


def find_raylets() -> list[Raylet]:
    """All that run, of every user whose processes can be seen."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet":
            command = " ".join(process.info["cmdline"] or ())
            address = re.search(r"--gcs-address=(\S+)", command)
            folder = re.search(r"--temp_dir=(\S+)", command)
            if address:
                found.append(Raylet(process.pid, address.group(1), folder.group(1) if folder else ""))
    return found
