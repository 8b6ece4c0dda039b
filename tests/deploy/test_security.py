"""The commands and servers that want a token or a certificate: what works, and what the user is told."""

from __future__ import annotations

import socket
import subprocess
import sysconfig
import threading
from contextlib import closing
from pathlib import Path

import pytest

from numoe.deploy.client import Client
from numoe.deploy.credentials import Credentials
from numoe.engine.errors import AccessError, InputError, NotFoundError, UnavailableError
from numoe.v1 import generation_pb2 as pb
from tests.certificates import Authority, write_tokens
from tests.deploy.test_client_commands import background, numoe

NUMOE = str(Path(sysconfig.get_path("scripts")) / "numoe")


def refused(error: type[Exception], message: str, address: str, **credentials: str | bool) -> None:
    with pytest.raises(error, match=message), Client(address, Credentials(**credentials)) as client:
        client.status()


def ask(address: str, **credentials: str | bool) -> str:
    """A generated text, or the error that the user is shown."""
    with Client(address, Credentials(**credentials)) as client:
        client.status()
        return "".join(message.tokens.text for message in client.generate(pb.GenerateRequest(text="hi")))


def test_commands_take_flags_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, tokens = Authority(tmp_path), write_tokens(tmp_path / "tokens", "abc", "def")
    pem, own = authority.issue("127.0.0.1"), authority.issue("client", file="client")
    endpoint = {
        "tls_cert": pem.cert, "tls_key": pem.key, "tls_client_ca": authority.ca, "token_file": tokens,
    }  # fmt: skip
    flags = {"token-file": tokens, "tls-ca": authority.ca, "tls-cert": own.cert, "tls-key": own.key}
    with background(endpoint=endpoint) as server:
        given = [part for name, value in flags.items() for part in (f"--{name}", value)]
        for command in (("generate", "hi"), ("status",)):
            assert server.run(*command, *given).returncode == 0
        for name, value in flags.items():
            monkeypatch.setenv(f"NUMOE_{name.upper().replace('-', '_')}", value)
        for command in (("generate", "hi"), ("status",)):
            done = server.run(*command)
            assert done.returncode == 0, done.stderr
        monkeypatch.delenv("NUMOE_TOKEN_FILE")
        failed = server.run("generate", "hi")
        assert (failed.returncode, failed.stdout) == (1, "")
        assert failed.stderr.startswith("numoe: this server wants a token")
        assert "NUMOE_TOKEN_FILE" in failed.stderr


def test_every_command_that_reaches_a_server_says_how_in_its_help() -> None:
    for command in (["generate"], ["status"], ["stop"], ["bench", "concurrency"]):
        done = subprocess.run(
            [NUMOE, *command, "--help"], capture_output=True, text=True, check=True, timeout=60
        )
        for word in ("--token-file", "NUMOE_TOKEN_FILE", "--tls-ca", "--tls-cert", "--tls-key", "NUMOE_ADDRESS"):
            assert word in done.stdout


def test_a_wrong_token_is_said(tmp_path: Path) -> None:
    tokens, wrong = write_tokens(tmp_path / "tokens", "abc"), write_tokens(tmp_path / "wrong", "abd")
    with background(endpoint={"token_file": tokens}) as server:
        assert ask(server.address, token_file=tokens) == "hello"
        refused(AccessError, "not one of this server's", server.address, token_file=wrong)
        Path(tokens).chmod(0o604)
        refused(AccessError, f"chmod 600 {tokens}", server.address, token_file=tokens)


def test_a_token_does_not_cross_a_network_in_the_clear(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", "abc")
    with pytest.raises(InputError, match=r"others could read the token.*--tls-ca.*--insecure"):
        Client("192.0.2.1:50051", Credentials(token_file=tokens))
    Client("192.0.2.1:50051", Credentials(token_file=tokens, insecure=True)).close()
    Client("192.0.2.1:50051", Credentials(token_file=tokens, tls=True)).close()


def test_a_certificate_that_does_not_fit_is_explained(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    pem, expired = authority.issue("numoe.test"), authority.issue("127.0.0.1", file="expired", days=-1)
    with background(endpoint={"tls_cert": pem.cert, "tls_key": pem.key}) as server:
        address = server.address
        assert ask(address, ca=authority.ca, name="numoe.test") == "hello"
        refused(AccessError, "is for numoe.test, not for 127.0.0.1: .*--tls-name", address, ca=authority.ca)
        refused(AccessError, f"signed by none of {other.ca}: .*--tls-ca", address, ca=other.ca)
        refused(AccessError, "signed by none of the public authorities: .*--tls-ca", address, tls=True)
        refused(AccessError, "speaks TLS: .*--tls-ca or NUMOE_TLS_CA", address)
    with background(endpoint={"tls_cert": expired.cert, "tls_key": expired.key}) as server:
        refused(AccessError, "has expired: renew it", server.address, ca=authority.ca)


def test_a_missing_or_refused_client_certificate_is_explained(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    pem, own = authority.issue("127.0.0.1"), authority.issue("client", file="own")
    theirs = other.issue("client", file="theirs")
    with background(endpoint={"tls_cert": pem.cert, "tls_key": pem.key, "tls_client_ca": authority.ca}) as server:
        address = server.address
        assert ask(address, ca=authority.ca, cert=own.cert, key=own.key) == "hello"
        refused(AccessError, "wants a certificate of its clients: .*--tls-cert", address, ca=authority.ca)
        refused(AccessError, "speaks TLS", address)
        refusal = f"refuses the certificate {theirs.cert}: .*--tls-client-ca"
        refused(AccessError, refusal, address, ca=authority.ca, cert=theirs.cert, key=theirs.key)


def test_a_server_without_tls_is_explained(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with background() as server:
        refused(InputError, "does not speak TLS: leave out", server.address, ca=authority.ca)


def test_nobody_or_something_else_at_the_address_is_said(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        threading.Thread(target=_hang_up, args=(other,), daemon=True).start()
        refused(UnavailableError, "does not answer as a numoe server", address)
    for credentials in ({}, {"ca": authority.ca}):
        refused(UnavailableError, "no numoe server answers", address, **credentials)


def _hang_up(server: socket.socket) -> None:
    while True:
        try:
            server.accept()[0].close()
        except OSError:
            return


def test_files_that_will_not_do_are_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pem, other = authority.issue("client"), authority.issue("client", file="other")
    for credentials, error, message in (
        ({"ca": "absent"}, NotFoundError, "no file absent"),
        ({"ca": pem.key}, InputError, "holds no PEM certificates"),
        ({"cert": pem.cert}, InputError, "give both"),
        ({"cert": pem.cert, "key": other.key}, InputError, "is not the key"),
        ({"token_file": "absent"}, NotFoundError, "no file absent"),
    ):
        with pytest.raises(error, match=message):
            Client("127.0.0.1:1", Credentials(**credentials))


def test_a_command_without_a_server_exits_with_one_line(tmp_path: Path) -> None:
    done = numoe("status", "--address", "127.0.0.1:1", "--tls-ca", "absent")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "numoe: there is no file absent\n"
