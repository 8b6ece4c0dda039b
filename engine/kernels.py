"""Every kernel of the CPU backend by name, and compiling them ahead of their use.

`python -m numoe.engine.kernels NAME ...` compiles into the disk cache and prints each name when it
is there. Names are "product:Q8_0", "pack:Q8_0", "unpack:Q8_0", "step:attend", "loop:shard", "pages:transfer".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from gguf import GGMLQuantizationType as QuantType

from numoe.engine.cpu.isa import choose_isa, kernel_cache_dir
from numoe.engine.gguf import GgufFile

STEP_KERNELS = (
    "attend", "rope_and_append", "rms_norm", "embed", "route_softmax", "attend_merge", "matmul", "exchange",
    "swiglu", "rope_table", "gather_logit_rows", "quantize", "add_partials",
)  # fmt: skip
LOOPS = ("shard", "team")
PAGES = ("transfer", "transfer_interleaved")
_RECORD = "compiled.json"


def needed_kernels(gguf: GgufFile) -> list[str]:
    """The kernels that serving a model takes, the slowest to compile first."""
    products = {info.qtype for info in gguf.tensors.values() if len(info.shape) > 1}
    names = [f"loop:{name}" for name in LOOPS] + [f"step:{name}" for name in STEP_KERNELS]
    names += [f"pages:{name}" for name in PAGES]
    names.append(f"unpack:{gguf.tensors['token_embd.weight'].qtype.name}")
    return names + [f"{kind}:{qtype.name}" for qtype in sorted(products) for kind in ("product", "pack")]


def compile_kernel(name: str) -> None:
    """Compile one kernel, or find it in the cache."""
    from numba import types

    kind, _, what = name.partition(":")
    if kind == "pack":
        from numoe.engine.cpu.packing import pack_kernel

        pack_kernel(QuantType[what])
    elif kind in ("product", "unpack"):
        from numoe.engine.cpu import products

        (products.product_kernel if kind == "product" else products.unpack_kernel)(QuantType[what])
    elif kind == "step":
        from numoe.engine.cpu import attention, dense
        from numoe.engine.experts import exchange

        found = [getattr(module, what) for module in (attention, dense, exchange) if hasattr(module, what)]
        _ = found[0].address
    elif kind == "pages":
        from numoe.engine.cpu import portable

        portable.prepare(getattr(portable, what))
    elif what == "shard":
        from numoe.engine.experts.loop import shard_loop

        shard_loop.compile((types.intp,) * 3)
    else:
        from numoe.engine.cpu import team

        team.compile_all()


def compiled() -> set[str]:
    """The kernels known to be in the cache of this CPU and version."""
    try:
        return set(json.loads(_record_file().read_text()))
    except (OSError, ValueError):
        return set()


def record_compiled(names: Iterable[str]) -> None:
    """Remember that these kernels are in the cache."""
    _record_file().write_text(json.dumps(sorted(compiled() | set(names))))


def _record_file() -> Path:
    return kernel_cache_dir(choose_isa()) / _RECORD


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        compile_kernel(wanted)
        print(wanted, flush=True)
