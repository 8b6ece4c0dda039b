"""HTTP/2 by hand: frames of RFC 9113 and, for headers, literals of RFC 7541."""

from __future__ import annotations

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, CONTINUATION = 0, 1, 3, 4, 6, 9
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None = None) -> bytes:
    """A frame, with the length that it says or another."""
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header that no table remembers."""
    return b"\0" + b"".join(_integer(len(part)) + part for part in (name, value))


def _integer(value: int) -> bytes:
    if value < 127:
        return bytes((value,))
    result, value = bytearray((127,)), value - 127
    while value >= 128:
        result.append(value % 128 + 128)
        value //= 128
    return bytes((*result, value))


def headers(path: bytes, **changes: bytes | None) -> bytes:
    """The headers of a gRPC call, some changed or (None) left out; underscores stand for hyphens."""
    found: dict[str, bytes | None] = {
        ":method": b"POST", ":scheme": b"http", ":path": path, ":authority": b"numoe", "te": b"trailers",
        "content-type": b"application/grpc",
    }  # fmt: skip
    found |= {name.replace("_", "-"): value for name, value in changes.items()}
    return b"".join(literal(name.encode(), value) for name, value in found.items() if value is not None)
