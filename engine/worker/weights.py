"""Packed weights of the attention side: everything but the routed experts."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from numoe.engine.cpu.memory import address, aligned_bytes, aligned_copy
from numoe.engine.cpu.packing import pack
from numoe.engine.cpu.products import product_kernel, unpack_kernel
from numoe.engine.formats import GROUP_ROWS, Shape, shape_of
from numoe.engine.gguf import GgufFile
from numoe.engine.progress import Progress

_PART_GROUPS = 1024  # groups that one thread packs at a time


def dense_tensor_names(gguf: GgufFile) -> list[str]:
    """The tensors that the attention side loads: all but the routed experts."""
    return [name for name in gguf.tensors if "_exps." not in name and name != "rope_freqs.weight"]


@dataclass(frozen=True)
class PackedMatrix:
    """A weight matrix as the kernels read it."""

    shape: Shape
    data: npt.NDArray[np.uint8]

    @property
    def address(self) -> int:
        """Where group 0 begins."""
        return address(self.data)

    @property
    def is_q8(self) -> bool:
        """Whether its products read 8-bit activation rows."""
        return self.shape.format.activations == "q8"

    @property
    def product(self) -> int:
        """The address of its product kernel."""
        return int(product_kernel(self.shape.format.qtype).address)

    @property
    def unpack(self) -> int:
        """The address of its unpack kernel."""
        return int(unpack_kernel(self.shape.format.qtype).address)


class DenseWeights:
    """The tensors of the attention side, packed in parallel as they are loaded."""

    def __init__(self, gguf: GgufFile, names: Iterable[str], threads: int, progress: Progress) -> None:
        self.matrices: dict[str, PackedMatrix] = {}
        self.vectors: dict[str, npt.NDArray[np.float32]] = {}
        with ThreadPoolExecutor(threads, thread_name_prefix="numoe-load") as pool:
            for name in names:
                if len(gguf.tensors[name].shape) == 1:
                    self.vectors[name] = aligned_copy(gguf.dequantize(name))
                else:
                    self.matrices[name] = _load_matrix(gguf, name, pool, progress)


def _load_matrix(gguf: GgufFile, name: str, pool: ThreadPoolExecutor, progress: Progress) -> PackedMatrix:
    info, raw = gguf.tensors[name], gguf.read(name)
    shape = shape_of(info.qtype, info.rows, info.shape[-1])
    matrix = PackedMatrix(shape, aligned_bytes(shape.nbytes))
    groups = matrix.data.reshape(shape.groups, shape.group_bytes)

    def load_part(start: int) -> None:
        rows = raw[start * GROUP_ROWS : (start + _PART_GROUPS) * GROUP_ROWS]
        pack(rows, info.qtype, groups[start : start + _PART_GROUPS].reshape(-1))
        progress.advance(groups[start : start + _PART_GROUPS].nbytes)

    list(pool.map(load_part, range(0, shape.groups, _PART_GROUPS)))
    return matrix
