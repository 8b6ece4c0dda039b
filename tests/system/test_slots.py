"""Conversations outlive their server: saved, resumed and restored by another process with other shards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from numoe.deploy.answers import Answer, read_answer
from numoe.deploy.client import Client
from numoe.engine.errors import DataLossError, NotFoundError, PreconditionError, UnavailableError
from numoe.engine.store import Store, open_store
from numoe.engine.store.manifest import Manifest, decode_manifest, encode_manifest, manifest_path
from numoe.v1 import admin_pb2, slots_pb2
from numoe.v1 import generation_pb2 as pb
from tests.s3 import CannotStartError, S3Server
from tests.system.harness import ServeProcess, numoe

PROMPT = [(7 * i + 11) % 250 for i in range(700)]  # two full chunks and a part
OTHER = [(5 * i + 3) % 250 for i in range(300)]
UNCACHED = pb.CacheOptions(bypass=True)


@dataclass
class Place:
    """Where conversations are kept: flags of `numoe serve`, the store, and its server if there is one."""

    flags: tuple[object, ...]
    store: Store
    server: S3Server | None = None


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    if request.param == "folder":
        yield Place(("--store", tmp_path / "store"), open_store(tmp_path / "store"))
        return
    try:
        server = S3Server.start(tmp_path / "s3")
    except CannotStartError as error:
        pytest.skip(str(error))
    with server:
        for name, value in server.environment.items():
            if name != "AWS_ENDPOINT_URL":
                monkeypatch.setenv(name, value)
        flags = ("--store", server.url("here"), "--store-endpoint", server.endpoint)
        yield Place(flags, open_store(server.url("here"), **server.options), server)


@contextmanager
def serving(model: Path, *flags: object) -> Iterator[tuple[ServeProcess, Client]]:
    """A server with three slots that is told to stop at the end, and must obey."""
    server = ServeProcess(model, "--parallel", 3, "--ctx-size", 1024, "--chunk", 64, *flags)
    try:
        with Client(server.address) as client:
            yield server, client
        code, errors = server.stop()
        assert code == 0, errors
    finally:
        if server.process.poll() is None:
            server.process.kill()


def request(ids: list[int], max_tokens: int, **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        sampling=pb.SamplingOptions(temperature=0.0),
        stopping=pb.StopOptions(max_tokens=max_tokens, ignore_eos=True),
        **fields,
    )


def answer(client: Client, ids: list[int], max_tokens: int = 16, **fields: object) -> Answer:
    return read_answer(client.generate(request(ids, max_tokens, **fields)))


def slots(server: ServeProcess, *arguments: object) -> dict:
    """The JSON that a `numoe slots` command prints."""
    result = numoe("slots", *arguments, "--json", "--address", server.address)
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


def restore(client: Client, slot: int, name: str) -> slots_pb2.SlotReport:
    *_, last = client.restore_slot(slots_pb2.RestoreSlotRequest(slot=slot, name=name))
    return last.report


def save(client: Client, slot: int, name: str) -> slots_pb2.SlotReport:
    *_, last = client.save_slot(slots_pb2.SaveSlotRequest(slot=slot, name=name))
    return last.report


def held(client: Client, slot: int) -> admin_pb2.SlotStatus:
    return client.list_slots()[slot]


def test_conversations_survive_a_restart_on_other_shards(tiny_model: Path, place: Place) -> None:
    with serving(tiny_model, *place.flags, "--shards", 2) as (server, client):
        told = PROMPT + answer(client, PROMPT, slot_id=1).token_ids
        saved = slots(server, "save", 1, "chat")
        assert (saved["tokens"], saved["computed"], saved["chunks"]) == (716, 715, 3)
        expected = answer(client, told, cache=UNCACHED)
        assert expected.cached_tokens == 0
        longer = told + answer(client, told, 200, slot_id=1).token_ids
        assert save(client, 1, "longer").moved_chunks <= 2  # the last one has become longer, and another began
        whispered = OTHER + answer(client, OTHER, slot_id=2).token_ids
        after_whisper = answer(client, whispered, cache=UNCACHED).token_ids
        assert [(slot["tokens"], slot["snapshot"]) for slot in slots(server, "list")["slots"]][1:] == [
            (len(longer), "longer"), (len(whispered), None),
        ]  # fmt: skip

    with serving(tiny_model, *place.flags, "--shards", 1) as (server, client):
        resumed = answer(client, whispered)  # by itself: nobody has saved it
        assert (resumed.cached_tokens, resumed.token_ids) == (len(whispered) - 1, after_whisper)
        restored = slots(server, "restore", 0, "chat")
        assert (restored["snapshot"], restored["tokens"], restored["computed"]) == ("chat", 716, 715)
        again = answer(client, told, slot_id=0)
        assert (again.cached_tokens, again.token_ids) == (len(told) - 1, expected.token_ids)
        found = slots(server, "snapshots")["snapshots"]
        assert [(entry["name"], entry["tokens"], entry["mismatch"]) for entry in found] == [
            ("chat", 716, None), ("longer", len(longer), None),
        ]  # fmt: skip
        kept = told + again.token_ids
        _damage(place.store)
        with pytest.raises(DataLossError, match=r"[0-9a-f]{64}"):
            restore(client, 0, "longer")
        client.remove_snapshot("longer")
        for missing in (lambda: client.remove_snapshot("longer"), lambda: restore(client, 0, "longer")):
            with pytest.raises(NotFoundError, match="longer"):
                missing()
        assert held(client, 0).tokens == len(kept)
        assert answer(client, kept, slot_id=0).cached_tokens == len(kept) - 1
        if place.server is not None:
            place.server.stop()
            assert len(answer(client, OTHER[::-1], slot_id=2).token_ids) == 16
            with pytest.raises(UnavailableError):
                save(client, 2, "lost")
            place.server.run()  # once more before the end: what slots hold is saved then


def test_an_idle_conversation_survives_a_kill_of_everything(tiny_model: Path, tmp_path: Path) -> None:
    flags, store = ("--store", tmp_path), open_store(tmp_path)
    with killing(tiny_model, *flags, "--shards", 2) as client:
        told = PROMPT + answer(client, PROMPT, slot_id=1).token_ids
        expected = answer(client, told, cache=UNCACHED).token_ids
        until = time.monotonic() + 60
        while not store.list("resumable"):
            assert time.monotonic() < until
            time.sleep(0.1)
    with serving(tiny_model, *flags, "--shards", 1) as (_, client):
        assert [slot.tokens for slot in client.list_slots()] == [0, len(told), 0]
        again = answer(client, told)
        assert (again.cached_tokens, again.token_ids) == (len(told) - 1, expected)


@contextmanager
def killing(model: Path, *flags: object) -> Iterator[Client]:
    """A server all of whose processes are killed at the end, as a power cut would."""
    server = ServeProcess(model, "--parallel", 3, "--ctx-size", 1024, "--chunk", 64, *flags)
    try:
        with Client(server.address) as client:
            yield client
    finally:
        for pid in (server.process.pid, *server.pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.process.communicate()


def _damage(store: Store) -> None:
    """Flip a bit in every chunk."""
    for entry in store.list("chunks"):
        data, version = store.get_versioned(entry.key)
        damaged = bytearray(data)
        damaged[len(damaged) // 2] ^= 1
        store.put_if(entry.key, bytes(damaged), version)


@pytest.fixture(scope="module")
def kept(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServeProcess, Client, Store]]:
    """A server with a store that goes on when the context is full."""
    folder = tmp_path_factory.mktemp("kept")
    with serving(tiny_model, "--store", folder, "--no-resume", "--keep", 10) as (server, client):
        yield server, client, open_store(folder)


def test_what_cannot_be_saved_at_the_stop_is_told(tiny_model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    server = ServeProcess(tiny_model, "--store", store)
    server.generate("a story", "--max-tokens", 20, "--temperature", 0)
    shutil.rmtree(store)
    store.touch()  # there is no folder any more, and none can be made
    code, errors = server.stop()
    assert code == 1
    assert f"numoe: of the slots' conversations 1 could not be saved: store {store}: " in errors
    assert server.left_over() == []


def test_a_busy_slot_is_refused_or_waited_for(kept: tuple[ServeProcess, Client, Store]) -> None:
    server, client, _ = kept
    stream = client.generate(request(OTHER, 5000, slot_id=0))
    next(message for message in stream if message.WhichOneof("event") == "tokens")
    for refused in (
        lambda: answer(client, OTHER, slot_id=0),
        lambda: list(client.generate(_waiting(200))),
        lambda: client.erase_slot(slots_pb2.EraseSlotRequest(slot=0)),
        lambda: client.fork_slot(slots_pb2.ForkSlotRequest(slot=1, target=0)),
        lambda: restore(client, 0, "chat"),
        lambda: save(client, 0, "chat"),
    ):
        with pytest.raises(PreconditionError, match="slot 0"):
            refused()
    impatient = numoe("slots", "save", 0, "chat", "--wait", 0.2, "--address", server.address)
    assert (impatient.returncode, "slot 0" in impatient.stderr) == (1, True)
    waiting = client.generation.Generate(_waiting(60_000))
    left = slots_pb2.SaveSlotRequest(slot=0, name="left")
    left.wait.FromSeconds(60)
    leaving = client.slots.SaveSlot(left)
    time.sleep(0.3)
    leaving.cancel()
    stream.close()  # type: ignore[attr-defined]
    assert next(waiting).started.prompt_tokens == len(OTHER)
    waiting.cancel()
    assert slots(server, "save", 0, "chat", "--wait", 30)["tokens"] >= len(OTHER)
    assert [entry.name for entry in client.list_snapshots()] == ["chat"]


def test_slots_are_forked_and_erased(kept: tuple[ServeProcess, Client, Store]) -> None:
    server, client, _ = kept
    told = OTHER + answer(client, OTHER, slot_id=0).token_ids
    assert slots(server, "fork", 0, 1)["tokens"] == len(told)
    first, second = (answer(client, told, slot_id=slot) for slot in (1, 0))
    assert first.cached_tokens == second.cached_tokens == len(told) - 1
    assert first.token_ids == second.token_ids
    slots(server, "erase", 0)
    assert [slot.tokens for slot in client.list_slots()] == [0, len(told) + 16, 0]
    with pytest.raises(PreconditionError, match="empty"):
        save(client, 0, "chat")


def test_a_snapshot_of_another_kv_type_is_listed_and_refused(kept: tuple[ServeProcess, Client, Store]) -> None:
    _, client, store = kept
    answer(client, OTHER, slot_id=2)
    save(client, 2, "ours")
    ours = decode_manifest(store.get(manifest_path("ours")), "ours")
    theirs = Manifest.of(
        "theirs", msgspec.structs.replace(ours.origin, kv_type="q8_0"), ours.token_ids, computed=ours.computed,
        sampling=ours.sampling, chunk_bytes=ours.chunk_bytes, created=ours.created,
    )  # fmt: skip
    store.put_new(manifest_path("theirs"), encode_manifest(theirs))
    mismatches = {entry.name: entry.mismatch for entry in client.list_snapshots()}
    assert (mismatches["ours"], "KV cache type is q8_0" in mismatches["theirs"]) == ("", True)
    before = held(client, 2)
    with pytest.raises(PreconditionError, match="KV cache type is q8_0"):
        restore(client, 2, "theirs")
    assert held(client, 2) == before


def test_an_answer_outlasts_the_context(kept: tuple[ServeProcess, Client, Store]) -> None:
    long = answer(kept[1], OTHER[:100], 1200)
    assert (long.completion_tokens, long.finish_reason) == (1200, "length")  # of a context of 1024


def _waiting(milliseconds: int) -> pb.GenerateRequest:
    """A request that waits for slot 0."""
    result = request(OTHER, 5000, slot_id=0)
    result.slot_wait.FromMilliseconds(milliseconds)
    return result


def test_a_prompt_cache_file_is_read_at_the_start(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--store", "none", "--prompt-cache", tmp_path / "state", "--prompt-cache-all")
    with serving(tiny_model, *flags) as (_, client):
        told = OTHER + answer(client, OTHER, slot_id=0).token_ids
        for start in range(4):  # take all pages: host memory has what was in them, without a store
            answer(client, [(start + i) % 250 for i in range(1000)], 1, slot_id=1)
        assert answer(client, told, slot_id=0).cached_tokens == len(told) - 1
        assert client.status().cache.hits_ram > 0
        told = OTHER + answer(client, OTHER, slot_id=0).token_ids
        expected = answer(client, told, cache=UNCACHED).token_ids
    with serving(tiny_model, *flags, "--shards", 2) as (_, client):
        again = answer(client, told)
        assert (again.cached_tokens, again.token_ids) == (len(told) - 1, expected)
