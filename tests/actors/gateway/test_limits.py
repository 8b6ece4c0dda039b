"""What one client can make the gateway hold is bounded, and the protobuf files say how."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import grpc
import pytest

from numoe.actors.gateway import Limits
from numoe.v1 import admin_pb2, chat_pb2, model_pb2
from numoe.v1 import generation_pb2 as pb
from numoe.v1 import tokenizer_pb2 as tok
from tests.actors.gateway.harness import in_loop, refusal, serving

PROTO = Path(__file__).parents[3] / "proto" / "numoe" / "v1"
EXHAUSTED, INVALID = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT
STATUS = admin_pb2.GetStatusRequest()
LIMITS = Limits()
MANY = 300_000
"""More than a loop in Python over them should be run for, if their number alone forbids them."""


def documented() -> str:
    return re.sub(r"\s*//\s*|\s+", " ", "".join(path.read_text() for path in sorted(PROTO.glob("*.proto"))))


@pytest.mark.parametrize(
    "words",
    [
        f"at most {LIMITS.max_metadata_bytes} bytes of metadata",
        f"{LIMITS.max_connections} connections, {LIMITS.max_calls} calls and {LIMITS.max_streams} streams",
        f"at least one, at most {LIMITS.max_messages}.",
        f"At most {LIMITS.max_stop_strings}, of 1 to {LIMITS.max_stop_string_bytes} bytes each",
        f"A stop token is not sent. At most {LIMITS.max_stop_ids}.",
        f"likeliest alternatives too, at most {LIMITS.max_logprobs}.",
        f"bans the token. At most {LIMITS.max_logit_bias} tokens.",
        f"At most {LIMITS.max_salt_bytes} bytes",
        f"at most {LIMITS.max_name_bytes} bytes",
        f"no less than {Limits.for_context(1).max_token_ids}.",
        "64 bytes for each token of the context, but no less than 1 MiB and no more than 16 MiB; its message: twice",
    ],
)
def test_the_limits_are_documented(words: str) -> None:
    assert words in documented()


@pytest.mark.parametrize(("context", "mib"), [(1, 1), (16 << 10, 1), (64 << 10, 4), (256 << 10, 16), (1 << 20, 16)])
def test_sizes_follow_the_context(context: int, mib: int) -> None:
    limits = Limits.for_context(context)
    assert (limits.max_prompt_bytes, limits.max_message_bytes) == (mib << 20, mib << 21)
    assert limits.max_token_ids >= context


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"token_ids": pb.TokenIds(ids=[7] * MANY)}, "token_ids.ids"),
        ({"chat": pb.ChatPrompt(messages=[chat_pb2.ChatMessage()] * MANY)}, "chat.messages"),
        ({"stopping": pb.StopOptions(strings=[""] * MANY)}, "stopping.strings"),
        ({"stopping": pb.StopOptions(token_ids=range(MANY))}, "stopping.token_ids"),
        ({"sampling": pb.SamplingOptions(logit_bias=dict.fromkeys(range(MANY), 1.0))}, "sampling.logit_bias"),
        ({"text": "x" * ((1 << 20) + 1)}, "text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@in_loop
async def test_what_is_too_many_is_counted_and_not_looked_at(fields: dict[str, Any], named: str) -> None:
    async with serving(limits=Limits(max_token_ids=1 << 16, max_prompt_bytes=1 << 20)) as gateway:
        failed = await gateway.refused(**fields)
        assert (failed.code, failed.fields) == (INVALID, [named])
        assert "at most" in failed.message
        assert gateway.engine.requests == []


@in_loop
async def test_texts_and_ids_to_convert_are_bounded() -> None:
    async with serving(limits=Limits(max_prompt_bytes=10, max_token_ids=10)) as gateway:
        messages = [chat_pb2.ChatMessage(role="user", content="y" * 7)]
        for call, request, field in (
            (gateway.tokenizer.Tokenize, tok.TokenizeRequest(text="é" * 6), "text"),
            (gateway.tokenizer.Detokenize, tok.DetokenizeRequest(token_ids=[1] * 11), "token_ids"),
            (gateway.tokenizer.ApplyTemplate, tok.ApplyTemplateRequest(messages=messages), "messages"),
            (gateway.models.GetModel, model_pb2.GetModelRequest(name="a" * 1025), "name"),
        ):
            failed = await refusal(call(request))
            assert (failed.code, failed.fields) == (INVALID, [field])


@in_loop
async def test_messages_and_metadata_are_bounded() -> None:
    async with serving(limits=Limits(max_message_bytes=1000)) as gateway:
        failed = await refusal(gateway.tokenizer.Tokenize(tok.TokenizeRequest(text="x" * 1000)))
        assert (failed.code, "larger than max" in failed.message) == (EXHAUSTED, True)
        failed = await refusal(gateway.admin.GetStatus(STATUS, metadata=(("x", "y" * LIMITS.max_metadata_bytes),)))
        assert (failed.code, "metadata size" in failed.message) == (EXHAUSTED, True)
        await gateway.admin.GetStatus(STATUS, metadata=(("x", "y" * (LIMITS.max_metadata_bytes - 1000)),))


@in_loop
async def test_a_small_message_cannot_unfold_to_a_large_one() -> None:
    async with serving() as gateway:
        request = tok.TokenizeRequest(text="x" * (64 << 20))
        failed = await refusal(gateway.tokenizer.Tokenize(request, compression=grpc.Compression.Gzip))
        assert failed.code is grpc.StatusCode.UNIMPLEMENTED
        assert "gzip" in failed.message


@in_loop
async def test_calls_are_bounded() -> None:
    async with serving(reason=None, limits=Limits(max_calls=3)) as gateway:
        calls = [gateway.generation.Generate(pb.GenerateRequest(text="hi")) for _ in range(3)]
        await asyncio.gather(*(call.read() for call in calls))
        own = [("grpc.use_local_subchannel_pool", 1)]  # one connection's calls would wait for each other
        async with grpc.aio.insecure_channel(gateway.server.address, own) as other:
            call = other.unary_unary("/numoe.v1.AdminService/GetStatus")
            failed = await refusal(call(b""))
            assert failed.code is EXHAUSTED
            calls[0].cancel()
            while not await _answers(call):  # noqa: ASYNC110 -- it is the server that has to hear of it
                await asyncio.sleep(0.005)


@in_loop
async def test_connections_are_bounded() -> None:
    async with serving(limits=Limits(max_connections=2)) as gateway:
        await gateway.admin.GetStatus(STATUS)
        host, port = gateway.server.address.split(":")
        held = [await asyncio.open_connection(host, int(port)) for _ in range(5)]
        ended = [asyncio.create_task(_closed(reader)) for reader, _ in held]
        done, _ = await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
        assert done
        await gateway.admin.GetStatus(STATUS)
        for _, writer in held:
            writer.close()
        await asyncio.gather(*ended)


async def _answers(call: Any) -> bool:
    try:
        return bool(await call(b""))
    except grpc.aio.AioRpcError:
        return False


async def _closed(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(1024):
            pass
    except ConnectionError:
        pass
