"""SlotService: saving, restoring and managing what slots hold."""

# ruff: noqa: N802, ARG002 -- gRPC gives the methods their names and arguments
from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from numoe.actors.gateway.errors import answers_errors
from numoe.actors.gateway.interfaces import EngineClient, ServerContext
from numoe.actors.gateway.lifecycle import Lifecycle
from numoe.actors.gateway.streams import RequestStreams
from numoe.actors.gateway.validation import Violations, check_slot
from numoe.engine.errors import InputError, NumoeError, PreconditionError
from numoe.engine.requests import SlotProgress, SlotReport, SlotStatus
from numoe.engine.store.manifest import check_name
from numoe.v1 import admin_pb2, slots_pb2_grpc
from numoe.v1 import slots_pb2 as pb

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Response = type[pb.SaveSlotResponse] | type[pb.RestoreSlotResponse]

_STATES = {
    "idle": admin_pb2.SLOT_STATE_IDLE,
    "loading": admin_pb2.SLOT_STATE_LOADING,
    "prefill": admin_pb2.SLOT_STATE_PREFILL,
    "decode": admin_pb2.SLOT_STATE_DECODE,
    "saving": admin_pb2.SLOT_STATE_SAVING,
    "restoring": admin_pb2.SLOT_STATE_RESTORING,
}


class SlotServicer(slots_pb2_grpc.SlotServiceServicer):
    """Hands operations to the worker, relays their progress, and cancels those whose caller is gone."""

    def __init__(
        self, context: ServerContext, engine: EngineClient, streams: RequestStreams, lifecycle: Lifecycle
    ) -> None:
        self._context = context
        self._engine = engine
        self._streams = streams
        self._lifecycle = lifecycle
        self._cancels: set[asyncio.Task[None]] = set()

    @answers_errors
    async def ListSlots(self, request: pb.ListSlotsRequest, context: Context) -> pb.ListSlotsResponse:
        """What every slot holds."""
        return pb.ListSlotsResponse(slots=map(slot_message, (await self._engine.status()).slots))

    @answers_errors
    async def SaveSlot(  # type: ignore[override]  # grpc.aio takes a coroutine that writes, too
        self, request: pb.SaveSlotRequest, context: Context
    ) -> None:
        """Save, with progress."""
        await self._move(self._engine.save_slot, request, context, pb.SaveSlotResponse)

    @answers_errors
    async def RestoreSlot(  # type: ignore[override]  # grpc.aio takes a coroutine that writes, too
        self, request: pb.RestoreSlotRequest, context: Context
    ) -> None:
        """Restore, with progress."""
        await self._move(self._engine.restore_slot, request, context, pb.RestoreSlotResponse)

    @answers_errors
    async def EraseSlot(self, request: pb.EraseSlotRequest, context: Context) -> pb.EraseSlotResponse:
        """Empty a slot."""
        self._lifecycle.require_serving()
        violations = Violations()
        slot, until = _slot(request, "slot", violations), _wait_until(request, context, violations)
        violations.raise_if_any()
        check_slot(slot, self._context)
        report = await self._unless_left(lambda operation: self._engine.erase_slot(operation, slot, until))
        return pb.EraseSlotResponse(report=_report_message(report))

    @answers_errors
    async def ForkSlot(self, request: pb.ForkSlotRequest, context: Context) -> pb.ForkSlotResponse:
        """Copy a slot into another."""
        self._lifecycle.require_serving()
        violations = Violations()
        slot, target = _slot(request, "slot", violations), _slot(request, "target", violations)
        if request.HasField("target") and slot == target:
            violations.add("target", f"is {target}, the slot itself")
        until = _wait_until(request, context, violations)
        violations.raise_if_any()
        for number in (slot, target):
            check_slot(number, self._context)
        report = await self._unless_left(lambda operation: self._engine.fork_slot(operation, slot, target, until))
        return pb.ForkSlotResponse(report=_report_message(report))

    @answers_errors
    async def ListSnapshots(self, request: pb.ListSnapshotsRequest, context: Context) -> pb.ListSnapshotsResponse:
        """All snapshots."""
        self._require_store()
        response = pb.ListSnapshotsResponse()
        for info in await self._engine.snapshots():
            response.snapshots.add(
                name=info.name,
                tokens=info.tokens,
                computed=info.computed,
                bytes=info.bytes,
                created=_timestamp(info.created),
                mismatch=info.mismatch or None,
            )
        return response

    @answers_errors
    async def RemoveSnapshot(self, request: pb.RemoveSnapshotRequest, context: Context) -> pb.RemoveSnapshotResponse:
        """Remove a snapshot."""
        self._lifecycle.require_serving()
        violations = Violations()
        name = _name(request.name, violations)
        violations.raise_if_any()
        self._require_store()
        await self._engine.remove_snapshot(name)
        return pb.RemoveSnapshotResponse()

    async def _move(
        self,
        start: Callable[[str, int, str, float | None], Awaitable[SlotReport]],
        request: pb.SaveSlotRequest | pb.RestoreSlotRequest,
        context: Context,
        response: Response,
    ) -> None:
        """Run a save or restore to its end, sending progress and at last the report."""
        self._lifecycle.require_serving()
        violations = Violations()
        slot, name = _slot(request, "slot", violations), _name(request.name, violations)
        until = _wait_until(request, context, violations)
        violations.raise_if_any()
        check_slot(slot, self._context)
        self._require_store()
        operation = secrets.token_hex(12)
        with self._streams.open(operation, self._cancel_soon) as stream:
            work = asyncio.ensure_future(start(operation, slot, name, until))
            events = asyncio.ensure_future(stream.next_events())
            try:
                while not work.done():
                    await asyncio.wait({work, events}, return_when=asyncio.FIRST_COMPLETED)
                    if events.done():
                        for event in events.result():
                            if isinstance(event, SlotProgress):
                                await context.write(response(progress=_progress_message(event)))
                        events = asyncio.ensure_future(stream.next_events())
                await context.write(response(report=_report_message(work.result())))
            finally:
                if not work.done():
                    self._cancel_soon(operation)
                for task in (work, events):
                    task.cancel()
                await asyncio.gather(work, events, return_exceptions=True)  # so that none fails unheard

    def _require_store(self) -> None:
        """Raise PreconditionError on a server without one."""
        if not self._context.has_store:
            raise PreconditionError("this server has no store: start it with --store URL, or without --store none")

    async def _unless_left(self, start: Callable[[str], Awaitable[SlotReport]]) -> SlotReport:
        """Await an operation, and end it when its caller is gone."""
        operation = secrets.token_hex(12)
        try:
            return await start(operation)
        except asyncio.CancelledError:
            self._cancel_soon(operation)
            raise

    def _cancel_soon(self, operation: str) -> None:
        """Cancel without waiting: the caller may itself be in the middle of being cancelled."""
        task = asyncio.get_running_loop().create_task(self._cancel(operation))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def _cancel(self, operation: str) -> None:
        try:
            await self._engine.cancel_slot_operation(operation)
        except NumoeError as error:
            logger.warning("slot operation %s could not be cancelled: %s", operation, error)


