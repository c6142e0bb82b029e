"""Send metrics to experiment trackers, through accelerate."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import RecipeError


def check_trackers(trackers: Sequence[str]) -> None:
    """Check that the packages of trackers are there: accelerate leaves out those that are not, without a word.

    Raises:
        RecipeError: one is not installed.
    """
    if not trackers:
        return
    from accelerate.tracking import get_available_trackers

    missing = sorted(set(trackers) - set(map(str, get_available_trackers())))
    if missing:
        raise RecipeError(f"train.trackers: {', '.join(missing)} is not installed; pip install it, or leave it out")


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
