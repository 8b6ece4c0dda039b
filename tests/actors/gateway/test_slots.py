"""SlotService, and requests that name a slot: what a caller reads for what the worker does."""

import time
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from numoe.actors.gateway.prompts import UNBOUNDED
from numoe.engine.errors import (
    DataLossError,
    NotFoundError,
    NumoeError,
    PreconditionError,
    ResourceError,
    UnavailableError,
)
from numoe.engine.requests import Finished, SlotProgress, SnapshotInfo, Timings
from numoe.v1 import admin_pb2
from numoe.v1 import slots_pb2 as pb
from numoe.v1.generation_pb2 import StopOptions
from tests.actors.gateway.harness import CONTEXT, Gateway, in_loop, refusal, serving, until
from tests.actors.gateway.scripted_slots import CHUNK_BYTES

DAY = 86_400


async def messages(call: Any) -> list[Any]:
    return [message async for message in call]


async def refused(call: Any) -> tuple[grpc.StatusCode, str, list[str]]:
    failed = await refusal(call)
    return failed.code, failed.message, failed.fields


@pytest.mark.parametrize("what", ["save", "restore"])
@in_loop
async def test_progress_then_one_report(what: str) -> None:
    async with serving() as gateway:
        call, kind = (
            (gateway.slots.SaveSlot, pb.SaveSlotRequest)
            if what == "save"
            else (gateway.slots.RestoreSlot, pb.RestoreSlotRequest)
        )
        stream = await messages(call(kind(slot=3, name="chat")))
        *progress, last = stream
        assert [message.WhichOneof("event") for message in stream] == ["progress"] * len(progress) + ["report"]
        assert progress[0].progress == pb.SlotProgress(
            done_chunks=1, chunks=3, done_bytes=CHUNK_BYTES, bytes=3 * CHUNK_BYTES
        )
        assert last.report == pb.SlotReport(
            slot=3, snapshot="chat", tokens=600, computed=599, chunks=3, bytes=3 * CHUNK_BYTES, moved_chunks=2,
            moved_bytes=2 * CHUNK_BYTES, seconds=0.25,
        )  # fmt: skip
        ((name, operation, *arguments),) = gateway.engine.operations
        assert (name, arguments) == (what, [3, "chat", None])
        assert operation
        assert gateway.engine.cancelled == []
        assert len(gateway.streams) == 0


@in_loop
async def test_slots_are_listed_with_what_they_hold() -> None:
    async with serving() as gateway:
        first, second = (await gateway.slots.ListSlots(pb.ListSlotsRequest())).slots
        assert (first.slot, first.state, first.request_id) == (0, admin_pb2.SLOT_STATE_DECODE, "a")
        assert not first.HasField("snapshot")
        assert not first.HasField("last_used")
        assert (second.state, second.tokens, second.computed, second.cached) == (
            admin_pb2.SLOT_STATE_IDLE, 600, 599, 512,
        )  # fmt: skip
        assert (second.snapshot, second.last_used.seconds) == ("chat", 10**9)


@in_loop
async def test_status_tells_what_the_prompt_cache_holds() -> None:
    async with serving() as gateway:
        cache = (await gateway.admin.GetStatus(admin_pb2.GetStatusRequest())).cache
        assert (cache.ram_bytes, cache.ram_limit_bytes, cache.pending_chunks) == (3_000_000, 1 << 30, 2)
        assert (cache.store_url, cache.store_error) == ("s3://bucket/prefix", "it is full")
        assert not cache.HasField("store_limit_bytes")
        assert (cache.hits_pages, cache.hits_ram, cache.hits_store, cache.misses) == (5, 4, 3, 2)


@in_loop
async def test_erase_fork_and_remove() -> None:
    async with serving() as gateway:
        erased = await gateway.slots.EraseSlot(pb.EraseSlotRequest(slot=0))
        assert erased.report == pb.SlotReport(slot=0)
        forked = await gateway.slots.ForkSlot(pb.ForkSlotRequest(slot=0, target=2))
        assert forked.report == pb.SlotReport(slot=2, tokens=600, computed=599)
        await gateway.slots.RemoveSnapshot(pb.RemoveSnapshotRequest(name="chat"))
        assert gateway.engine.operations == [("erase", 0, None), ("fork", 0, 2, None), ("remove", "chat")]


@in_loop
async def test_snapshots_say_which_can_be_restored_here() -> None:
    stored = (
        SnapshotInfo(name="a", tokens=600, computed=599, bytes=7, created=1e9),
        SnapshotInfo(name="b", tokens=1, computed=0, bytes=0, created=2e9, mismatch="KV cache type is q8_0"),
    )
    async with serving(stored=stored) as gateway:
        first, second = (await gateway.slots.ListSnapshots(pb.ListSnapshotsRequest())).snapshots
        assert (first.name, first.tokens, first.computed, first.bytes) == ("a", 600, 599, 7)
        assert first.created.ToDatetime(UTC) == datetime.fromtimestamp(1e9, UTC)
        assert not first.HasField("mismatch")
        assert second.mismatch == "KV cache type is q8_0"


