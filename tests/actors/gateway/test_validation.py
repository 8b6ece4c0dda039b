"""Bad requests are refused before anything else sees them, and every bad field is named."""

import math

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from numoe.actors.gateway import Limits
from numoe.engine.errors import NumoeError
from numoe.v1 import chat_pb2
from numoe.v1 import generation_pb2 as pb
from tests.actors.gateway.harness import CONTEXT, VOCAB_SIZE, in_loop, serving

MESSAGE = chat_pb2.ChatMessage


@in_loop
async def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    async with serving() as gateway:
        for prompt in (
            {"token_ids": pb.TokenIds(ids=[1] * 100)},
            {"text": "x" * 99},  # and beginning-of-sequence
            {"chat": pb.ChatPrompt(messages=[MESSAGE(role="user", content="y" * 82)])},
        ):
            failed = await gateway.refused(**prompt)
            assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
            assert "100 tokens" in failed.message
            assert f"context holds {CONTEXT}" in failed.message
            assert failed.fields[0].startswith(next(iter(prompt)))
        assert gateway.engine.requests == []


@in_loop
async def test_a_prompt_that_fills_the_context_leaves_no_room_for_a_token() -> None:
    async with serving() as gateway:
        assert (await gateway.refused(token_ids=pb.TokenIds(ids=[1] * CONTEXT))).fields == ["token_ids.ids"]
        await gateway.generate(token_ids=pb.TokenIds(ids=[1] * (CONTEXT - 1)))
        assert gateway.engine.requests[0].max_tokens == 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"text": ""}, "text"),
        ({"token_ids": pb.TokenIds()}, "token_ids.ids"),
        ({"token_ids": pb.TokenIds(ids=[0, VOCAB_SIZE])}, "token_ids.ids[1]"),
        ({"token_ids": pb.TokenIds(ids=[2**32 - 1])}, "token_ids.ids[0]"),
        ({"chat": pb.ChatPrompt()}, "chat.messages"),
        ({"chat": pb.ChatPrompt(messages=[MESSAGE(content="hi")])}, "chat.messages[0].role"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "a b"}, "request_id"),
        ({"request_id": "a" * 129}, "request_id"),
        ({"logprobs": 21}, "logprobs"),
        ({"sampling": pb.SamplingOptions(temperature=-0.1)}, "sampling.temperature"),
        ({"sampling": pb.SamplingOptions(temperature=math.nan)}, "sampling.temperature"),
        ({"sampling": pb.SamplingOptions(temperature=math.inf)}, "sampling.temperature"),
        ({"sampling": pb.SamplingOptions(top_p=1.01)}, "sampling.top_p"),
        ({"sampling": pb.SamplingOptions(top_p=math.nan)}, "sampling.top_p"),
        ({"sampling": pb.SamplingOptions(min_p=-1)}, "sampling.min_p"),
        ({"sampling": pb.SamplingOptions(repetition_penalty=0)}, "sampling.repetition_penalty"),
        ({"sampling": pb.SamplingOptions(repetition_penalty=-1)}, "sampling.repetition_penalty"),
        ({"sampling": pb.SamplingOptions(presence_penalty=math.inf)}, "sampling.presence_penalty"),
        ({"sampling": pb.SamplingOptions(frequency_penalty=math.nan)}, "sampling.frequency_penalty"),
        ({"sampling": pb.SamplingOptions(penalty_window=-2)}, "sampling.penalty_window"),
        ({"sampling": pb.SamplingOptions(logit_bias={VOCAB_SIZE: 1.0})}, "sampling.logit_bias[0]"),
        ({"sampling": pb.SamplingOptions(logit_bias={3: math.inf})}, "sampling.logit_bias[3]"),
        ({"sampling": pb.SamplingOptions(logit_bias={3: math.nan})}, "sampling.logit_bias[3]"),
        (
            {"sampling": pb.SamplingOptions(logit_bias=dict.fromkeys(range(VOCAB_SIZE), -math.inf))},
            "sampling.logit_bias",
        ),
        ({"stopping": pb.StopOptions(max_tokens=0)}, "stopping.max_tokens"),
        ({"stopping": pb.StopOptions(strings=[""])}, "stopping.strings[0]"),
        ({"stopping": pb.StopOptions(strings=["a" * 1025])}, "stopping.strings[0]"),
        ({"stopping": pb.StopOptions(strings=["a"] * 65)}, "stopping.strings"),
        ({"stopping": pb.StopOptions(token_ids=[VOCAB_SIZE])}, "stopping.token_ids[0]"),
        ({"stopping": pb.StopOptions(token_ids=[1] * 1025)}, "stopping.token_ids"),
        ({"cache": pb.CacheOptions(salt=b"a" * 257)}, "cache.salt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@in_loop
async def test_a_bad_field_is_named(fields: dict[str, object], named: str) -> None:
    async with serving() as gateway:
        failed = await gateway.refused(**fields)
        assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
        assert failed.fields == [named]
        assert named in failed.message
        assert (failed.info.domain, failed.info.reason) == ("numoe", "BAD_REQUEST")
        assert gateway.engine.requests == []
        assert len(gateway.streams) == 0


@in_loop
async def test_all_bad_fields_are_named_at_once_within_what_a_header_holds() -> None:
    async with serving() as gateway:
        failed = await gateway.refused(
            text="",
            logprobs=99,
            sampling=pb.SamplingOptions(top_p=7),
            stopping=pb.StopOptions(max_tokens=0, strings=["é" * 2000] * 64),
        )
        assert failed.fields[:2] == ["text", "stopping.max_tokens"]
        assert len(failed.fields) == 16
        assert len(failed.message) <= 240


@in_loop
async def test_a_request_without_a_prompt_is_refused() -> None:
    async with serving() as gateway:
        call = gateway.generation.Generate(pb.GenerateRequest())
        with pytest.raises(grpc.aio.AioRpcError, match="prompt: is missing"):
            await call.read()


@in_loop
async def test_a_prompt_over_the_byte_limit_is_not_tokenized() -> None:
    async with serving(limits=Limits(max_prompt_bytes=10)) as gateway:
        assert (await gateway.refused(text="é" * 6)).fields == ["text"]


@in_loop
async def test_chat_without_a_template_is_a_failed_precondition() -> None:
    async with serving(template=False) as gateway:
        failed = await gateway.refused(chat=pb.ChatPrompt(messages=[MESSAGE(role="user", content="hi")]))
        assert (failed.code, failed.info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED")


@in_loop
async def test_messages_that_the_template_refuses_are_an_invalid_argument() -> None:
    async with serving() as gateway:
        failed = await gateway.refused(chat=pb.ChatPrompt(messages=[MESSAGE(role="forbidden", content="hi")]))
        assert failed.code is grpc.StatusCode.INVALID_ARGUMENT


def absent_or(values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.none() | values


FLOATS = st.floats(width=32) | st.sampled_from([0.0, 1.0, math.nan, math.inf, -math.inf])
UINT32 = st.integers(0, 2**32 - 1) | st.integers(0, 2 * VOCAB_SIZE)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
MESSAGES = st.builds(MESSAGE, role=st.sampled_from(["user", "system", "forbidden", ""]), content=TEXT)
SAMPLING = st.builds(
    pb.SamplingOptions,
    temperature=absent_or(FLOATS),
    top_k=absent_or(UINT32),
    top_p=absent_or(FLOATS),
    min_p=absent_or(FLOATS),
    repetition_penalty=absent_or(FLOATS),
    presence_penalty=absent_or(FLOATS),
    frequency_penalty=absent_or(FLOATS),
    penalty_window=absent_or(st.integers(-(2**31), 2**31 - 1)),
    logit_bias=st.dictionaries(UINT32, FLOATS, max_size=4),
    seed=absent_or(st.integers(0, 2**64 - 1)),
)
STOPPING = st.builds(
    pb.StopOptions,
    max_tokens=absent_or(UINT32),
    strings=st.lists(TEXT, max_size=4),
    token_ids=st.lists(UINT32, max_size=4),
    ignore_eos=absent_or(st.booleans()),
)
PROMPTS = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"text": TEXT}),
    st.fixed_dictionaries({"token_ids": st.builds(pb.TokenIds, ids=st.lists(UINT32, max_size=80))}),
    st.fixed_dictionaries({"chat": st.builds(pb.ChatPrompt, messages=st.lists(MESSAGES, max_size=3))}),
)
REQUESTS = st.builds(
    lambda prompt, **fields: pb.GenerateRequest(**prompt, **fields),
    prompt=PROMPTS,
    sampling=absent_or(SAMPLING),
    stopping=absent_or(STOPPING),
    logprobs=absent_or(UINT32 | st.integers(0, 20)),
    request_id=absent_or(st.text("aZ9._:-", max_size=130) | TEXT),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests=st.lists(REQUESTS, min_size=8, max_size=16))
