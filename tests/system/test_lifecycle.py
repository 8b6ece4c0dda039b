"""Starting and stopping: what a server leaves behind, and how it fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from numoe.deploy.client import Client
from numoe.engine.errors import UnavailableError
from numoe.engine.gguf import GgufFile
from numoe.engine.models.reference import reference_logits
from numoe.v1 import admin_pb2
from tests.models import make_model
from tests.s3 import free_ports
from tests.system.harness import NUMOE, ServeProcess, numoe
from tests.system.streams import Streams, varied


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_nothing_is_left(tiny_model: Path, number: int) -> None:
    server = ServeProcess(tiny_model, "--shards", 2)
    assert server.generate("hello", "--max-tokens", 3, "--temperature", 0)["token_ids"]
    code, errors = server.stop(number)
    assert code == 0, errors
    assert server.left_over() == []


def test_a_terminal_that_is_closed_ends_the_server_as_ctrl_c_does(tiny_model: Path) -> None:
    """It tells every process in it, and what runs is drained all the same."""
    server = ServeProcess(tiny_model)
    streams = Streams(server.address, [varied(0, 400)])
    streams.started(1)
    for pid in (server.process.pid, *server.pids):
        os.kill(pid, signal.SIGHUP)
    (told,) = streams.join()
    assert (told.error, len(told.token_ids)) == (None, 400)
    server.process.wait(60)
    code, errors = server.stop()
    assert code == 0, errors
    assert server.left_over() == []


def test_a_group_of_processes_that_is_ended_leaves_nothing(tiny_model: Path) -> None:
    """Some supervisors of services tell every process at once: Ray ends beside the server, and can help no more."""
    server = ServeProcess(tiny_model)
    with contextlib.suppress(psutil.NoSuchProcess):
        everyone = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, errors = server.process.communicate(timeout=50)  # Ray itself gives up after a minute, and cleans up nothing
    assert "Ray's" in errors or server.process.returncode == 0
    assert server.left_over() == []


def test_numoe_stop_ends_the_server(tiny_model: Path) -> None:
    server = ServeProcess(tiny_model)
    result = numoe("stop", "--address", server.address)
    assert result.returncode == 0, result.stderr
    assert server.stop()[0] == 0
    assert server.left_over() == []


def test_two_servers_do_not_know_each_other(tiny_model: Path) -> None:
    first, second = ServeProcess(tiny_model), ServeProcess(tiny_model)
    assert first.stop()[0] == 0
    assert second.generate("hello", "--max-tokens", 3, "--temperature", 0)["token_ids"]
    assert second.stop()[0] == 0
    assert second.left_over() == []


def test_a_signal_while_starting_undoes_what_has_begun(tiny_model: Path) -> None:
    process = subprocess.Popen([NUMOE, "serve", str(tiny_model), "--listen", "127.0.0.1:0"], stderr=subprocess.PIPE)
    time.sleep(3)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    _, left = psutil.wait_procs(children, timeout=10)
    assert not [child for child in left if child.status() != psutil.STATUS_ZOMBIE]


def test_a_server_that_loads_says_so_and_can_be_stopped(tiny_model: Path) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = [NUMOE, "serve", str(tiny_model), "--listen", address, "--store", "none"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        status = first_status(address)
        expert = next(actor.pid for actor in status.actors if actor.role == admin_pb2.ACTOR_ROLE_EXPERT)
        os.kill(expert, signal.SIGSTOP)  # it loads for as long as it takes
        children = psutil.Process(process.pid).children(recursive=True)
        with Client(address) as client:
            assert client.status().state == admin_pb2.SERVER_STATE_STARTING
            with pytest.raises(UnavailableError, match="the model is loading; try again"):
                list(client.generate(varied(0)))
        result = numoe("stop", "--address", address)
        assert result.returncode == 0, result.stderr
        output, errors = process.communicate(timeout=60)
    finally:
        process.terminate()
        process.wait(60)
    assert (process.returncode, output) == (1, "")
    assert "numoe: the server was told to stop while it started" in errors
    _, left = psutil.wait_procs(children, timeout=10)
    assert not [child for child in left if child.status() != psutil.STATUS_ZOMBIE]


def first_status(address: str) -> admin_pb2.GetStatusResponse:
    """What a server says of itself as soon as it says anything."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(UnavailableError), Client(address) as client:
            return client.status()
        time.sleep(0.02)
    raise AssertionError("nobody listens")


