"""Where a slice lies: measured, not as it was asked for."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import numpy as np

from numoe.engine.cpu.memory import address
from numoe.engine.numa import PAGE_BYTES, huge_share, page_nodes
from numoe.engine.weights.slices import WeightSlice

_ASKED_PAGES: Final = 1 << 14
_LIFETIME_S: Final = 30.0
"""How long a report is good: to make one, the kernel walks through all pages."""


@dataclass(frozen=True)
class SliceReport:
    """A slice in memory.

    medium: the kind of memory that it was loaded to. on_nodes: the part of its pages that lie on the
    nodes where they should, None if they may lie anywhere or nobody can tell. huge: the part of what is
    mapped that are huge pages.
    """

    nbytes: int
    medium: str
    on_nodes: float | None
    huge: float


class SliceReporter:
    """Makes reports of a slice, not more often than it takes."""

    def __init__(self, weights: WeightSlice, nodes: Collection[int]) -> None:
        """nodes: where its pages should be."""
        self._weights, self._nodes = weights, frozenset(nodes)
        self._report, self._made = SliceReport(0, "", None, 0.0), -_LIFETIME_S

    def report(self) -> SliceReport:
        """The slice now, or half a minute ago."""
        if time.monotonic() - self._made > _LIFETIME_S:
            header = self._weights.header
            assert header is not None
            self._report = SliceReport(
                header.nbytes, header.medium, self._on_nodes(), huge_share(str(self._weights.path.resolve()))
            )
            self._made = time.monotonic()
        return self._report

    def _on_nodes(self) -> float | None:
        if not self._nodes:
            return None
        array = self._weights.array
        first = -address(array) % PAGE_BYTES
        pages = (len(array) - first) // PAGE_BYTES
        asked = min(pages, _ASKED_PAGES)
        if not asked:
            return None
        # The kernel tells of pages that are mapped: a process that attached has to look at them first.
        array[first + np.arange(asked) * pages // asked * PAGE_BYTES].sum()
        try:
            found = page_nodes(address(array) + first, pages * PAGE_BYTES, at_most=asked)
        except OSError:  # a kernel without NUMA
            return None
        return sum(found[node] for node in self._nodes) / asked
