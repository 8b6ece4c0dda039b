"""The gRPC front end: plain asyncio code, run by the gateway actor and by tests alike."""

from numoe.actors.gateway.interfaces import ChatTemplate, EngineClient, Limits, ModelInfo, ServerContext
from numoe.actors.gateway.server import GatewayServer, build_server
from numoe.actors.gateway.streams import RequestStreams
from numoe.cluster.status import ActorInfo

__all__ = [
    "ActorInfo",
    "ChatTemplate",
    "EngineClient",
    "GatewayServer",
    "Limits",
    "ModelInfo",
    "RequestStreams",
    "ServerContext",
    "build_server",
]