@pytest.fixture(scope="module")
def logits_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "f32.gguf", "qwen3moe", seed=1, n_used=2)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_logits_through_the_actors_equal_the_float64_reference(
    logits_model: Path, tmp_path: Path, shards: int
) -> None:
    ids = np.random.default_rng(5).integers(0, 256, 40).tolist()
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    out = tmp_path / "logits.npz"
    result = numoe(
        "logits", logits_model, "--tokens-file", tmp_path / "ids.json", "--out", out, "--shards", shards, "--chunk", 16
    )
    assert result.returncode == 0, result.stderr
    with np.load(out) as found, GgufFile.open(logits_model) as gguf:
        want = reference_logits(gguf, ids)
        assert found["logits"].dtype == np.float32
        assert found["tokens"].tolist() == ids
        error = ((found["logits"] - want) ** 2).mean() / want.var()
        assert error <= 1e-6
        assert (found["logits"].argmax(axis=1) == want.argmax(axis=1)).all()


def expect_one_line(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


def test_a_truncated_file_is_named(tiny_model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "cut.gguf"
    damaged.write_bytes(tiny_model.read_bytes()[:-1000])
    expect_one_line(numoe("serve", damaged), "cut.gguf")


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a model, but long enough to have a header")
    expect_one_line(numoe("serve", tmp_path / "notes.txt"), "notes.txt", "GGUF")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    expect_one_line(numoe("serve", tmp_path / "absent.gguf"), "absent.gguf")


def test_a_busy_port_is_named(tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        expect_one_line(numoe("serve", tiny_model, "--listen", f"127.0.0.1:{port}"), str(port), "--listen")


def test_too_little_memory_says_how_much_is_missing(tmp_path: Path) -> None:
    model = make_model(tmp_path / "long.gguf", "qwen3moe", context=1 << 24)
    expect_one_line(numoe("serve", model, "--ctx-size", 1 << 24, "--parallel", 256), "is missing", "--ctx-size")


@pytest.mark.parametrize("flags", [["--shards", "many"], ["--parallel", "0"], ["--ctx-size", "999999999"]])
def test_a_wrong_value_names_its_flag(tiny_model: Path, flags: list[str]) -> None:
    expect_one_line(numoe("serve", tiny_model, *flags), flags[0])


def test_an_unknown_flag_is_named(tiny_model: Path) -> None:
    result = numoe("serve", tiny_model, "--no-such-flag")
    assert result.returncode != 0
    assert "--no-such-flag" in result.stdout + result.stderr


@contextlib.contextmanager
def ray_cluster() -> Iterator[subprocess.Popen]:
    """A cluster that a user started, in the foreground: `ray stop` would end the servers of other tests too."""
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0", "--num-cpus=2",
             "--include-dashboard=false", "--object-store-memory=80000000", "--disable-usage-stats"]  # fmt: skip
    head = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert head.stdout is not None
        assert any("Ray runtime started" in line for line in head.stdout)
        yield head
    finally:
        head.terminate()
        head.communicate(timeout=30)


def test_a_running_ray_cluster_is_used_and_left_running(server: ServeProcess, tiny_model: Path) -> None:
    with ray_cluster() as head:
        joined = ServeProcess(tiny_model)
        assert joined.generate("hello", "--max-tokens", 3, "--temperature", 0)["token_ids"]
        assert "gcs_server" not in {psutil.Process(pid).name() for pid in joined.pids}
        code, errors = joined.stop()
        assert code == 0, errors
        assert joined.left_over() == []
        orphaned = ServeProcess(tiny_model)
        orphaned.process.kill()
        orphaned.process.communicate(timeout=20)
        result = numoe("stop", "--address", orphaned.address)
        assert (result.returncode, result.stderr) == (0, "")
        assert orphaned.left_over() == []
        assert head.poll() is None
        assert "gcs_server" in {process.name() for process in psutil.Process(head.pid).children()}
    assert server.generate("hello", "--max-tokens", 3)["token_ids"]  # whose own Ray is another


def test_version_and_help() -> None:
    assert numoe("version").stdout.startswith("numoe 0.")
    assert subprocess.run([NUMOE, "serve", "--help"], capture_output=True, text=True, check=True).stdout
