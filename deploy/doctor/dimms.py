"""Memory modules and channels, from the firmware's tables (SMBIOS type 17) and the error detector (EDAC)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from numoe.cluster.topology.tree import Tree

DMI_TABLE, _EDAC = "/sys/firmware/dmi/tables/DMI", "/sys/devices/system/edac/mc"
_MEMORY_DEVICE, _END = 17, 127
_KINDS = {0x18: "DDR3", 0x1A: "DDR4", 0x1E: "LPDDR4", 0x20: "HBM", 0x21: "HBM2", 0x22: "DDR5", 0x23: "LPDDR5"}
_SIZE_UNKNOWN, _SIZE_EXTENDED, _SIZE_IN_KB = 0xFFFF, 0x7FFF, 0x8000


@dataclass(frozen=True)
class Slot:
    """A place for a memory module; transfers a second in 1e6, 0 if not known. Empty if it has no bytes.

    speed: what the module could do; configured: what it does.
    """

    place: str
    nbytes: int
    kind: str
    speed: int
    configured: int


def read_slots(tree: Tree) -> list[Slot] | None:
    """The slots that the firmware tells of; None where its table cannot be read, as by anybody but root."""
    try:
        table = tree.path(DMI_TABLE).read_bytes()
    except OSError:
        return None
    slots, at = [], 0
    while at + 4 <= len(table):
        kind, length = table[at], table[at + 1]
        end = table.find(b"\0\0", at + length)
        if length < 4 or kind == _END or end < 0:
            break
        if kind == _MEMORY_DEVICE and length >= 0x17:
            slots.append(_slot(table[at : at + length], table[at + length : end].split(b"\0")))
        at = end + 2
    return slots


def _slot(entry: bytes, strings: list[bytes]) -> Slot:
    def number(at: int, size: int = 2) -> int:
        return int.from_bytes(entry[at : at + size], "little")

    size = number(0x0C)
    nbytes = (number(0x1C, 4) & 0x7FFFFFFF) << 20 if size == _SIZE_EXTENDED else (size & 0x7FFF) << 20
    if size & _SIZE_IN_KB:
        nbytes = 0 if size == _SIZE_UNKNOWN else (size & 0x7FFF) << 10
    names = [strings[n - 1].decode(errors="replace").strip() for n in entry[0x10:0x12] if 0 < n <= len(strings)]
    return Slot(" ".join(names), nbytes, _KINDS.get(entry[0x12], "memory"), number(0x15), number(0x20))


def count_channels(tree: Tree) -> int | None:
    """Channels that have a module, as the error detector tells; None where there is none."""
    found = set()
    for controller in tree.numbered(_EDAC, "mc"):
        for kind in ("dimm", "rank"):
            for module in tree.numbered(f"{_EDAC}/mc{controller}", kind):
                folder = f"{_EDAC}/mc{controller}/{kind}{module}"
                place = re.search(r"channel (\d+)", tree.text(f"{folder}/dimm_location") or "")
                if place and tree.integer(f"{folder}/size"):
                    found.add((controller, place.group(1)))
    return len(found) or None
