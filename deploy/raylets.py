"""Which Ray clusters have a node on this host."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from contextlib import closing
from dataclasses import dataclass

import psutil

_PRIVATE_NAME = "numoe-ray-"
PRIVATE_TEMP = f"{tempfile.gettempdir()}/{_PRIVATE_NAME}{os.getuid()}"
"""Folder of the Rays that numoe starts for itself, each in a folder of its own there."""
_ANSWERS_WITHIN_S = 2.0


@dataclass(frozen=True)
class Raylet:
    """A cluster's node on this host, and its session's folder."""

    pid: int
    gcs_address: str
    folder: str

    @property
    def private(self) -> bool:
        """Whether a numoe, of any user, started it for itself, so that it goes when that one does."""
        return re.search(rf"/{_PRIVATE_NAME}\d+(/|$)", self.folder) is not None

    @property
    def may_be_joined(self) -> bool:
        """Whether it is a cluster for others, and its head is there: a node outlives that by about a minute."""
        return not self.private and head_answers(self.gcs_address)


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


def head_answers(address: str) -> bool:
    """Whether somebody listens at a Ray address; "auto", and what else has no port, is not asked."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return True
    with closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as probe:
        probe.settimeout(_ANSWERS_WITHIN_S)
        try:
            return probe.connect_ex((host.strip("[]"), int(port))) == 0
        except OSError:  # of a name that is unknown
            return False
