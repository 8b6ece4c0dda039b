"""How calls end early: cancelled, expired, aborted, too slow, drained."""

import asyncio
import contextlib
import time

import grpc
import pytest

from numoe.actors.gateway import Limits, RequestStreams
from numoe.engine.errors import ResourceError, UnavailableError
from numoe.engine.requests import PrefillProgress, TokenGenerated
from numoe.v1 import generation_pb2 as pb
from tests.actors.gateway.harness import Gateway, in_loop, refusal, serving, until


@in_loop
async def test_a_cancelled_call_aborts_its_request_at_once() -> None:
    async with serving(reason=None) as gateway:
        call = gateway.generation.Generate(pb.GenerateRequest(text="a", request_id="r"))
        assert (await call.read()).started.request_id == "r"
        call.cancel()
        cancelled = time.monotonic()
        await gateway.engine.abort_seen.wait()
        assert gateway.engine.aborted == ["r"]
        assert time.monotonic() - cancelled < 1
        await until(lambda: not len(gateway.streams))


@in_loop
async def test_a_caller_who_disconnects_aborts_his_request() -> None:
    async with serving(reason=None) as gateway:
        async with grpc.aio.insecure_channel(gateway.server.address) as channel:
            call = channel.unary_stream(
                "/numoe.v1.GenerationService/Generate",
                request_serializer=pb.GenerateRequest.SerializeToString,
                response_deserializer=pb.GenerateResponse.FromString,
            )(pb.GenerateRequest(text="a", request_id="r"))
            await call.read()
        await gateway.engine.abort_seen.wait()
        assert gateway.engine.aborted == ["r"]


@in_loop
async def test_the_calls_deadline_reaches_the_worker_and_aborts_when_it_passes() -> None:
    async with serving(reason=None) as gateway:
        began = time.time()
        failed = await refusal(_read_all(gateway.generation.Generate(pb.GenerateRequest(text="a"), timeout=0.3)))
        assert failed.code is grpc.StatusCode.DEADLINE_EXCEEDED
        deadline = gateway.engine.requests[0].deadline
        assert deadline is not None
        assert deadline == pytest.approx(began + 0.3, abs=0.2)
        await gateway.engine.abort_seen.wait()


