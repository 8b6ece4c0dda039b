"""What the gateway needs from the rest of numoe, and the values it is built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from numoe.cluster.status import ActorInfo
from numoe.engine.requests import GenerationRequest, SlotReport, SnapshotInfo, WorkerStatus
from numoe.engine.text import Tokenizer


class EngineClient(Protocol):
    """The way to the attention worker and the supervisor.

    Every method but `submit` and `abort` raises UnavailableError while the other side is down.
    """

    async def submit(self, request: GenerationRequest) -> None:
        """Queue a request; its events come through `RequestStreams.deliver`.

        The request outlives its worker: another one goes on with it. Raises ResourceError when the
        queue is full, InputError when the worker cannot serve it.
        """

    async def abort(self, request_id: str) -> None:
        """End a request within one step, with a Finished event; an unknown id is no error.

        It may overtake a `submit` that was cancelled, and must win then.
        """

    async def save_slot(self, operation: str, slot: int, name: str, wait_until: float | None) -> SlotReport:
        """Make or replace snapshot `name` of a slot.

        operation: the request_id of the SlotProgress events that come through `RequestStreams.deliver`.
        wait_until: `time.time()` until which to wait for a busy slot, None: not at all. Raises
        NotFoundError for an unknown slot, PreconditionError for a busy or empty one, and what stores raise.
        """

    async def restore_slot(self, operation: str, slot: int, name: str, wait_until: float | None) -> SlotReport:
        """Put snapshot `name` into a slot, as `save_slot`; after an error the slot is what it was.

        Raises PreconditionError for a snapshot that does not fit, DataLossError for a damaged one.
        """

    async def cancel_slot_operation(self, operation: str) -> None:
        """End a save or restore, which changes nothing then; as `abort`, it may overtake its begin."""

    async def erase_slot(self, operation: str, slot: int, wait_until: float | None) -> SlotReport:
        """Empty a slot."""

    async def fork_slot(self, operation: str, slot: int, target: int, wait_until: float | None) -> SlotReport:
        """Make `target` hold what a slot holds; the report is the target's."""

    async def snapshots(self) -> Sequence[SnapshotInfo]:
        """List the store's snapshots by name."""

    async def remove_snapshot(self, name: str) -> None:
        """Remove a snapshot; NotFoundError if there is none."""

    async def status(self) -> WorkerStatus:
        """Tell what the attention worker is doing."""

    async def actors(self) -> list[ActorInfo]:
        """List the server's processes, the gateway included."""

    async def shutdown(self, deadline_s: float, *, keep_weights: bool) -> None:
        """Begin to stop the server and return at once.

        The running requests get `deadline_s` seconds; the gateway is the last to go. keep_weights: they
        stay in shared memory.
        """


class ChatTemplate(Protocol):
    """The part of `numoe.engine.text.ChatTemplate` that the gateway uses."""

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Return the prompt of a conversation; raises InputError when the template refuses it."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The model as clients see it; counts are 0 and ids None where it has no such thing.

    context_tokens: what one request may hold here, prompt and continuation together;
    trained_context_tokens: what the model was trained for. fingerprint: None if not computed.
    """

    name: str
    architecture: str
    context_tokens: int
    vocab_size: int
    trained_context_tokens: int = 0
    parameters: int = 0
    layers: int = 0
    experts: int = 0
    experts_used: int = 0
    weight_format: str = ""
    file_bytes: int = 0
    bos_id: int | None = None
    eos_id: int | None = None
    eot_id: int | None = None
    pad_id: int | None = None
    fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on what clients can make the gateway hold; the protobuf files tell them.

    max_calls: of all connections together. stream_backlog: events that wait for a slow reader before its
    request is ended.
    """

    max_message_bytes: int = 32 << 20
    max_connections: int = 1024
    max_calls: int = 2048
    max_metadata_bytes: int = 16 << 10
    max_prompt_bytes: int = 16 << 20
    max_messages: int = 10_000
    max_token_ids: int = 1 << 20
    max_name_bytes: int = 1024
    max_salt_bytes: int = 256
    max_stop_strings: int = 64
    max_stop_string_bytes: int = 1024
    max_stop_ids: int = 1024
    max_logprobs: int = 20
    max_logit_bias: int = 4096
    max_streams: int = 1024
    stream_backlog: int = 8192


    @classmethod
    def for_context(cls, tokens: int) -> Limits:
        """Bounds for requests that may hold so many tokens: 64 bytes for each, 1 MiB to 16 MiB together."""
        prompt = min(max(64 * tokens, 1 << 20), 16 << 20)
        return cls(max_message_bytes=2 * prompt, max_prompt_bytes=prompt, max_token_ids=max(tokens, 1 << 16))

@dataclass(frozen=True, kw_only=True)
class ServerContext:
    """Everything that the servicers share and that never changes.

    outlasts_context: answers go on without the middle when the context is full (--keep). slots: requests
    that run at once. has_store: whether slots can be saved.
    """

    tokenizer: Tokenizer
    model: ModelInfo
    version: str
    chat_template: ChatTemplate | None = None
    limits: Limits = field(default_factory=Limits)
    outlasts_context: bool = False
    slots: int = 1
    has_store: bool = False
