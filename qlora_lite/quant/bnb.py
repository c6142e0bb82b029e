"""bitsandbytes, and its import without what that would fetch: the package imports it from here alone.

On a CPU with AVX512-BF16 the import itself asks the package ``kernels``, where there is one, for a kernel from the hub,
and runs it; where there is none, it warns on standard error (read in 0.50.2, backends/cpu/ops.py). bitsandbytes' own
library has the same product. So ``kernels`` cannot be imported for as long as this takes.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_ASKING = "bitsandbytes.backends.cpu.ops"  # the module, and its logger
_HUB_PACKAGE = "kernels"


@contextmanager
def _without_hub_kernels() -> Iterator[None]:
    log, earlier = logging.getLogger(_ASKING), sys.modules.get(_HUB_PACKAGE)
    level = log.level
    log.setLevel(logging.ERROR)
    sys.modules[_HUB_PACKAGE] = None  # Python's own way to say that there is no such module
    try:
        yield
    finally:
        log.setLevel(level)
        del sys.modules[_HUB_PACKAGE]
        if earlier is not None:
            sys.modules[_HUB_PACKAGE] = earlier


with _without_hub_kernels():
    from bitsandbytes import functional, optim
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

__all__ = ["functional", "has_native_library", "optim"]


def has_native_library() -> bool:
    """Return whether bitsandbytes found its compiled library, without which it computes in plain torch."""
    return not isinstance(lib, ErrorHandlerMockBNBNativeLibrary)
