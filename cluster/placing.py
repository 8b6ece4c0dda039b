"""Placing actors with Ray: where each may run, under which name, and spare ones."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Collection, Iterator
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from numoe.cluster.plan import Plan
from numoe.cluster.status import ActorRole
from numoe.engine.errors import ResourceError

NAMESPACE = "numoe"
_PLACEMENT_TIMEOUT_S = 30.0
_SMALL_CPUS = 0.1  # what Ray books for an actor that computes little, or alternates with others
_CONCURRENCY: dict[ActorRole, int] = {"gateway": 64, "attention": 32, "expert": 8}
_SPARED: tuple[ActorRole, ...] = ("gateway", "expert", "attention")
"""Of these a spare waits."""


class ActorClasses(msgspec.Struct, frozen=True):
    """The classes that the supervisor places."""

    gateway: Any
    attention: Any
    expert: Any


class Placing:
    """The actors of one server in Ray. They are detached: none of them dies with the supervisor.

    A spare has done everything that takes long and that any actor of its role does: starting Python, importing,
    reading the tokenizer. It takes a dead one's place in a fraction of the time. For the attention worker's spare no
    GPU is booked: it takes that of the dead one, which stays booked for the server.
    """

    def __init__(self, instance: str, plan: Plan, classes: ActorClasses, folder: str) -> None:
        self._instance, self._plan, self._folder = instance, plan, folder
        self._classes = {"gateway": classes.gateway, "attention": classes.attention, "expert": classes.expert}
        self._group: PlacementGroup | None = None
        self._spares: dict[ActorRole, tuple[str, Any]] = {}

    def reserve(self) -> None:
        """Book what the actors take on one node. Raises ResourceError."""
        bundles = [{"CPU": _SMALL_CPUS}, *({"CPU": cpus} for cpus in self._cpus())]
        if self._plan.gpu:
            bundles[1]["GPU"] = 1
        name = f"numoe-{self._instance}"
        self._group = placement_group(bundles, strategy="STRICT_PACK", name=name, lifetime="detached")
        if not self._group.wait(_PLACEMENT_TIMEOUT_S):
            raise ResourceError(
                f"Ray has no node with {sum(b['CPU'] for b in bundles):.1f} free CPUs"
                f"{' and a free GPU' if self._plan.gpu else ''} for this model: "
                "stop what else runs there, or lower --threads"
            )

    def take_over(self) -> None:
        """Go on with what another supervisor has booked."""
        self._group = get_placement_group(f"numoe-{self._instance}")

    def _cpus(self) -> Iterator[float]:
        """Processors that Ray books for the attention worker and for each shard.

        They take turns on the same ones; together with the gateway they stay below what the plan
        may use, so that a host of two processors serves any number of shards.
        """
        plan = self._plan
        yield _SMALL_CPUS
        for _ in plan.shards:
            yield round(max(_SMALL_CPUS, (min(plan.attention_threads, plan.cpus) - 0.4) / len(plan.shards)), 3)

    def spawn(self, role: ActorRole, index: int = 0) -> tuple[str, Any]:
        """Start an actor, which is not initialized: its name and its handle."""
        bundle = {"gateway": 0, "attention": 1, "expert": 2 + index}[role]
        assert self._group is not None
        return self._start(role, bundle, self._group.bundle_specs[bundle])

    def replacement(self, role: ActorRole, index: int = 0) -> tuple[str, Any]:
        """A spare actor, or a new one where there is none."""
        return self._spares.pop(role, None) or self.spawn(role, index)

    def keep_spares(self) -> None:
        """Have a spare of each role."""
        for role in _SPARED:
            if role not in self._spares and (role != "expert" or self._plan.shards):
                name, handle = self._start(role, 0, {})
                handle.prepare.remote()
                self._spares[role] = name, handle

    def _start(self, role: ActorRole, bundle: int, resources: dict[str, float]) -> tuple[str, Any]:
        name = f"{self._instance}-{role}-{secrets.token_hex(4)}"
        options = {
            "name": name,
            "lifetime": "detached",
            "num_cpus": resources.get("CPU", 0),
            "num_gpus": resources.get("GPU", 0),
            "max_concurrency": _CONCURRENCY[role],
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
        }
        args = (self._plan,) if role == "gateway" else (self._plan, self._folder)
        return name, ray.remote(self._classes[role]).options(**options).remote(*args)

    def kill_others(self, names: set[str]) -> None:
        """End the actors of this server except those of these names: spares, and what was being started."""
        self._spares.clear()
        kill_actors(self._instance, names)

    def release(self) -> None:
        """End what is left of the server's actors, and give back what was booked."""
        self.kill_others(set())
        if self._group is not None:
            remove_placement_group(self._group)


def kill_actors(instance: str, spared: Collection[str] = ()) -> None:
    """End the actors of a server but those of some names."""
    with contextlib.suppress(RayError):
        for name in ray.util.list_named_actors():
            if name.startswith(f"{instance}-") and name not in spared:
                with contextlib.suppress(ValueError, RayError):
                    ray.kill(ray.get_actor(name))
