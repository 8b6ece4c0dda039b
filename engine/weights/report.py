"""Where a slice lies: measured, not as it was asked for."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import numpy as np

from numoe.engine.cpu.memory import address
from numoe.engine.numa import BIND_CURE, PAGE_BYTES, huge_share, page_nodes, why_unbound
from numoe.engine.weights.slices import WeightSlice

logger = logging.getLogger(__name__)

ENOUGH: Final = 0.99
"""The part of the pages that should lie on their node at least."""
_ASKED_PAGES: Final = 1 << 14
_LIFETIME_S: Final = 30.0
"""How long a report is good: to make one, the kernel walks through all pages."""


@dataclass(frozen=True)
class SliceReport:
    """A slice in memory.

    medium: the kind of memory that it was loaded to. on_nodes: the part of its pages that lie on the
    nodes where they should, None if they may lie anywhere or nobody can tell. huge: the part of what is
    mapped that are huge pages. problem: why they do not lie where they should, and what helps; empty if they do.
    """

    nbytes: int
    medium: str
    on_nodes: float | None
    huge: float
    problem: str = ""


class SliceReporter:
    """Makes reports of a slice, not more often than it takes."""

    def __init__(self, weights: WeightSlice, nodes: Collection[int], *, bound: bool) -> None:
        """nodes: where its pages should be. bound: whether it was bound to them, as there are others."""
        self._weights, self._nodes, self._is_bound = weights, frozenset(nodes), bound
        self._report, self._made = SliceReport(0, "", None, 0.0), -_LIFETIME_S

    def report(self) -> SliceReport:
        """The slice now, or half a minute ago."""
        if time.monotonic() - self._made > _LIFETIME_S:
            header = self._weights.header
            assert header is not None
            on_nodes = self._on_nodes()
            huge = huge_share(str(self._weights.path.resolve()))
            self._report = SliceReport(header.nbytes, header.medium, on_nodes, huge, self._problem(on_nodes))
            self._made = time.monotonic()
        return self._report

    def check(self) -> None:
        """Log it if the slice does not lie where it should: for who has just loaded it or attached to it."""
        if problem := self._problem(self._on_nodes()):
            logger.warning("%s", problem)

    def _problem(self, on_nodes: float | None) -> str:
        if not self._is_bound or (on_nodes is not None and on_nodes >= ENOUGH):
            return ""
        what = f"weights {self._weights.path}"
        if wrong := why_unbound(sorted(self._nodes)):
            return f"{what} cannot be bound ({'; '.join(wrong.values())}): {BIND_CURE}"
        if on_nodes is None:
            return ""
        return (
            f"{what} lie on their node with {100 * on_nodes:.0f} % of their pages only: stop the server, remove them "
            "(`numoe weights rm`), and start it again"
        )

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
