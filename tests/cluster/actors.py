"""Ray in a few lines: actors are objects of this process, their calls run at once, and they die when told to."""

from __future__ import annotations

import threading
from concurrent.futures import FIRST_COMPLETED, Future, wait
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError, RayActorError

from numoe.actors.identity import Identity
from numoe.cluster.status import ActorRole

LIVING_PID = 0
"""Of no process: nobody is struck by mistake."""


class FakeActor:
    """An actor whose methods note what they are called with; `on` says what else they do, or give a Future."""

    def __init__(self, role: ActorRole, name: str, on: dict[str, Any]) -> None:
        self.role, self.name, self.end, self._on = role, name, Future[None](), on
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return SimpleNamespace(remote=lambda *args, **_: self._call(method, args))

    def called(self, method: str) -> list[tuple[Any, ...]]:
        """What a method was called with, each time."""
        return [args for name, args in self.calls if name == method]

    def die(self) -> None:
        """End: what it runs, and every later call, fails."""
        if not self.end.done():
            self.end.set_exception(RayActorError())

    def _call(self, method: str, args: tuple[Any, ...]) -> Future[Any]:
        if method == "run":
            return self.end
        self.calls.append((method, args))
        result: Future[Any] = Future()
        try:
            if self.end.done():
                raise RayActorError  # noqa: TRY301
            answer = self._answer(method, args)
            if isinstance(answer, Future):
                return answer
            result.set_result(answer)
        except Exception as error:  # noqa: BLE001 - as Ray does
            result.set_exception(error)
        return result

    def _answer(self, method: str, args: tuple[Any, ...]) -> Any:
        if method == "stop":
            self.end.set_result(None)
        if method in self._on:
            return self._on[method](self, *args)
        return Identity(pid=LIVING_PID, host="here") if method == "identity" else ""


class FakeRay:
    """What numoe's cluster part asks Ray for, and the placing of its actors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.actors: dict[str, FakeActor] = {}
        self.on: dict[ActorRole, dict[str, Any]] = {"gateway": {}, "attention": {}, "expert": {}}
        self.reconstructed, self.killed = False, list[str]()
        self._lock = threading.Lock()
        for name in ("get", "wait", "kill", "get_actor", "get_runtime_context"):
            monkeypatch.setattr(ray, name, getattr(self, name))

    def get(self, references: Any, timeout: float | None = None) -> Any:
        if isinstance(references, list):
            return [self.get(each, timeout) for each in references]
        try:
            return references.result(timeout)
        except TimeoutError:
            raise GetTimeoutError from None

    def wait(self, references: list[Future[Any]], num_returns: int = 1, timeout: float | None = None) -> Any:
        assert num_returns in (1, len(references))
        when = "ALL_COMPLETED" if num_returns == len(references) > 1 else FIRST_COMPLETED
        done = wait(references, timeout, return_when=when).done
        return [each for each in references if each in done], [each for each in references if each not in done]

    def kill(self, actor: FakeActor | str) -> None:
        if isinstance(actor, str):
            self.killed.append(actor)
        else:
            actor.die()

    def get_actor(self, name: str) -> Any:
        if name.startswith("supervisor"):  # which is no actor here
            return name
        if name not in self.actors or self.actors[name].end.done():
            raise ValueError(name)
        return self.actors[name]

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(was_current_actor_reconstructed=self.reconstructed)

    def of(self, role: ActorRole) -> list[FakeActor]:
        """The actors of a role that there have been, in order."""
        return [actor for actor in self.actors.values() if actor.role == role]

    # --- as Placing -------------------------------------------------------------------------------

    def spawn(self, role: ActorRole, index: int = 0) -> tuple[str, FakeActor]:
        with self._lock:
            name = f"{role}-{index}-{len(self.actors)}"
            self.actors[name] = FakeActor(role, name, self.on[role])
        return name, self.actors[name]

    replacement = spawn

    def kill_others(self, names: set[str]) -> None:
        for actor in self.actors.values():
            if actor.name not in names:
                actor.die()

    def release(self) -> None:
        self.kill_others(set())

    def reserve(self) -> None:
        pass

    def take_over(self) -> None:
        pass

    def keep_spares(self) -> None:
        pass
