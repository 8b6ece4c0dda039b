"""Generate: what a caller reads for what the worker does."""

import asyncio
import math

import grpc
import pytest

from numoe.engine.errors import InputError, UnavailableError
from numoe.v1 import chat_pb2
from numoe.v1 import generation_pb2 as pb
from tests.actors.gateway.harness import BOS, CONTEXT, CONTROL, EOG, in_loop, serving, until


@in_loop
async def test_a_stream_starts_reports_prefill_sends_tokens_and_finishes() -> None:
    async with serving(cached=2, pause_s=0.01) as gateway:
        stream = await gateway.generate(text="prompt", request_id="my-request")
        assert stream.kinds == ["started", "prefill", *["tokens"] * 5, "finished"]
        assert stream.text == "hello"
        assert stream.token_ids == list(b"hello")
        assert (stream.started.request_id, stream.started.prompt_tokens) == ("my-request", 7)
        assert stream.started.cached_tokens == 2
        progress = stream.messages[1].prefill
        assert (progress.done, progress.total) == (7, 7)
        finished = stream.finished
        assert finished.reason == pb.FINISH_REASON_STOP
        assert not finished.HasField("stop_string")
        assert finished.usage == pb.Usage(prompt_tokens=7, cached_tokens=2, completion_tokens=5)
        assert finished.timings.queued_ms == 1.0
        assert finished.timings.prompt_ms_per_token == pytest.approx(20 / 5)
        assert finished.timings.decode_ms_per_token == pytest.approx(30 / 5)
        assert finished.timings.total_ms >= 50
        assert gateway.engine.aborted == []


@in_loop
async def test_prompts_come_as_text_ids_or_messages() -> None:
    async with serving() as gateway:
        messages = [chat_pb2.ChatMessage(role="user", content="hi")]
        await gateway.generate(text="hi")
        await gateway.generate(token_ids=pb.TokenIds(ids=[5, 6]))
        await gateway.generate(chat=pb.ChatPrompt(messages=messages))
        await gateway.generate(chat=pb.ChatPrompt(messages=messages, add_generation_prompt=False))
        prompts = [request.token_ids for request in gateway.engine.requests]
        assert prompts[0] == (BOS, *b"hi")
        assert prompts[1] == (5, 6)
        assert bytes(prompts[2]) == b"user: hi\nassistant: "  # the template wrote all special tokens
        assert bytes(prompts[3]) == b"user: hi\n"


@in_loop
async def test_absent_fields_take_the_documented_defaults() -> None:
    async with serving() as gateway:
        first, second = await gateway.generate(), await gateway.generate()
        request = gateway.engine.requests[0]
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.8, 40, 0.95, 0.05)
        assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.0, 0.0)
        assert (sampling.frequency_penalty, sampling.penalty_window) == (0.0, 64)
        assert sampling.logit_bias == ()
        assert request.max_tokens == CONTEXT - len(request.token_ids)
        assert request.stop_ids == {EOG}
        assert (request.logprobs, request.deadline) == (None, None)
        assert first.started.seed == sampling.seed != second.started.seed
        assert first.started.request_id != second.started.request_id


@in_loop
async def test_given_fields_reach_the_worker_even_where_they_are_zero() -> None:
    async with serving() as gateway:
        await gateway.generate(
            sampling=pb.SamplingOptions(
                temperature=0,
                top_k=0,
                top_p=0,
                min_p=0,
                repetition_penalty=1.5,
                presence_penalty=-0.5,
                frequency_penalty=0.25,
                penalty_window=-1,
                logit_bias={7: -math.inf, 3: 1.5},
                seed=0,
            ),
            stopping=pb.StopOptions(max_tokens=3, token_ids=[9]),
            logprobs=0,
        )
        request = gateway.engine.requests[0]
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0, 0, 0, 0)
        assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.5, -0.5)
        assert (sampling.frequency_penalty, sampling.penalty_window) == (0.25, -1)
        assert sampling.logit_bias == ((3, 1.5), (7, -math.inf))
        assert sampling.seed == 0
        assert (request.max_tokens, request.stop_ids, request.logprobs) == (3, {9, EOG}, 0)


