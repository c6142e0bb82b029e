"""Write what a run has learned: checkpoints, and the adapter or the whole model that was trained."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

from qlora_lite.adapters.files import save_adapter
from qlora_lite.adapters.read import CONFIG_NAME, WEIGHTS_NAME
from qlora_lite.artifacts.run_files import METRICS_DIGEST
from qlora_lite.artifacts.run_folder import CHECKPOINTS, digests_of, package_versions, trained_folders
from qlora_lite.errors import OutputError
from qlora_lite.prepare.task import find_task
from qlora_lite.train.checkpoints import Checkpoint
from qlora_lite.train.state import STATE, capture, collection_of
from qlora_lite.train.whole_tensors import Collection, Whole

from .async_checkpoint import Saver
from .progress import Progress
from .resume import OF_RANKS, RUN
from .stages import Proven

log = logging.getLogger("qlora_lite")
BEST = "best.safetensors"  # of a checkpoint


class Saving:
    """Writes into a run's folder; all ranks call each method.

    ``best`` and ``last`` are the names of the folders of what is trained, and ``digests`` are the SHA-256 sums of what
    was written into them, as the summary names them.
    """

    def __init__(self, proven: Proven):
        self.proven, self.trainer = proven, proven.trainer
        self.task, self.method = find_task(proven.recipe), proven.trainer.workload.method
        self.best, self.last = trained_folders(proven.recipe)
        self.digests: dict[str, str | None] = {}

    @cached_property
    def saver(self) -> Saver:
        """What writes the checkpoints of this run."""
        proven, settings = self.proven, self.proven.recipe.train
        return Saver(
            proven.run.path / CHECKPOINTS,
            settings.save_every_steps,
            settings.save_every_minutes,
            settings.keep_checkpoints,
            proven.run.flush_metrics,
            package_versions(),
            proven.recipe.recipe_hash,
            proven.continuation.checkpoint.step if proven.continuation else None,
        )

    def checkpoint(self, progress: Progress) -> None:
        """Begin to write a checkpoint; all wait as long as the one before takes a slow disk."""
        with self._collected(progress) as collection:
            if self.proven.processes.is_first:
                captured = partial(self._capture, progress, collection)
                self.saver.save(self.trainer.step, captured, copies=not self.method.trains_base)
        self.proven.processes.wait(long=True)

    def trained(self, name: str, progress: Progress) -> None:
        """Write the adapter, or the whole model that was trained, into a folder, and note its SHA-256.

        Raises:
            OutputError: it cannot be written.
        """
        proven, folder = self.proven, self.proven.run.path / name
        if self.method.trains_base:
            with self._collected(progress) as collection:
                if proven.processes.is_first:
                    self._model(folder, collection)
                    self.digests |= digests_of(folder)
            return
        if not proven.processes.is_first:
            return
        save_adapter(proven.model, folder, proven.recipe.model.path, proven.tokenizer, self.method)
        self.task.save_beside(proven.model, folder)
        self.digests |= digests_of(folder)

    def try_trained(self, name: str, progress: Progress) -> None:
        """Do what ``trained`` does, and only log it if that fails."""
        try:
            self.trained(name, progress)
        except OutputError as error:
            log.warning("step %d: %s. Training goes on", self.trainer.step, error)
        self.proven.processes.wait(long=True)

    def last_trained(self, progress: Progress) -> None:
        """Write what the last step left; a whole model is in the checkpoint, and need not be written twice."""
        if not self.method.trains_base:
            self.trained(self.last, progress)
            self.proven.processes.wait(long=True)

    def end(self, progress: Progress) -> None:
        """Write what the run ends with; of whole models, no other is left."""
        self.trained(self.best, progress)
        if self.method.trains_base:  # what an earlier stop may have left
            shutil.rmtree(self.proven.run.path / self.last, ignore_errors=True)

    @contextmanager
    def _collected(self, progress: Progress) -> Iterator[Collection | None]:
        """Let the first rank put together inside what ranks have divided, if they have, for which the others serve."""
        collection = collection_of(self.trainer, {} if progress.best is None else {BEST: progress.best.tensors})
        if collection is None:
            yield None
        elif self.proven.processes.is_first:
            try:
                yield collection
            finally:
                collection.end()
        else:
            yield collection
            collection.serve()

    def _capture(self, progress: Progress, collection: Collection | None) -> Checkpoint:
        proven, run = self.proven, self.proven.run
        run.write_metrics()  # a checkpoint that knows of lines that wait would lose them
        tensors, state = capture(self.trainer, not self.method.trains_base, collection)
        if progress.best is not None and collection is None:
            tensors[BEST] = progress.best.tensors
        document = {
            "recipe": proven.recipe.model_dump(mode="json"),
            "identity": proven.identity,
            "plan": proven.chosen,
            OF_RANKS: list(proven.plan.of_ranks),
            "environment": proven.environment,
            "progress": progress.document(max(progress.earlier_peak_bytes, proven.meter.peak_bytes())),
            "summary": dict(run.summary),
            "metrics_bytes": run.metrics_bytes,
            METRICS_DIGEST: run.metrics_hash.hexdigest(),
        }
        config = self.method.config(proven.model, proven.recipe.model.path)
        return Checkpoint(self.trainer.step, tensors, {STATE: state, RUN: document, CONFIG_NAME: config})

    def _model(self, folder: Path, collection: Collection | None) -> None:
        found, proven = collection.tensors[WEIGHTS_NAME] if collection else {}, self.proven
        elsewhere = {name: each for name, each in found.items() if isinstance(each, Whole)}
        end_tokens = proven.data.data.end_token_ids
        self.task.save_model(proven.recipe, proven.model, folder, proven.tokenizer, end_tokens, elsewhere)
