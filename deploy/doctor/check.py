"""`Check`: one line of what `numoe doctor` found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from numoe.cluster.topology import Topology
from numoe.cluster.topology.tree import Tree

State = Literal["ok", "warning", "error"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A finding: what was looked at, whether it is as it should be, what it is, and what to do about it.

    name:   stays the same, as do the keys of `values`: scripts read them.
    text:   a line for people. cure: what to type or change; empty where nothing is wrong.
    values: what was found, as JSON can hold it.
    """

    name: str
    state: State
    text: str
    cure: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Host:
    """What is looked at: the kernel's files, and what they say of the topology."""

    tree: Tree
    topology: Topology

    @classmethod
    def read(cls, root: Path = Path("/")) -> Host:
        """The host whose procfs and sysfs are under `root`."""
        return cls(Tree(root), Topology.read(root))


def ok(name: str, text: str, **values: Any) -> Check:
    """Nothing to do."""
    return Check(name=name, state="ok", text=text, values=values)


def warning(name: str, text: str, cure: str, **values: Any) -> Check:
    """It works, less well than it could."""
    return Check(name=name, state="warning", text=text, cure=cure, values=values)


def error(name: str, text: str, cure: str, **values: Any) -> Check:
    """It does not work like this."""
    return Check(name=name, state="error", text=text, cure=cure, values=values)


def gb(nbytes: float) -> str:
    """Bytes in GB for people, in MB below one."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def ranges(numbers: tuple[int, ...]) -> str:
    """Numbers in the kernel's list format: (0, 1, 2, 8) is "0-2,8"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
