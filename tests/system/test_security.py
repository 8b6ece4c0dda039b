"""A server that other hosts may reach, from its refused start to `numoe stop`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.certificates import Authority, write_tokens
from tests.system.harness import ServeProcess, numoe

EVERYWHERE = "0.0.0.0:0"
SHARED = Path("/dev/shm")
RAY = Path(tempfile.gettempdir()) / f"numoe-ray-{os.getuid()}"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    authority = Authority(tmp_path)
    pem = authority.issue("127.0.0.1")
    tokens = write_tokens(tmp_path / "tokens", "# ours", "a-token")
    return {"ca": authority.ca, "tls-cert": pem.cert, "tls-key": pem.key, "token-file": tokens}


def flags(files: dict[str, str], *names: str) -> list[str]:
    return [part for name in names for part in (f"--{name}", files[name])]


def test_without_tls_and_token_it_does_not_start(tiny_model: Path, files: dict[str, str]) -> None:
    done = numoe("serve", tiny_model, "--listen", EVERYWHERE, *flags(files, "token-file"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("numoe: 0.0.0.0:0 can be reached from other hosts: give --tls-cert")
    assert "--insecure-listen" in done.stderr
    Path(files["token-file"]).chmod(0o644)
    done = numoe("serve", tiny_model, *flags(files, "token-file"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"chmod 600 {files['token-file']}" in done.stderr


def test_everything_works_over_tls_with_a_token(tiny_model: Path, files: dict[str, str]) -> None:
    secured = flags(files, "tls-cert", "tls-key", "token-file")
    process = ServeProcess(tiny_model, *secured, "--shards", 2, "--ctx-size", 256, listen=EVERYWHERE)
    try:
        reach = ["--address", process.address.replace("0.0.0.0", "127.0.0.1"), "--tls-ca", files["ca"]]
        known = [*reach, *flags(files, "token-file")]
        assert numoe("status", *known).returncode == 0
        for command in (
            ("generate", "once upon", "--max-tokens", 4),
            ("bench", "concurrency", "--streams", 2, "--prompt-tokens", 4, "--max-tokens", 4, "--json"),
        ):
            done = numoe(*command, *known)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout
            stranger = numoe(*command, *reach)
            assert (stranger.returncode, stranger.stdout) == (1, "")
            assert "this server wants a token" in stranger.stderr
        assert sorted(unlike_private(process.process.pid)) == []
        refused = numoe("stop", *reach)
        assert (refused.returncode, "wants a token" in refused.stderr) == (1, True)
        stopped = numoe("stop", *known)
        assert (stopped.returncode, stopped.stderr) == (0, "")
        assert process.process.wait(60) == 0
    finally:
        process.stop()


def unlike_private(pid: int) -> Iterator[str]:
    """What others than its user may open of a server's shared memory or Ray's folder."""
    start = psutil.Process(pid).create_time()
    if RAY.stat().st_mode & 0o077:
        yield str(RAY)
    for root in SHARED.glob("numoe*"):
        for path in (root, *root.rglob("*")):
            found = path.lstat()
            mode = found.st_mode & 0o777
            if found.st_ctime >= start and not path.is_symlink() and mode != (0o700 if path.is_dir() else 0o600):
                yield f"{path} {mode:o}"
