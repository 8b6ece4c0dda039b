"""The rows of one step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from numoe.engine.scheduler.sequence import Sequence

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Part:
    """The rows of one sequence in a batch: `rows` tokens from position `start` on.

    logit_row: the number of its logits among the batch's, None for a prompt that goes on.
    """

    sequence: Sequence
    start: int
    rows: int
    logit_row: int | None


@dataclass(frozen=True)
class Batch:
    """One step. A sequence's rows lie together, positions ascending.

    token_ids, positions, slots: int32 [rows]. logit_rows: int32 [n], the rows whose logits are
    wanted. page_tables: int32 [slots, pages], the KV pages of each slot. parts: what
    `Scheduler.postprocess` needs to know. Running a batch again changes nothing but its own KV rows.
    """

    token_ids: Ints
    positions: Ints
    slots: Ints
    logit_rows: Ints
    page_tables: Ints
    parts: tuple[Part, ...] = ()

    @classmethod
    def of(cls, parts: list[Part], page_tables: Ints) -> Batch:
        """Lay out the rows of some parts."""
        rows = [
            (part.sequence.tokens[position], position, part.sequence.slot)
            for part in parts
            for position in range(part.start, part.start + part.rows)
        ]
        table = np.array(rows, np.int32).reshape(len(rows), 3)
        ends = np.cumsum([part.rows for part in parts]) - 1
        wanted = [end for part, end in zip(parts, ends, strict=True) if part.logit_row is not None]
        token_ids, positions, slots = (np.ascontiguousarray(column) for column in table.T)
        return cls(token_ids, positions, slots, np.array(wanted, np.int32), page_tables, tuple(parts))
