"""How a server's actors come up and are joined, at its start and when one is replaced.

A worker is told: open_mailbox, initialize, attach_experts. A shard: initialize. A gateway: initialize, before
anything is loaded, so that it can be asked how things are, and serve at last. All: run.
Worker and gateway are joined: worker.connect(gateway), gateway.attach(worker), worker.settle. To another supervisor's
keeper a worker hands what shall outlive it: hand_over.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from numoe.cluster.calls import get
from numoe.cluster.endpoint import Endpoint
from numoe.cluster.member import Member, Phase, ServerRecord
from numoe.cluster.placing import Placing
from numoe.cluster.plan import Plan
from numoe.cluster.status import ActorRole
from numoe.engine.errors import UnavailableError
from numoe.engine.keeper import SOCKET, Keeper
from numoe.engine.shm import adopt_folder
from numoe.engine.weights import CachedPages, WeightSlice, hold_weights, is_loaded, sweep_incomplete

logger = logging.getLogger(__name__)

_ANSWER_S = 20.0  # in which a new process says who it is
_JOIN_S = 30.0


class Assembly:
    """The members of a server, in a folder that remembers them. supervisor: its actor's name in Ray."""

    def __init__(self, plan: Plan, folder: Path, endpoint: Endpoint | None, placing: Placing, supervisor: str) -> None:
        self._plan, self._folder, self._endpoint, self._placing = plan, folder, endpoint, placing
        self._supervisor = supervisor
        self.members: list[Member] = []
        self.phase: Phase = "launching"
        self.address = ""
        self.keep_weights, self.drain_until = False, 0.0
        self.supervisors = 0  # that have died
        self._connection, self._joined = 0, ("", "")
        self._joining, self._saving = threading.Lock(), threading.Lock()
        self.weights: list[WeightSlice] = []
        self._keeper: Keeper | None = None

    # --- the whole --------------------------------------------------------------------------------

    def launch(self) -> None:
        """Place all actors and bring them up. Raises the first one's error."""
        self._keep()
        self._placing.reserve()
        if self._endpoint is not None:
            self.members.append(Member("gateway", "gateway"))
        self.members.append(Member("attention", "attention"))
        for shard in self._plan.shards:
            self.members.append(Member("expert", f"experts {shard.index}", shard.index, shard.numa_node))
        for member in self.members:
            member.actor, member.handle = self._placing.spawn(member.role, member.index)
        for member in self.members:
            self._identify(member)
        for gateway in self.of("gateway"):
            self._open(gateway)
        worker = self.of("attention")[0]
        get(worker.handle.open_mailbox.remote(create=True))
        self._load(worker)
        for member in reversed(self.members):
            self._serve(member)
        if self.phase == "launching":  # and not told to stop already
            self.phase = "running"
        self.save()

    def _load(self, worker: Member) -> None:
        """Have the weights loaded or attached to, and leave the page cache as it was found."""
        sweep_incomplete()
        pages = None
        if not all(is_loaded(key) for key in self._plan.slices):
            pages = CachedPages.look(self._plan.files)
            pages.save(self._folder)
        loading = [member.handle.initialize.remote(member.index) for member in self.of("expert")]
        get([worker.handle.initialize.remote(), *loading])
        get(worker.handle.attach_experts.remote())
        if pages is not None:
            pages.drop_all()
        self.hold_weights()

    def hold_weights(self) -> None:
        """Keep the weights in shared memory, whoever dies."""
        self.weights = hold_weights(self._folder)

    def _keep(self) -> None:
        """Keep the worker's memory, as far as there is room for a socket."""
        if self._keeper is None:
            try:
                self._keeper = Keeper(self._folder / SOCKET)
            except OSError as error:
                logger.warning("the worker's memory may not outlive it: %s: %s", self._folder, error.strerror)

    def let_go(self) -> None:
        """Keep nothing any more: what nobody else uses can be freed."""
        for weights in self.weights:
            weights.close()
        if self._keeper is not None:
            self._keeper.close()

    def take_over(self, record: ServerRecord) -> list[Member]:
        """Go on where another supervisor has died; the members that have to be replaced."""
        self._keep()
        self._placing.take_over()
        self.address, self.phase, self.supervisors = record.address, record.phase, record.restarts + 1
        self.keep_weights, self.drain_until = record.keep_weights, record.drain_until
        self._connection, self._joined = record.connection, record.joined
        self.members = [Member.of(remembered) for remembered in record.members]
        lost = [member for member in self.members if member.handle is None or member.state != "running"]
        self._placing.kill_others({member.actor for member in self.members if member not in lost})
        for member in self.members:
            if member in lost:
                member.died()
            else:
                member.run = self._run(member)
                if member.role == "gateway":  # it may have been joined, but not told yet
                    member.handle.serve.remote()
                elif member.role == "attention":
                    member.handle.hand_over.remote()
        self.hold_weights()
        self.save()
        return lost

    def save(self) -> None:
        """Remember the members, and let the folder stay while any of them lives.

        A server whose supervisor remembers too little is better than none: where somebody has removed the folder, the
        log says so.
        """
        with self._saving:
            members = tuple(member.record() for member in self.members)
            record = ServerRecord(
                phase=self.phase, members=members, address=self.address,
                keep_weights=self.keep_weights, drain_until=self.drain_until,
                connection=self._connection, joined=self._joined, restarts=self.supervisors,
                pid=os.getpid(), host=socket.gethostname(),
            )  # fmt: skip
            try:
                record.save(self._folder)
                adopt_folder(self._folder, [os.getpid(), *(member.pid for member in self.members if member.is_local)])
            except OSError as error:
                logger.warning("the server's state cannot be saved in %s: %s", self._folder, error.strerror)

    def of(self, role: ActorRole) -> list[Member]:
        """The members of a role."""
        return [member for member in self.members if member.role == role]

    # --- one member -------------------------------------------------------------------------------

    def replace(self, member: Member, *, afresh: bool = False) -> None:
        """Put another actor in a dead member's place. Raises UnavailableError if that dies or hangs, too.

        afresh: a worker does not go on with the memory of those before: it may be what they died of.
        """
        self._keep()
        if afresh and member.role == "attention" and self._keeper is not None:
            self._keeper.forget()
        if member.role == "gateway":
            self._abandon_requests()
        member.kill()
        member.actor, member.handle = self._placing.replacement(member.role, member.index)
        self._identify(member)
        if member.role == "attention":
            get(member.handle.open_mailbox.remote(create=False))
            get(member.handle.initialize.remote())
            get(member.handle.attach_experts.remote())
        elif member.role == "expert":
            get(member.handle.initialize.remote(member.index))
        else:
            self._open(member)
        self._serve(member)

    def _identify(self, member: Member) -> None:
        member.pid = 0
        who = get(member.handle.identity.remote(), _ANSWER_S)
        member.pid, member.host = who.pid, who.host
        self.save()

    def _open(self, gateway: Member) -> None:
        """Have a gateway listen: it tells how things are, and refuses requests until it serves."""
        assert self._endpoint is not None
        endpoint = replace(self._endpoint, listen=self.address or self._endpoint.listen)
        supervisor = ray.get_actor(self._supervisor)
        self.address = get(gateway.handle.initialize.remote(endpoint, supervisor))

    def _serve(self, member: Member) -> None:
        """Have a member that is initialized do its work, for each other and for clients.

        Its `run` comes last: once that is known its end is seen to, which must not happen while it is coming up.
        """
        run = self._run(member) if member.role == "expert" or self._endpoint is not None else None
        member.came_up()
        self.join()
        if member.role == "gateway":
            get(member.handle.serve.remote())
        self.save()
        member.run = run

    def _run(self, member: Member) -> Any:
        return member.handle.run.remote()

    @property
    def is_apart(self) -> bool:
        """Whether worker and gateway are both up, but not connected with each other."""
        pair = self.of("attention") + self.of("gateway")
        running = len(pair) == 2 and all(member.state == "running" for member in pair)
        return running and tuple(member.actor for member in pair) != self._joined

    @property
    def is_joining(self) -> bool:
        """Whether somebody connects them."""
        return self._joining.locked()

    def join(self) -> None:
        """Connect worker and gateway if they are apart. Where one of them is dead, its successor is connected."""
        with self._joining:
            if not self.is_apart:
                return
            (worker,), (gateway,) = self.of("attention"), self.of("gateway")
            names = worker.actor, gateway.actor
            self._connection += 1
            self.save()  # before it is used: no other may have the same number, whoever dies
            with contextlib.suppress(UnavailableError):
                get(worker.handle.connect.remote(gateway.handle, self._connection), _JOIN_S)
                get(gateway.handle.attach.remote(worker.handle, self._connection), _JOIN_S)
                worker.handle.settle.remote()
                self._joined = names
                self.save()

    def _abandon_requests(self) -> None:
        """Have the worker end what a dead gateway has asked for."""
        for worker in self.of("attention"):
            if worker.state != "running":
                continue
            with contextlib.suppress(UnavailableError):  # it has died, too
                get(worker.handle.connect.remote(None, self._connection), _ANSWER_S)
