"""bitsandbytes, imported without two things that its import would do: the package imports it from here alone.

- On a CPU with AVX512-BF16 it asks the package ``kernels``, where there is one, for a kernel from the hub, and runs it;
  where there is none, it warns on standard error. bitsandbytes' own library has the same product.
- It hands four functions in plain torch to torch.compile, which imports the whole compiler: 1 CPU second in every
  process, though a GPU and an ordinary CPU use but one of them, for optimizer states of small weights on a CPU. Its
  first step would then wait for a C++ compiler, where there is one, and its bits would depend on that.

Both it tries and does without, and so is made to: the two modules cannot be imported for as long as it takes. Read in
bitsandbytes 0.50.2 (backends/cpu/ops.py, backends/default/ops.py) and torch 2.11 to 2.13.
"""

import logging
import re
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_ASKING = "bitsandbytes.backends.cpu.ops"  # the logger that says that there is no package ``kernels``
_HIDDEN = "kernels", "torch._inductor.compiler_bisector"  # the second is the first that torch.compile imports


@contextmanager
def _plain() -> Iterator[None]:
    log, earlier = logging.getLogger(_ASKING), {name: sys.modules.get(name) for name in _HIDDEN}
    level = log.level
    log.setLevel(logging.ERROR)
    # None is Python's own way to say that there is no such module
    sys.modules.update(dict.fromkeys(_HIDDEN))  # type: ignore[arg-type]  # its types know of no None
    try:
        yield
    finally:
        log.setLevel(level)
        for name, module in earlier.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


with _plain():
    from bitsandbytes import functional, optim
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

__all__ = ["architectures", "functional", "has_native_library", "optim"]

# What a container of CUDA code begins with: magic, version and size of this header, and the size of what follows
_FATBIN = re.escape(struct.pack("<IHH", 0xBA55ED50, 1, 16)) + b"(.{8})"


def has_native_library() -> bool:
    """Return whether bitsandbytes found its compiled library, without which it computes in plain torch."""
    return not isinstance(lib, ErrorHandlerMockBNBNativeLibrary)


@cache
def architectures(library: str = "") -> tuple[str, ...]:
    """Return what GPUs a library has kernels for, as ``torch.cuda.get_arch_list`` does; on others they end the process.

    Read are the containers of CUDA code in the file, with entries of PTX (1) or machine code (2): sizes at 4 and 8, the
    architecture at 28. PTX beside a section for nvcc's linker is not in the linked code.

    Args:
        library: its path; "" is bitsandbytes' own.
    """
    path = Path(library or (lib._lib._name if has_native_library() else ""))
    data = path.read_bytes() if path.is_file() else b""
    kinds, found = {2: "sm"} if b"__nv_rel" in data else {1: "compute", 2: "sm"}, set()
    for container in re.finditer(_FATBIN, data, re.DOTALL):
        place, (size,) = container.end(), struct.unpack("<Q", container[1])
        end = min(place + size, len(data) - 32)
        while place < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, place)
            if kind in kinds:
                found.add((*struct.unpack_from("<I", data, place + 28), kinds[kind]))
            place += max(1, header + size)
    return tuple(f"{kind}_{number}" for number, kind in sorted(found))