def slot_message(slot: SlotStatus) -> admin_pb2.SlotStatus:
    """Describe a slot."""
    return admin_pb2.SlotStatus(
        slot=slot.slot,
        state=_STATES[slot.state],
        request_id=slot.request_id or None,
        tokens=slot.tokens,
        computed=slot.computed,
        cached=slot.cached,
        snapshot=slot.snapshot or None,
        last_used=_timestamp(slot.last_used) if slot.last_used else None,
    )


def _slot(request: Any, field: str, violations: Violations) -> int:
    """A required slot number."""
    if not request.HasField(field):
        violations.add(field, "is missing: say which slot")
    return int(getattr(request, field))


def _name(name: str, violations: Violations) -> str:
    """A snapshot's name."""
    try:
        return check_name(name)
    except InputError as error:
        violations.add("name", str(error))
        return ""


def _wait_until(request: Any, context: Context, violations: Violations) -> float | None:
    """`time.time()` until which a busy slot is waited for: no longer than the caller waits."""
    if not request.HasField("wait"):
        return None
    remaining = context.time_remaining()
    seconds = violations.duration("wait", request.wait)
    return time.time() + (seconds if remaining is None else min(seconds, remaining))


def _timestamp(seconds: float) -> Timestamp:
    """Seconds since 1970."""
    result = Timestamp()
    result.FromNanoseconds(int(seconds * 1e9))
    return result


def _progress_message(event: SlotProgress) -> pb.SlotProgress:
    return pb.SlotProgress(
        done_chunks=event.done_chunks, chunks=event.chunks, done_bytes=event.done_bytes, bytes=event.bytes
    )


def _report_message(report: SlotReport) -> pb.SlotReport:
    return pb.SlotReport(
        slot=report.slot,
        tokens=report.tokens,
        computed=report.computed,
        snapshot=report.snapshot or None,
        chunks=report.chunks,
        bytes=report.bytes,
        moved_chunks=report.moved_chunks,
        moved_bytes=report.moved_bytes,
        seconds=report.seconds,
    )
