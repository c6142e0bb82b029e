"""From a recipe to a trained adapter: the run's folder, its stages in order, and what is left where one fails."""

import logging
import sys
from pathlib import Path

from qlora_lite.artifacts.run_folder import (
    COMPLETE,
    LOG,
    RunFolder,
    create_run,
    how_to_go_on,
    is_begun,
    is_complete,
    logging_to,
    new_path,
    newest_checkpoint,
    undo_start,
)
from qlora_lite.data.render import last_turn
from qlora_lite.errors import CheckpointError, Interrupted, OutputError, QloraLiteError
from qlora_lite.files import locked
from qlora_lite.inference.evaluate import Watch
from qlora_lite.memory.meter import PeakMeter
from qlora_lite.models.load import resolve_device
from qlora_lite.recipe.load import require_recipe
from qlora_lite.recipe.schema import Recipe
from qlora_lite.reporting.report import write_report
from qlora_lite.train.checkpoints import CHECKPOINTS, newest_whole
from qlora_lite.train.determinism import deterministic
from qlora_lite.train.out_of_memory import explaining_memory
from qlora_lite.train.shared_cores import sharing_cores
from qlora_lite.units import format_bytes, format_seconds

from .ranks import require_one_process
from .resume import Continuation, path_to_continue, reopen
from .signals import Stop, stop_signals
from .stages import Progress, Trained, prepare, prove
from .training import train

log = logging.getLogger("qlora_lite")
SAMPLES = 4


def run_recipe(
    recipe: Recipe, progress: Progress | None = None, resume: str | Path | None = None, force: bool = False,
    watch: Watch | None = None,
) -> Path:  # fmt: skip
    """Run a recipe to its end; return the run folder.

    Args:
        progress: called after every step with its metrics and the total number of steps.
        resume: run folder to resume, from its newest whole checkpoint; "" takes the recipe's newest run, None
            begins a new one. A run without a checkpoint begins afresh.
        force: go on although the recipe or the data make another run of it.
        watch: called with what is being done ("evaluation" or "answers"), how many examples are done, and of how
            many.

    Raises:
        QloraLiteError: see its subclasses; the summary then says "failed" or "interrupted", if the folder is kept.
    """
    require_recipe(recipe)
    require_one_process()
    path = None if resume is None else path_to_continue(recipe, resume)
    was_there = path is not None or bool(recipe.output.dir and Path(recipe.output.dir).exists())
    is_new, path = path is None, path or new_path(recipe)
    with locked(path):
        begins, was_empty = is_new or not is_begun(path), not any(path.iterdir())
        run, continuation = create_run(path, recipe, replace=not is_new) if begins else None, None
        with logging_to(path / LOG), stop_signals(recipe.train.max_hours) as stop:
            if run is None and is_complete(path, recipe):
                log.info("resume: %s is complete", path)
                return path
            if run is None:
                run, continuation = reopen(path, recipe, force)
            try:
                _execute(recipe, run, continuation, stop, progress, watch)
            except QloraLiteError as error:
                if was_empty and not run.trains and not isinstance(error, Interrupted):  # the error says it all
                    undo_start(path, was_there)
                raise
    return path


def _execute(
    recipe: Recipe, run: RunFolder, continuation: Continuation | None, stop: Stop, progress: Progress | None,
    watch: Watch | None,
) -> None:  # fmt: skip
    """Go through the stages, or leave a summary and a report that say how far the run came and why no further."""
    try:
        device = resolve_device(recipe.model.device)
        repeatable = deterministic(recipe.train.deterministic)
        with repeatable, sharing_cores(device.type), PeakMeter(device) as meter:
            with explaining_memory():
                with stop.at_once():
                    proven = prove(prepare(recipe, run, continuation, stop, meter, progress, watch))
                trained = train(proven)
            _conclude(trained)
    except KeyboardInterrupt as cut:  # before training, or by a second signal
        whole, _ = newest_whole(run.path / CHECKPOINTS)
        there = newest_checkpoint(whole.step if whole else None)
        error = Interrupted(f"stopped at once by {str(cut) or 'SIGINT'}; {there}. {how_to_go_on(run.path)}")
        _leave(run, error)
        raise error from None
    except QloraLiteError as error:
        _leave(run, error)
        raise
    finally:
        if run.summary.get("status") == "running":  # what nobody foresaw
            _leave(run, sys.exception())


def _leave(run: RunFolder, error: BaseException | None) -> None:
    """Write down why the run ended early, if the disk lets us; a run that was not resumed stays as it was."""
    if not run.proven:
        return
    can_go_on = isinstance(error, Interrupted | CheckpointError)
    why = str(error) if isinstance(error, QloraLiteError) else repr(error)
    try:
        run.summary.update(status="interrupted" if can_go_on else "failed", error=why)
        run.write_summary()
        write_report(run.path)
    except OutputError as fault:
        log.warning("%s", fault)


def _conclude(trained: Trained) -> None:
    """Write the summary and the report of a run that came to its end."""
    run, most_tokens = trained.run, trained.trainer.most_tokens
    if most_tokens is not None:
        run.summary["plan"]["most_tokens"] = most_tokens
    run.summary.update(
        status=COMPLETE, ended_by=trained.ended_by, adapter_step=trained.adapter_step, samples=_samples(trained)
    )
    run.write_summary()
    write_report(run.path)
    log.info("done: %d steps in %s, peak memory %s", trained.trainer.step, format_seconds(run.summary["seconds"]),
             format_bytes(run.summary["peak_bytes"]))  # fmt: skip


def _samples(trained: Trained) -> list[dict]:
    before, after, rows = trained.before, trained.after, trained.data.eval_data
    if not (before and after and rows and rows.template):  # without one no row has an answer
        return []
    template = rows.template

    def plain(prompt: str) -> str:
        ids = trained.tokenizer(prompt, add_special_tokens=False).input_ids
        return trained.tokenizer.decode(ids, skip_special_tokens=True)

    answers = before.answers, before.matches, after.answers, after.matches
    return [
        {"prompt": plain(row.prompt), "question": plain(last_turn(template, row.prompt)),
         "reference": row.answer, "before": b, "before_matches": b_matches, "after": a, "after_matches": a_matches}
        for row, b, b_matches, a, a_matches in zip(rows.examples, *answers, strict=False) if row.answer
    ][:SAMPLES]  # fmt: skip
