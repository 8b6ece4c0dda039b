"""Loading a slice: every byte is read once, in parallel, summed up, packed where it will stay, and checked."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from numoe.engine.cpu.memory import ALIGNMENT, align, aligned_bytes
from numoe.engine.cpu.packing import pack
from numoe.engine.errors import DataLossError, ModelFileError
from numoe.engine.formats import GROUP_ROWS, Shape
from numoe.engine.gguf import GgufFile, TensorInfo, dequantize_rows
from numoe.engine.progress import Progress
from numoe.engine.weights.contents import ContentSum, content_table, unit_rows
from numoe.engine.weights.header import SliceHeader
from numoe.engine.weights.pages import CachedPages, SharedReads
from numoe.engine.weights.slices import SliceKey, WeightSlice, open_slice, piece_table, remove_slice
from numoe.engine.weights.source import layout_identity, source_fingerprint

_PIECE_BYTES: Final = 8 << 20
_FOLIO_BYTES: Final = 2 << 20
"""The page cache keeps pages in groups of up to so many bytes, of which it drops all or none."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class PackedTensor:
    """What a slice holds of a tensor [..., rows, cols]: of each of its matrices some rows and some 32-column blocks.

    shape: of one packed matrix, None for a vector, which is held as float32. count: matrices, one
    behind the other from `offset` on. rows, blocks: the ranges of each that are held. readers: slices that
    hold other blocks of the same rows and so read them too, this one among them as number `reader`.
    """

    tensor: TensorInfo
    shape: Shape | None
    offset: int
    count: int = 1
    rows: tuple[int, int] = (0, 1)
    blocks: tuple[int, int] | None = None
    readers: int = 1
    reader: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return self.count * (self.shape.nbytes if self.shape else 4 * self.tensor.shape[-1])

    def pieces(self) -> Iterator[Piece]:
        """What is read and packed at a time: some megabytes of the file, whole units of rows (`contents.py`)."""
        if self.shape is None:
            yield Piece(self, 0, 1, self.offset, self.nbytes, is_summed=True)
            return
        if self.shape.nbytes == 0:
            return
        first, last = self.rows
        of_matrix = self.tensor.rows // self.count
        unit = unit_rows(self.tensor)
        step = max(1, _PIECE_BYTES // (unit * self.tensor.row_bytes)) * unit
        starts = [(matrix, start) for matrix in range(self.count) for start in range(first, last, step)]
        for number, (matrix, start) in enumerate(starts):
            rows, at = min(step, last - start), matrix * self.shape.nbytes
            at += (start - first) // GROUP_ROWS * self.shape.group_bytes
            nbytes = -(-rows // GROUP_ROWS) * self.shape.group_bytes
            is_summed = number % self.readers == self.reader
            yield Piece(self, matrix * of_matrix + start, rows, self.offset + at, nbytes, is_summed=is_summed)


@dataclass(frozen=True)
class Piece:
    """`rows` rows of a tensor from row `first` on, packed to `nbytes` bytes at `offset` of the slice.

    is_summed: whether it is up to this slice, of all that read these rows, to sum up what they hold.
    """

    packed: PackedTensor
    first: int
    rows: int
    offset: int
    nbytes: int
    is_summed: bool

    @property
    def source(self) -> tuple[int, int]:
        """The range of bytes in the tensor's file."""
        row_bytes = self.packed.tensor.row_bytes
        start = self.packed.tensor.offset + self.first * row_bytes
        return start, start + self.rows * row_bytes


def slice_bytes(tensors: Iterable[PackedTensor]) -> int:
    """Bytes of the packed weights of a slice; no slice is empty."""
    return max((align(packed.offset + packed.nbytes) for packed in tensors), default=0) or ALIGNMENT


def open_tensors(
    key: SliceKey, gguf: GgufFile, tensors: Sequence[PackedTensor], progress: Progress,
    *, threads: int, on_thread: Callable[[], None] = lambda: None,
    pages: CachedPages | None = None, reads: SharedReads | None = None,
) -> WeightSlice:  # fmt: skip
    """The slice with these tensors: attached if it is there, else loaded.

    key: with the fingerprint of the file as it was when the server was planned; ModelFileError if it has
    changed. threads: that read and pack; each runs `on_thread` first. pages, reads: see `pages.py`.
    """
    _check_source(key, gguf)
    pieces = [piece for packed in tensors for piece in packed.pieces()]
    nbytes = slice_bytes(tensors)
    found = open_slice(key, nbytes, len(pieces), len(tensors), threads=threads, on_thread=on_thread)
    if found.header is not None:
        progress.skip()
        if reads is not None:
            reads.finish_all()
        return found
    assert found.medium is not None
    medium, start = found.medium.kind, time.monotonic()
    try:
        table, contents = load_tensors(
            found.array, tensors, progress, threads, on_thread=on_thread, pages=pages, reads=reads
        )
        _verify(found.array, table, threads, on_thread, found.path)
        _check_source(key, gguf)
        found.finish(
            table,
            contents,
            lambda checksum: SliceHeader(
                source=key.source, cut=key.cut, layout=layout_identity(), nbytes=nbytes, pieces=len(pieces),
                tensors=len(tensors), checksum=checksum, nodes=key.nodes, medium=medium, model=str(gguf.path),
                read_bytes=sum(stop - start for start, stop in (piece.source for piece in pieces)),
                seconds=time.monotonic() - start,
            ),
        )  # fmt: skip
    except BaseException:
        found.close()
        remove_slice(found.path)
        raise
    return found


def load_tensors(
    out: npt.NDArray[np.uint8], tensors: Sequence[PackedTensor], progress: Progress, threads: int,
    *, on_thread: Callable[[], None] = lambda: None,
    pages: CachedPages | None = None, reads: SharedReads | None = None,
) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:  # fmt: skip
    """Read and pack tensors into `out`; the table of what was written, with checksums, and that of what was read."""
    pieces = [piece for packed in tensors for piece in packed.pieces()]
    with ExitStack() as files:
        loader = _Loader(out, tensors, progress, pages, reads, files)
        digests = _on_threads(loader.load, pieces, threads, on_thread)
    progress.finish()
    names, sums = [packed.tensor.name for packed in tensors], [loader.contents[packed] for packed in tensors]
    contents = content_table(names, sums)
    return piece_table([(piece.offset, piece.nbytes) for piece in pieces], digests), contents


def verify_pieces(
    array: npt.NDArray[np.uint8], table: npt.NDArray[np.void], threads: int, on_thread: Callable[[], None]
) -> list[int]:
    """The numbers of the pieces whose bytes are not what their checksums say."""

    def is_damaged(piece: np.void) -> bool:
        start, nbytes = int(piece["offset"]), int(piece["nbytes"])
        return bool(blake3(array[start : start + nbytes].data).digest() != piece["digest"].tobytes())

    return [i for i, damaged in enumerate(_on_threads(is_damaged, list(table), threads, on_thread)) if damaged]


class _Loader:
    """Loads one piece after the other on each of many threads; a thread has a buffer of its own for what it reads."""

    def __init__(
        self, out: npt.NDArray[np.uint8], tensors: Sequence[PackedTensor], progress: Progress,
        pages: CachedPages | None, reads: SharedReads | None, files: ExitStack,
    ) -> None:  # fmt: skip
        self._out, self._progress, self._pages, self._reads = out, progress, pages, reads
        self._buffers, self._lock = threading.local(), threading.Lock()
        self._edges: set[tuple[Path, int]] = set()
        self._files: dict[Path, int] = {}
        for path in {packed.tensor.path for packed in tensors}:
            self._files[path] = os.open(path, os.O_RDONLY)
            # The kernel must not read ahead: its large folios reach into the next piece, and then cannot be dropped.
            os.posix_fadvise(self._files[path], 0, 0, os.POSIX_FADV_RANDOM)
            files.callback(os.close, self._files[path])
        self.contents = dict.fromkeys(tensors, ContentSum())
        shared = [packed for packed in tensors if packed.readers > 1]
        self._numbers = {packed: number for number, packed in enumerate(shared)}
        self._left = Counter({packed: sum(1 for _ in packed.pieces()) for packed in shared})
        for packed in shared:
            if reads is not None and self._left[packed] == 0:
                reads.finished(self._numbers[packed])

    def load(self, piece: Piece) -> bytes:
        """Read, sum up and pack a piece; the checksum of the packed bytes."""
        tensor, blocks = piece.packed.tensor, piece.packed.blocks
        raw = self._read(piece).reshape(piece.rows, tensor.row_bytes)
        if piece.is_summed:
            content = ContentSum.of(tensor, piece.first, raw)
            with self._lock:
                self.contents[piece.packed] += content
        out = self._out[piece.offset : piece.offset + piece.nbytes]
        if piece.packed.shape is None:
            out.view(np.float32)[:] = dequantize_rows(raw, tensor.qtype).reshape(-1)
        else:
            pack(raw, tensor.qtype, out, blocks)
        digest = blake3(out.data).digest()
        self._progress.advance(piece.nbytes)
        return digest

    def _read(self, piece: Piece) -> npt.NDArray[np.uint8]:
        start, stop = piece.source
        path, descriptor = piece.packed.tensor.path, self._files[piece.packed.tensor.path]
        buffer = getattr(self._buffers, "raw", None)
        if buffer is None or len(buffer) < stop - start:
            buffer = self._buffers.raw = aligned_bytes(max(stop - start, _PIECE_BYTES))
        raw, done = buffer[: stop - start], 0
        while done < len(raw):
            try:
                count = os.preadv(descriptor, [raw[done:].data], start + done)
            except OSError as error:
                raise ModelFileError(f"{path}: cannot be read at byte {start + done} ({error.strerror})") from None
            if count == 0:
                raise ModelFileError(f"{path}: ends at byte {start + done}; it was cut off while it was being read")
            done += count
        self._forget(piece, descriptor)
        return raw

    def _forget(self, piece: Piece, descriptor: int) -> None:
        """Drop the pages that were read, or of a shared tensor all once every slice has read it."""
        if self._pages is None:
            return
        packed = piece.packed
        (start, stop) = piece.source
        if packed.readers > 1:
            with self._lock:
                self._left[packed] -= 1
                is_last = self._left[packed] == 0
            if not is_last or (self._reads is not None and not self._reads.finished(self._numbers[packed])):
                return
            start, stop = packed.tensor.offset, packed.tensor.offset + packed.tensor.nbytes
        with self._lock:
            before, after = (packed.tensor.path, start) in self._edges, (packed.tensor.path, stop) in self._edges
            self._edges |= {(packed.tensor.path, start), (packed.tensor.path, stop)}
        # A folio across a boundary can be dropped once both sides are read.
        low, high = start - _FOLIO_BYTES * before, stop + _FOLIO_BYTES * after
        self._pages.drop(descriptor, packed.tensor.path, max(0, low), high)


def _verify(
    array: npt.NDArray[np.uint8], table: npt.NDArray[np.void], threads: int, on_thread: Callable[[], None], path: Path
) -> None:
    if damaged := verify_pieces(array, table, threads, on_thread):
        at = int(table[damaged[0]]["offset"])
        raise DataLossError(
            f"weights {path} changed in memory while they were loaded (byte {at}): load again, and check the memory"
        )


def _on_threads(
    work: Callable[[_Item], _Result], items: Sequence[_Item], threads: int, on_thread: Callable[[], None]
) -> list[_Result]:
    """Map on threads; the first error ends it at once."""
    with ThreadPoolExecutor(threads, thread_name_prefix="numoe-load", initializer=on_thread) as pool:
        try:
            return list(pool.map(work, items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _check_source(key: SliceKey, gguf: GgufFile) -> None:
    if source_fingerprint(gguf.paths) != key.source:
        raise ModelFileError(f"{gguf.path}: the file has changed since the server was planned; start the server again")
