"""Weights that outlive their server, as users see it."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import psutil
import pytest

from numoe.engine.weights import stored_slices
from tests.models import make_model
from tests.system.harness import ServeProcess, numoe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "kept.gguf"
    return make_model(path, "qwen3moe", experts_type="Q8_0", attn_type="Q8_0", seed=4, context=512)


def slices(model: Path) -> list[dict]:
    listed = json.loads(numoe("weights", "list", "--json").stdout)
    return [entry for entry in listed if entry["model"] == str(model)]


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 255]))


def answer(server: ServeProcess) -> list[int]:
    return server.generate("Once upon a time", "--max-tokens", 9, "--temperature", 0, "--ignore-eos")["token_ids"]


def test_kept_weights_are_attached_to_by_the_next_server_and_freed_by_its_stop(model: Path) -> None:
    first = ServeProcess(model, "--shards", 2)
    want = answer(first)
    assert numoe("stop", "--keep-weights", "--address", first.address).returncode == 0
    assert first.stop()[0] == 0
    kept = slices(model)
    assert sorted(entry["slice"] for entry in kept) == ["dense", "experts-0-of-2", "experts-1-of-2"]
    assert {entry["state"] for entry in kept} == {"kept"}
    inodes = {Path(entry["path"]).stat().st_ino for entry in kept}
    verified = numoe("weights", "verify", kept[0]["fingerprint"][:12])
    assert (verified.returncode, verified.stdout.splitlines()[-1]) == (0, "checked 3 slices: no damage")

    second = ServeProcess(model, "--shards", 2)
    attached = slices(model)
    assert {Path(entry["path"]).stat().st_ino for entry in attached} == inodes
    assert {entry["state"] for entry in attached} == {"in use"}
    assert answer(second) == want
    assert numoe("stop", "--address", second.address).returncode == 0
    assert second.stop()[0] == 0
    assert second.left_over() == []


def test_weights_whose_file_has_changed_are_named_and_removed(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "changed.gguf"
    path.write_bytes(model.read_bytes())
    assert ServeProcess(path, "--keep-weights").stop()[0] == 0
    assert {entry["state"] for entry in slices(path)} == {"kept"}
    os.utime(path)
    assert {entry["state"] for entry in slices(path)} == {"kept, stale: its file has changed"}
    with path.open("r+b") as file:
        file.truncate(100)
    assert {entry["state"] for entry in slices(path)} == {"kept, stale: its file has changed"}
    path.unlink()
    assert {entry["state"] for entry in slices(path)} == {"kept, stale: its file is gone"}
    server = ServeProcess(model)
    used = slices(model)
    assert numoe("weights", "rm", "--stale").returncode == 0
    assert slices(path) == []
    assert slices(model) == used
    code, errors = server.stop()
    assert code == 0
    assert re.search(r"GB of weights in shared memory can serve nobody any more, .*`numoe weights rm --stale`", errors)
    assert server.left_over() == []


def test_servers_of_one_model_share_its_weights(model: Path) -> None:
    first, second = ServeProcess(model), ServeProcess(model)
    assert len(slices(model)) == 2
    want = answer(first)
    assert numoe("stop", "--address", first.address).returncode == 0
    assert first.stop()[0] == 0
    refused = numoe("weights", "rm", model)
    assert refused.returncode == 1
    assert "in use" in refused.stderr
    assert answer(second) == want
    assert second.stop()[0] == 0
    assert second.left_over() == []


def test_weights_of_a_server_that_was_killed_are_found_again_or_removed_by_hand(model: Path) -> None:
    server = ServeProcess(model)
    inodes = {Path(entry["path"]).stat().st_ino for entry in slices(model)}
    server.process.kill()
    for pid in server.pids:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid) for pid in server.pids if psutil.pid_exists(pid)], timeout=20)
    server.process.communicate(timeout=20)
    assert {entry["state"] for entry in slices(model)} == {"kept"}
    again = ServeProcess(model, "--keep-weights")
    assert {Path(entry["path"]).stat().st_ino for entry in slices(model)} == inodes
    assert again.stop()[0] == 0
    damage(Path(slices(model)[0]["path"]))
    found = numoe("weights", "verify", model)
    assert found.returncode == 1
    assert "numoe weights rm" in found.stderr
    assert "1 damaged piece, the first at byte " in found.stdout
    removed = numoe("weights", "rm", model)
    assert removed.returncode == 0, removed.stderr
    assert not [found for found in stored_slices() if found.header and found.header.model == str(model)]
    assert again.left_over() == []
