"""The GPU: whether attention can run there, how it is attached, and how fast it copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numoe.deploy.doctor.check import Check, Host, error, gb, ok, warning
from numoe.engine.errors import NumoeError
from numoe.engine.gpu.copies import HostCopies, ask_copies
from numoe.engine.gpu.device import Device, find_gpu

_CUDA_13 = 580
"""The oldest driver for CUDA 13."""
_UNEVEN = 1.2

FindGpu = Callable[[str], Device | None]
AskCopies = Callable[[Sequence[int]], list[HostCopies]]


def check_gpu(host: Host, find: FindGpu = find_gpu) -> Check:
    """The GPUs, the driver, and whether CuPy can use one."""
    topology, driver = host.topology, host.topology.gpu_driver
    values: dict[str, Any] = {
        "driver": driver,
        "gpus": [
            {
                "address": gpu.address,
                "name": gpu.name,
                "numa_node": gpu.numa_node,
                "link_width": gpu.link_width,
                "max_link_width": gpu.max_link_width,
            }
            for gpu in topology.gpus
        ],
        "device": None,
    }
    if not topology.gpus and driver is None:
        return ok("gpu", "none: attention runs on the CPUs", **values)
    names = ", ".join(_place(gpu.name or "NVIDIA GPU", gpu.address, gpu.numa_node) for gpu in topology.gpus)
    if driver is None:
        cure = "install NVIDIA's driver (in a container --gpus all)"
        return warning("gpu", f"{names}, but no driver", cure, **values)
    text = f"{names or 'no GPU on the PCI bus that can be seen'}, driver {driver}"
    try:
        device = find("gpu")
    except NumoeError as refused:
        reason = str(refused).removeprefix("--device gpu: ")
        cure = "see nvidia-smi: is the driver loaded, and as new as the CUDA of CuPy?"
        if "CuPy is not installed" in reason:
            cure = f"pip install 'numoe[{_extra(driver)}]'"
        return warning("gpu", f"{text}: cannot be used, attention runs on the CPUs ({reason})", cure, **values)
    assert device is not None  # asked for a GPU, there is one or an error
    values["device"] = {
        "name": device.name,
        "capability": ".".join(map(str, device.capability)),
        "memory_bytes": device.memory_bytes,
        "free_bytes": device.free_bytes,
    }
    text = f"{text}; {device.name} with {gb(device.free_bytes)} of {gb(device.memory_bytes)} free"
    narrow = [gpu for gpu in topology.gpus if gpu.link_width and gpu.link_width < (gpu.max_link_width or 0)]
    if narrow:
        text = f"{text}; {narrow[0].address} has {narrow[0].link_width} of {narrow[0].max_link_width} PCIe lanes"
        cure = "put it into a slot with all lanes, without a riser: weights are streamed over them"
        return warning("gpu", text, cure, **values)
    return ok("gpu", text, **values)


def check_gpu_copies(host: Host, find: FindGpu = find_gpu, ask: AskCopies = ask_copies) -> Check:
    """Copies within the GPU's memory, and to and from the memory of each node."""
    values: dict[str, Any] = {"device_gb_s": None, "host": []}
    device = find("auto")
    if device is None:
        return ok("gpu_copies", "no GPU that can be used", **values)
    nodes = [node.id for node in host.topology.nodes if node.has_memory]
    try:
        copies = ask(nodes)
    except NumoeError as refused:
        cure = "the GPU must be able to pin the experts' memory: see memlock"
        return error("gpu_copies", str(refused), cure, **values)
    values = {
        "device_gb_s": round(device.copy_bytes_s / 2e9, 1),
        "host": [
            {"node": c.node, "to_gpu_gb_s": round(c.to_gpu / 1e9, 1), "from_gpu_gb_s": round(c.from_gpu / 1e9, 1)}
            for c in copies
        ],
    }
    rates = "; ".join(f"node {c.node}: {c.to_gpu / 1e9:.1f} to the GPU, {c.from_gpu / 1e9:.1f} back" for c in copies)
    text = f"GB/s copied: {device.copy_bytes_s / 2e9:.0f} within the GPU; {rates}"
    near = {gpu.numa_node for gpu in host.topology.gpus} - {None}
    local = [c.to_gpu for c in copies if c.node in near]
    if local and max(c.to_gpu for c in copies) > _UNEVEN * max(local):
        cure = "the firmware's word on the GPU's nearest node looks wrong: see its PCIe settings"
        return warning("gpu_copies", f"{text}: the nearest node is not the fastest", cure, **values)
    return ok("gpu_copies", text, **values)


def _place(name: str, address: str, node: int | None) -> str:
    return f"{name} at {address} near {'no node that is told' if node is None else f'node {node}'}"


def _extra(driver: str) -> str:
    """The extra of numoe whose CUDA the driver supports."""
    major = driver.partition(".")[0]
    return "cuda13" if major.isdigit() and int(major) >= _CUDA_13 else "cuda12"
