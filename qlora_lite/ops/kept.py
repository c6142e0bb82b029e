"""Results that a checkpointed block keeps, instead of computing them again in backward.

A checkpoint computes everything twice. Some results are cheap to keep for what they cost: attention's is one
hidden-sized tensor, and the dearest of a block per byte on a CPU. ``keep_results`` is the ``context_fn`` of
``torch.utils.checkpoint``; inside such a block a function asks ``kept_result`` for its result of the first
run. torch's selective checkpointing does the same for operators, through a dispatch mode that every operator
of the block then passes: dearer here than what it would save.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch

_record: ContextVar[list | None] = ContextVar("record", default=None)  # set in the first run of a block
_replay: ContextVar[Iterator | None] = ContextVar("replay", default=None)  # set in its second run


def keep_results() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts of a checkpointed block's first and second run."""
    kept = []
    return _setting(_record, lambda: kept), _setting(_replay, lambda: iter(kept))


def kept_result(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return what ``compute()`` gives, from the first run if this is the second run of a block that keeps results."""
    replay, record = _replay.get(), _record.get()
    result = compute() if replay is None else next(replay)
    if record is not None:
        record.append(result)
    return result


@contextmanager
def _setting(variable: ContextVar, make: Callable):
    token = variable.set(make())
    try:
        yield
    finally:
        variable.reset(token)