@in_loop
async def test_a_worker_that_sees_the_deadline_first_ends_the_call_with_it() -> None:
    async with serving(reason="deadline") as gateway:
        failed = await gateway.refused()
        assert (failed.code, failed.info.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


@in_loop
async def test_abort_ends_a_request_as_cancelled_with_what_it_had() -> None:
    async with serving(reason=None) as gateway:
        call = asyncio.create_task(gateway.generate(request_id="r"))
        await until(lambda: bool(gateway.engine.requests))
        await asyncio.sleep(0.05)
        await gateway.generation.Abort(pb.AbortRequest(request_id="r"))
        stream = await call
        assert (stream.text, stream.finished.reason) == ("hello", pb.FINISH_REASON_CANCELLED)
        assert gateway.engine.aborted == ["r"]


@in_loop
async def test_abort_of_an_unknown_request_is_not_found() -> None:
    async with serving() as gateway:
        unknown = await refusal(gateway.generation.Abort(pb.AbortRequest(request_id="nobody")))
        assert (unknown.code, unknown.info.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
        malformed = await refusal(gateway.generation.Abort(pb.AbortRequest()))
        assert (malformed.code, malformed.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["request_id"])


@in_loop
async def test_two_running_requests_cannot_share_an_id() -> None:
    async with serving(reason=None) as gateway:
        async with _running(gateway, "r"):
            failed = await gateway.refused(request_id="r")
            assert (failed.code, failed.info.reason) == (
                grpc.StatusCode.ALREADY_EXISTS,
                "REQUEST_ID_IN_USE",
            )
            assert gateway.engine.aborted == []  # the first one goes on
        await until(lambda: not len(gateway.streams))
        gateway.engine.reason = "stop"
        await gateway.generate(request_id="r")


@in_loop
async def test_a_full_queue_says_when_to_try_again() -> None:
    full = ResourceError("64 requests wait already, the most that --queue allows: try again later")
    async with serving(submit_error=full) as gateway:
        failed = await gateway.refused()
        assert failed.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert failed.message == str(full)
        assert failed.retry.retry_delay.seconds == 1
        assert gateway.engine.aborted == []


@in_loop
async def test_a_reader_who_stops_reading_is_cut_off_with_bounded_memory() -> None:
    window = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with serving(reason=None, tokens=(), backlog=50, channel_options=window) as gateway:
        call = gateway.generation.Generate(pb.GenerateRequest(text="a", request_id="r", logprobs=20))
        await call.read()
        token = TokenGenerated("r", 65)
        for _ in range(20_000):
            gateway.streams.deliver([token] * 20)
            if gateway.engine.abort_seen.is_set():
                break
            await asyncio.sleep(0)
        assert gateway.engine.aborted == ["r"]
        failed = await refusal(_read_on(call))
        assert (failed.code, failed.info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER")


@in_loop
async def test_a_backlog_holds_no_more_than_its_limit() -> None:
    streams, overflowed = RequestStreams(backlog=10), list[str]()
    with streams.open("r", overflowed.append) as stream:
        streams.deliver([PrefillProgress("r", done, 100) for done in range(100)])  # only the last counts
        assert await stream.next_events() == [PrefillProgress("r", 99, 100)]
        streams.deliver([TokenGenerated("r", 1)] * 1000)
        streams.deliver([TokenGenerated("stranger", 1)])
        assert overflowed == ["r"]
        with pytest.raises(ResourceError, match="10 events wait"):
            await stream.next_events()


@in_loop
async def test_no_more_streams_than_the_limit() -> None:
    streams = RequestStreams(max_streams=1)
    with streams.open("a", print):
        with pytest.raises(ResourceError, match="1 streams are open"), streams.open("b", print):
            pass
        streams.fail_all("gone")
    await streams.wait_idle()


@in_loop
async def test_draining_refuses_new_requests_and_lets_running_ones_finish() -> None:
    async with serving(pause_s=0.05) as gateway:
        running = asyncio.create_task(gateway.generate())
        await until(lambda: bool(gateway.engine.requests))
        draining = asyncio.create_task(gateway.server.drain(10))
        await until(lambda: gateway.server.state == "draining")
        failed = await gateway.refused()
        assert failed.code is grpc.StatusCode.UNAVAILABLE
        assert failed.retry.retry_delay.seconds > 0
        assert (await running).text == "hello"
        assert await draining


@in_loop
async def test_draining_ends_at_its_deadline_and_stopping_ends_the_rest() -> None:
    async with serving(reason=None) as gateway:
        running = asyncio.create_task(gateway.refused())
        await until(lambda: bool(gateway.engine.requests))
        assert not await gateway.server.drain(0.05)
        await gateway.server.stop()
        failed = await running
        assert failed.code is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in failed.message


@in_loop
async def test_before_the_model_is_ready_generate_is_unavailable() -> None:
    async with serving(ready=False) as gateway:
        failed = await gateway.refused()
        assert (failed.code, failed.info.reason) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
        assert "loading" in failed.message
        await gateway.server.set_ready()
        assert (await gateway.generate()).text == "hello"


@in_loop
async def test_a_message_over_the_size_limit_is_refused() -> None:
    async with serving(limits=Limits(max_message_bytes=1000)) as gateway:
        failed = await gateway.refused(text="a" * 2000)
        assert failed.code is grpc.StatusCode.RESOURCE_EXHAUSTED


@in_loop
async def test_an_abort_that_fails_is_logged_and_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(reason=None) as gateway:

        async def fail(request_id: str) -> None:
            gateway.engine.abort_seen.set()
            raise UnavailableError("worker down")

        gateway.engine.abort = fail  # type: ignore[method-assign]
        async with _running(gateway, "r"):
            pass
        await gateway.engine.abort_seen.wait()
        await until(lambda: "r could not be aborted: worker down" in caplog.text)


async def _read_all(call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]) -> None:
    async for _ in call:
        pass


async def _read_on(call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


@contextlib.asynccontextmanager
async def _running(gateway: Gateway, request_id: str):
    call = gateway.generation.Generate(pb.GenerateRequest(text="a", request_id=request_id))
    await call.read()
    yield
    call.cancel()
