"""A gateway on loopback with a scripted worker behind it, and a client channel to it."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_status import rpc_status

from numoe.actors.gateway import (
    ActorInfo,
    GatewayServer,
    Limits,
    ModelInfo,
    RequestStreams,
    ServerContext,
    build_server,
)
from numoe.cluster.endpoint import Endpoint
from numoe.cluster.status import ActorPlacement
from numoe.engine.errors import InputError
from numoe.engine.requests import (
    CacheStatus,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    PrefillProgress,
    SlotStatus,
    Started,
    Timings,
    TokenGenerated,
    TokenLogprob,
    WorkerStatus,
)
from numoe.v1 import admin_pb2_grpc, generation_pb2_grpc, model_pb2_grpc, slots_pb2_grpc, tokenizer_pb2_grpc
from numoe.v1 import generation_pb2 as pb
from tests.actors.gateway.scripted_slots import ScriptedSlots

BOS, EOG, CONTROL = 256, 257, 258
VOCAB_SIZE = 300
CONTEXT = 64
TIMINGS = Timings(queued_ms=1.0, prefill_ms=20.0, decode_ms=30.0)
PLACEMENT = ActorPlacement(
    nodes=(0,), weight_bytes=3_000_000_000, medium="hugetlbfs", on_nodes=0.995, huge=1.0, cpus=(0, 1, 2, 5),
    ran_on=(0, 1, 2, 5), read_bytes_s=40e9, bandwidth_share=0.8,
    problem="they lie elsewhere: move them",
)  # fmt: skip


class ByteTokenizer:
    """One token per byte, three control tokens, and multi-byte tokens from 259 on."""

    eog_ids = frozenset({EOG})
    adds_space_prefix = False

    def __init__(self, words: Sequence[bytes] = ()) -> None:
        self._words = list(words)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:  # noqa: ARG002
        return [BOS] * add_special + list(text.encode())

    def encode_chat(self, rendered: str) -> list[int]:
        return self.encode(rendered, add_special=False)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def is_special(self, token_id: int) -> bool:
        return BOS <= token_id <= CONTROL

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < BOS:
            return bytes([token_id])
        if token_id <= CONTROL:
            return b"<control>"
        word = token_id - CONTROL - 1
        return self._words[word] if 0 <= word < len(self._words) else b""


class PlainTemplate:
    """Renders "role: content" lines; refuses the role "forbidden"."""

    def render(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        if any(message["role"] == "forbidden" for message in messages):
            raise InputError("the chat template refuses these messages: no such role")
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return "".join(lines) + "assistant: " * add_generation_prompt


@dataclass
class ScriptedEngine(ScriptedSlots):
    """Answers every request with the same tokens, one step at a time.

    reason: how it finishes; None: not until it is aborted. submit_error: what submit raises.
    """

    tokens: Sequence[int] = tuple(b"hello")
    reason: FinishReason | None = "stop"
    error: str = ""
    cached: int = 0
    pause_s: float = 0.0
    submit_error: Exception | None = None
    status_error: Exception | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    shutdowns: list[float] = field(default_factory=list)
    keeps_weights: bool = False
    running: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    abort_seen: asyncio.Event = field(default_factory=asyncio.Event)

    async def submit(self, request: GenerationRequest) -> None:
        if self.submit_error is not None:
            raise self.submit_error
        self.requests.append(request)
        self.running[request.request_id] = asyncio.create_task(self._replay(request))

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.abort_seen.set()
        task = self.running.pop(request_id, None)
        if task is not None and not task.done():
            task.cancel()
            self.streams.deliver([self._finished(request_id, "cancelled", 0)])

    async def status(self) -> WorkerStatus:
        if self.status_error is not None:
            raise self.status_error
        slots = (
            SlotStatus(slot=0, state="decode", request_id="a", tokens=7),
            SlotStatus(slot=1, state="idle", tokens=600, computed=599, cached=512, snapshot="chat", last_used=1e9),
        )
        cache = CacheStatus(
            ram_bytes=3_000_000, ram_limit=1 << 30, store_url="s3://bucket/prefix", store_bytes=2_500_000_000,
            pending=2, hits_pages=5, hits_ram=4, hits_store=3, misses=2, store_error="it is full",
        )  # fmt: skip
        return WorkerStatus(
            slots=slots,
            queued=2,
            queue_limit=64,
            kv_pages_used=3,
            kv_pages_cached=0,
            kv_pages_total=10,
            steps=5,
            step_ms={"total": 2.5, "experts": 1.5},
            cache=cache,
        )

    async def actors(self) -> list[ActorInfo]:
        return [
            ActorInfo(role="gateway", pid=1, host="box"),
            ActorInfo(
                role="expert", pid=2, host="box", numa_node=0, state="restarting", restarts=3, placement=PLACEMENT
            ),
        ]

    async def shutdown(self, deadline_s: float, *, keep_weights: bool) -> None:
        self.shutdowns.append(deadline_s)
        self.keeps_weights = keep_weights

    async def _replay(self, request: GenerationRequest) -> None:
        request_id, prompt = request.request_id, len(request.token_ids)
        self._deliver(Started(request_id, prompt, self.cached))
        self._deliver(PrefillProgress(request_id, prompt, prompt))
        tokens = self.tokens[: request.max_tokens]
        for token_id in tokens:
            await asyncio.sleep(self.pause_s)
            self._deliver(self._token(request, token_id))
        if self.reason is None:
            await asyncio.Event().wait()  # until it is aborted
            return
        await asyncio.sleep(self.pause_s)
        reason = self.reason if len(tokens) == len(self.tokens) else "length"
        self._deliver(self._finished(request_id, reason, len(tokens)))

    def _token(self, request: GenerationRequest, token_id: int) -> TokenGenerated:
        if request.logprobs is None:
            return TokenGenerated(request.request_id, token_id)
        top = tuple(TokenLogprob(i, -float(i + 1)) for i in range(request.logprobs))
        return TokenGenerated(request.request_id, token_id, -0.5, top)

    def _finished(self, request_id: str, reason: FinishReason, tokens: int) -> Finished:
        return Finished(request_id, reason, tokens, TIMINGS, self.error)

    def _deliver(self, event: Event) -> None:
        self.streams.deliver([event])


@dataclass
class Gateway:
    """What a test holds: the server, the worker's double, and stubs on a real channel."""

    server: GatewayServer
    engine: ScriptedEngine
    streams: RequestStreams
    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.tokenizer = tokenizer_pb2_grpc.TokenizerServiceStub(self.channel)
        self.models = model_pb2_grpc.ModelServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)
        self.slots = slots_pb2_grpc.SlotServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    async def generate(self, **fields: Any) -> "Stream":
        """Run one Generate call to its end."""
        if not {"text", "token_ids", "chat"} & fields.keys():
            fields["text"] = "prompt"
        return Stream([message async for message in self.generation.Generate(pb.GenerateRequest(**fields))])

    async def refused(self, **fields: Any) -> "Refusal":
        """Run one Generate call that must fail."""
        return await refusal(self.generate(**fields))


