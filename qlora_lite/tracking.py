"""Send metrics to experiment trackers, through accelerate."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def tracking(trackers: Sequence[str], name: str, folder: Path) -> Iterator[Callable[[dict, int], None]]:
    """Give a function that sends a step's metrics to the trackers named.

    Args:
        name: of the run.
        folder: where those that write files write them.
    """
    if not trackers:
        yield lambda _values, _step: None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(trackers), project_dir=folder)
    accelerator.init_trackers(name)
    try:
        yield lambda values, step: accelerator.log(values, step=step)
    finally:
        accelerator.end_training()
