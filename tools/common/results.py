"""Write what a benchmark measured, and on which machine and versions, to tools/results/NAME.json."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qlora_lite.files import write_text

RESULTS = Path(__file__).resolve().parents[1] / "results"
PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "numpy")
OTHERS = ("peft", "triton", "liger_kernel", "cut_cross_entropy")  # what is compared with, or compiles; if installed
UNKNOWN = "unknown"


def write_result(name: str, payload: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a benchmark's figures; an earlier result of the same name is replaced.

    Args:
        name: the file's stem.
        payload: anything JSON can hold; the keys "date", "machine" and "versions" are added where it has none.
        folder: where, if it is not for tools/results.

    Returns:
        The file written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    result = {
        "date": now(),
        "machine": machine(),
        "versions": versions(),
        **payload,
    }
    write_text(path, json.dumps(result, indent=2) + "\n")
    return path


def earlier(name: str, key: str, shape: dict[str, Any], folder: Path = RESULTS) -> dict[str, Any]:
    """Return what a result has under a key already, if it is of the same shape; nothing otherwise.

    Args:
        shape: what else must stand in it.
    """
    path = folder / f"{name}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return known[key] if shape.items() <= known.items() else {}


def today() -> dict[str, str]:
    """Return the processor and the date, for a part of a result that is measured by itself."""
    return {"processor": machine()["cpu"], "date": datetime.now(UTC).strftime("%Y-%m-%d")}


def now() -> str:
    """Return the date and time of a result."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def versions() -> dict[str, str]:
    """Return the versions of Python and of packages that figures depend on."""
    others = {name: _version(name) for name in OTHERS}
    return (
        {"python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES}
        | {k: v for k, v in others.items() if v != UNKNOWN}
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # modules on PYTHONPATH without their metadata
        return UNKNOWN


def machine() -> dict[str, Any]:
    """Return the processor, its cores and load, the memory in bytes, and the GPU or None."""
    import torch  # here, since most tools need it in the processes that they start alone

    has_gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 1),  # above the number of cores in use: others were at work
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory if has_gpu else None,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
