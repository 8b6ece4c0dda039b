"""The whole examination: every check, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from numoe.cluster.bandwidth import Progress, bandwidth
from numoe.cluster.plan import Plan, PlanOptions
from numoe.deploy.console import count
from numoe.deploy.doctor import gpu, memory, nodes, processor, services
from numoe.deploy.doctor.check import Check, Host, error, gb, ok, warning
from numoe.deploy.launch import place_model
from numoe.engine.errors import NumoeError


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What is asked for: a model, an address to listen on, a store as `serve` takes it, whether to measure again.

    no_path: why the kernels' path that NUMOE_ISA names cannot be taken, empty if it can.
    """

    model: str | None
    listen: str
    store: str | None
    store_endpoint: str | None
    measure: bool
    no_path: str = ""


def examine(host: Host, questions: Questions, progress: Progress | None = None) -> Iterator[Check]:
    """All checks; what none of them expected is an error of theirs, not the end."""
    plan, model = _plan(questions.model)
    endpoint = {} if questions.store_endpoint is None else {"endpoint": questions.store_endpoint}
    checks: dict[str, Callable[[], Check]] = {
        "processor": lambda: processor.check_processor(host),
        "kernels": lambda: processor.check_kernels(host, refused=questions.no_path),
        "cpuset": lambda: processor.check_cpuset(host),
        "cpu_time": lambda: processor.check_cpu_time(host),
        "governor": lambda: processor.check_governor(host),
        "nodes": lambda: nodes.check_nodes(host),
        "memory_channels": lambda: nodes.check_memory_channels(host),
        "bandwidth": lambda: _bandwidth(host, questions, progress),
        "binding": lambda: nodes.check_binding(host),
        "numa_balancing": lambda: nodes.check_balancing(host),
        "memory": lambda: memory.check_memory(host, plan),
        "shared_memory": lambda: memory.check_shared_memory(host, plan),
        "huge_pages": lambda: memory.check_huge_pages(host),
        "transparent_huge_pages": lambda: memory.check_transparent(host, plan),
        "memlock": lambda: memory.check_memlock(host, plan),
        "swap": lambda: memory.check_swap(host),
        "gpu": lambda: gpu.check_gpu(host),
        "gpu_copies": lambda: gpu.check_gpu_copies(host),
        "ray": services.check_ray,
        "port": lambda: services.check_port(questions.listen),
        "store": lambda: services.check_store(questions.store, **endpoint),
        "cache": services.check_cache,
    }
    for name, check in checks.items():
        try:
            yield check()
        except (NumoeError, OSError) as failed:
            yield error(name, str(failed), "report this: numoe did not expect it")
    yield model


def _bandwidth(host: Host, questions: Questions, progress: Progress | None) -> Check:
    try:
        found = bandwidth(host.topology, again=questions.measure, progress=progress)
    except NumoeError as refused:
        return warning("bandwidth", f"not measured: {refused}", "run `numoe doctor --measure` when memory is free")
    return nodes.check_bandwidth(host, found)


def _plan(path: str | None) -> tuple[Plan | None, Check]:
    """Where a model would lie with the usual options, and whether numoe can serve it at all."""
    if path is None:
        return None, ok("model", "none given: numoe doctor MODEL.gguf says whether it fits", path=None)
    try:
        with place_model(path, PlanOptions()) as (_, _, plan):
            pass
    except (NumoeError, OSError) as refused:
        return None, error("model", str(refused), "give a whole GGUF file; of a split model any part", path=path)
    values = {
        "path": plan.model,
        "shared_bytes": plan.shared_bytes,
        "attention_bytes": plan.attention_bytes,
        "shards": len(plan.shards),
        "gpu": plan.gpu.name if plan.gpu else None,
    }
    where = plan.gpu.name if plan.gpu else "memory"
    experts = gb(sum(shard.nbytes for shard in plan.shards))
    shards = f"{experts} of experts in {count(len(plan.shards), 'shard')}, " if plan.shards else ""
    text = f"{plan.model}: {shards}{gb(plan.attention_bytes)} of attention in {where}"
    short = memory.refusal("model", plan, text, values)
    return (None, short) if short else (plan, ok("model", text, **values))
