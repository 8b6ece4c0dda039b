"""FastLLM (package ftllm): a GGUF model as a whole, and the time of each call of its expert operator.

Python's bindings reach the model, not the operators. So the entry of `fastllm::CpuMergeMOE` (gate, up,
SwiGLU, down and sum of one layer) in the library's table of virtual functions is replaced by one that
takes the time and calls it. The automatic warm-up is left out: it reads thousands of tokens with an attention that
takes minutes on a CPU.

The thread that calls operators spins beside the workers: with as many workers as processors everything waits for
the scheduler's slices of milliseconds, so one less is faster.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from ftllm import llm

from peers.job import Job, Result

_TABLE, _RUN = "_ZTVN7fastllm11CpuMergeMOEE", b"_ZN7fastllm11CpuMergeMOE3RunE"
_SLOTS = 12
_FUNCTION = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 5)
_POLL_S = 0.001
_SHORT_PROMPT = 2
_DONE = -1


class _Symbol(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def time_calls(library: Any) -> tuple[list[float], Callable[..., None]]:
    """The seconds of each call of the expert operator from now on, and what must be kept alive for it."""
    libc = ctypes.CDLL(None)
    table = ctypes.addressof(ctypes.c_char.in_dll(library, _TABLE))
    slots, symbol = (ctypes.c_void_p * _SLOTS).from_address(table), _Symbol()
    for slot in range(_SLOTS):
        if slots[slot] and libc.dladdr(ctypes.c_void_p(slots[slot]), ctypes.byref(symbol)) and symbol.name:  # noqa: SIM102
            if symbol.name.startswith(_RUN):
                break
    else:
        raise SystemExit("this ftllm has another table of virtual functions: the expert operator is not found")
    taken, original = list[float](), _FUNCTION(slots[slot])

    def timed(*args: int) -> None:
        start = time.perf_counter()
        original(*args)
        taken.append(time.perf_counter() - start)

    replacement = _FUNCTION(timed)
    page = (table + 8 * slot) // mmap.PAGESIZE * mmap.PAGESIZE
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(2 * mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE):
        raise SystemExit("the table of virtual functions cannot be made writable")
    slots[slot] = ctypes.cast(replacement, ctypes.c_void_p).value
    return taken, replacement


def generate(model: Any, prompt: list[int], answer: int) -> list[float]:
    """Seconds from the start until each token of the answer was there."""
    library, buffer = llm.fastllm_lib, (ctypes.c_int * len(prompt))(*prompt)
    stops = model.stop_token_ctypes(None)
    start, times = time.perf_counter(), list[float]()
    handle = library.launch_response_llm_model(
        model.model, len(prompt), buffer, ctypes.c_int(answer), ctypes.c_int(answer), ctypes.c_bool(0),
        ctypes.c_float(1), ctypes.c_int(1), ctypes.c_float(1), ctypes.c_float(1), ctypes.c_bool(0), *stops,
    )  # fmt: skip
    while True:
        # Fetching spins; this sleeps.
        while not library.can_fetch_response_llm_model(model.model, handle):
            time.sleep(_POLL_S)
        if library.fetch_response_llm_model(model.model, handle) <= _DONE:
            return times
        times.append(time.perf_counter() - start)


def measure(job: Job) -> Result:
    """Decode behind a short prompt, then a long prompt; the first requests let it lay out its weights."""
    llm.set_device_map("cpu")
    llm.set_device_map("cpu", is_moe=True)
    llm.set_cpu_threads(job.workers)
    taken, _keep = time_calls(llm.fastllm_lib)
    model = llm.model(job.model)
    generate(model, job.tokens(_SHORT_PROMPT), 2)
    taken.clear()
    answer = generate(model, job.tokens(_SHORT_PROMPT), job.answer + 1)
    one_row = median(taken[job.layers :])
    taken.clear()
    prompt = generate(model, job.tokens(job.prompt), 1)
    return Result(
        decode=(len(answer) - 1) / (answer[-1] - answer[0]),
        prefill=job.prompt / prompt[0],
        one_row_us=1e6 * one_row,
        many_rows_ms=1e3 * median(taken[: job.layers]),
    )


if __name__ == "__main__":
    measure(Job.from_command_line()).print()
    os._exit(0)  # its threads do not end
