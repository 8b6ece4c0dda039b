"""Reading what the kernel tells in small files, under a root that tests choose."""

from __future__ import annotations

import re
from pathlib import Path


class Tree:
    """The files of procfs and sysfs under `root`; a file that is missing or unreadable has no value."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """Where a file is whose path is `name` on the host."""
        return self.root / name.lstrip("/")

    def text(self, name: str) -> str | None:
        """A file's text without space around it."""
        try:
            return self.path(name).read_text(errors="replace").strip()
        except OSError:
            return None

    def integer(self, name: str) -> int | None:
        """A file's number."""
        text = self.text(name)
        return int(text) if text and re.fullmatch(r"-?\d+", text) else None

    def cpus(self, name: str) -> tuple[int, ...] | None:
        """A file's list of CPUs or nodes."""
        text = self.text(name)
        return None if text is None else tuple(parse_cpu_list(text))

    def fields(self, name: str) -> dict[str, str]:
        """The lines "name: value" of a file, the first of each name."""
        found: dict[str, str] = {}
        for line in (self.text(name) or "").splitlines():
            key, colon, value = line.partition(":")
            if colon:
                found.setdefault(key.strip(), value.strip())
        return found

    def chosen(self, name: str) -> str | None:
        """The word in brackets of a file such as "always [madvise] never"."""
        found = re.search(r"\[(\w+)\]", self.text(name) or "")
        return found.group(1) if found else None

    def numbered(self, folder: str, prefix: str) -> list[int]:
        """The numbers N, in order, of what is called `prefix` N in a folder."""
        try:
            names = [entry.name for entry in self.path(folder).iterdir()]
        except OSError:
            return []
        return sorted(int(name[len(prefix) :]) for name in names if re.fullmatch(re.escape(prefix) + r"\d+", name))


def parse_cpu_list(text: str) -> list[int]:
    """The kernel's list format: "0-3,8" is [0, 1, 2, 3, 8]."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.extend(range(int(first), int(last or first) + 1))
    return cpus
