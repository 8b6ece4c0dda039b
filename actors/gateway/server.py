"""The gRPC server: services, health, reflection, limits, start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from numoe.actors.gateway.admin import AdminServicer
from numoe.actors.gateway.generation import GenerationServicer
from numoe.actors.gateway.interfaces import EngineClient, Limits, ServerContext
from numoe.actors.gateway.lifecycle import Lifecycle, LifecycleState
from numoe.actors.gateway.listen import ListenAddress, bind_error, parse_listen, require_free, require_protected
from numoe.actors.gateway.malformed import MalformedRequests
from numoe.actors.gateway.model import ModelServicer
from numoe.actors.gateway.slots import SlotServicer
from numoe.actors.gateway.streams import RequestStreams
from numoe.actors.gateway.tls import CertificateFiles, certificate_files
from numoe.actors.gateway.tokenizer import TokenizerServicer
from numoe.actors.gateway.tokens import TokenFile, TokenRequired
from numoe.actors.gateway.unknown import tolerant_server
from numoe.cluster.endpoint import Endpoint
from numoe.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    slots_pb2,
    slots_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)

GATED = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    slots_pb2.DESCRIPTOR.services_by_name["SlotService"].full_name,
)
OTHERS = (
    tokenizer_pb2.DESCRIPTOR.services_by_name["TokenizerService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
)
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class GatewayServer:
    """A bound gRPC server. Use it within one event loop.

    address: where it listens, with the port that was really bound.
    """

    def __init__(
        self, server: grpc.aio.Server, address: ListenAddress, lifecycle: Lifecycle, streams: RequestStreams
    ) -> None:
        self._server = server
        self._listen = address
        self._lifecycle = lifecycle
        self._streams = streams
        self.address = str(address)

    @property
    def state(self) -> LifecycleState:
        """What it does with new requests."""
        return self._lifecycle.state

    async def start(self) -> None:
        """Answer calls; Generate is refused until `set_ready`."""
        await self._lifecycle.start()
        await self._server.start()
        if self._listen.path:
            # Only this user may connect, as to the shared-memory files.
            await asyncio.to_thread(os.chmod, self._listen.path, 0o600)

    async def set_ready(self, *, ready: bool = True) -> None:
        """Tell whether a first token can be made: SERVING, or NOT_SERVING again."""
        await self._lifecycle.set_ready(ready=ready)

    async def drain(self, deadline_s: float) -> bool:
        """Refuse new requests and wait for the running ones.

        Returns whether all had ended after `deadline_s` seconds.
        """
        await self._lifecycle.set_draining()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._streams.wait_idle(), deadline_s)
        return not len(self._streams)

    async def stop(self, grace_s: float = 1.0) -> None:
        """Close the port and end what still runs: its callers read UNAVAILABLE."""
        await self._lifecycle.set_draining()
        self._streams.fail_all("the server is shutting down")
        await self._server.stop(grace_s)
        if self._listen.path:
            await asyncio.to_thread(Path(self._listen.path).unlink, missing_ok=True)

    async def wait_stopped(self) -> None:
        """Wait until `stop` has closed everything."""
        await self._server.wait_for_termination()


def build_server(
    context: ServerContext,
    engine: EngineClient,
    streams: RequestStreams,
    endpoint: Endpoint,
) -> GatewayServer:
    """Bind a server to an endpoint, port 0 for any free one; `start` makes it answer.

    Call it in the event loop that will run it. Raises InputError for a bad address and
    ResourceError for one in use, AccessError for a token or key file that others may read.
    """
    address, certificate, tokens = check_endpoint(endpoint)
    interceptors = [*([TokenRequired(tokens)] if tokens else []), MalformedRequests()]
    server = tolerant_server(interceptors, _options(context.limits), context.limits.max_calls)
    lifecycle = Lifecycle(GATED, OTHERS)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(
        GenerationServicer(context, engine, streams, lifecycle), server
    )
    slots_pb2_grpc.add_SlotServiceServicer_to_server(SlotServicer(context, engine, streams, lifecycle), server)
    tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(TokenizerServicer(context), server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(context), server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(
        AdminServicer(context, engine, streams, lifecycle), server
    )
    health_pb2_grpc.add_HealthServicer_to_server(lifecycle.health, server)
    reflection.enable_server_reflection((*GATED, *OTHERS, HEALTH, reflection.SERVICE_NAME), server)
    try:
        if certificate is None:
            port = server.add_insecure_port(str(address))
        else:
            port = server.add_secure_port(str(address), certificate.credentials())
    except RuntimeError as error:
        raise bind_error(address, error) from error
    bound = address if address.path else address._replace(port=port)
    return GatewayServer(server, bound, lifecycle, streams)


def check_endpoint(endpoint: Endpoint) -> tuple[ListenAddress, CertificateFiles | None, TokenFile | None]:
    """Its address, certificate and tokens. Raises NumoeError for what will not do."""
    address = parse_listen(endpoint.listen)
    require_protected(endpoint)
    certificate = certificate_files(endpoint)
    tokens = None if endpoint.token_file is None else TokenFile(endpoint.token_file)
    require_free(address)
    return address, certificate, tokens


def _options(limits: Limits) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # else a second server on the same port would silently share it
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
        ("grpc.max_concurrent_streams", limits.max_calls),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.server_handshake_timeout_ms", 20_000),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a small message could become a huge one
        # A caller who vanished without closing his connection is noticed within a minute.
        ("grpc.keepalive_time_ms", 40_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Callers may ping every 10 s to keep a long prefill's connection open through proxies.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
