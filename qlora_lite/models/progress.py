"""How far work of minutes on a model's weights is."""

import logging
import time

from transformers.utils.logging import tqdm

LINE_SECONDS = 10  # between lines of the log
log = logging.getLogger("qlora_lite")


class Progress:
    """Say how far it is by a line of the log now and then, and by a bar where transformers shows its own.

    Commands turn those off, see ``cli.output.prepare``.
    """

    def __init__(self, what: str, total: int):
        self._what, self._done, self._total = what, 0, total
        self._bar, self._shown = tqdm(total=total, desc=what), time.monotonic()

    def step(self) -> None:
        """Count one more thing as done."""
        self._done += 1
        self._bar.update()
        now = time.monotonic()
        if self._done >= self._total:
            self._bar.close()
        elif now - self._shown >= LINE_SECONDS:
            self._shown = now
            log.info("%s: %d of %d", self._what, self._done, self._total)
