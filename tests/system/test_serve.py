"""A running server, as its users see it."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from numoe.deploy.answers import Answer, read_answer
from numoe.deploy.client import Client
from numoe.v1 import generation_pb2 as pb
from tests.system.harness import ServeProcess, numoe

PROMPTS = [f"{word} and the rest of the story, which was told {i} times" for i, word in enumerate(
    ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
)]  # fmt: skip


def request(prompt: str, max_tokens: int = 24, **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text=prompt,
        sampling=pb.SamplingOptions(temperature=0.0),
        stopping=pb.StopOptions(max_tokens=max_tokens, ignore_eos=True),
        **fields,
    )


def tokens(address: str, prompt: str, max_tokens: int = 24) -> list[int]:
    with Client(address) as client:
        return read_answer(client.generate(request(prompt, max_tokens), None)).token_ids


def wait_for_idle(server: ServeProcess) -> dict:
    """The server's status once no request is left."""
    for _ in range(100):
        status = server.status()
        if all(slot["state"] == "idle" for slot in status["slots"]):
            return status
        time.sleep(0.1)
    raise AssertionError(f"requests are left: {status}")


def test_status_lists_every_actor_as_its_own_process(server: ServeProcess) -> None:
    actors = server.status()["actors"]
    assert sorted(actor["role"] for actor in actors) == ["attention", "expert", "expert", "gateway", "supervisor"]
    assert len({actor["pid"] for actor in actors}) == len(actors)
    for actor in actors:
        assert psutil.pid_exists(actor["pid"])
        assert actor["state"] == "running"
        assert actor["restarts"] == 0
        assert actor["host"] == os.uname().nodename


def test_status_tells_where_weights_lie_and_threads_run(server: ServeProcess) -> None:
    server.generate("Once upon a time", "--max-tokens", 5, "--temperature", 0, "--ignore-eos")
    actors = server.status()["actors"]
    assert all((actor["placement"] is None) == (actor["role"] in ("gateway", "supervisor")) for actor in actors)
    for actor in actors:
        if actor["role"] in ("attention", "expert"):
            placement = actor["placement"]
            assert placement["weight_bytes"] > 0
            assert placement["on_nodes"] is None or placement["on_nodes"] >= 0.99
            assert (actor["role"] == "expert") == bool(placement["read_bytes_per_second"])
            assert placement["ran_on"]
            assert placement["cpus"] in ([], placement["ran_on"])


def test_generate_prints_one_json_object(server: ServeProcess) -> None:
    answer = server.generate("Once upon a time", "--max-tokens", 5, "--temperature", 0, "--ignore-eos")
    assert answer["finish_reason"] == "length"
    assert len(answer["token_ids"]) == 5
    assert answer["prompt_tokens"] == len("Once upon a time") - 3  # "on", " a" and " t" are merges
    assert answer["cached_tokens"] < answer["prompt_tokens"]
    assert answer["timings"]["decode"] > 0


def test_greedy_tokens_are_the_same_alone_and_among_seven_others(server: ServeProcess) -> None:
    alone = [tokens(server.address, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda prompt: tokens(server.address, prompt), PROMPTS))
    assert together == alone
    assert len(set(map(tuple, alone))) > 1


def test_a_long_prompt_does_not_stall_a_running_stream(server: ServeProcess) -> None:
    """Between two tokens of a stream lies at most one chunk of another's prompt: progress shows it."""
    long_prompt = "word " * 90
    with Client(server.address) as client:
        stream = client.generate(request("short", 60), None)
        arrivals: list[str] = []
        lock = threading.Lock()

        def read_long() -> None:
            for message in Client(server.address).generate(request(long_prompt, 1), None):
                with lock:
                    arrivals.append(message.WhichOneof("event"))

        other = None
        for message in stream:
            if message.WhichOneof("event") == "tokens":
                with lock:
                    arrivals.append("short token")
                if other is None:
                    other = threading.Thread(target=read_long)
                    other.start()
        other.join()
    first, last = arrivals.index("prefill"), len(arrivals) - 1 - arrivals[::-1].index("prefill")
    assert "short token" in arrivals[first:last]


