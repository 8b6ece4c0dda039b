"""Many streams of a server at once, and what came of each."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from numoe.deploy.client import Client
from numoe.v1 import generation_pb2 as pb

STREAMS = 8


def varied(number: int, max_tokens: int = 500) -> pb.GenerateRequest:
    """A long request of its own: every other one is sampled, some with penalties, log-probabilities or a slot."""
    sampling = pb.SamplingOptions(temperature=0.0)
    if number % 2:
        sampling = pb.SamplingOptions(temperature=0.9, top_p=0.95, seed=number, repetition_penalty=1.1)
    return pb.GenerateRequest(
        text=f"the story number {number}, which is told again and again",
        sampling=sampling,
        stopping=pb.StopOptions(max_tokens=max_tokens, ignore_eos=True),
        logprobs=2 if number % 4 == 1 else None,
        slot_id=STREAMS + number // 4 if number % 4 == 2 else None,
    )


@dataclass
class Told:
    """What a client was told in one stream."""

    starts: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: pb.Finished | None = None
    error: grpc.StatusCode | None = None

    @property
    def answer(self) -> tuple[str, list[int], list[float], pb.Usage | None]:
        """What must not depend on who died meanwhile; what was cached of a prompt may."""
        usage = None
        if self.finished is not None:
            usage = pb.Usage(
                prompt_tokens=self.finished.usage.prompt_tokens,
                completion_tokens=self.finished.usage.completion_tokens,
            )
        return self.text, self.token_ids, self.logprobs, usage


class Streams:
    """Requests that all run at once; `started` returns when each has had a token, `begun` says when it began."""

    def __init__(self, address: str, requests: Sequence[pb.GenerateRequest]) -> None:
        self.told = [Told() for _ in requests]
        self.begun = [0.0 for _ in requests]
        self._going = [threading.Event() for _ in requests]
        self._threads = [
            threading.Thread(target=self._read, args=(address, request, number), daemon=True)
            for number, request in enumerate(requests)
        ]
        for thread in self._threads:
            thread.start()

    def started(self, at_least: int = 1) -> None:
        """Wait until so many streams have had a token."""
        for event in self._going[:at_least]:
            assert event.wait(60)

    def join(self) -> list[Told]:
        """Wait for all ends."""
        for thread in self._threads:
            thread.join(180)
            assert not thread.is_alive(), "a stream has no end"
        return self.told

    def _read(self, address: str, request: pb.GenerateRequest, number: int) -> None:
        told = self.told[number]
        with Client(address) as client:
            try:
                for message in client.generation.Generate(request):
                    told.starts += message.HasField("started")
                    self.begun[number] = self.begun[number] or time.monotonic()
                    if message.HasField("tokens"):
                        told.text += message.tokens.text
                        told.token_ids += message.tokens.token_ids
                        told.logprobs += [entry.token.logprob for entry in message.tokens.logprobs]
                        self._going[number].set()
                    elif message.HasField("finished"):
                        told.finished = message.finished
            except grpc.RpcError as error:
                told.error = error.code()
                self._going[number].set()