@in_loop
async def test_ignore_eos_bans_the_end_tokens_unless_they_were_asked_for() -> None:
    async with serving() as gateway:
        await gateway.generate(stopping=pb.StopOptions(ignore_eos=True))
        await gateway.generate(stopping=pb.StopOptions(ignore_eos=True, token_ids=[EOG]))
        banned, asked = gateway.engine.requests
        assert (banned.sampling.logit_bias, banned.stop_ids) == (((EOG, -math.inf),), frozenset())
        assert (asked.sampling.logit_bias, asked.stop_ids) == ((), {EOG})


@in_loop
async def test_max_tokens_is_cut_to_the_context() -> None:
    async with serving() as gateway:
        await gateway.generate(token_ids=pb.TokenIds(ids=[1] * 60), stopping=pb.StopOptions(max_tokens=999))
        assert gateway.engine.requests[0].max_tokens == CONTEXT - 60


@in_loop
async def test_a_message_never_ends_inside_a_character() -> None:
    text = "a😀é\u200d👩‍👩‍👧b"
    async with serving(tokens=list(text.encode()), pause_s=0.001) as gateway:
        stream = await gateway.generate()
        assert stream.text == text
        assert "\ufffd" not in "".join(tokens.text for tokens in stream.tokens)
        assert stream.token_ids == list(text.encode())
        for tokens in stream.tokens:  # ids come with the characters that they complete
            assert bytes(tokens.token_ids).decode() == tokens.text


@in_loop
async def test_a_token_that_ends_one_character_and_begins_another() -> None:
    emoji = "😀".encode()
    words = [b"a" + emoji[:2], emoji[2:] + b"b"]
    async with serving(words=words, tokens=[CONTROL + 1, CONTROL + 2], pause_s=0.02) as gateway:
        stream = await gateway.generate()
        assert [(t.text, list(t.token_ids)) for t in stream.tokens] == [
            ("a", [CONTROL + 1]),
            ("😀b", [CONTROL + 2]),
        ]


@in_loop
async def test_bytes_that_never_become_a_character_end_as_a_replacement_character() -> None:
    async with serving(tokens=[*b"ok", 0xF0, 0x9F], reason="length") as gateway:
        stream = await gateway.generate()
        assert stream.text == "ok\ufffd"
        assert stream.token_ids == [*b"ok", 0xF0, 0x9F]


@in_loop
async def test_control_tokens_are_reported_without_waiting_for_text() -> None:
    async with serving(tokens=[CONTROL, *b"x"], pause_s=0.02) as gateway:
        stream = await gateway.generate()
        assert [(t.text, list(t.token_ids)) for t in stream.tokens] == [("", [CONTROL]), ("x", [ord("x")])]


@pytest.mark.parametrize("pause_s", [0, 0.002])
@in_loop
async def test_a_stop_string_across_tokens_ends_the_request(pause_s: float) -> None:
    async with serving(tokens=list(b"one STOP two"), pause_s=pause_s, reason=None) as gateway:
        stream = await gateway.generate(stopping=pb.StopOptions(strings=["never", "STOP"]), request_id="r")
        assert stream.text == "one "
        assert bytes(stream.token_ids) == b"one "
        assert stream.finished.reason == pb.FINISH_REASON_STOP
        assert stream.finished.stop_string == "STOP"
        assert stream.finished.usage.completion_tokens == len("one STOP")
        await gateway.engine.abort_seen.wait()
        assert gateway.engine.aborted == ["r"]


