"""Examine the machine: versions, devices, and what will be slow here and why."""

import importlib.util
import platform
import shutil

import psutil
import torch

from qlora_lite.artifacts.run_folder import package_versions
from qlora_lite.compilers import NO_TRITON, missing_for_triton
from qlora_lite.files import cache_root
from qlora_lite.kernels.fused_attention import kernel_of_gpu
from qlora_lite.memory.process import segments_grow
from qlora_lite.models.load import fast_dtype, missing_kernels, resolve_device
from qlora_lite.models.unused_gpu import fault_of_cuda, unsupported_gpu
from qlora_lite.quant.bnb import has_native_library
from qlora_lite.train.optim import can_page
from qlora_lite.units import counted, format_bytes


def examine() -> dict:
    """Return ``versions``, ``machine`` facts and ``notes``: one sentence each on what is slow or missing."""
    too_old = torch.cuda.is_available() and missing_kernels(torch.device("cuda", torch.cuda.current_device()))
    fault = too_old or fault_of_cuda()
    device = torch.device("cpu") if fault else resolve_device("auto")
    machine = {
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, {counted(torch.get_num_threads(), 'thread')}, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "memory": format_bytes(psutil.virtual_memory().total),
        "gpu": _gpu(),
        "cuda": _build(),
        "fast_bfloat16": fast_dtype(device) == torch.bfloat16,
        "attention": (None if fault else kernel_of_gpu(fast_dtype(device))) or "torch's CPU kernels",
        "bitsandbytes_backend": _backend(device),
        "cache": f"{cache_root()} ({_free(cache_root())} free)",
    }
    return {"versions": package_versions(), "machine": machine, "notes": [fault] * bool(fault) + _notes(device)}


def _build() -> str | None:
    if torch.version.hip:
        return f"torch is built for ROCm {torch.version.hip}"
    return torch.version.cuda and f"torch is built for CUDA {torch.version.cuda}"


def _gpu() -> str | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info()
    return f"{properties.name}, {format_bytes(free)} of {format_bytes(total)} free"


def _backend(device: torch.device) -> str:
    return f"{device.type}, {'native library' if has_native_library() else 'plain torch (no native library)'}"


def _free(path) -> str:
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    return format_bytes(shutil.disk_usage(existing).free)


def _notes(device: torch.device) -> list[str]:
    notes = []
    if device.type == "cpu":
        notes.append("no CUDA GPU is usable: training runs on the CPU; choose a small model")
        if unused := unsupported_gpu():
            notes.append(unused)
    if torch.version.hip:
        notes.append("AMD GPUs are used like CUDA GPUs, unverified: nobody has tried this package on ROCm")
    if (dtype := fast_dtype(device)) != torch.bfloat16:
        fallback = str(dtype).removeprefix("torch.")
        notes.append(f"this device has no fast bfloat16: the compute type falls back to {fallback}")
    if device.type == "cuda" and not segments_grow():
        notes.append(
            "torch's CUDA allocator has segments of fixed size here (Windows, WSL, ROCm before 7, a Tegra, a slice of "
            "a GPU, or PYTORCH_ALLOC_CONF): plans leave more room for fragmentation; where torch supports it, "
            "PYTORCH_ALLOC_CONF=expandable_segments:True makes them expandable"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") and (missing := missing_for_triton()):
        notes.append(
            f"triton needs {missing} for train.compile, the fused kernel of 4-bit experts (memory.kernels), and a few "
            "products of torch 2.13 and later: install it, or "
            f"leave train.compile off (in Python, set {'='.join(NO_TRITON)} too, before torch is imported)"
        )
    if not can_page(device):
        notes.append("paged optimizers are ordinary ones here: no GPU that can page their states was found")
    if "plain torch" in _backend(device):
        notes.append("bitsandbytes has no native library here: 4-bit layers run in plain torch, many times slower")
    return notes
