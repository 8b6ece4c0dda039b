"""The supervisor: has the other actors placed, replaces those that die, and takes them down again.

A named, detached Ray actor, as are the others: so none of them dies with it, and Ray starts it again. It is given
the actor classes, so that it knows only their lifecycle: a cheap constructor, `initialize`, a long-running `run` whose
pending reference is the sign of life, `identity` and `progress`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from numoe.cluster.assembly import Assembly
from numoe.cluster.bandwidth import remembered
from numoe.cluster.endpoint import Endpoint
from numoe.cluster.heartbeats import SignsOfLife
from numoe.cluster.member import Member, ServerRecord, end_processes
from numoe.cluster.placing import NAMESPACE, ActorClasses, Placing
from numoe.cluster.plan import Plan
from numoe.cluster.signals import die_of_sigterm
from numoe.cluster.status import SAVE_S, ActorInfo, ActorPlacement, ActorState, LoadProgress
from numoe.cluster.topology import Topology
from numoe.engine import shm
from numoe.engine.errors import InputError, UnavailableError
from numoe.engine.weights import free_weights, sweep_incomplete

__all__ = ["NAMESPACE", "ActorClasses", "Supervisor"]

logger = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 10.0
_PLACEMENT_ANSWER_S = 2.0
_LOOK_S = 0.2
_LONGEST_LOOK_S = 60.0
_ATTEMPTS = 5
_ATTEMPTS_AS_BEFORE = 2
_MOST_CRASHES = 12
_LINGER_S = 3.0  # in which those who wait hear of the end
_SPARES_AFTER_S = 5.0  # of quiet: a server that has just come up has better things to do


@dataclass
class _Outcome:
    """How the server ended: an empty message when it was told to stop."""

    ended: threading.Event = field(default_factory=threading.Event)
    message: str = ""


class Supervisor:
    """Ray actor, threaded. `launch` brings everything up; `wait` returns when it is down again."""

    def __init__(
        self, instance: str, plan: Plan, classes: ActorClasses, endpoint: Endpoint | None, *, keep_weights: bool = False
    ) -> None:
        die_of_sigterm()
        self._plan, self._endpoint, self._name = plan, endpoint, supervisor_name(instance)
        self._bandwidth: dict[int, float] = {}
        self._outcome, self._stopping = _Outcome(), threading.Lock()
        self._looked = math.inf  # by `time.monotonic`; nobody looks before everybody is up
        self._folder = shm.ROOT / instance
        self._placing = Placing(instance, plan, classes, str(self._folder))
        self._assembly = Assembly(plan, self._folder, endpoint, self._placing, self._name)
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._take_over()
        else:
            ServerRecord.reserve(shm.create_folder(instance))
            self._assembly.keep_weights = keep_weights
            self._assembly.save()

    # --- bringing up ------------------------------------------------------------------------------

    def launch(self) -> str:
        """Place and start all actors; the gateway's address, empty without a gateway.

        Raises the first actor's error, and UnavailableError if it is told to stop meanwhile; everything is taken down
        again then.
        """
        try:
            self._assembly.launch()
        except Exception as error:
            if self._stopping.locked():
                raise UnavailableError("the server was told to stop while it started") from None
            self._take_down(str(error))
            raise
        threading.Thread(target=self._watch, name="numoe-watch", daemon=True).start()
        return self._assembly.address

    def _take_over(self) -> None:
        """Go on where the supervisor that has died was."""
        record = ServerRecord.load(self._folder)
        if record is None:  # it had taken everything down
            self._end()
            return
        lost = self._assembly.take_over(record)
        if record.phase not in ("running", "draining"):
            why = "" if record.phase == "stopping" else "the supervisor died while the server was starting"
            threading.Thread(target=self._take_down, args=(why,), name="numoe-down", daemon=True).start()
            return
        logger.warning("the supervisor was restarted")
        for member in lost:
            self._replace_soon(member, "was lost with the supervisor")
        threading.Thread(target=self._watch, name="numoe-watch", daemon=True).start()
        if record.phase == "draining":
            self._drain_soon()

    # --- looking ----------------------------------------------------------------------------------

    def progress(self) -> list[LoadProgress]:
        """How far the actors that load have come."""
        found = []
        for member in list(self._assembly.members):
            if member.role in ("attention", "expert") and member.handle is not None:
                with contextlib.suppress(RayError, GetTimeoutError):
                    progress = ray.get(member.handle.progress.remote(), timeout=_CALL_TIMEOUT_S)
                    found.append(LoadProgress(name=member.name, **progress))
        return found

    def actors(self) -> list[ActorInfo]:
        """Every process of the server, this one included."""
        state: ActorState = "draining" if self._assembly.phase in ("draining", "stopping") else "running"
        own = ActorInfo(
            role="supervisor", pid=os.getpid(), host=socket.gethostname(), state=state,
            restarts=self._assembly.supervisors,
        )  # fmt: skip
        placements = self._placements()
        return [*(member.info(placements.get(member.name)) for member in self._assembly.members), own]

    def _placements(self) -> dict[str, ActorPlacement]:
        """Where the actors that compute are; who does not answer at once is left out."""
        asked = {
            member.handle.placement.remote(): member.name
            for member in self._assembly.members
            if member.role in ("attention", "expert") and member.state == "running"
        }
        if not asked:
            return {}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_PLACEMENT_ANSWER_S)
        found = {}
        for reference in ready:
            with contextlib.suppress(RayError):
                placement = ray.get(reference)
                if placement is not None:
                    found[asked[reference]] = self._with_share(placement)
        return found

    def _with_share(self, placement: ActorPlacement) -> ActorPlacement:
        """With the share of what the cores of its nodes can read, as far as that was measured on this host."""
        if placement.read_bytes_s is None:
            return placement
        if not self._bandwidth:  # else it cannot change
            topology = Topology.read()
            if known := remembered(topology):
                self._bandwidth = {node.id: known.local(topology, node.id) or 0.0 for node in topology.compute_nodes}
        possible = sum(self._bandwidth.get(node, 0.0) for node in placement.nodes)
        mates = sum(shard.seats.nodes == placement.nodes for shard in self._plan.shards)
        if not possible:
            return placement
        return msgspec.structs.replace(placement, bandwidth_share=mates * placement.read_bytes_s / possible)

    def worker(self) -> Any:
        """The attention worker's handle."""
        return self._assembly.of("attention")[0].handle

    def wait(self) -> str:
        """Block until the server is down; why and what is lost, empty if it was told to stop and saved all."""
        self._outcome.ended.wait()
        return self._outcome.message

    # --- replacing --------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Notice who dies or hangs, and have another actor take its place."""
        signs, quiet = SignsOfLife(self._folder, self._plan.mailbox), 0.0
        while not (self._outcome.ended.is_set() or self._stopping.locked()):
            self._looked = time.monotonic()
            try:
                quiet = quiet + _LOOK_S if self._look(signs) else 0.0
                if quiet >= _SPARES_AFTER_S and self._endpoint is not None:
                    self._placing.keep_spares()
            except Exception:  # whatever it is, there must be somebody who looks
                logger.exception("the actors could not be looked at")
                self._outcome.ended.wait(_LOOK_S)

    def _look(self, signs: SignsOfLife) -> bool:
        """Wait a moment for somebody to die; whether nobody has, and all run."""
        members = [member for member in self._assembly.members if member.state in ("running", "restarting")]
        runs = {member.run: member for member in members if member.run is not None}
        ended = ray.wait(list(runs), timeout=_LOOK_S)[0] if runs else []
        if not runs:
            self._outcome.ended.wait(_LOOK_S)
        if self._stopping.locked():
            return False
        for reference in ended:
            self._replace_soon(runs[reference], _why(reference))
        for member in members:
            if why := signs.why_hung(member):
                logger.warning("actor %s (pid %d) %s and is killed", member.name, member.pid, why)
                member.kill()
        if self._assembly.is_apart and not self._assembly.is_joining:
            threading.Thread(target=self._assembly.join, name="numoe-join", daemon=True).start()
        return not ended and all(member.state == "running" for member in members)

    def pulse(self) -> str:
        """Answers as long as the supervisor can; why it is to be taken for hung all the same, empty if it is not."""
        still = time.monotonic() - self._looked
        if still < _LONGEST_LOOK_S or self._stopping.locked() or self._outcome.ended.is_set():
            return ""
        return f"has not looked after its actors for {still:.0f} s"

    def _replace_soon(self, member: Member, why: str) -> None:
        """Begin to replace a member that has died."""
        what = f"actor {member.name} (pid {member.pid}) {why}"
        if self._endpoint is None or member.crashes >= _MOST_CRASHES:
            member.state = "dead"
            threading.Thread(
                target=self._take_down, name="numoe-down", daemon=True,
                args=(f"{what}; see its log in the Ray session folder, then start the server again",),
            ).start()  # fmt: skip
            return
        logger.warning("%s and is replaced", what)
        member.died()
        threading.Thread(target=self._replace, args=(member, what), name=f"numoe-{member.name}", daemon=True).start()

    def _replace(self, member: Member, what: str) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._assembly.replace(member, afresh=attempt + member.crashes > _ATTEMPTS_AS_BEFORE)
            except Exception as error:  # noqa: BLE001 - whatever it is, a server without this actor is none
                if self._stopping.locked():
                    return
                logger.warning("attempt %d to replace it has failed: %s", attempt, error)
                why = error
                if isinstance(error, InputError):  # nor will the next
                    break
            else:
                logger.warning("actor %s is back, as process %d", member.name, member.pid)
                return
        member.state = "dead"
        self._take_down(f"{what} and could not be replaced ({why}); start the server again")

    # --- taking down ------------------------------------------------------------------------------

    def shutdown(self, deadline_s: float, *, keep_weights: bool = False) -> None:
        """Let running requests finish for `deadline_s` seconds, then take everything down; returns at once.

        keep_weights: leave them in shared memory for the next server of this model. Told twice, the earlier end
        counts, and weights stay if either said so. What was told is remembered, should the supervisor be replaced.
        """
        assembly, until = self._assembly, time.time() + deadline_s
        assembly.keep_weights |= keep_weights
        assembly.drain_until = min(until, assembly.drain_until) if assembly.phase == "draining" else until
        if assembly.phase == "running":  # one that is still coming up is taken down by whoever finds it so
            assembly.phase = "draining"
        assembly.save()
        self._drain_soon()

    def _drain_soon(self) -> None:
        threading.Thread(target=self._drain, name="numoe-drain", daemon=True).start()

    def _drain(self) -> None:
        left_s = max(0.0, self._assembly.drain_until - time.time())
        for gateway in self._assembly.of("gateway"):
            if gateway.state != "running":
                continue
            with contextlib.suppress(RayError, GetTimeoutError):
                ray.get(gateway.handle.drain.remote(left_s), timeout=left_s + _CALL_TIMEOUT_S)
        self._take_down("")

    def _take_down(self, message: str) -> None:
        if not self._stopping.acquire(blocking=False):
            return
        self._outcome.message, self._assembly.phase = message, "stopping"
        members = self._assembly.members
        self._assembly.save()
        for member in reversed(members):
            with contextlib.suppress(RayError, GetTimeoutError):
                if member.handle is None:
                    continue
                if member.role == "gateway":
                    ray.get(member.handle.stop.remote(message), timeout=_CALL_TIMEOUT_S)
                elif member.role == "attention" and member.state == "running":
                    member.state = "draining"
                    lost = ray.get(member.handle.stop.remote(SAVE_S, message), timeout=SAVE_S + _CALL_TIMEOUT_S)
                    self._outcome.message = "; ".join(filter(None, (message, lost)))
        pending = [m.run for m in members if m.run is not None and m.state != "dead"]
        if pending:
            ray.wait(pending, num_returns=len(pending), timeout=_STOP_TIMEOUT_S)
        for member in members:
            member.state = "dead"
        self._placing.release()
        try:
            self._free_memory()
        except OSError:  # those who wait for the end must hear of it all the same
            logger.exception("shared memory could not be freed")
        self._end()

    def _end(self) -> None:
        """The server is down: let those hear of it who wait, then end this process, as nobody else may be left to."""
        self._outcome.ended.set()
        threading.Thread(target=self._exit, name="numoe-exit", daemon=True).start()

    def _exit(self) -> None:
        time.sleep(_LINGER_S)
        with contextlib.suppress(ValueError, RayError):  # somebody was faster
            ray.kill(ray.get_actor(self._name))

    def _free_memory(self) -> None:
        """Remove what is in shared memory, but weights that another server uses or that shall stay."""
        self._assembly.let_go()
        if not self._assembly.keep_weights:
            end_processes(member.pid for member in self._assembly.members if member.is_local)
            free_weights(self._folder)
        sweep_incomplete()  # of a load that was interrupted
        shm.remove_folder(self._folder)


def supervisor_name(instance: str) -> str:
    """A supervisor's name in Ray."""
    return f"supervisor-{instance}"


def _why(ended: Any) -> str:
    """What has happened to an actor whose `run` has ended."""
    try:
        ray.get(ended)
    except RayActorError:
        return "died"
    except RayTaskError as error:
        return f"failed: {error.cause}"
    return "ended"
