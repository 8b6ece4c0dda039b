"""The gateway's calls of the worker: those that wait leave room for others."""

import asyncio
import time

import pytest

from numoe.actors.gateway import RequestStreams, worker
from numoe.engine.errors import BusyError
from numoe.engine.requests import SlotReport
from tests.actors.gateway.harness import in_loop


class Method:
    """A remote method of an actor."""

    def __init__(self, function):
        self.remote = function


class BusyWorker:
    """Slot 0 is in use until `ended`; operations on it wait as long as they are told."""

    def __init__(self):
        self.ended, self.most, self._running = asyncio.Event(), 0, 0
        self.save_slot = Method(self._save)

    async def _save(self, _, slot, name, wait_until):
        self._running += 1
        self.most = max(self.most, self._running)
        try:
            if slot == 0 and not self.ended.is_set():
                if wait_until is not None:
                    await asyncio.sleep(max(0.0, wait_until - time.time()))
                raise BusyError("slot 0 is in use")
            return SlotReport(slot=slot, snapshot=name)
        finally:
            self._running -= 1


def test_operations_that_wait_for_a_slot_hold_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_TURN_S", 0.01)

    @in_loop
    async def check() -> None:
        client, busy = worker.RayEngineClient(RequestStreams(), None), BusyWorker()
        await client.attach(busy)
        late = time.time() + 1e6
        waiting = [
            asyncio.ensure_future(client.save_slot(str(number), 0, "chat", late))
            for number in range(3 * worker.SLOT_OPERATIONS)
        ]
        with pytest.raises(BusyError):
            await asyncio.wait_for(client.save_slot("impatient", 0, "chat", None), 20)
        report = await asyncio.wait_for(client.save_slot("other", 1, "chat", late), 20)
        assert (report.slot, any(task.done() for task in waiting)) == (1, False)
        busy.ended.set()
        reports = await asyncio.wait_for(asyncio.gather(*waiting), 20)
        assert {report.slot for report in reports} == {0}
        assert busy.most == worker.SLOT_OPERATIONS

    check()