@in_loop
async def test_any_request_is_answered_or_refused_with_a_reason(requests: list[pb.GenerateRequest]) -> None:
    async with serving(tokens=list("hé😀lo".encode())) as gateway:
        codes = set()
        for request in requests:
            try:
                kinds = [m.WhichOneof("event") async for m in gateway.generation.Generate(request, timeout=5)]
            except grpc.aio.AioRpcError as refused:
                codes.add(refused.code())
            else:
                assert (kinds[0], kinds[-1]) == ("started", "finished")
        assert codes <= {grpc.StatusCode.INVALID_ARGUMENT}
        assert len(gateway.streams) == 0
        for submitted in gateway.engine.requests:
            _check_promises(submitted)


def _check_promises(request: object) -> None:
    """What the worker may rely on."""
    sampling = request.sampling
    assert 1 <= len(request.token_ids) <= CONTEXT - 1
    assert 1 <= request.max_tokens <= CONTEXT - len(request.token_ids)
    assert all(0 <= i < VOCAB_SIZE for i in (*request.token_ids, *request.stop_ids))
    assert sampling.temperature == 0 or 1e-4 <= sampling.temperature <= 1000
    assert 0 <= sampling.top_k <= VOCAB_SIZE
    assert 0 <= sampling.top_p <= 1
    assert 0 <= sampling.min_p <= 1
    assert 0 < sampling.repetition_penalty <= 100
    assert sampling.penalty_window >= -1
    assert all(0 <= i < VOCAB_SIZE and value < math.inf for i, value in sampling.logit_bias)
    assert 0 <= sampling.seed < 2**64


@pytest.mark.parametrize("method", ["GenerationService/Generate", "AdminService/GetStatus"])
@in_loop
async def test_bytes_that_are_no_request_are_an_invalid_argument(method: str) -> None:
    async with serving() as gateway:
        path = f"/numoe.v1.{method}"
        for data in (b"\xff" * 10, b"\x0a\x02\xff\xfe", b"\x0a\xff\xff\xff\xff\x0f"):
            call = gateway.channel.unary_stream(path, request_serializer=None, response_deserializer=None)(data)
            try:
                await call.read()
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT  # noqa: PT017
        assert (await gateway.generate()).text == "hello"


def test_every_numoe_error_has_a_status() -> None:
    from numoe.actors.gateway.errors import status_of

    def children(kind: type[NumoeError]) -> list[type[NumoeError]]:
        return [kind, *(grandchild for child in kind.__subclasses__() for grandchild in children(child))]

    for kind in children(NumoeError):
        error = kind.__new__(kind)
        error.violations = ()  # type: ignore[attr-defined]
        status = status_of(error)
        assert status.code not in {0, 2}
        assert len(status.SerializeToString()) < 8192
