"""The slots: each runs one request at a time, and keeps its conversation until somebody else needs the place."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from numoe.engine.errors import BusyError, NotFoundError
from numoe.engine.requests import SlotState, SlotStatus
from numoe.engine.scheduler.conversation import Conversation
from numoe.engine.scheduler.sequence import Sequence

Operation = Literal["", "saving", "restoring"]


class Slots:
    """`count` slots.

    sequences: what runs in each. conversations: what each held before. operations: what is done to it.
    reserved: those of requests that ran when the worker before died, until they come again.
    """

    def __init__(self, count: int) -> None:
        self.sequences: list[Sequence | None] = [None] * count
        self.conversations: list[Conversation | None] = [None] * count
        self.operations: list[Operation] = [""] * count
        self.reserved: set[int] = set()

    def __len__(self) -> int:
        return len(self.sequences)

    def check(self, slot: int) -> None:
        """Raise NotFoundError unless there is such a slot."""
        if not 0 <= slot < len(self):
            raise NotFoundError(f"there is no slot {slot}: the server has slots 0 to {len(self) - 1} (--parallel)")

    def is_free(self, slot: int) -> bool:
        """Whether nothing runs in a slot, nothing is done to it, and nobody is to come back to it."""
        return self.sequences[slot] is None and not self.operations[slot] and slot not in self.reserved

    @property
    def n_free(self) -> int:
        """Slots in which a request could begin."""
        return sum(self.is_free(slot) for slot in range(len(self)))

    def running(self) -> list[Sequence]:
        """The sequences in slots, oldest first."""
        return sorted((s for s in self.sequences if s is not None), key=lambda s: s.number)

    def choose(self, sequence: Sequence, wanted: Collection[int | None] = ()) -> int | None:
        """The slot for a request, None if it has to wait. wanted: those that older ones wait for.

        The one that it names; else the one whose conversation it goes on with; else an empty one; else the
        one that was used longest ago, among those that no request named as long as there are any.
        """
        free = [slot for slot in range(len(self)) if self.is_free(slot) and slot not in wanted]
        if (named := sequence.request.slot) is not None:
            return named if named in free else None
        held = {slot: c for slot in free if (c := self.conversations[slot]) is not None}
        if sequence.keys is not None:
            root, tokens = sequence.keys.root, sequence.tokens
            same = {slot: c.computed for slot, c in held.items() if c.root == root and c.begins(tokens)}
            if same:
                return max(same, key=lambda slot: same[slot])
        empty = [slot for slot in free if slot not in held]
        if empty:
            return empty[0]
        return min(held, key=lambda slot: (held[slot].named, held[slot].last_used), default=None)

    def begin(self, slot: int, operation: Operation) -> None:
        """Keep a slot to oneself; BusyError while it is in use, NotFoundError if there is none."""
        self.check(slot)
        if not self.is_free(slot):
            raise busy(slot)
        self.operations[slot] = operation

    def end(self, slot: int) -> None:
        """Let others use a slot again."""
        self.operations[slot] = ""

    def status(self, slot: int, cached: int) -> SlotStatus:
        """One slot; cached: tokens of its conversation in pages."""
        sequence, conversation = self.sequences[slot], self.conversations[slot]
        state: SlotState = self.operations[slot] or "idle"
        if sequence is not None:
            state = "loading" if sequence.load else "decode" if sequence.is_decoding else "prefill"
            return SlotStatus(
                slot=slot, state=state, request_id=sequence.request.request_id,
                tokens=len(sequence.tokens), computed=sequence.computed, cached=sequence.computed,
            )  # fmt: skip
        if conversation is None:
            return SlotStatus(slot=slot, state=state)
        return SlotStatus(
            slot=slot, state=state, tokens=len(conversation.tokens), computed=conversation.computed,
            cached=cached, snapshot=conversation.snapshot, last_used=conversation.last_used,
        )  # fmt: skip


def busy(slot: int) -> BusyError:
    """What somebody is told who cannot have a slot."""
    return BusyError(f"slot {slot} is in use: wait for it (a request's or command's wait), or use another slot")
