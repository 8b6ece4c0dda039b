"""A worker dies where the store has chunks of another server, which rounds sums otherwise: its streams show nothing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from numoe.engine.store.chunks import ChunkShape, Provenance, build_chunk, decode_chunk, rounding_of
from numoe.v1 import generation_pb2 as pb
from tests.system.harness import ServeProcess
from tests.system.streams import STREAMS, Streams

PROMPTS = np.random.default_rng(5).integers(0, 250, (STREAMS, 300)).tolist()
SHAPE = ChunkShape("f16/f16", layers=2, layer_bytes=131072)


def requests(max_tokens: int, *, bypass: bool = False) -> list[pb.GenerateRequest]:
    return [
        pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingOptions(temperature=0.0),
            stopping=pb.StopOptions(max_tokens=max_tokens, ignore_eos=True),
            cache=pb.CacheOptions(bypass=bypass),
        )
        for prompt in PROMPTS
    ]


def full_chunks(store: Path, count: int) -> list[Path]:
    """The objects of full chunks, when there are so many."""
    until, found = time.monotonic() + 60, list[Path]()
    while len(found) < count:
        assert time.monotonic() < until, f"{len(found)} of {count} chunks were written"
        time.sleep(0.05)
        found = [path for path in store.glob("chunks/*/*") if path.stat().st_size == SHAPE.object_bytes]
    return found


def rounding(path: Path) -> bytes:
    """What an object says of how its sums were rounded."""
    provenance = Provenance.peek(path.read_bytes())
    assert provenance is not None
    return provenance.rounding


def make_foreign(path: Path) -> None:
    """What an object holds is computed by somebody else, and so differently that nobody could miss it."""
    data, key = path.read_bytes(), bytes.fromhex(path.name)
    layers, provenance = decode_chunk(data, key, SHAPE), Provenance.peek(data)
    assert provenance is not None
    other = provenance._replace(rounding=rounding_of("another server"))
    path.write_bytes(build_chunk(key, SHAPE, lambda out: np.concatenate(layers[::-1], out=out), other))


def test_streams_go_on_where_the_store_has_what_others_computed(tiny_model: Path, tmp_path: Path) -> None:
    """As if another server had been faster to write what both have computed."""
    server = ServeProcess(tiny_model, "--parallel", STREAMS, "--ctx-size", 1024, "--store", tmp_path / "store")
    try:
        undisturbed = Streams(server.address, requests(600, bypass=True)).join()
        assert [len(told.token_ids) for told in undisturbed] == [600] * STREAMS
        streams = Streams(server.address, requests(600))
        streams.started(STREAMS)
        for path in full_chunks(tmp_path / "store", STREAMS):
            make_foreign(path)
        # Both: so nobody keeps the worker's memory, and the next one reads the store.
        for victim in [actor for actor in server.status()["actors"] if actor["role"] in ("attention", "supervisor")]:
            os.kill(victim["pid"], signal.SIGKILL)
        told = streams.join()
        assert [stream.error for stream in told] == [None] * STREAMS
        assert [stream.token_ids for stream in told] == [stream.token_ids for stream in undisturbed]
        # A new request takes what there is.
        new = [told.finished.usage.cached_tokens for told in Streams(server.address, requests(1)).join()]
        assert min(new) >= 256
    finally:
        server.stop()
    assert server.left_over() == []


def test_two_servers_of_one_store_go_on_each_with_its_own(tiny_model: Path, tmp_path: Path) -> None:
    """The other one writes the chunks of running streams anew, when they have made room for others."""
    store, tokens = tmp_path / "store", 1700
    flags = ("--parallel", STREAMS, "--ctx-size", 2048, "--store", store)
    servers = [ServeProcess(tiny_model, "--shards", shards, *flags) for shards in (1, 2)]
    server, other = servers
    try:
        undisturbed = Streams(server.address, requests(tokens, bypass=True)).join()
        streams = Streams(server.address, requests(tokens))
        streams.started(STREAMS)
        removed = full_chunks(store, STREAMS)[:STREAMS]
        own = {rounding(path) for path in removed}
        for path in removed:
            path.unlink()
        assert {told.error for told in Streams(other.address, requests(1)).join()} == {None}
        until = time.monotonic() + 60
        while not all(path.exists() for path in removed):
            assert time.monotonic() < until, "the other server did not write what it computed"
            time.sleep(0.05)
        assert not own & {rounding(path) for path in removed}
        assert None in [told.finished for told in streams.told], "the streams ended too soon"
        for victim in [actor for actor in server.status()["actors"] if actor["role"] in ("attention", "supervisor")]:
            os.kill(victim["pid"], signal.SIGKILL)
        told = streams.join()
        assert [stream.error for stream in told] == [None] * STREAMS
        assert [stream.token_ids for stream in told] == [stream.token_ids for stream in undisturbed]
        # Few words would have been others; so see that nothing was taken.
        assert server.status()["cache"]["misses"] >= STREAMS
    finally:
        for each in servers:
            each.stop()
    assert [each.left_over() for each in servers] == [[], []]
