"""Record what the step is doing, for whoever watches its memory.

The training code marks its phases and the few places where tensors of a known kind are born; a ``Ledger``
reads the marks. They cost an assignment when nobody watches. They are the process's, not the thread's,
because autograd runs backward on threads of its own on CUDA.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class _Marks:
    phase = "load"
    category = "workspace"
    repeats = 1  # how many times over what runs now counts as work
    kinds = 1  # how many shapes each shape of what runs now stands for
    is_once_a_step = False  # what runs now does so once a step, however many its micro-batches are
    clock: Callable[[], None] | None = None  # called between phases while ``timing`` is active


marks = _Marks()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark a phase: load, forward, backward, optimizer or evaluation."""
    earlier = _change_phase(name)
    try:
        yield
    finally:
        _change_phase(earlier)


def _change_phase(name: str) -> str:
    if marks.clock is not None:
        marks.clock()
    earlier, marks.phase = marks.phase, name
    return earlier


@contextmanager
def timing(device: torch.device) -> Iterator[dict[str, float]]:
    """Add up the seconds of each phase into the dict given; what is outside of phases counts as "other"."""
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def clock() -> None:
        nonlocal last
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now, name = time.perf_counter(), "other" if marks.phase == "load" else marks.phase
        seconds[name] = seconds.get(name, 0.0) + now - last
        last = now

    marks.clock = clock
    try:
        yield seconds
        clock()
    finally:
        marks.clock = None


@contextmanager
def repeated(times: int, kinds: int = 1) -> Iterator[None]:
    """Count the work inside ``times`` times (a plan leaves out what would only be repeated), and
    each product's shape for so many ``kinds`` of shapes."""
    earlier = marks.repeats, marks.kinds
    marks.repeats, marks.kinds = marks.repeats * times, marks.kinds * kinds
    try:
        yield
    finally:
        marks.repeats, marks.kinds = earlier


@contextmanager
def once_a_step() -> Iterator[None]:
    """Count the work inside once a step, and not once a micro-batch."""
    earlier, marks.is_once_a_step = marks.is_once_a_step, True
    try:
        yield
    finally:
        marks.is_once_a_step = earlier


@contextmanager
def category(name: str) -> Iterator[None]:
    """Mark the category of the tensors that are born inside, until a later mark or hook gives them another."""
    earlier, marks.category = marks.category, name
    try:
        yield
    finally:
        marks.category = earlier
