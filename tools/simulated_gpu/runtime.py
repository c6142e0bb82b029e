"""Build runtime.c, a CUDA GPU that computes nothing, and give the environment in which torch finds it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parent / "runtime.c"
LIBRARY = "CARD_LIBRARY"  # the variable that names the built library: it is set where the GPU is there
GIB = 2**30


class Counts(NamedTuple):
    """What a process has asked of the GPU so far: kernels, waits of the host, allocations there and pinned ones.

    ``managed_bytes`` are those of unified memory, such as paged optimizer states, which are never given back.
    """

    launches: int
    waits: int
    allocations: int
    pinned: int
    managed_bytes: int


def counts() -> Counts:
    """Return the counts of this process, which has the GPU preloaded."""
    found = (ctypes.c_long * len(Counts._fields))()
    ctypes.CDLL(os.environ[LIBRARY]).card_counts(found)
    return Counts(*found)


def card_environment(folder: Path, gib: int) -> dict[str, str]:
    """Build the GPU into a folder; return the environment of a process that has it.

    Args:
        folder: where the library is written.
        gib: memory of the GPU.

    Raises:
        FileNotFoundError: torch is built without CUDA, or its libraries lie elsewhere than in its wheels.
        subprocess.CalledProcessError: there is no C compiler, or it failed.
    """
    libraries, includes = _users(), _includes()
    needed = {name for library in libraries for name in _undefined(library)}
    needed |= {name.decode() for name in re.findall(rb"nvml[A-Z]\w+", libraries[1].read_bytes())}  # asked for by name
    triton = _package("triton") / "backends/nvidia/driver.c"  # torch has kernels of its own in it; compiled when needed
    needed |= set(re.findall(r"\bcu[A-Z][a-z]\w+", triton.read_text("utf-8")))
    library = folder / "libcuda.so.1"  # the name by which torch looks for the driver
    compiler = ["cc", "-shared", "-fPIC", "-O1", "-w", *(f"-I{path}" for path in includes), str(SOURCE)]
    subprocess.run([*compiler, "-o", str(library)], check=True)
    rest = folder / "rest.c"
    missing = sorted(needed - _names(["nm", "-D", "--defined-only", str(library)]))
    rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
    subprocess.run([*compiler, str(rest), "-o", str(library)], check=True)
    (folder / "libnvidia-ml.so.1").symlink_to(library)  # torch asks that one too whether there are links to other GPUs
    return {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(folder),
        LIBRARY: str(library),
        "CARD_BYTES": str(gib * GIB),
    }


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{name} is not installed")
    return Path(spec.submodule_search_locations[0])


def _users() -> list[Path]:
    """Return the libraries that call the CUDA runtime and cuBLAS."""
    torch_libraries = _package("torch") / "lib"
    names = ("torch_cuda", "c10_cuda", "torch_python", "torch_cuda_linalg", "caffe2_nvrtc")
    found = [torch_libraries / f"lib{name}.so" for name in names]
    if not found[0].exists():
        raise FileNotFoundError("this torch is built without CUDA")
    return [*found, *_package("bitsandbytes").glob("libbitsandbytes_cuda13*.so")]


def _includes() -> list[Path]:
    """Return the folders of CUDA's headers; part of them come with triton only."""
    headers = next(_package("nvidia").glob("cu1*/include/cuda_runtime_api.h"), None)
    if headers is None:
        raise FileNotFoundError("CUDA's headers are not in nvidia's packages")
    return [headers.parent, _package("triton") / "backends/nvidia/include"]


def _undefined(library: Path) -> set[str]:
    return {name for name in _names(["nm", "-D", "--undefined-only", str(library)]) if re.match("cu|__cuda", name)}


def _names(command: list[str]) -> set[str]:
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}
