"""The gateway actor: the gRPC server inside Ray."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Sequence
from typing import Any

from numoe.actors.gateway.interfaces import Limits, ModelInfo, ServerContext
from numoe.actors.gateway.order import Connections
from numoe.actors.gateway.server import GatewayServer, build_server
from numoe.actors.gateway.streams import RequestStreams
from numoe.actors.gateway.worker import RayEngineClient
from numoe.actors.identity import Identity, identity
from numoe.cluster.endpoint import Endpoint
from numoe.cluster.plan import Plan
from numoe.engine.gguf import GgufFile
from numoe.engine.models.config import ModelConfig
from numoe.engine.requests import Event


class GatewayActor:
    """Ray actor, asyncio. `initialize` binds the port, `serve` opens it, `stop` closes it; `run` returns then."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._server: GatewayServer | None = None
        self._context: asyncio.Task[ServerContext] | None = None
        limits = Limits()
        self._streams = RequestStreams(max_streams=limits.max_streams, backlog=limits.stream_backlog)
        self._connections = Connections()

    async def identity(self) -> Identity:
        """Who this process is."""
        return identity()

    async def prepare(self) -> None:
        """Read the tokenizer; `initialize` does, too, if it has not been done."""
        if self._context is None:
            self._context = asyncio.ensure_future(asyncio.to_thread(server_context, self._plan))
        await asyncio.shield(self._context)

    async def initialize(self, endpoint: Endpoint, supervisor: Any) -> str:
        """Bind the port; the address. The worker comes with `attach`."""
        await self.prepare()
        assert self._context is not None
        self._client = RayEngineClient(self._streams, supervisor)
        self._server = build_server(self._context.result(), self._client, self._streams, endpoint)
        await self._server.start()
        return self._server.address

    async def attach(self, worker: Any, connection: int) -> None:
        """Have requests served by this worker, the events of which carry this number."""
        await self._client.attach(worker)
        for events in self._connections.attach(connection):
            self._streams.deliver(events)

    async def serve(self) -> None:
        """Take requests from now on."""
        assert self._server is not None
        await self._server.set_ready()

    async def deliver(self, connection: int, number: int, events: Sequence[Event]) -> None:
        """Route the events of one step, the worker's push number `number`; those of an earlier worker come too late."""
        for ready in self._connections.accept(connection, number, events):
            self._streams.deliver(ready)

    async def run(self) -> None:
        """Return when the server has been stopped; while this is pending, the gateway is alive."""
        assert self._server is not None
        await self._server.wait_stopped()

    async def pulse(self) -> str:
        """Answers, with an empty text, as long as the event loop runs."""
        return ""

    async def drain(self, deadline_s: float) -> None:
        """Take no new requests and let the running ones finish."""
        if self._server is not None:
            await self._server.drain(deadline_s)

    async def stop(self, message: str) -> None:
        """End what still runs, with `message` if it is not empty, and close the port."""
        if message:
            self._streams.fail_all(message)
        if self._server is not None:
            await self._server.stop()


def server_context(plan: Plan) -> ServerContext:
    """The tokenizer, templates and facts of a model file."""
    from numoe.engine.text import ChatTemplate, Tokenizer

    with GgufFile.open(plan.model) as gguf:
        config, metadata = ModelConfig.from_gguf(gguf), gguf.metadata
        tokenizer = Tokenizer.from_metadata(metadata)
        parameters = sum(info.rows * info.shape[-1] for info in gguf.tensors.values())
        sizes: dict[str, int] = {}
        for info in gguf.tensors.values():
            sizes[info.qtype.name] = sizes.get(info.qtype.name, 0) + info.nbytes
        model = ModelInfo(
            name=str(metadata.get("general.name") or gguf.path.stem),
            architecture=config.architecture,
            context_tokens=plan.context,
            vocab_size=config.vocab,
            trained_context_tokens=config.context,
            parameters=parameters,
            layers=config.n_layers,
            experts=config.moe.n_experts if config.moe else 0,
            experts_used=config.moe.n_used if config.moe else 0,
            weight_format=max(sizes, key=lambda name: sizes[name]),
            file_bytes=gguf.size_bytes,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
        )
        return ServerContext(
            tokenizer=tokenizer,
            model=model,
            version=importlib.metadata.version("numoe"),
            chat_template=ChatTemplate.from_metadata(metadata),
            limits=Limits.for_context(plan.context),
            outlasts_context=plan.cache.keep is not None,
            slots=plan.slots,
            has_store=bool(plan.cache.store_url),
        )