@in_loop
async def test_a_stop_string_that_begins_inside_a_token() -> None:
    words = [b"good ST", b"OP bad"]
    async with serving(words=words, tokens=[CONTROL + 1, CONTROL + 2], reason=None) as gateway:
        stream = await gateway.generate(stopping=pb.StopOptions(strings=["STOP"]))
        assert (stream.text, stream.token_ids) == ("good ", [CONTROL + 1])


@in_loop
async def test_text_held_for_a_stop_string_comes_when_it_is_none_after_all() -> None:
    async with serving(tokens=list(b"a ST, b ST"), pause_s=0.001) as gateway:
        stream = await gateway.generate(stopping=pb.StopOptions(strings=["STOP"]))
        assert stream.text == "a ST, b ST"
        assert bytes(stream.token_ids) == b"a ST, b ST"
        assert not stream.finished.HasField("stop_string")
        assert all(not tokens.text.endswith("S") for tokens in stream.tokens)


@in_loop
async def test_logprobs_come_with_their_tokens() -> None:
    async with serving(tokens=list("é!".encode()), pause_s=0.001) as gateway:
        stream = await gateway.generate(logprobs=2)
        assert [len(tokens.logprobs) for tokens in stream.tokens] == [2, 1]
        first = stream.tokens[0].logprobs[0]
        assert (first.token.token_id, first.token.logprob, first.token.piece) == (0xC3, -0.5, b"\xc3")
        assert [(top.token_id, top.logprob, top.piece) for top in first.top] == [
            (0, -1.0, b"\x00"),
            (1, -2.0, b"\x01"),
        ]
        plain = await gateway.generate()
        assert not any(tokens.logprobs for tokens in plain.tokens)


@in_loop
async def test_eight_streams_at_once_do_not_mix() -> None:
    async with serving(tokens=list("añ😀".encode()), pause_s=0.001) as gateway:
        streams = await asyncio.gather(*(gateway.generate(request_id=f"r{i}") for i in range(8)))
        assert [stream.started.request_id for stream in streams] == [f"r{i}" for i in range(8)]
        assert {stream.text for stream in streams} == {"añ😀"}
        assert len(gateway.streams) == 0


@in_loop
async def test_the_length_reason_and_a_single_token() -> None:
    async with serving() as gateway:
        stream = await gateway.generate(stopping=pb.StopOptions(max_tokens=1))
        assert (stream.text, stream.finished.reason) == ("h", pb.FINISH_REASON_LENGTH)
        assert stream.finished.timings.decode_ms_per_token == 0


@in_loop
async def test_a_worker_that_gives_up_ends_the_call_with_its_error() -> None:
    async with serving(reason="error", error="shard 1 returned NaN") as gateway:
        refusal = await gateway.refused()
        assert (refusal.code, refusal.message) == (grpc.StatusCode.INTERNAL, "shard 1 returned NaN")
        assert refusal.info.reason == "GENERATION_FAILED"


@in_loop
async def test_a_worker_that_dies_ends_its_streams_as_unavailable() -> None:
    async with serving(reason=None) as gateway:
        call = asyncio.create_task(gateway.refused())
        await until(lambda: bool(gateway.engine.requests))
        gateway.streams.fail_all("the attention worker died and is being restarted")
        refusal = await call
        assert refusal.code is grpc.StatusCode.UNAVAILABLE
        assert "attention worker died" in refusal.message
        assert refusal.retry.retry_delay.seconds > 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnavailableError("worker down"), grpc.StatusCode.UNAVAILABLE),
        (InputError("no room"), grpc.StatusCode.INVALID_ARGUMENT),
        (RuntimeError("a defect"), grpc.StatusCode.INTERNAL),
    ],
)
@in_loop
async def test_errors_of_submit_have_codes_and_leave_nothing_open(
    error: Exception, code: grpc.StatusCode, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(submit_error=error) as gateway:
        refusal = await gateway.refused()
        assert refusal.code is code
        assert refusal.info.domain == "numoe"
        assert "a defect" not in refusal.message  # defects are logged, not sent
        assert len(gateway.streams) == 0
