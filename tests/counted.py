"""Count the work of what a test runs."""

from contextlib import contextmanager

from qlora_lite.memory.ledger import Ledger
from qlora_lite.memory.work import WorkCounter


@contextmanager
def counted():
    """Give a counter of the work of all operations inside."""
    counter = WorkCounter()
    with Ledger(work=counter):
        yield counter
