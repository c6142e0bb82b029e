"""Write a summary of what a benchmark measured, on which machine and versions, to tools/results/NAME.json."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qlora_lite.files import write_text

RESULTS = Path(__file__).resolve().parents[1] / "results"
PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "numpy")
OTHERS = ("peft", "triton", "liger_kernel", "cut_cross_entropy")  # what is compared with, or compiles; if installed
UNKNOWN = "unknown"
MOST_NUMBERS = 10  # of a list that a result keeps
SHORT, LONG = 300, 1200  # characters of what stays on one line: of a part of a result, and inside of one


def write_result(
    name: str, payload: dict[str, Any], folder: Path = RESULTS, raw: frozenset[str] | set[str] = frozenset()
) -> Path:
    """Write a summary of a benchmark's figures, a table's row on each line; an earlier result is replaced.

    Args:
        name: the file's stem.
        payload: anything JSON can hold; the keys "date", "machine" and "versions" are added where it has none.
        folder: where, if it is not for tools/results.
        raw: keys, at any depth, of what a summary leaves out.

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
    write_text(path, as_text(summary(result, raw)) + "\n")
    return path


def summary(value: Any, raw: frozenset[str] | set[str] = frozenset()) -> Any:
    """Return what a result keeps: floats of nine digits, the spread of many numbers in their place, no raw keys."""
    if isinstance(value, dict):
        return {key: summary(each, raw) for key, each in value.items() if key not in raw}
    if isinstance(value, list | tuple):
        many = len(value) > MOST_NUMBERS and all(isinstance(each, int | float) for each in value)
        return summary(spread(value)) if many else [summary(each, raw) for each in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return how many numbers there are, and their range and median."""
    return {"n": len(values), "lowest": min(values), "median": statistics.median(values), "highest": max(values)}


def spread_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the spread of each number over the rows of equal runs."""
    numbers = [key for key in rows[0] if all(isinstance(row.get(key), int | float) for row in rows)]
    return {key: spread([row[key] for row in rows]) for key in numbers}


def as_text(value: Any, depth: int = 0) -> str:
    """Return JSON in which a row of a table, and whatever is short, stands on one line."""
    line, inner = json.dumps(value), "  " * (depth + 1)
    if depth and (len(line) <= (SHORT if depth == 1 else LONG) or not _has_rows(value)):
        return line
    if isinstance(value, list):
        parts = [as_text(each, depth + 1) for each in value]
        return "[\n" + ",\n".join(inner + part for part in parts) + f"\n{inner[2:]}]"
    text = ""
    for key, each in value.items():
        begins_line = not _is_plain(each) if depth else isinstance(each, dict | list)
        if text:
            text += f",\n{inner}" if begins_line else ", "
        text += f"{json.dumps(key)}: {as_text(each, depth + 1)}"
    return f"{{{text}}}" if depth else f"{{\n{inner}{text}\n}}"


def _is_plain(value: Any) -> bool:
    return not isinstance(value, dict | list) or not any(isinstance(each, dict | list) for each in _values(value))


def _has_rows(value: Any) -> bool:
    """Return whether a list of rows, or rows by name, are in it."""
    if not isinstance(value, dict | list):
        return False
    inside = _values(value)
    return bool(inside) and (
        all(isinstance(each, dict | list) for each in inside)
        or any(isinstance(each, list) and not _is_plain(each) for each in inside)
        or any(isinstance(each, dict) and not all(map(_is_plain, each.values())) for each in inside)
    )


def _values(value: dict | list) -> list:
    return list(value.values()) if isinstance(value, dict) else value


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
