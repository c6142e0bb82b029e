"""Say what the step is doing, for whoever watches its memory.

The training code marks its phases and the few places where tensors of a known kind are born; a ``Ledger``
reads the marks. They cost an assignment when nobody watches. They are the process's, not the thread's,
because autograd runs backward on threads of its own on CUDA.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class _Marks:
    phase = "load"
    category = "workspace"


marks = _Marks()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark a phase: load, forward, backward, optimizer or evaluation."""
    earlier, marks.phase = marks.phase, name
    try:
        yield
    finally:
        marks.phase = earlier


@contextmanager
def category(name: str) -> Iterator[None]:
    """Mark the category of the tensors that are born inside, until a later mark or hook gives them another."""
    earlier, marks.category = marks.category, name
    try:
        yield
    finally:
        marks.category = earlier
