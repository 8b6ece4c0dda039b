"""Attacks that hypothesis makes up."""

from __future__ import annotations

import struct
from typing import Any

from hypothesis import strategies as st

from numoe.v1 import chat_pb2, slots_pb2, tokenizer_pb2
from numoe.v1 import generation_pb2 as pb
from tests.http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    frame,
    headers,
    literal,
)
from tests.system.hostile.attacks import (
    HEALTH,
    METHODS,
    REFLECTION,
    SHUTDOWN,
    UNKNOWN,
    Cancelled,
    Message,
    Metadata,
    Raw,
    Unread,
)

sizes = st.sampled_from([0, 1, 100, 16_000, 70_000, 1 << 20, (1 << 20) + 1, 3 << 20])
short_texts = st.one_of(st.text(max_size=50), st.sampled_from([1, 1024, 1025]).map(lambda size: "s" * size))
texts = st.one_of(
    short_texts,
    st.sampled_from(["<|im_end|>", "\0", "\u202e", "a\u0301", "\U0010ffff", " "]).map(lambda text: 3000 * text),
    sizes.map(lambda size: "x" * size),
)
numbers = st.sampled_from([0, 1, 2, 20, 21, 63, 64, 511, 512, 4097, 2**31, 2**32 - 1])
counts = st.sampled_from([0, 1, 3, 65, 1025, 4097, 70_000, 300_000])
floats = st.floats(width=32)


@st.composite
def generate_requests(draw: Any) -> bytes:
    """GenerateRequests whose fields are anything that the types allow."""
    request = pb.GenerateRequest()
    kind = draw(st.sampled_from(["text", "token_ids", "chat", "none"]))
    if kind == "text":
        request.text = draw(texts)
    elif kind == "token_ids":
        request.token_ids.ids.extend([draw(numbers)] * draw(counts))
    elif kind == "chat":
        count, roles = draw(st.sampled_from([0, 1, 2, 10_001])), st.sampled_from(["user", "", "ro\0le"])
        message = chat_pb2.ChatMessage(role=draw(roles), content=draw(texts if count < 3 else short_texts))
        request.chat.messages.extend([message] * count)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        if draw(st.booleans()):
            setattr(request.sampling, name, draw(floats))
    if draw(st.booleans()):
        request.sampling.top_k, request.sampling.penalty_window = draw(numbers), draw(st.integers(-(2**31), 2**31 - 1))
    for token_id in range(draw(st.sampled_from([0, 0, 1, 4097, 50_000]))):
        request.sampling.logit_bias[token_id] = draw(floats) if token_id == 0 else 1.0
    request.stopping.max_tokens = draw(numbers)
    request.stopping.strings.extend([draw(short_texts)] * draw(st.sampled_from([0, 0, 1, 64, 65, 1000])))
    request.stopping.token_ids.extend(range(draw(st.sampled_from([0, 0, 1, 1025, 100_000]))))
    if draw(st.booleans()):
        request.logprobs = draw(numbers)
    if draw(st.booleans()):
        request.request_id = draw(st.one_of(st.just("the-same"), texts))
    request.cache.salt = draw(st.binary(max_size=300))
    return request.SerializeToString()


def good_request(prompt: str, tokens: int, logprobs: int | None = None) -> bytes:
    """A request that there is nothing wrong with."""
    stopping = pb.StopOptions(max_tokens=tokens, ignore_eos=True)
    sampling = pb.SamplingOptions(temperature=0)
    return pb.GenerateRequest(text=prompt, stopping=stopping, sampling=sampling, logprobs=logprobs).SerializeToString()


good_requests = st.builds(good_request, st.text("abc ", min_size=1, max_size=40), st.integers(1, 400), st.just(20))


