"""The supervisor: places the other actors, watches them, and takes them down again.

A named, detached Ray actor. It is given the actor classes, so that it knows only their lifecycle:
a cheap constructor, `initialize`, a long-running `run` whose pending reference is the sign of life,
`identity` and `progress`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import psutil
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from numoe.cluster.bandwidth import remembered
from numoe.cluster.endpoint import Endpoint
from numoe.cluster.plan import Plan
from numoe.cluster.status import SAVE_S, ActorInfo, ActorPlacement, ActorRole, ActorState, LoadProgress
from numoe.cluster.topology import Topology
from numoe.engine import shm
from numoe.engine.errors import NumoeError, ResourceError, UnavailableError
from numoe.engine.weights import CachedPages, WeightSlice, free_weights, hold_weights, is_loaded, sweep_incomplete

NAMESPACE = "numoe"
_PLACEMENT_TIMEOUT_S = 30.0
_CALL_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 10.0
_PLACEMENT_ANSWER_S = 2.0
_EXIT_TIMEOUT_S = 5.0
_SMALL_CPUS = 0.1  # what Ray books for an actor that computes little, or alternates with others


class ActorClasses(msgspec.Struct, frozen=True):
    """The classes that the supervisor places."""

    gateway: Any
    attention: Any
    expert: Any


@dataclass
class _Member:
    """One placed actor."""

    role: ActorRole
    name: str
    handle: Any
    state: ActorState = "starting"
    pid: int = 0
    host: str = ""
    numa_node: int | None = None
    run: Any = None
    restarts: int = 0

    def info(self, placement: ActorPlacement | None = None) -> ActorInfo:
        return ActorInfo(
            role=self.role,
            pid=self.pid,
            host=self.host,
            numa_node=self.numa_node,
            state=self.state,
            restarts=self.restarts,
            placement=placement,
        )


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
        self._plan, self._classes, self._endpoint, self._instance = plan, classes, endpoint, instance
        self._keep_weights, self._weights = keep_weights, list[WeightSlice]()
        self._bandwidth: dict[int, float] | None = None
        self._folder = shm.create_folder(instance)
        self._members: list[_Member] = []
        self._group: PlacementGroup | None = None
        self._outcome = _Outcome()
        self._stopping = threading.Lock()
        self.address = ""

    # --- bringing up ------------------------------------------------------------------------------

    def launch(self) -> str:
        """Place and start all actors; the gateway's address, empty without a gateway.

        Raises the first actor's error; everything is taken down again then.
        """
        try:
            self._place()
            worker, shards = self._member("attention"), self._of("expert")
            _get(worker.handle.create_mailbox.remote())
            self._load([worker, *shards])
            _get(worker.handle.attach_experts.remote())
            if self._endpoint is not None:
                gateway = self._member("gateway")
                supervisor = ray.get_runtime_context().current_actor
                self.address = _get(gateway.handle.initialize.remote(worker.handle, supervisor))
                _get(worker.handle.connect.remote(gateway.handle))
                worker.run = worker.handle.run.remote()
                _get(gateway.handle.serve.remote())
            for member in shards:
                member.run = member.handle.run.remote()
            for member in self._members:
                member.state = "running"
            threading.Thread(target=self._watch, name="numoe-watch", daemon=True).start()
        except (NumoeError, RayError) as error:
            self._take_down(str(error))
            raise
        return self.address

    def _load(self, members: list[_Member]) -> None:
        """Have the weights loaded or attached to, and leave the page cache as it was found."""
        sweep_incomplete()
        pages = None
        if not all(is_loaded(key) for key in self._plan.slices):
            pages = CachedPages.look(self._plan.files)
            pages.save(self._folder)
        _get([member.handle.initialize.remote() for member in members])
        if pages is not None:
            pages.drop_all()
        self._weights = hold_weights(self._folder)

    def _place(self) -> None:
        plan = self._plan
        bundles = [{"CPU": _SMALL_CPUS}, *({"CPU": cpus} for cpus in self._cpus())]
        if plan.gpu:
            bundles[1]["GPU"] = 1
        self._group = placement_group(bundles, strategy="STRICT_PACK", name=f"numoe-{self._instance}")
        if not self._group.wait(_PLACEMENT_TIMEOUT_S):
            raise ResourceError(
                f"Ray has no node with {sum(b['CPU'] for b in bundles):.1f} free CPUs"
                f"{' and a free GPU' if plan.gpu else ''} for this model: stop what else runs there, or lower --threads"
            )
        folder, members = str(self._folder), self._members
        if self._endpoint is not None:
            gateway = self._spawn(self._classes.gateway, 0, 64, plan, self._endpoint)
            members.append(_Member("gateway", "gateway", gateway))
        members.append(_Member("attention", "attention", self._spawn(self._classes.attention, 1, 32, plan, folder)))
        for shard in plan.shards:
            handle = self._spawn(self._classes.expert, 2 + shard.index, 4, plan, folder, shard.index)
            members.append(_Member("expert", f"experts {shard.index}", handle))
        for member, who in zip(members, _get([m.handle.identity.remote() for m in members]), strict=True):
            member.pid, member.host, member.numa_node = who.pid, who.host, who.numa_node

    def _cpus(self) -> Iterator[float]:
        """Processors that Ray books for the attention worker and for each shard.

        They take turns on the same ones; together with the gateway they stay below what the plan
        may use, so that a host of two processors serves any number of shards.
        """
        plan = self._plan
        yield _SMALL_CPUS
        for _ in plan.shards:
            yield round(max(_SMALL_CPUS, (min(plan.attention_threads, plan.cpus) - 0.4) / len(plan.shards)), 3)

    def _spawn(self, cls: Any, bundle: int, concurrency: int, *args: Any) -> Any:
        assert self._group is not None
        resources = self._group.bundle_specs[bundle]
        options = {
            "num_cpus": resources["CPU"],
            "num_gpus": resources.get("GPU", 0),
            "max_concurrency": concurrency,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=bundle
            ),
        }
        return ray.remote(cls).options(**options).remote(*args)

    # --- looking ----------------------------------------------------------------------------------

    def progress(self) -> list[LoadProgress]:
        """How far the actors that load have come."""
        found = []
        for member in list(self._members):
            if member.role in ("attention", "expert"):
                with contextlib.suppress(RayError, GetTimeoutError):
                    progress = ray.get(member.handle.progress.remote(), timeout=_CALL_TIMEOUT_S)
                    found.append(LoadProgress(name=member.name, **progress))
        return found

    def actors(self) -> list[ActorInfo]:
        """Every process of the server, this one included."""
        state: ActorState = "draining" if self._stopping.locked() else "running"
        own = ActorInfo(role="supervisor", pid=os.getpid(), host=socket.gethostname(), state=state)
        placements = self._placements()
        return [*(member.info(placements.get(member.name)) for member in self._members), own]

    def _placements(self) -> dict[str, ActorPlacement]:
        """Where the actors that compute are; who does not answer at once is left out."""
        asked = {
            member.handle.placement.remote(): member.name
            for member in self._members
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
        if self._bandwidth is None:
            topology = Topology.read()
            known = remembered(topology)
            self._bandwidth = {
                node.id: known.local(topology, node.id) or 0.0 if known else 0.0 for node in topology.compute_nodes
            }
        possible = sum(self._bandwidth.get(node, 0.0) for node in placement.nodes)
        mates = sum(shard.seats.nodes == placement.nodes for shard in self._plan.shards)
        if not possible:
            return placement
        return msgspec.structs.replace(placement, bandwidth_share=mates * placement.read_bytes_s / possible)

    def worker(self) -> Any:
        """The attention worker's handle."""
        return self._member("attention").handle

    def wait(self) -> str:
        """Block until the server is down; why, or an empty text if it was told to stop."""
        self._outcome.ended.wait()
        return self._outcome.message

    # --- taking down ------------------------------------------------------------------------------

    def shutdown(self, deadline_s: float, *, keep_weights: bool = False) -> None:
        """Let running requests finish for `deadline_s` seconds, then take everything down; returns at once.

        keep_weights: leave them in shared memory for the next server of this model.
        """
        self._keep_weights |= keep_weights
        threading.Thread(target=self._drain, args=(deadline_s,), name="numoe-drain", daemon=True).start()

    def _drain(self, deadline_s: float) -> None:
        for member in self._members:
            member.state = "draining"
        for gateway in self._of("gateway"):
            with contextlib.suppress(RayError, GetTimeoutError):
                ray.get(gateway.handle.drain.remote(deadline_s), timeout=deadline_s + _CALL_TIMEOUT_S)
        self._take_down("")

    def _watch(self) -> None:
        """Take the server down when an actor dies: it cannot answer without any of them."""
        runs = {member.run: member for member in self._members if member.run is not None}
        while runs and not self._outcome.ended.is_set():
            done, _ = ray.wait(list(runs), timeout=5.0)
            for reference in done:
                member = runs.pop(reference)
                if self._stopping.locked():
                    continue
                try:
                    ray.get(reference)
                    why = "ended"
                except RayActorError:
                    why = "died"
                except RayTaskError as error:
                    why = f"failed: {error.cause}"
                member.state = "dead"
                self._take_down(
                    f"actor {member.name} (pid {member.pid}) {why}; "
                    "see its log in the Ray session folder, then start the server again"
                )
                return

    def _take_down(self, message: str) -> None:
        if not self._stopping.acquire(blocking=False):
            return
        self._outcome.message = message
        for member in reversed(self._members):
            with contextlib.suppress(RayError, GetTimeoutError):
                if member.role == "gateway":
                    ray.get(member.handle.stop.remote(message), timeout=_CALL_TIMEOUT_S)
                elif member.role == "attention" and member.state != "starting":
                    ray.get(member.handle.stop.remote(SAVE_S, message), timeout=SAVE_S + _CALL_TIMEOUT_S)
        pending = [m.run for m in self._members if m.run is not None and m.state != "dead"]
        if pending:
            ray.wait(pending, num_returns=len(pending), timeout=_STOP_TIMEOUT_S)
        for member in self._members:
            member.state = "dead"
            ray.kill(member.handle)
        if self._group is not None:
            remove_placement_group(self._group)
        self._free_memory()
        self._outcome.ended.set()

    def _free_memory(self) -> None:
        """Remove what is in shared memory, but weights that another server uses or that shall stay."""
        for weights in self._weights:
            weights.close()
        if not self._keep_weights:
            _await_exits(member.pid for member in self._members if member.host == socket.gethostname())
            free_weights(self._folder)
        shm.remove_folder(self._folder)

    def _of(self, role: ActorRole) -> list[_Member]:
        return [member for member in self._members if member.role == role]

    def _member(self, role: ActorRole) -> _Member:
        return self._of(role)[0]


def _await_exits(pids: Iterable[int]) -> None:
    """Wait until processes are gone: until then they use their weights."""
    living = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            living.append(psutil.Process(pid))
    psutil.wait_procs(living, timeout=_EXIT_TIMEOUT_S)


def _get(references: Any) -> Any:
    """ray.get that raises numoe's own errors as they were raised, and a dead actor as UnavailableError."""
    try:
        return ray.get(references)
    except RayTaskError as error:
        if isinstance(error.cause, NumoeError):
            raise error.cause from None
        raise UnavailableError(f"an actor failed while starting: {error.cause}") from error
    except RayActorError as error:
        raise UnavailableError(f"an actor died while starting: {error}") from error


