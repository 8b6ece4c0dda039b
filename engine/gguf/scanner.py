"""Bounds-checked little-endian reads over a file's bytes: the layer no hostile length gets past."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Final

import numpy as np
from gguf import GGUFValueType

from numoe.engine.errors import ModelFileError

DAMAGED: Final = "download or convert the file again"
MAX_HEADER_BYTES: Final = 512 << 20
MAX_ARRAY_LENGTH: Final = 1 << 24

Value = str | int | float | bool | list[str] | list[int] | list[float] | list[bool]

SCALAR_TYPES: Final[dict[GGUFValueType, np.dtype[np.generic]]] = {
    GGUFValueType.UINT8: np.dtype("u1"),
    GGUFValueType.INT8: np.dtype("i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("u1"),
}

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


def quoted(text: str, limit: int = 80) -> str:
    """`text` from a file, made safe to show: one line, at most about `limit` characters."""
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


class Scanner:
    """A cursor over the start of a GGUF file. Every read is checked against the file's end.

    Nothing is allocated before the bytes that justify it are known to exist, and no more than
    `MAX_HEADER_BYTES` are ever walked. Every failure is a `ModelFileError` that names the file.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.position = 0
        self._data = data
        self._end = min(len(data), MAX_HEADER_BYTES)
        self._size = len(data)

    @property
    def remaining(self) -> int:
        """Bytes between the cursor and the end of what may be read."""
        return self._end - self.position

    def error(self, what: str, cure: str = DAMAGED) -> ModelFileError:
        """Make the error to raise: file, what is wrong, where, what to do."""
        return ModelFileError(f"{self.path}: {what} (at byte {self.position}); {cure}")

    def take(self, count: int, what: str) -> int:
        """Move past `count` bytes of `what`; their offset."""
        if count > self.remaining:
            if self._size > self._end:
                raise self.error(f"its header is longer than {MAX_HEADER_BYTES >> 20} MiB, in {what}")
            raise self.error(
                f"truncated in {what}: {count} bytes needed, {self.remaining} left of {self._size}"
            )
        start = self.position
        self.position += count
        return start

    def u32(self, what: str) -> int:
        """Read an unsigned 32-bit integer."""
        start = self.take(4, what)
        return int(_U32.unpack_from(self._data, start)[0])

    def u64(self, what: str) -> int:
        """Read an unsigned 64-bit integer."""
        start = self.take(8, what)
        return int(_U64.unpack_from(self._data, start)[0])

    def text(self, what: str) -> str:
        """Read a length-prefixed UTF-8 string."""
        length = self.u64(what)
        start = self.take(length, what)
        return self._decoded(start, length, what)

    def value(self, kind: int, what: str) -> Value:
        """Read a metadata value of GGUF type number `kind`."""
        value_type = self._value_type(kind, what)
        if value_type == GGUFValueType.STRING:
            return self.text(what)
        if value_type == GGUFValueType.ARRAY:
            return self._array(what)
        return self._numbers(value_type, 1, what)[0]

    def _value_type(self, kind: int, what: str) -> GGUFValueType:
        try:
            return GGUFValueType(kind)
        except ValueError:
            raise self.error(f"{what} has the unknown value type {kind}") from None

    def _array(self, what: str) -> Value:
        value_type = self._value_type(self.u32(what), what)
        count = self.u64(what)
        if value_type == GGUFValueType.ARRAY:
            raise self.error(f"{what} is an array of arrays, which no model uses")
        width = 8 if value_type == GGUFValueType.STRING else SCALAR_TYPES[value_type].itemsize
        if count > MAX_ARRAY_LENGTH or count * width > self.remaining:
            raise self.error(f"{what} claims {count} elements, more than the file can hold")
        if value_type == GGUFValueType.STRING:
            return self._strings(count, what)
        return self._numbers(value_type, count, what)

    def _strings(self, count: int, what: str) -> list[str]:
        data, unpack, end, position = self._data, _U64.unpack_from, self._end, self.position
        result: list[str] = []
        for _ in range(count):
            start = position + 8
            if start > end or (position := start + unpack(data, start - 8)[0]) > end:
                self.position = start - 8
                raise self.error(f"truncated in {what}: a string reaches past the end")
            try:
                result.append(data[start:position].decode())
            except UnicodeDecodeError:
                self.position = start
                raise self.error(f"{what} is not valid UTF-8") from None
        self.position = position
        return result

    def _numbers(
        self, value_type: GGUFValueType, count: int, what: str
    ) -> list[int] | list[float] | list[bool]:
        dtype = SCALAR_TYPES[value_type]
        start = self.take(count * dtype.itemsize, what)
        raw = self._data[start : self.position]
        values = np.frombuffer(raw, dtype)
        if value_type != GGUFValueType.BOOL:
            numbers: list[int] | list[float] = values.tolist()
            return numbers
        if count and int(values.max()) > 1:
            raise self.error(f"{what} holds a boolean that is neither 0 nor 1")
        return [bool(value) for value in raw]

    def _decoded(self, start: int, length: int, what: str) -> str:
        try:
            return self._data[start : start + length].decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} is not valid UTF-8") from None
