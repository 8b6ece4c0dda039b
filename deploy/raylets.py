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
    """A cluster's node on this host. private: a numoe started it for itself, and it goes when that one does."""

    pid: int
    gcs_address: str
    private: bool


def find_raylets() -> list[Raylet]:
    """All that run, of every user whose processes can be seen."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet":
            command = " ".join(process.info["cmdline"] or ())
            address = re.search(r"--gcs-address=(\S+)", command)
            if address:
                private = f"--temp_dir={PRIVATE_TEMP}" in command
                found.append(Raylet(process.pid, address.group(1), private))
    return found