class Stream:
    """The messages of a finished stream, by kind."""

    def __init__(self, messages: Iterable[pb.GenerateResponse]) -> None:
        self.messages = list(messages)
        self.kinds = [message.WhichOneof("event") for message in self.messages]
        self.tokens = [message.tokens for message in self.messages if message.HasField("tokens")]
        self.text = "".join(tokens.text for tokens in self.tokens)
        self.token_ids = [i for tokens in self.tokens for i in tokens.token_ids]
        self.started = self.messages[0].started
        self.finished = self.messages[-1].finished


class Refusal:
    """A failed call: its code, message and details."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code, self.message = error.code(), error.details() or ""
        self.info, self.retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        self.bad = error_details_pb2.BadRequest()
        status = rpc_status.from_call(error)
        for detail in status.details if status is not None else ():
            for known in (self.info, self.retry, self.bad):
                detail.Unpack(known)

    @property
    def fields(self) -> list[str]:
        return [violation.field for violation in self.bad.field_violations]


async def refusal(call: Any) -> Refusal:
    """Await a call that must fail."""
    try:
        result = await call
    except grpc.aio.AioRpcError as error:
        return Refusal(error)
    raise AssertionError(f"the call succeeded with {result}")


@asynccontextmanager
async def serving(
    *,
    ready: bool = True,
    words: Sequence[bytes] = (),
    template: bool = True,
    limits: Limits | None = None,
    outlasts_context: bool = False,
    has_store: bool = True,
    backlog: int = 8192,
    listen: str = "127.0.0.1:0",
    endpoint: dict[str, Any] | None = None,
    channel_options: Sequence[tuple[str, int]] = (),
    **script: Any,
) -> AsyncIterator[Gateway]:
    """A gateway whose worker answers as `script` (fields of ScriptedEngine) says."""
    streams = RequestStreams(backlog=backlog)
    engine = ScriptedEngine(streams, **script)
    context = ServerContext(
        tokenizer=ByteTokenizer(words),
        model=ModelInfo(name="tiny", architecture="llama", context_tokens=CONTEXT, vocab_size=VOCAB_SIZE, eos_id=EOG),
        version="1.2.3",
        chat_template=PlainTemplate() if template else None,
        limits=limits or Limits(),
        outlasts_context=outlasts_context,
        slots=8,
        has_store=has_store,
    )
    server = build_server(context, engine, streams, Endpoint(listen=listen, **(endpoint or {})))
    await server.start()
    await server.set_ready(ready=ready)
    try:
        async with grpc.aio.insecure_channel(server.address, options=list(channel_options)) as channel:
            yield Gateway(server, engine, streams, channel)
    finally:
        await server.stop(0)


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in an event loop of its own, for at most 30 s."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 30))

    return run


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something comes true."""
    while not condition():  # noqa: ASYNC110 -- there is no event to wait for
        await asyncio.sleep(0.005)
