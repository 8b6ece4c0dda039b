"""Tokenizer, model and admin services, health, reflection, and the listening address."""

import asyncio
import socket
import stat
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from numoe.actors.gateway.listen import parse_listen
from numoe.engine.errors import InputError, ResourceError, UnavailableError
from numoe.v1 import admin_pb2, chat_pb2, model_pb2
from numoe.v1 import tokenizer_pb2 as tok
from tests.actors.gateway.harness import BOS, CONTEXT, EOG, VOCAB_SIZE, Gateway, in_loop, refusal, serving
from tests.http2 import DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, SETTINGS, frame, headers

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
USER = chat_pb2.ChatMessage(role="user", content="hi")


@in_loop
async def test_tokenize_and_detokenize() -> None:
    async with serving(ready=False) as gateway:  # it needs no worker
        tokens = await gateway.tokenizer.Tokenize(tok.TokenizeRequest(text="é"))
        assert list(tokens.token_ids) == [BOS, 0xC3, 0xA9]
        bare = await gateway.tokenizer.Tokenize(tok.TokenizeRequest(text="é", add_special=False))
        assert list(bare.token_ids) == [0xC3, 0xA9]
        text = await gateway.tokenizer.Detokenize(tok.DetokenizeRequest(token_ids=bare.token_ids))
        assert text.text == "é"
        long = await gateway.tokenizer.Tokenize(tok.TokenizeRequest(text="a" * 100_000))  # in a thread
        assert len(long.token_ids) == 100_001
        failed = await refusal(gateway.tokenizer.Detokenize(tok.DetokenizeRequest(token_ids=[1, VOCAB_SIZE])))
        assert (failed.code, failed.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["token_ids[1]"])


@in_loop
async def test_apply_template() -> None:
    async with serving() as gateway:
        rendered = await gateway.tokenizer.ApplyTemplate(tok.ApplyTemplateRequest(messages=[USER]))
        assert rendered.text == "user: hi\nassistant: "
        closed = tok.ApplyTemplateRequest(messages=[USER], add_generation_prompt=False)
        assert (await gateway.tokenizer.ApplyTemplate(closed)).text == "user: hi\n"
        failed = await refusal(gateway.tokenizer.ApplyTemplate(tok.ApplyTemplateRequest()))
        assert failed.fields == ["messages"]
    async with serving(template=False) as gateway:
        failed = await refusal(gateway.tokenizer.ApplyTemplate(tok.ApplyTemplateRequest(messages=[USER])))
        assert failed.code is grpc.StatusCode.FAILED_PRECONDITION


@in_loop
async def test_the_model_is_described() -> None:
    async with serving() as gateway:
        model = (await gateway.models.GetModel(model_pb2.GetModelRequest())).model
        assert (model.name, model.context_tokens, model.vocab_size) == ("tiny", CONTEXT, VOCAB_SIZE)
        assert (model.special_tokens.eos, list(model.special_tokens.end_of_generation)) == (EOG, [EOG])
        assert not model.special_tokens.HasField("bos")
        assert not model.HasField("fingerprint")
        assert model.has_chat_template
        assert list((await gateway.models.ListModels(model_pb2.ListModelsRequest())).models) == [model]
        failed = await refusal(gateway.models.GetModel(model_pb2.GetModelRequest(name="other")))
        assert failed.code is grpc.StatusCode.NOT_FOUND


