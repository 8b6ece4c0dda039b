"""Conversations that have been idle in their slots for a while: what of them the store is to have now."""

from __future__ import annotations

from typing import Final

from numoe.engine.scheduler import Scheduler
from numoe.engine.scheduler.conversation import Conversation, Parked

IDLE_S: Final = 5.0
"""So long does a conversation lie in its slot before it is written: most answers of tools come sooner."""
LOOKS_S: Final = 1.0
"""Between two calls of `IdleSlots.due`."""


class IdleSlots:
    """Finds them, each conversation once. Its methods need the engine's lock, and never wait."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._ledger, self._slots = scheduler.ledger, scheduler.slots
        self._since: dict[int, tuple[Conversation, float]] = {}
        self._given: dict[int, Conversation] = {}

    def due(self, now: float) -> list[Parked]:
        """Those that have become idle IDLE_S ago, by `time.monotonic()`, and have not been given yet.

        From here on they have the names that they are written under, so that whoever goes on from them, or
        erases them, takes those away.
        """
        found = []
        for slot, held in enumerate(self._slots.conversations):
            if held is None or not self._slots.is_free(slot) or held is self._given.get(slot):
                continue
            since, at = self._since.get(slot, (None, now))
            if since is not held:
                self._since[slot] = held, now
            elif now - at >= IDLE_S:
                name = Parked(held, slot=slot).name
                self._note(slot, held, (*(other for other in held.stored if other != name), name))
                found.append(Parked(self._given[slot], slot=slot))
        return found

    def written(self, parked: Parked) -> None:
        """One of them is in the store, and what it went on from is not any more.

        While an operation on its slot is under way, which may note something about it, its names stay as they are.
        """
        slot, conversation = parked.slot, parked.conversation
        if slot is not None and self._slots.is_free(slot) and self._slots.conversations[slot] is conversation:
            self._note(slot, conversation, (parked.name,))

    def _note(self, slot: int, held: Conversation, stored: tuple[str, ...]) -> None:
        self._ledger.note_conversation(slot, held, stored=stored)
        if (noted := self._slots.conversations[slot]) is not None:
            self._given[slot] = noted