def test_cancelling_frees_the_slot(server: ServeProcess) -> None:
    with Client(server.address) as client:
        stream = client.generate(request("endless", 400), None)
        for message in stream:
            if message.WhichOneof("event") == "tokens":
                break
        stream.close()
        status = wait_for_idle(server)
    assert status["queue"]["queued"] == 0


def test_an_expired_call_frees_its_slot(server: ServeProcess) -> None:
    with Client(server.address) as client, pytest.raises(grpc.RpcError) as failure:
        list(client.generation.Generate(request("endless", 400), timeout=0.15))
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for_idle(server)


def test_a_full_queue_is_refused_with_a_time_to_retry(server: ServeProcess) -> None:
    with Client(server.address) as client:
        streams = [client.generation.Generate(request(f"busy {i}", 400)) for i in range(14)]
        refusals = []
        for stream in streams:
            try:
                next(stream)
            except grpc.RpcError as error:
                refusals.append(error)
        for stream in streams:
            stream.cancel()
    assert refusals
    for refusal in refusals:
        assert refusal.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        details = rpc_status.from_call(refusal).details
        assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in details)
    wait_for_idle(server)


def test_a_prompt_longer_than_the_context_names_both_numbers(server: ServeProcess) -> None:
    result = numoe("generate", "x" * 600, "--address", server.address)
    assert result.returncode == 1
    assert "600" in result.stderr
    assert "512" in result.stderr


def test_health_says_serving(server: ServeProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", "numoe.v1.GenerationService"):
            answer = check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_an_idle_server_uses_under_one_percent_of_a_core(server: ServeProcess) -> None:
    """The server's actors; Ray's own daemons are measured in docs/benchmarks.md."""
    wait_for_idle(server)
    time.sleep(1)
    computing = [actor for actor in server.status()["actors"] if actor["role"] in ("attention", "expert")]
    actors = [psutil.Process(actor["pid"]) for actor in computing]
    time.sleep(1)

    def seconds() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in actors)

    before, start = seconds(), time.monotonic()
    time.sleep(5)
    assert seconds() - before < 0.01 * len(actors) * (time.monotonic() - start) + 0.02


def test_logprobs_are_those_of_the_chosen_tokens(server: ServeProcess) -> None:
    answer = server.generate("logs", "--max-tokens", 3, "--temperature", 0, "--logprobs", 2, "--ignore-eos")
    for token_id, entry in zip(answer["token_ids"], answer["logprobs"], strict=True):
        assert entry["token_id"] == token_id
        assert entry["top"][0]["token_id"] == token_id  # greedy takes the likeliest
        assert entry["logprob"] <= 0


def test_equal_seeds_give_equal_answers(server: ServeProcess) -> None:
    def sample(seed: int) -> list[int]:
        flags = ("--max-tokens", 20, "--temperature", 1, "--seed", seed, "--ignore-eos")
        return server.generate("dice", *flags)["token_ids"]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_a_prompt_that_was_read_before_is_not_read_again(server: ServeProcess) -> None:
    prompt = "Midnight dreary, while I pondered, weak and weary, over many a quaint " * 6  # begins like no other here
    with Client(server.address) as client:

        def answer(**cache: object) -> Answer:
            return read_answer(client.generate(request(prompt, cache=pb.CacheOptions(**cache)), None))

        first, again, salted, bypassing = answer(), answer(), answer(salt=b"another"), answer(bypass=True)
    assert first.prompt_tokens > 256
    assert [a.cached_tokens for a in (first, again, salted, bypassing)] == [0, first.prompt_tokens - 1, 0, 0]
    assert first.token_ids == again.token_ids == salted.token_ids == bypassing.token_ids
    assert wait_for_idle(server)["kv"]["pages_cached"] > 0
