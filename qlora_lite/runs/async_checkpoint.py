"""When checkpoints are written, and by whom: a thread of its own, so that training goes on meanwhile.

Training waits only until its state is copied to host memory, or for the checkpoint before, if that is still being
written: there is never more than one on its way. A whole model is not copied, which would take its memory once more:
training waits until it is written. A checkpoint that cannot be written does not end a run; it is said,
the ones before it stay, and the next interval tries again.
"""

import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from qlora_lite.errors import OutputError, first_line
from qlora_lite.files import Space
from qlora_lite.train.checkpoints import CHECKPOINTS, Checkpoint, keep_only, steps_on_disk, write_checkpoint
from qlora_lite.train.out_of_memory import is_out_of_memory
from qlora_lite.units import format_bytes

log = logging.getLogger("qlora_lite")


class Saver:
    """Write checkpoints when they are due; use as a context manager, which waits for the last one.

    Args:
        root: the folder of checkpoints.
        every_steps: steps between two, 0 for none by steps.
        every_minutes: minutes between two, 0 for none by time.
        keep: how many of the newest stay.
        prepare: called before each is written, in the thread that writes; an OutputError there counts as its own.
        versions: see ``write_checkpoint``, as is the next.
        recipe_hash: of the run's recipe.
        whole_step: the step of the newest checkpoint known to be whole, None if there is none.
    """

    def __init__(
        self,
        root: Path,
        every_steps: int,
        every_minutes: float,
        keep: int,
        prepare: Callable[[], None],
        versions: dict[str, str],
        recipe_hash: str,
        whole_step: int | None = None,
    ):
        self._root, self._every_steps, self._every_seconds = root, every_steps, 60 * every_minutes
        self._keep, self._prepare, self._about = keep, prepare, (versions, recipe_hash)
        self._steps = [step for step in reversed(steps_on_disk(root)) if whole_step is not None and step <= whole_step]
        self._thread = ThreadPoolExecutor(1, "checkpoint-writer")
        self._pending: Future | None = None
        self._pending_step = 0
        self._last_try = time.monotonic()
        self.failure: str | None = None

    @property
    def newest_step(self) -> int | None:
        """The step of the newest checkpoint that is on disk."""
        return self._steps[-1] if self._steps else None

    def due(self, step: int) -> bool:
        """Return whether a checkpoint should be written after a step."""
        self._collect(wait=False)
        by_time = self._every_seconds and time.monotonic() - self._last_try >= self._every_seconds
        return bool(by_time or (self._every_steps and step % self._every_steps == 0))

    def save(self, step: int, capture: Callable[[], Checkpoint], copies: bool = True) -> None:
        """Begin to write a checkpoint, unless that of this step is there; a failure is logged, now or later.

        Args:
            capture: copies the state to host memory; an OutputError there, or memory that runs out, is a failure like
                one of the disk.
            copies: False if it copies nothing: then the checkpoint is written before this returns.
        """
        self.wait()
        self._last_try = time.monotonic()
        if step == self.newest_step:
            return
        try:
            checkpoint = capture()
        except (OutputError, RuntimeError, MemoryError) as error:
            self._note_failure(step, error)
        else:
            self._pending_step = step
            self._pending = self._thread.submit(self._write, checkpoint)
            if not copies:
                self.wait()

    def _write(self, checkpoint: Checkpoint) -> None:
        self._prepare()
        write_checkpoint(self._root, checkpoint, *self._about)
        keep_only(self._root, [*self._steps, checkpoint.step][-self._keep :])

    def wait(self) -> None:
        """Wait until nothing is being written."""
        self._collect(wait=True)

    def _collect(self, wait: bool) -> None:
        """Take note of how the writing of the last one ended, if it has."""
        if self._pending is None or not (wait or self._pending.done()):
            return
        try:
            self._pending.result()  # a signal may cut it: it is still pending then
        except (OutputError, RuntimeError, MemoryError) as error:
            self._pending = None
            self._note_failure(self._pending_step, error)
        else:
            self._steps = [*self._steps, self._pending_step][-self._keep :]
            self._pending = self.failure = None
            log.info("step %d: checkpoint written", self._pending_step)

    def _note_failure(self, step: int, error: Exception) -> None:
        if is_out_of_memory(error):
            self.failure = f"there is no memory for it ({first_line(error)})"
        elif isinstance(error, OutputError):
            self.failure = str(error)
        else:
            raise error
        log.warning(
            "step %d: no checkpoint was written: %s. Training goes on and tries again with the next", step, self.failure
        )

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_error) -> None:
        self.wait()
        self._thread.shutdown()


def check_space(folder: Path, space: Space) -> None:
    """Compare what a run will write into its folder with the free space of its disk, before it begins.

    Raises:
        OutputError: not even one checkpoint and the adapter would fit.
    """
    least = space.checkpoint_bytes + 2 * space.adapter_bytes
    whole = space.whole_bytes(len(steps_on_disk(folder / CHECKPOINTS)))
    free = shutil.disk_usage(folder).free
    if free >= whole:
        return
    text = (
        f"the disk of {folder} has {format_bytes(free)} free; this run needs {format_bytes(whole)} for checkpoints of "
        f"{format_bytes(space.checkpoint_bytes)} and its adapters"
    )
    if free < least:
        raise OutputError(f"{text}. Free some space, or set output.dir to another disk")
    log.warning("%s. It begins all the same, with less than that it may end without some of them", text)
