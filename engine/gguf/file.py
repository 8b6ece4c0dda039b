"""`GgufFile`: a model's metadata and memory-mapped tensors, from one file or from all parts of one."""

from __future__ import annotations

import mmap
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from numoe.engine.errors import ModelFileError, UnsupportedError
from numoe.engine.gguf.header import Header, read_header
from numoe.engine.gguf.scanner import DAMAGED, quoted
from numoe.engine.gguf.split import check_parts, part_paths
from numoe.engine.gguf.tensors import WEIGHT_TYPES, TensorInfo, dequantize_rows


class GgufFile:
    """An open GGUF model: `metadata`, `tensors`, and their bytes without a copy.

    A split model (`NAME-00001-of-0000N.gguf`) is opened by the name of any part and looks like one
    file. Opening validates the whole header and maps the data without reading it. Arrays that
    `read` returned keep the map alive past `close`.
    """

    def __init__(self, path: Path, maps: Mapping[Path, mmap.mmap], headers: list[Header]) -> None:
        self.path = path
        self.metadata: Mapping[str, Any] = MappingProxyType(headers[0].metadata)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: info for header in headers for name, info in header.tensors.items()}
        )
        self._maps = dict(maps)
        self._size_bytes = sum(len(data) for data in maps.values())

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Map and validate `path`, and the other parts if it is split.

        Raises ModelFileError for a missing, unreadable or unsound file or part, UnsupportedError
        for a tensor type of unknown size.
        """
        path = Path(path)
        data = _map(path)
        header = read_header(path, data)
        paths = part_paths(path, header.metadata)
        maps: dict[Path, mmap.mmap] = {}
        headers: list[Header] = []
        for part in paths:
            maps[part] = data if part == path else _map(part)
            headers.append(header if part == path else read_header(part, maps[part]))
        check_parts(paths, headers)
        return cls(paths[0], maps, headers)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file of the model, in order."""
        return tuple(self._maps)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return self._size_bytes

    @property
    def architecture(self) -> str:
        """The value of general.architecture; ModelFileError without one."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or not name:
            raise ModelFileError(f"{self.path}: metadata key general.architecture is missing; {DAMAGED}")
        return name

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the bytes of tensor `name`: read-only uint8 [*shape[:-1], row_bytes], a view of the map."""
        info = self._info(name)
        if not self._maps:
            raise ValueError(f"{self.path} is closed")
        data = np.frombuffer(self._maps[info.path], np.uint8, info.nbytes, info.offset)
        return data.reshape(*info.shape[:-1], info.row_bytes)

    def dequantize(self, name: str) -> npt.NDArray[np.float32]:
        """Return tensor `name` as float32 [*shape]; a view of the map if it is stored so."""
        return dequantize_rows(self.read(name), self._info(name).qtype)

    def check_weight_types(self, names: Iterable[str] | None = None) -> None:
        """Raise UnsupportedError for the first of `names` (all if None) in a format without kernels."""
        for name in self.tensors if names is None else names:
            info = self._info(name)
            if info.qtype not in WEIGHT_TYPES:
                supported = ", ".join(qtype.name for qtype in WEIGHT_TYPES)
                raise UnsupportedError(
                    f"{info.path}: tensor {quoted(name)} has type {info.qtype.name}; "
                    f"use a file whose tensors are {supported}"
                )

    def close(self) -> None:
        """Unmap the files; arrays still in use keep theirs until they are gone."""
        for data in self._maps.values():
            try:
                data.close()
            except BufferError:  # an array still shows it
                continue
        self._maps = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GgufFile({str(self.path)!r}, {len(self.tensors)} tensors, {self.size_bytes} bytes)"

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelFileError(f"{self.path}: tensor {quoted(name)} is missing; {DAMAGED}") from None


def _map(path: Path) -> mmap.mmap:
    """Map a regular, non-empty file read-only."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ModelFileError(f"{path}: {kind}; give the path of a .gguf file")
        if status.st_size == 0:
            raise ModelFileError(f"{path}: the file is empty; {DAMAGED}")
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(
            f"{quoted(str(path), 500)}: cannot be opened ({error}); check the path"
        ) from None
