"""Send metrics to experiment trackers, through accelerate.

A tracker that fails, as one does whose server is away, ends no training: a warning, and it is sent nothing more.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qlora_lite.files import refuse_link

log = logging.getLogger("qlora_lite")
_OWN = (("mlflow.exceptions", "MlflowException"), ("wandb.errors", "Error"))  # which are no kind of the others


def failures() -> tuple[type[Exception], ...]:
    """Return what a network, a disk and the trackers that are loaded raise."""
    own = [getattr(sys.modules[module], name) for module, name in _OWN if module in sys.modules]
    return (OSError, RuntimeError, ValueError, *own)


@contextmanager
def tracking(trackers: Sequence[str], name: str, folder: Path) -> Iterator[Callable[[dict, int], None]]:
    """Give a function that sends a step's metrics to the trackers named.

    Args:
        name: of the run.
        folder: where those that write files write them, in a folder called after the run or after themselves.

    Raises:
        OutputError: that is a symbolic link, through which they would write elsewhere.
    """
    if not trackers:
        yield lambda _values, _step: None
        return
    for own in (name, *trackers):
        refuse_link(folder / own)
    from accelerate import Accelerator

    works, begun = True, []
    try:
        accelerator = Accelerator(log_with=list(trackers), project_dir=folder)
        accelerator.init_trackers(name)
        begun = accelerator.trackers
    except failures() as error:  # an account or a server that is not there
        works = False
        log.warning("%s cannot begin (%s); no metrics are sent", ", ".join(trackers), error)

    def send(values: dict, step: int) -> None:
        nonlocal works
        if not works:
            return
        try:
            accelerator.log(values, step=step)
        except failures() as error:
            works = False
            log.warning("step %d: %s takes no metrics (%s); it is sent no more", step, ", ".join(trackers), error)

    try:
        yield send
    finally:
        try:
            for tracker in begun:  # end_training would also end the group of processes
                tracker.finish()
        except failures() as error:
            log.warning("%s did not end well (%s)", ", ".join(trackers), error)