@in_loop
async def test_status_tells_actors_slots_queue_and_steps() -> None:
    async with serving() as gateway:
        status = await gateway.admin.GetStatus(admin_pb2.GetStatusRequest())
        assert (status.version, status.state) == ("1.2.3", admin_pb2.SERVER_STATE_SERVING)
        gateway_actor, expert = status.actors
        assert (gateway_actor.role, gateway_actor.pid) == (admin_pb2.ACTOR_ROLE_GATEWAY, 1)
        assert not gateway_actor.HasField("numa_node")
        assert expert.HasField("numa_node")
        assert (expert.state, expert.restarts) == (admin_pb2.ACTOR_STATE_RESTARTING, 3)
        assert [slot.state for slot in status.slots] == [
            admin_pb2.SLOT_STATE_DECODE,
            admin_pb2.SLOT_STATE_IDLE,
        ]
        assert (status.queue.queued, status.queue.limit) == (2, 64)
        assert (status.kv.pages_used, status.kv.pages_total) == (3, 10)
        assert dict(status.step.last_ms) == {"total": 2.5, "experts": 1.5}


@in_loop
async def test_status_answers_while_the_worker_is_down() -> None:
    async with serving(ready=False, status_error=UnavailableError("restarting")) as gateway:
        status = await gateway.admin.GetStatus(admin_pb2.GetStatusRequest())
        assert status.state == admin_pb2.SERVER_STATE_STARTING
        assert len(status.actors) == 2
        assert not status.slots
        assert not status.HasField("step")


@in_loop
async def test_shutdown_drains_and_tells_the_supervisor() -> None:
    async with serving() as gateway:
        await gateway.admin.Shutdown(
            admin_pb2.ShutdownRequest(drain_deadline=Duration(seconds=2), keep_weights=True)
        )
        assert gateway.engine.keeps_weights
        await gateway.admin.Shutdown(admin_pb2.ShutdownRequest())
        assert gateway.engine.shutdowns == [2.0, 30.0]
        assert (await gateway.refused()).code is grpc.StatusCode.UNAVAILABLE
        bad = admin_pb2.ShutdownRequest(drain_deadline=Duration(seconds=-1))
        assert (await refusal(gateway.admin.Shutdown(bad))).fields == ["drain_deadline"]


@in_loop
async def test_health_follows_readiness_and_draining() -> None:
    async with serving(ready=False) as gateway:
        generation, slots, models = (f"numoe.v1.{name}Service" for name in ("Generation", "Slot", "Model"))
        assert [await _health(gateway, s) for s in ("", generation, slots)] == [NOT_SERVING] * 3
        assert await _health(gateway, models) == SERVING
        await gateway.server.set_ready()
        assert [await _health(gateway, s) for s in ("", generation, slots, models)] == [SERVING] * 4
        await gateway.server.set_ready(ready=False)  # a worker is being replaced
        assert [await _health(gateway, s) for s in ("", generation, slots)] == [NOT_SERVING] * 3
        await gateway.server.drain(0)
        await gateway.server.set_ready()  # too late
        assert [await _health(gateway, s) for s in ("", generation, slots, models)] == [NOT_SERVING] * 4
        unknown = gateway.health.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert (await refusal(unknown)).code is grpc.StatusCode.NOT_FOUND


@in_loop
async def test_reflection_lists_and_describes_every_service() -> None:
    async with serving() as gateway:
        services, fields = await asyncio.to_thread(_reflect, gateway.server.address)
        assert services >= {
            "numoe.v1.GenerationService",
            "numoe.v1.TokenizerService",
            "numoe.v1.ModelService",
            "numoe.v1.SlotService",
            "numoe.v1.AdminService",
            "grpc.health.v1.Health",
        }
        assert "sampling" in fields


@in_loop
async def test_a_busy_port_is_named_with_its_cure() -> None:
    async with serving() as gateway:
        port = gateway.server.address.rpartition(":")[2]
        with pytest.raises(ResourceError, match=rf"port {port} on 127.0.0.1 is in use: .*--listen"):
            async with serving(listen=f"127.0.0.1:{port}"):
                pass
    with socket.create_server(("127.0.0.1", 0)) as stranger:  # no gRPC server
        port = stranger.getsockname()[1]
        with pytest.raises(ResourceError, match="in use"):
            async with serving(listen=f"127.0.0.1:{port}"):
                pass


