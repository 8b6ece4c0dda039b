"""Who is answered: addresses, tokens and certificates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from numoe.actors.gateway.listen import require_protected
from numoe.actors.gateway.server import check_endpoint
from numoe.cluster.endpoint import MAX_TOKENS, Endpoint
from numoe.engine.errors import AccessError, InputError, NotFoundError
from numoe.v1 import admin_pb2, admin_pb2_grpc, generation_pb2_grpc
from numoe.v1 import generation_pb2 as pb
from tests.actors.gateway.harness import Refusal, in_loop, refusal, serving
from tests.certificates import Authority, write_tokens

STATUS = admin_pb2.GetStatusRequest()
CHECK = health_pb2.HealthCheckRequest()


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:7", "[::ffff:0.0.0.0]:0"])
def test_other_hosts_are_answered_only_with_tls_and_tokens_or_when_told_so(listen: str, tmp_path: Path) -> None:
    pem, tokens = Authority(tmp_path).issue("localhost"), write_tokens(tmp_path / "tokens", "abc")
    tls = {"tls_cert": pem.cert, "tls_key": pem.key}
    for half in ({}, {"token_file": tokens}, tls):
        with pytest.raises(InputError, match=r"reached from other hosts: give --tls-cert.*--insecure-listen"):
            check_endpoint(Endpoint(listen=listen, **half))
    for enough in ({**tls, "token_file": tokens}, {**tls, "tls_client_ca": pem.cert}, {"insecure": True}):
        require_protected(Endpoint(listen=listen, **enough))


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.9.9.9:0", "localhost:0", "[::ffff:127.0.0.1]:0"])
def test_loopback_needs_nothing(listen: str) -> None:
    check_endpoint(Endpoint(listen=listen))


def test_a_socket_in_the_file_system_needs_nothing(tmp_path: Path) -> None:
    check_endpoint(Endpoint(listen=f"unix:{tmp_path}/socket"))


# --- tokens ---------------------------------------------------------------------------------------


@in_loop
async def test_only_callers_with_a_token_are_answered(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", "# ours", "", "first-token  # alice", "second+/~._-==")
    async with serving(endpoint={"token_file": tokens}) as gateway:
        for token in ("first-token", "second+/~._-=="):
            await gateway.admin.GetStatus(STATUS, metadata=bearer(token))
        await gateway.admin.GetStatus(STATUS, metadata=(("authorization", "bearer first-token"),))
        failed = await refusal(gateway.admin.GetStatus(STATUS))
        assert (failed.code, failed.info.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        assert "authorization: Bearer TOKEN" in failed.message
        assert "--token-file" in failed.message
        for wrong in ("", "first", "first-token-", "FIRST-TOKEN", "alice", "#", "ours"):
            failed = await refusal(gateway.admin.GetStatus(STATUS, metadata=bearer(wrong)))
            assert failed.code is grpc.StatusCode.UNAUTHENTICATED
            assert "not one of this server's" in failed.message
        for metadata in ((("authorization", "Basic first-token"),), bearer("first-token") * 2):
            failed = await refusal(gateway.admin.GetStatus(STATUS, metadata=metadata))
            assert (failed.code, "of the form `Bearer TOKEN`" in failed.message) == (
                grpc.StatusCode.UNAUTHENTICATED,
                True,
            )


@in_loop
async def test_no_service_but_health_checks_answers_without_a_token(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", "abc")
    async with serving(endpoint={"token_file": tokens}) as gateway:
        assert (await gateway.health.Check(CHECK)).status == health_pb2.HealthCheckResponse.SERVING
        watch = gateway.health.Watch(CHECK)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        assert (await gateway.refused(text="hi")).code is grpc.StatusCode.UNAUTHENTICATED
        assert gateway.engine.requests == []
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        reflect = reflection_pb2_grpc.ServerReflectionStub(gateway.channel).ServerReflectionInfo(iter([ask]))
        unknown = gateway.channel.unary_unary("/numoe.v1.AdminService/Nothing")(b"")
        misleading = gateway.channel.unary_unary("/grpc.health.v1.HealthX/Check")(b"")
        for call in (reflect.read(), unknown, misleading):
            assert (await refusal(call)).code is grpc.StatusCode.UNAUTHENTICATED
        known = reflection_pb2_grpc.ServerReflectionStub(gateway.channel)
        answer = await known.ServerReflectionInfo(iter([ask]), metadata=bearer("abc")).read()
        assert len(answer.list_services_response.service) >= 5


@in_loop
async def test_what_the_token_file_holds_now_counts(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    write_tokens(path, "before")
    async with serving(endpoint={"token_file": str(path)}) as gateway:

        async def answer(token: str) -> grpc.StatusCode:
            try:
                await gateway.admin.GetStatus(STATUS, metadata=bearer(token))
            except grpc.aio.AioRpcError as error:
                return Refusal(error).code
            return grpc.StatusCode.OK

        assert await answer("before") is grpc.StatusCode.OK
        write_tokens(path, "afterwards")
        assert await answer("before") is grpc.StatusCode.UNAUTHENTICATED
        assert await answer("afterwards") is grpc.StatusCode.OK
        path.chmod(0o644)  # somebody else may know them now
        assert await answer("afterwards") is grpc.StatusCode.UNAVAILABLE
        path.chmod(0o600)
        assert await answer("afterwards") is grpc.StatusCode.OK
        path.unlink()
        assert await answer("afterwards") is grpc.StatusCode.UNAVAILABLE
        write_tokens(path, "anew")
        assert await answer("anew") is grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["# nothing"], "holds no token: write one with `openssl rand"),
        (["fine", "not fine"], "line 2 of .* is no token"),
        (["schön"], "line 1 of .* is no token"),
        (["x"] * (MAX_TOKENS + 1), "1001 tokens; at most 1000"),
    ],
)
def test_a_token_file_that_cannot_be_used_is_refused_at_start(lines: list[str], message: str, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", *lines)
    with pytest.raises(InputError, match=message):
        check_endpoint(Endpoint(listen="127.0.0.1:0", token_file=tokens))


def test_a_token_file_that_others_may_read_is_refused_at_start(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", "abc")
    Path(tokens).chmod(0o644)
    with pytest.raises(AccessError, match=f"chmod 600 {tokens}"):
        check_endpoint(Endpoint(listen="127.0.0.1:0", token_file=tokens))


# --- certificates ---------------------------------------------------------------------------------


def channel(address: str, ca: str, pair: Any = None) -> grpc.aio.Channel:
    key, chain = (Path(pair.key).read_bytes(), Path(pair.cert).read_bytes()) if pair else (None, None)
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(Path(ca).read_bytes(), key, chain))


async def status(address: str, ca: str, pair: Any = None, **options: Any) -> grpc.StatusCode:
    async with channel(address, ca, pair) as secure:
        try:
            await admin_pb2_grpc.AdminServiceStub(secure).GetStatus(STATUS, timeout=5, **options)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


@in_loop
async def test_tls_with_tokens(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    pem, tokens = authority.issue("127.0.0.1"), write_tokens(tmp_path / "tokens", "abc")
    async with serving(endpoint={"tls_cert": pem.cert, "tls_key": pem.key, "token_file": tokens}) as gateway:
        address = gateway.server.address
        assert await status(address, authority.ca, metadata=bearer("abc")) is grpc.StatusCode.OK
        assert await status(address, authority.ca) is grpc.StatusCode.UNAUTHENTICATED
        assert await status(address, other.ca, metadata=bearer("abc")) is grpc.StatusCode.UNAVAILABLE
        assert (await refusal(gateway.admin.GetStatus(STATUS))).code is grpc.StatusCode.UNAVAILABLE  # no TLS
        async with channel(address, authority.ca) as secure:
            call = generation_pb2_grpc.GenerationServiceStub(secure).Generate(
                pb.GenerateRequest(text="hi"), metadata=bearer("abc")
            )
            assert [message.WhichOneof("event") async for message in call][-1] == "finished"


@in_loop
async def test_clients_show_a_certificate_where_the_server_wants_one(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    pem = authority.issue("127.0.0.1")
    ours, theirs = authority.issue("client", file="ours"), other.issue("client", file="theirs")
    expired = authority.issue("client", file="expired", days=-1)
    endpoint = {"tls_cert": pem.cert, "tls_key": pem.key, "tls_client_ca": authority.ca}
    async with serving(endpoint=endpoint) as gateway:
        address = gateway.server.address
        assert await status(address, authority.ca, ours) is grpc.StatusCode.OK
        for refused in (None, theirs, expired):
            assert await status(address, authority.ca, refused) is grpc.StatusCode.UNAVAILABLE


@in_loop
async def test_a_renewed_certificate_counts_for_new_connections(tmp_path: Path) -> None:
    before, after = Authority(tmp_path, "before"), Authority(tmp_path, "after")
    pem = before.issue("127.0.0.1")
    async with serving(endpoint={"tls_cert": pem.cert, "tls_key": pem.key}) as gateway:
        address = gateway.server.address
        assert await status(address, before.ca) is grpc.StatusCode.OK
        write_tokens(Path(pem.cert), "half a certificate")  # while it is being written
        assert await status(address, before.ca) is grpc.StatusCode.OK
        after.issue("127.0.0.1")
        assert await status(address, before.ca) is grpc.StatusCode.UNAVAILABLE
        assert await status(address, after.ca) is grpc.StatusCode.OK


def test_files_that_do_not_belong_together_are_refused_at_start(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pem, other, text = authority.issue("a"), authority.issue("b", file="other"), tmp_path / "text"
    write_tokens(text, "no certificate")
    for changes, error, message in (
        ({"tls_key": None}, InputError, "--tls-cert goes with --tls-key"),
        ({"tls_cert": None}, InputError, "--tls-key goes with --tls-cert"),
        ({"tls_cert": None, "tls_key": None, "tls_client_ca": authority.ca}, InputError, "needs TLS"),
        ({"tls_key": other.key}, InputError, "is not the key of the certificate"),
        ({"tls_cert": str(text)}, InputError, "no PEM certificate and key"),
        ({"tls_key": str(text)}, InputError, "no PEM certificate and key"),
        ({"tls_client_ca": str(text)}, InputError, "holds no PEM certificates"),
        ({"tls_cert": "absent"}, NotFoundError, "no file absent"),
        ({"tls_key": "absent"}, NotFoundError, "no file absent"),
        ({"tls_client_ca": "absent"}, NotFoundError, "no file absent"),
    ):
        endpoint = {"tls_cert": pem.cert, "tls_key": pem.key, **changes}
        with pytest.raises(error, match=message):
            check_endpoint(Endpoint(listen="127.0.0.1:0", **endpoint))
    Path(pem.key).chmod(0o640)
    with pytest.raises(AccessError, match=f"chmod 600 {pem.key}"):
        check_endpoint(Endpoint(listen="127.0.0.1:0", tls_cert=pem.cert, tls_key=pem.key))