@st.composite
def broken(draw: Any, messages: st.SearchStrategy[bytes]) -> bytes:
    """Good messages with a few bytes changed, added, or cut off."""
    message = bytearray(draw(messages)[:4096])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(message) - 1)))
        message[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(message[: draw(st.integers(0, len(message)))]) if draw(st.booleans()) else bytes(message)


deep = st.builds(
    lambda group, depth: group * depth,
    st.sampled_from([b"\x0b", b"\x1b", b"\x0a\x80\x01", b"\x1a\x7f"]),
    st.sampled_from([50, 99, 101, 10_000, 500_000]),
)
lengths = st.builds(
    lambda tag, rest: bytes((tag,)) + rest,
    st.sampled_from([0x0A, 0x12, 0x1A, 0x22, 0x2A]),
    st.sampled_from([b"\xff" * 10, b"\xff\xff\xff\xff\x0f", b"\xff\xff\xff\xff\x07", b"\x80" * 11, b""]),
)
not_utf8 = st.binary(min_size=1, max_size=20).map(lambda text: b"\x0a" + bytes((len(text) + 1, 0xFF)) + text)
others = st.one_of(
    st.builds(lambda text: tokenizer_pb2.TokenizeRequest(text=text), texts),
    st.builds(lambda token_id, n: tokenizer_pb2.DetokenizeRequest(token_ids=[token_id] * n), numbers, counts),
    st.builds(lambda slot, target: slots_pb2.ForkSlotRequest(slot=slot, target=target), numbers, numbers),
    st.builds(lambda name: pb.AbortRequest(request_id=name), texts),
).map(lambda message: message.SerializeToString())
messages = st.one_of(
    generate_requests(), broken(generate_requests()), broken(good_requests), others, st.binary(max_size=200), deep,
    lengths, not_utf8,
)  # fmt: skip
paths = st.one_of(
    st.sampled_from([path.encode() for path in (*METHODS, *UNKNOWN, HEALTH)]), st.binary(max_size=50),
    st.just(9000).map(lambda size: b"/" + b"x" * size),
)  # fmt: skip
odd_headers = st.fixed_dictionaries(
    {},
    optional={
        ":method": st.sampled_from([b"GET", b"", None]), ":scheme": st.sampled_from([b"https", None]),
        ":authority": st.sampled_from([b"", None]), "te": st.sampled_from([b"", None]),
        "content_type": st.sampled_from([b"text/html", b"application/grpc+json", b"", None]),
        "grpc_timeout": st.sampled_from([b"99999999H", b"0n", b"-1S", b"1", b"99999999999999S", b""]),
        "grpc_encoding": st.sampled_from([b"gzip", b"deflate", b"snappy", b"xxxxxxxx"]),
        "x_bin": st.binary(max_size=30), "cookie": st.just(30_000).map(lambda size: b"z" * size),
        "Upper": st.just(b"case"),
    },
)  # fmt: skip


@st.composite
def http2(draw: Any, token: str) -> tuple[bytes, ...]:
    """A connection that begins well, and frames of any kind after it."""
    pieces, stream = [PREFACE + frame(SETTINGS, 0, 0, b"")], 1
    kinds = st.sampled_from(["call", "call", "any", "reset", "settings", "ping", "continuation", "wrong length"])
    for kind in draw(st.lists(kinds, min_size=1, max_size=6)):
        if kind == "call":
            known = {"authorization": b"Bearer " + token.encode()} if draw(st.booleans()) else {}
            block = headers(draw(paths), **draw(odd_headers), **known)[:16_000]
            message = draw(messages)[:8000]
            said = draw(st.sampled_from([len(message), len(message) + 1, 0, 2**31, 2**32 - 1]))
            prefix = bytes((draw(st.sampled_from([0, 0, 1, 2])),)) + said.to_bytes(4, "big")
            pieces.append(frame(HEADERS, END_HEADERS, stream, block))
            pieces.append(frame(DATA, draw(st.sampled_from([0, END_STREAM])), stream, prefix + message))
            stream += 2
        elif kind == "reset":  # as in CVE-2023-44487
            for _ in range(draw(st.sampled_from([1, 50]))):
                pieces.append(frame(HEADERS, END_HEADERS, stream, headers(HEALTH.encode())))
                pieces.append(frame(RST_STREAM, 0, stream, b"\0\0\0\x08"))
                stream += 2
        elif kind == "settings":
            entry = struct.pack(">HI", draw(st.integers(0, 10)), draw(st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1])))
            pieces.append(frame(SETTINGS, draw(st.sampled_from([0, 1])), 0, entry) * draw(st.sampled_from([1, 200])))
        elif kind == "ping":
            pieces.append(frame(PING, 0, 0, b"\0" * 8) * draw(st.sampled_from([1, 500])))
        elif kind == "continuation":  # as in CVE-2024-27316
            pieces.append(frame(HEADERS, 0, stream, literal(b"x", b"y" * 1000)))
            pieces.append(frame(CONTINUATION, 0, stream, literal(b"x", b"y" * 4000)) * draw(st.sampled_from([1, 300])))
            stream += 2
        else:
            length = draw(st.integers(0, 2**24 - 1)) if kind == "wrong length" else None
            kinds_, flags, streams = st.integers(0, 255), st.integers(0, 255), st.integers(0, 2**31 - 1)
            pieces.append(frame(draw(kinds_), draw(flags), draw(streams), draw(st.binary(max_size=100)), length))
    return tuple(pieces)


def attacks(token: str) -> st.SearchStrategy[Any]:
    """Everything that a client may do to a server that knows `token`."""
    fine = (("authorization", f"Bearer {token}"),)
    beginnings = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", PREFACE[:10], PREFACE, b"\x16\x03\x01" * 9, b""]
    garbage = st.one_of(
        st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=4).map(tuple),
        st.sampled_from(beginnings).map(lambda beginning: (beginning,)),
        st.binary(max_size=60).map(lambda rest: tuple(bytes((byte,)) for byte in PREFACE + rest)),
    )
    names = st.from_regex(r"[a-z0-9_.-]{1,20}", fullmatch=True).map(lambda name: "x" + name.removesuffix("-bin"))
    values = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=50)
    entries = st.lists(st.tuples(names, values), max_size=5).map(lambda found: (*found, *fine))
    tokens = values.map(lambda value: (("authorization", value),))
    everything = [*METHODS, *UNKNOWN, REFLECTION, HEALTH]
    known, unknown = st.just(True), st.just(False)
    return st.one_of(
        st.builds(Message, st.sampled_from([METHODS[0], *everything]), messages, known),
        st.builds(Message, st.sampled_from([SHUTDOWN, *everything]), messages, unknown),
        st.builds(Message, st.just(METHODS[0]), generate_requests(), known),
        st.builds(Cancelled, good_requests, st.integers(1, 50), st.sampled_from([0.1, 1.0, 10.0, 5000.0])),
        st.builds(Unread, good_requests),
        st.builds(Metadata, st.one_of(entries, tokens, st.just(fine)), st.sampled_from([0, 0, 8000, 16_500, 60_000])),
        st.builds(Raw, garbage, st.sampled_from([0, 0, 0.5]), st.booleans()),
        st.builds(Raw, http2(token), st.sampled_from([0, 0, 1]), st.booleans()),
    )
