"""Numbers from the command line as protobuf fields."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from numoe.engine.errors import InputError

MAX_SECONDS = 86_400.0


def unsigned(flag: str, value: int | None, bits: int = 32) -> int | None:
    """`value` if a field of so many bits holds it. Raises InputError."""
    if value is not None and not 0 <= value < 1 << bits:
        raise InputError(f"{flag} {value}: give a whole number from 0 to 2^{bits} - 1")
    return value


def duration(flag: str, seconds: float | None) -> Duration | None:
    """Seconds as a message. Raises InputError for more than a day, as servers do."""
    if seconds is None:
        return None
    if not 0 <= seconds <= MAX_SECONDS:
        raise InputError(f"{flag} {seconds:g}: give seconds from 0 to {MAX_SECONDS:g}")
    result = Duration()
    result.FromNanoseconds(int(seconds * 1e9))
    return result