@in_loop
async def test_a_wait_is_a_time_and_ends_with_the_caller() -> None:
    async with serving() as gateway:
        slots, wait = gateway.slots, Duration(seconds=90)
        before = time.time()
        await messages(slots.SaveSlot(pb.SaveSlotRequest(slot=0, name="chat", wait=wait)))
        await slots.EraseSlot(pb.EraseSlotRequest(slot=0, wait=wait))
        await slots.ForkSlot(pb.ForkSlotRequest(slot=0, target=1, wait=wait), timeout=20)
        after = time.time()
        saved, erased, forked = (operation[-1] for operation in gateway.engine.operations)
        assert before + 90 <= saved <= erased <= after + 90
        assert before + 15 <= forked <= after + 60  # not 90


@in_loop
async def test_bad_fields_are_named_and_reach_no_worker() -> None:
    async with serving() as gateway:
        slots, long = gateway.slots, Duration(seconds=DAY + 1)
        for call, fields in (
            (messages(slots.SaveSlot(pb.SaveSlotRequest(name="../x", wait=Duration(seconds=-1)))), "slot name wait"),
            (messages(slots.RestoreSlot(pb.RestoreSlotRequest(slot=0))), "name"),
            (messages(slots.RestoreSlot(pb.RestoreSlotRequest(slot=0, name="a" * 101))), "name"),
            (slots.EraseSlot(pb.EraseSlotRequest()), "slot"),
            (slots.EraseSlot(pb.EraseSlotRequest(slot=0, wait=long)), "wait"),
            (slots.ForkSlot(pb.ForkSlotRequest(slot=1)), "target"),
            (slots.ForkSlot(pb.ForkSlotRequest(slot=1, target=1)), "target"),
            (slots.RemoveSnapshot(pb.RemoveSnapshotRequest()), "name"),
            (gateway.generate(slot_wait=Duration(seconds=1)), "slot_wait"),
            (gateway.generate(slot_id=0, slot_wait=long), "slot_wait"),
        ):
            code, _, found = await refused(call)
            assert (code, found) == (grpc.StatusCode.INVALID_ARGUMENT, fields.split())
        assert gateway.engine.operations == []


@in_loop
async def test_a_slot_that_there_is_not_is_not_found() -> None:
    async with serving() as gateway:
        slots = gateway.slots
        for call in (
            messages(slots.SaveSlot(pb.SaveSlotRequest(slot=8, name="chat"))),
            messages(slots.RestoreSlot(pb.RestoreSlotRequest(slot=8, name="chat"))),
            slots.EraseSlot(pb.EraseSlotRequest(slot=8)),
            slots.ForkSlot(pb.ForkSlotRequest(slot=8, target=1)),
            slots.ForkSlot(pb.ForkSlotRequest(slot=1, target=8)),
            gateway.generate(slot_id=8),
        ):
            code, message, _ = await refused(call)
            assert code is grpc.StatusCode.NOT_FOUND
            assert message == "there is no slot 8: this server has slots 0 to 7 (--parallel)"
        assert gateway.engine.operations == gateway.engine.requests == []


@in_loop
async def test_without_a_store_slots_are_forked_and_erased_but_not_saved() -> None:
    async with serving(has_store=False) as gateway:
        slots = gateway.slots
        await slots.ForkSlot(pb.ForkSlotRequest(slot=0, target=1))
        await slots.EraseSlot(pb.EraseSlotRequest(slot=0))
        for call in (
            messages(slots.SaveSlot(pb.SaveSlotRequest(slot=0, name="chat"))),
            messages(slots.RestoreSlot(pb.RestoreSlotRequest(slot=0, name="chat"))),
            slots.ListSnapshots(pb.ListSnapshotsRequest()),
            slots.RemoveSnapshot(pb.RemoveSnapshotRequest(name="chat")),
        ):
            code, message, _ = await refused(call)
            assert (code, "--store" in message) == (grpc.StatusCode.FAILED_PRECONDITION, True)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFoundError("no snapshot chat"), grpc.StatusCode.NOT_FOUND),
        (PreconditionError("slot 0 is busy"), grpc.StatusCode.FAILED_PRECONDITION),
        (DataLossError("chunk 12ab is damaged"), grpc.StatusCode.DATA_LOSS),
        (ResourceError("the store is full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (UnavailableError("the store is down"), grpc.StatusCode.UNAVAILABLE),
    ],
)
@in_loop
async def test_errors_keep_their_kind_and_message(error: NumoeError, code: grpc.StatusCode) -> None:
    async with serving(slot_error=error) as gateway:
        slots = gateway.slots
        for call in (
            messages(slots.SaveSlot(pb.SaveSlotRequest(slot=0, name="chat"))),
            messages(slots.RestoreSlot(pb.RestoreSlotRequest(slot=0, name="chat"))),
            slots.EraseSlot(pb.EraseSlotRequest(slot=0)),
            slots.ForkSlot(pb.ForkSlotRequest(slot=0, target=1)),
            slots.ListSnapshots(pb.ListSnapshotsRequest()),
            slots.RemoveSnapshot(pb.RemoveSnapshotRequest(name="chat")),
        ):
            assert await refused(call) == (code, str(error), [])
        assert gateway.engine.cancelled == []  # they have ended by themselves


