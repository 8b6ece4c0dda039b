"""Typed, bounded reads of an architecture's metadata keys."""

from __future__ import annotations

import math
from typing import Any, Final

from numoe.engine.errors import ModelFileError, UnsupportedError
from numoe.engine.gguf import GgufFile
from numoe.engine.gguf.scanner import DAMAGED, quoted

_MISSING: Final = object()


class MetadataReader:
    """Reads keys `ARCHITECTURE.name` of `gguf`; every fault is an error naming file, key and value.

    Each method takes the key without the architecture's prefix, and a default for an absent key;
    without a default the key is required.
    """

    def __init__(self, gguf: GgufFile) -> None:
        self._gguf = gguf
        self.architecture = gguf.architecture

    def __contains__(self, name: str) -> bool:
        return self._key(name) in self._gguf.metadata

    def integer(self, name: str, default: object = _MISSING, *, low: int = 1, high: int = 1 << 24) -> int:
        """Read an integer in [low, high]. A list with one value per layer must repeat one value."""
        value = self._get(name, default)
        if isinstance(value, list):
            value = self._uniform(name, value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, f"is {quoted(str(value))}, not an integer")
        if not low <= value <= high:
            raise self.error(name, f"is {value}, not in {low} .. {high}")
        return value

    def real(self, name: str, default: object = _MISSING, *, low: float = 0.0, high: float = 1e12) -> float:
        """Read a finite number in [low, high]."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, f"is {quoted(str(value))}, not a number")
        if not math.isfinite(value) or not low <= value <= high:
            raise self.error(name, f"is {value}, not in {low:g} .. {high:g}")
        return float(value)

    def flag(self, name: str, default: object = _MISSING) -> bool:
        """Read a boolean."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"is {quoted(str(value))}, not a boolean")
        return value

    def text(self, name: str, default: object = _MISSING) -> str:
        """Read a string."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"is {quoted(str(value))}, not a string")
        return value

    def error(self, name: str, what: str, cure: str = DAMAGED) -> ModelFileError:
        """Make the error for a bad value of key `name`."""
        return ModelFileError(f"{self._gguf.path}: metadata key {self._key(name)} {what}; {cure}")

    def unsupported(self, name: str, what: str) -> UnsupportedError:
        """Make the error for a sound value of key `name` that numoe has no code for."""
        return UnsupportedError(f"{self._gguf.path}: metadata key {self._key(name)} {what}")

    def _key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def _get(self, name: str, default: object) -> Any:
        value = self._gguf.metadata.get(self._key(name), default)
        if value is _MISSING:
            raise self.error(name, "is missing")
        return value

    def _uniform(self, name: str, values: list[Any]) -> Any:
        if not values:
            raise self.error(name, "is an empty list")
        if any(value != values[0] for value in values):
            raise self.unsupported(name, "differs between layers; use a model whose layers are alike")
        return values[0]
