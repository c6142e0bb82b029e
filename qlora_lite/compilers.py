"""What torch builds code with while a model runs, and whether it is installed.

torch.compile builds with a C++ compiler for a processor, and by way of triton with a C compiler for a GPU. A few
products of torch 2.13 and later are triton's too, unless ``NO_TRITON`` is set before torch is imported
(torch/_native/common_utils.py).
"""

import os
import re
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

NO_TRITON = ("TORCH_DISABLE_NATIVE_JIT", "1")  # torch's own kernels in place of triton's
ROCM_ATTENTION = ("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL", "1")  # read in sdp_utils.cpp


def missing_for_compile(device_type: str) -> str:
    """Name what torch.compile needs for a device ("cpu" or "cuda") and does not find; "" is nothing."""
    if device_type == "cuda":
        return missing_for_triton()
    name = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return "" if shutil.which(name) else f"a C++ compiler ({name})"


def missing_for_triton() -> str:
    """Name what triton builds its kernels' launchers with (3.7, runtime/build.py) and does not find; "" is nothing."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["clang", "gcc"]
    if not any(map(shutil.which, names)):
        return f"a C compiler ({names[-1]})"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_path("include", scheme), "Python.h")
    return "" if header.exists() else "Python.h (python3-dev)"


def avoid_what_is_missing() -> None:
    """Have torch, which must not be imported yet, take its own kernels where triton could build none.

    And where it is built for ROCm, have it take its fused attention on GPUs that it calls experimental, too.
    """
    if missing_for_triton():
        os.environ.setdefault(*NO_TRITON)
    if _is_for_rocm():
        os.environ.setdefault(*ROCM_ATTENTION)


def _is_for_rocm() -> bool:
    """Check whether the torch that would be imported is built for ROCm."""
    found = find_spec("torch")
    file = Path(found.origin).with_name("version.py") if found and found.origin else None
    return bool(
        file and file.exists() and re.search(r"^hip\b.*= *['\"]", file.read_text(encoding="utf-8"), re.MULTILINE)
    )
