"""Packed weights of the attention side: everything but the routed experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from numoe.engine.cpu.memory import address, align, aligned_bytes
from numoe.engine.cpu.products import product_kernel, unpack_kernel
from numoe.engine.formats import Shape, shape_of
from numoe.engine.gguf import GgufFile
from numoe.engine.numa import Pins
from numoe.engine.progress import Progress
from numoe.engine.weights import PackedTensor, WeightSlice, link_slice, load_tensors, open_tensors, slice_bytes
from numoe.engine.worker.options import ForwardOptions

DENSE: Final = "dense"
"""What the slice of the attention side is called."""


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
    """The tensors of the attention side, packed: one slice, in shared memory or in memory of its own."""

    def __init__(self, gguf: GgufFile, options: ForwardOptions, progress: Progress) -> None:
        self.slice: WeightSlice | None = None
        tensors, threads, shared = plan_dense(gguf), options.threads, options.shared
        self.nbytes = slice_bytes(tensors)
        if shared is None:
            array = aligned_bytes(self.nbytes)
            load_tensors(array, tensors, progress, threads)
        else:
            self.slice = open_tensors(
                shared.key, gguf, tensors, progress,
                threads=threads, on_thread=Pins(options.cpus).pin_next, pages=shared.pages,
            )  # fmt: skip
            link_slice(shared.folder, DENSE, self.slice)
            array = self.slice.array
        self.matrices: dict[str, PackedMatrix] = {}
        self.vectors: dict[str, npt.NDArray[np.float32]] = {}
        for packed in tensors:
            data = array[packed.offset : packed.offset + packed.nbytes]
            if packed.shape is None:
                self.vectors[packed.tensor.name] = data.view(np.float32)
            else:
                self.matrices[packed.tensor.name] = PackedMatrix(packed.shape, data)


def plan_dense(gguf: GgufFile) -> list[PackedTensor]:
    """Where each tensor lies in the slice of the attention side."""
    plan, offset = [], 0
    for name in dense_tensor_names(gguf):
        info = gguf.tensors[name]
        is_vector = len(info.shape) == 1
        shape = None if is_vector else shape_of(info.qtype, info.rows, info.shape[-1])
        plan.append(PackedTensor(info, shape, offset, rows=(0, info.rows)))
        offset = align(offset + plan[-1].nbytes)
    return plan