@in_loop
async def test_a_port_can_be_reused_at_once() -> None:
    async with serving() as gateway:
        address = gateway.server.address
        await gateway.generate()
    async with serving(listen=address) as gateway:
        assert gateway.server.address == address
        await gateway.generate()


@in_loop
async def test_a_unix_socket_is_private_and_never_stolen(tmp_path: Path) -> None:
    path = tmp_path / "numoe.sock"
    async with serving(listen=f"unix:{path}") as gateway:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (await gateway.generate()).text == "hello"
        with pytest.raises(ResourceError, match="is in use"):
            async with serving(listen=f"unix:{path}"):
                pass
        assert (await gateway.generate()).text == "hello"
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serving(listen=f"unix:{path}") as gateway:  # a dead server's socket is replaced
        assert (await gateway.generate()).text == "hello"
    path.write_text("a file")
    with pytest.raises(ResourceError, match="is no socket"):
        async with serving(listen=f"unix:{path}"):
            pass
    with pytest.raises(InputError, match="no folder"):
        async with serving(listen=f"unix:{tmp_path}/missing/numoe.sock"):
            pass


@pytest.mark.parametrize(
    "listen", ["", "50051", ":50051", "host:", "127.0.0.1:x", "127.0.0.1:99999", "::1:5", "a:-1", "unix:"]
)
def test_a_malformed_address_is_refused(listen: str) -> None:
    with pytest.raises(InputError):
        parse_listen(listen)


def test_addresses_keep_their_form() -> None:
    for listen in ("127.0.0.1:0", "[::1]:50051", "localhost:1", "unix:/run/numoe.sock"):
        assert str(parse_listen(listen)) == listen


@in_loop
async def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(InputError, match=r"cannot listen on 192\.0\.2\.1:5"):
        async with serving(listen="192.0.2.1:5", endpoint={"insecure": True}):
            pass


async def _health(gateway: Gateway, service: str) -> int:
    return (await gateway.health.Check(health_pb2.HealthCheckRequest(service=service))).status


def _reflect(address: str) -> tuple[set[str], set[str]]:
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        service = pool.FindServiceByName("numoe.v1.GenerationService")
        fields = {f.name for f in service.FindMethodByName("Generate").input_type.fields}
        return set(database.get_services()), fields


@in_loop
async def test_unknown_methods_are_refused_whatever_their_names() -> None:
    async with serving() as gateway:
        for path in (b"/x/y", b"/numoe.v1.AdminService/\xff\xfe", b"\x80", b"", b"/"):
            reader, writer = await asyncio.open_connection(*gateway.server.address.split(":"))
            writer.write(PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS, 1, headers(path)))
            writer.write(frame(DATA, END_STREAM, 1, bytes(5)))
            answer = await reader.read(1 << 16)
            while b"grpc-status" not in answer and (more := await reader.read(1 << 16)):
                answer += more
            writer.close()
            unknown = await refusal(gateway.channel.unary_unary("/x/y")(b""))
            assert unknown.code is grpc.StatusCode.UNIMPLEMENTED
        status = await gateway.admin.GetStatus(admin_pb2.GetStatusRequest())  # the server lives
        assert status.state == admin_pb2.SERVER_STATE_SERVING


@in_loop
async def test_what_is_no_message_is_refused_by_every_service() -> None:
    async with serving() as gateway:
        reflect = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        for method in ("numoe.v1.AdminService/GetStatus", "grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"):
            failed = await refusal(gateway.channel.unary_unary(f"/{method}")(b"\xff"))
            assert (failed.code, failed.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["request"])
        failed = await refusal(gateway.channel.stream_stream(reflect)(iter([b"\xff"])).read())
        assert (failed.code, failed.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["request"])
        unknown = gateway.health.Check(health_pb2.HealthCheckRequest(service="unknown"))
        assert (await refusal(unknown)).code is grpc.StatusCode.NOT_FOUND
