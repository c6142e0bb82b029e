"""Find out why torch computes on the CPU of a machine that has a GPU.

torch says no more than that no CUDA device is available, with one warning at most, where its build is for the CPU, for
another maker's GPUs, or for a CUDA that is newer than the driver. A model of 7B would then train for weeks.

Source of the drivers: the CUDA toolkit's release notes, minor version compatibility (CUDA 12: 525.60, 13: 580).
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

_KERNEL_MODULE = Path("/proc/driver/nvidia/version")
_DEVICES = Path("/dev")
_AMD_DEVICE = "kfd"
_OLDEST_DRIVER = {12: 525, 13: 580}  # by CUDA's major version
_HIDING = "CUDA_VISIBLE_DEVICES"  # that is empty or begins with -1 shows no GPU to a process: the CPU is meant
_BUILD = "choose CUDA {} at pytorch.org/get-started, which names the pip command"
MEANT = "set model.device to cpu if the CPU is meant"


def fault_of_cuda() -> str:
    """Say why an NVIDIA GPU of this machine is not used, and the cure; "" where there is none, or it is hidden."""
    if torch.cuda.is_available() or _is_hidden() or not (driver := _driver()) or _is_shut_out():
        return ""
    seen = f"this machine has an NVIDIA GPU (driver {driver})"
    built = f"and torch {torch.__version__} is built"
    if torch.version.cuda is None:
        return f"{seen}, {built} without CUDA: install a build with it ({_build(driver)})"
    needed = _OLDEST_DRIVER.get(int(torch.version.cuda.partition(".")[0]), 0)
    if _major(driver) < needed:
        return (
            f"{seen}, {built} for CUDA {torch.version.cuda}, which needs driver {needed} or later: update the "
            f"driver, or install a build for an earlier CUDA ({_build(driver)})"
        )
    return f"{seen}, but CUDA {torch.version.cuda} does not start; python -c 'import torch; torch.cuda.init()' says why"


def unsupported_gpu() -> str:
    """Say which GPU of this machine is left unused because it cannot be, and why; "" where there is none."""
    if torch.cuda.is_available() or _is_hidden():
        return ""
    if torch.backends.mps.is_available():
        return "Apple's GPU (mps) is not supported: neither the 4-bit layers' memory nor their kernels are known there"
    if torch.xpu.is_available():
        return "Intel's GPU (xpu) is not supported: memory is counted and limited by torch's CUDA allocator alone"
    if _driver() and _is_shut_out():
        return "this machine has an NVIDIA driver, but this process sees no GPU (start the container with --gpus all)"
    if (_DEVICES / _AMD_DEVICE).exists():
        build = f"finds none with ROCm {torch.version.hip}" if torch.version.hip else "is built without ROCm"
        return f"this machine may have an AMD GPU, and torch {torch.__version__} {build}"
    return ""


def _is_hidden() -> bool:
    shown = os.environ.get(_HIDING)
    return shown is not None and (not shown.strip() or shown.strip().startswith("-1"))


def _driver() -> str:
    """Return the version of NVIDIA's driver; "" where there is none, or nothing says so."""
    if _KERNEL_MODULE.exists():
        text = _KERNEL_MODULE.read_text(encoding="utf-8", errors="replace")
    elif program := shutil.which("nvidia-smi"):  # on Windows and WSL
        try:
            asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
            text = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return ""
    else:
        return ""
    found = re.search(r"\b\d{3,}\.\d[\d.]*", text)
    return found[0] if found else ""


def _is_shut_out() -> bool:
    """Return whether the kernel has the driver, and this process none of its devices: a container started without."""
    return _KERNEL_MODULE.exists() and not any(_DEVICES.glob("nvidia[0-9]*"))


def _major(driver: str) -> int:
    return int(driver.partition(".")[0])


def _build(driver: str) -> str:
    if _major(driver) >= _OLDEST_DRIVER[13]:
        return _BUILD.format(13)  # which newer GPUs need
    return _BUILD.format(12.6) + ("" if _major(driver) >= _OLDEST_DRIVER[12] else "; for it too, update the driver")