@pytest.mark.parametrize("expires", [False, True])
@in_loop
async def test_a_caller_who_leaves_cancels_the_operation(*, expires: bool) -> None:
    async with serving(hang=True) as gateway:
        call = gateway.slots.SaveSlot(pb.SaveSlotRequest(slot=0, name="chat"), timeout=0.2 if expires else None)
        await gateway.engine.started.wait()
        if not expires:
            call.cancel()
        await gateway.engine.cancel_seen.wait()
        assert gateway.engine.cancelled == [gateway.engine.operations[0][1]]
        await until(lambda: len(gateway.streams) == 0)


@in_loop
async def test_a_server_that_stops_ends_operations_and_one_that_drains_waits_for_them() -> None:
    async with serving(hang=True) as gateway:
        call = gateway.slots.RestoreSlot(pb.RestoreSlotRequest(slot=0, name="chat"))
        await gateway.engine.started.wait()
        assert not await gateway.server.drain(0.05)
        code, message, _ = await refused(messages(gateway.slots.SaveSlot(pb.SaveSlotRequest(slot=0, name="x"))))
        assert (code, "shutting down" in message) == (grpc.StatusCode.UNAVAILABLE, True)
        gateway.streams.fail_all("a worker is gone")
        assert (await refused(messages(call)))[:2] == (grpc.StatusCode.UNAVAILABLE, "a worker is gone")
        await gateway.engine.cancel_seen.wait()


@in_loop
async def test_a_slow_reader_gets_the_latest_progress() -> None:
    async with serving(backlog=2) as gateway:
        with gateway.streams.open("operation", lambda _: None) as stream:
            for done in range(9):
                stream.push(SlotProgress("operation", done, 9, done, 9))
            assert [event.done_chunks for event in await stream.next_events()] == [8]


@in_loop
async def test_a_request_names_its_slot() -> None:
    async with serving() as gateway:
        before = time.time()
        await gateway.generate()
        await gateway.generate(slot_id=0)
        await gateway.generate(slot_id=7, slot_wait=Duration(seconds=60))
        anywhere, first, waits = gateway.engine.requests
        assert (anywhere.slot, anywhere.slot_deadline) == (None, None)
        assert (first.slot, first.slot_deadline) == (0, None)
        assert waits.slot == 7
        assert before + 60 <= waits.slot_deadline <= time.time() + 60


@in_loop
async def test_a_slot_that_stays_busy_is_a_failed_precondition() -> None:
    async with serving(submit_error=PreconditionError("slot 0 is busy")) as gateway:
        at_once = await gateway.refused(slot_id=0)
    async with serving() as gateway:
        later = await _busy(gateway)
    for failed in (at_once, later):
        assert (failed.code, failed.message) == (grpc.StatusCode.FAILED_PRECONDITION, "slot 0 is busy")
        assert failed.info.reason == "PRECONDITION"
    assert gateway.engine.aborted == []


@in_loop
async def test_answers_end_with_the_context_unless_the_server_goes_on() -> None:
    for goes_on, most in ((False, CONTEXT - 3), (True, UNBOUNDED)):
        async with serving(outlasts_context=goes_on) as gateway:
            for max_tokens in (None, 2, 1000):
                await gateway.generate(text="hi", stopping=StopOptions(max_tokens=max_tokens))
            limits = [request.max_tokens for request in gateway.engine.requests]
            assert limits == [most, 2, min(1000, most)]


async def _busy(gateway: Gateway) -> Any:
    async def submit(request: Any) -> None:
        ended = Finished(request.request_id, "slot_busy", 0, Timings(), "slot 0 is busy")
        gateway.streams.deliver([ended])

    gateway.engine.submit = submit  # type: ignore[method-assign]
    return await gateway.refused(slot_id=0, slot_wait=Duration(seconds=1))
