"""The gateway's way to the attention worker and the supervisor, over Ray calls, while either may be replaced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayTaskError

from numoe.actors.gateway.streams import RequestStreams
from numoe.cluster.status import ActorInfo
from numoe.engine.errors import BusyError, NumoeError, UnavailableError
from numoe.engine.requests import GenerationRequest, SlotReport, SnapshotInfo, WorkerStatus

SLOT_OPERATIONS = 8
"""At once, as each holds a thread of the worker's, which others need for requests and to end operations."""
_TURN_S = 0.5  # in which an operation waits for its slot before others have their turn
_LOOK_S = 0.1
_SUPERVISOR_S = 12.0  # in which one that died is there again
T = TypeVar("T")


class LostError(UnavailableError):
    """The actor that was called is dead."""


class RayEngineClient:
    """See `EngineClient`. Requests outlive their worker: `attach` hands what is left of them to the next one."""

    def __init__(self, streams: RequestStreams, supervisor: Any) -> None:
        self._streams, self._supervisor = streams, supervisor
        self._worker: Any = None
        self._turn = asyncio.Lock()  # so that no request comes before those of a lost worker
        self._slot_operations = asyncio.Semaphore(SLOT_OPERATIONS)

    async def attach(self, worker: Any) -> None:
        """Call this worker from now on. It gets the requests that have not ended, oldest first."""
        async with self._turn:
            self._worker = worker
            for stream in self._streams:
                if (request := stream.remainder()) is not None:
                    try:
                        await _call(worker.submit.remote(request))
                    except LostError:
                        return  # its successor gets them
                    except NumoeError as error:
                        stream.fail(error)

    async def submit(self, request: GenerationRequest) -> None:
        """Queue a request."""
        async with self._turn:
            self._streams[request.request_id].submitted(request)
            worker = self._worker
        while worker is not None:
            try:
                return await _call(worker.submit.remote(request))
            except LostError:
                await asyncio.sleep(_LOOK_S)
                if self._worker is not worker:
                    return None  # `attach` has seen to it
        return None  # as it will

    async def abort(self, request_id: str) -> None:
        """End a request."""
        while True:
            try:
                return await _call(self._of_worker("abort").remote(request_id))
            except LostError:
                if request_id not in self._streams:
                    return None
                await asyncio.sleep(_LOOK_S)

    async def save_slot(self, operation: str, slot: int, name: str, wait_until: float | None) -> SlotReport:
        """Make a snapshot of a slot."""
        report: SlotReport = await self._operate_on_slot("save_slot", wait_until, operation, slot, name)
        return report

    async def restore_slot(self, operation: str, slot: int, name: str, wait_until: float | None) -> SlotReport:
        """Put a snapshot into a slot."""
        report: SlotReport = await self._operate_on_slot("restore_slot", wait_until, operation, slot, name)
        return report

    async def cancel_slot_operation(self, operation: str) -> None:
        """End a save or restore."""
        await _call(self._of_worker("cancel_slot_operation").remote(operation))

    async def erase_slot(self, operation: str, slot: int, wait_until: float | None) -> SlotReport:
        """Empty a slot."""
        report: SlotReport = await self._operate_on_slot("erase_slot", wait_until, operation, slot)
        return report

    async def fork_slot(self, operation: str, slot: int, target: int, wait_until: float | None) -> SlotReport:
        """Make two slots hold the same."""
        report: SlotReport = await self._operate_on_slot("fork_slot", wait_until, operation, slot, target)
        return report

    async def snapshots(self) -> tuple[SnapshotInfo, ...]:
        """The store's snapshots."""
        found: tuple[SnapshotInfo, ...] = await self._operate(lambda: self._of_worker("snapshots").remote())
        return found

    async def remove_snapshot(self, name: str) -> None:
        """Remove a snapshot."""
        await self._operate(lambda: self._of_worker("remove_snapshot").remote(name))

    async def status(self) -> WorkerStatus:
        """What the worker is doing."""
        status: WorkerStatus = await _call(self._of_worker("status").remote())
        return status

    async def actors(self) -> list[ActorInfo]:
        """The server's processes."""
        found: list[ActorInfo] = await _ask(self._supervisor.actors.remote)
        return found

    async def shutdown(self, deadline_s: float, *, keep_weights: bool) -> None:
        """Begin to stop the server."""
        await _ask(lambda: self._supervisor.shutdown.remote(deadline_s, keep_weights=keep_weights))

    def _of_worker(self, method: str) -> Any:
        """A method of the worker, to be called over Ray."""
        if self._worker is None:
            raise LostError("the attention worker is being replaced; try again")
        return getattr(self._worker, method)

    async def _operate_on_slot(self, method: str, wait_until: float | None, *args: Any) -> Any:
        """Operate; who waits for a slot that is in use takes turns, so that others get through to theirs."""

        def call() -> Awaitable[Any]:
            turn = None if wait_until is None else min(wait_until, time.time() + _TURN_S)
            found: Awaitable[Any] = self._of_worker(method).remote(*args, turn)
            return found

        while True:
            try:
                return await self._operate(call)
            except BusyError:
                if wait_until is None or time.time() >= wait_until:
                    raise

    async def _operate(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Call the worker; a caller who leaves does not make room for others before the worker is done."""
        await self._slot_operations.acquire()
        try:
            work = asyncio.ensure_future(_call(call()))
        except BaseException:
            self._slot_operations.release()
            raise
        work.add_done_callback(self._operated)
        return await asyncio.shield(work)

    def _operated(self, work: asyncio.Future[Any]) -> None:
        self._slot_operations.release()
        if not work.cancelled():
            work.exception()  # heard, even where nobody waits for it


async def _call(reference: Awaitable[T]) -> T:
    """Await a Ray call; numoe's own errors as they were raised, a dead actor as LostError."""
    try:
        return await reference
    except RayTaskError as error:
        if isinstance(error.cause, NumoeError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise LostError(f"a worker of this server is gone: {error}") from None


async def _ask(call: Callable[[], Awaitable[T]]) -> T:
    """Make a Ray call to the supervisor, again while Ray restarts it."""
    until = time.monotonic() + _SUPERVISOR_S
    while True:
        try:
            return await _call(call())
        except LostError:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(_LOOK_S)
