"""The part of the worker's double that keeps slots."""

import asyncio
from dataclasses import dataclass, field

from numoe.actors.gateway import RequestStreams
from numoe.engine.errors import PreconditionError
from numoe.engine.requests import SlotProgress, SlotReport, SnapshotInfo

CHUNK_BYTES = 1000


@dataclass
class ScriptedSlots:
    """Saves and restores three chunks, one event for each; records what it is asked.

    slot_error: what operations raise at their end. hang: they do not end until they are cancelled.
    """

    streams: RequestStreams
    slot_error: Exception | None = None
    hang: bool = False
    stored: tuple[SnapshotInfo, ...] = ()
    operations: list[tuple[object, ...]] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: list[str] = field(default_factory=list)
    cancel_seen: asyncio.Event = field(default_factory=asyncio.Event)

    async def save_slot(self, operation: str, slot: int, name: str, wait_until: float | None) -> SlotReport:
        return await self._move("save", operation, slot, name, wait_until)

    async def restore_slot(self, operation: str, slot: int, name: str, wait_until: float | None) -> SlotReport:
        return await self._move("restore", operation, slot, name, wait_until)

    async def cancel_slot_operation(self, operation: str) -> None:
        self.cancelled.append(operation)
        self.cancel_seen.set()

    async def erase_slot(self, operation: str, slot: int, wait_until: float | None) -> SlotReport:  # noqa: ARG002
        self.operations.append(("erase", slot, wait_until))
        self._fail()
        return SlotReport(slot=slot)

    async def fork_slot(self, operation: str, slot: int, target: int, wait_until: float | None) -> SlotReport:  # noqa: ARG002
        self.operations.append(("fork", slot, target, wait_until))
        self._fail()
        return SlotReport(slot=target, tokens=600, computed=599)

    async def snapshots(self) -> tuple[SnapshotInfo, ...]:
        self._fail()
        return self.stored

    async def remove_snapshot(self, name: str) -> None:
        self.operations.append(("remove", name))
        self._fail()

    async def _move(self, what: str, operation: str, slot: int, name: str, wait_until: float | None) -> SlotReport:
        self.operations.append((what, operation, slot, name, wait_until))
        self.started.set()
        for done in range(1, 4):
            event = SlotProgress(operation, done, 3, done * CHUNK_BYTES, 3 * CHUNK_BYTES)
            self.streams.deliver([event])
            await asyncio.sleep(0.01)
        if self.hang:
            await self.cancel_seen.wait()
            raise PreconditionError("the operation was cancelled")
        self._fail()
        return SlotReport(
            slot=slot, snapshot=name, tokens=600, computed=599, chunks=3, bytes=3 * CHUNK_BYTES, moved_chunks=2,
            moved_bytes=2 * CHUNK_BYTES, seconds=0.25,
        )  # fmt: skip

    def _fail(self) -> None:
        if self.slot_error is not None:
            raise self.slot_error
