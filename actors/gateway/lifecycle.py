"""Whether the gateway takes requests, and what health checks say about it."""

from __future__ import annotations

import time
from typing import Literal

from grpc_health.v1 import health, health_pb2

from numoe.engine.errors import UnavailableError

LifecycleState = Literal["starting", "serving", "draining"]

_REFUSALS: dict[LifecycleState, str] = {
    "starting": "the server is not ready yet: the model is loading; try again",
    "draining": "the server is shutting down and takes no new requests",
}


class Lifecycle:
    """starting ⇄ serving → draining.

    generation_services: answer SERVING only while serving, as the server as a whole (""); the
    other services do so until draining.
    """

    def __init__(self, generation_services: tuple[str, ...], other_services: tuple[str, ...]) -> None:
        self._gated = ("", *generation_services)
        self._others = other_services
        self._started = time.monotonic()
        self.state: LifecycleState = "starting"
        self.health = health.aio.HealthServicer()  # type: ignore[attr-defined]

    @property
    def uptime_s(self) -> float:
        """Seconds since this object was made."""
        return time.monotonic() - self._started

    async def start(self) -> None:
        """Make health checks tell the initial state."""
        await self._publish()

    async def set_ready(self, *, ready: bool) -> None:
        """Tell whether a first token can be made; without effect once draining."""
        if self.state != "draining":
            self.state = "serving" if ready else "starting"
            await self._publish()

    async def set_draining(self) -> None:
        """Refuse new requests from now on."""
        self.state = "draining"
        await self._publish()

    def require_serving(self) -> None:
        """Raise UnavailableError unless new requests are taken."""
        if self.state != "serving":
            raise UnavailableError(_REFUSALS[self.state])

    async def _publish(self) -> None:
        status = health_pb2.HealthCheckResponse
        for service in self._gated:
            await self.health.set(service, status.SERVING if self.state == "serving" else status.NOT_SERVING)
        for service in self._others:
            await self.health.set(service, status.NOT_SERVING if self.state == "draining" else status.SERVING)
