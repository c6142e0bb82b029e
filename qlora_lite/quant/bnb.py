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
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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

__all__ = ["functional", "has_native_library", "optim"]


def has_native_library() -> bool:
    """Return whether bitsandbytes found its compiled library, without which it computes in plain torch."""
    return not isinstance(lib, ErrorHandlerMockBNBNativeLibrary)
