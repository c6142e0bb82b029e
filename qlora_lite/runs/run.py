"""From a recipe to a trained adapter: the run's folder, its stages in order, and what is left where one fails."""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

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
from qlora_lite.data.chat.render import last_turn
from qlora_lite.data.tokens.preferences import answered
from qlora_lite.errors import CheckpointError, Interrupted, LaunchError, OutputError, QloraLiteError
from qlora_lite.files import locked
from qlora_lite.inference.evaluate import Watch
from qlora_lite.memory.meter import PeakMeter
from qlora_lite.models.load import resolve_device
from qlora_lite.prepare.ranks import speeds_of
from qlora_lite.prepare.share import check_packs
from qlora_lite.prepare.task import find_preference
from qlora_lite.recipe.load import require_recipe
from qlora_lite.recipe.schema import Recipe
from qlora_lite.reporting.report import write_report
from qlora_lite.train.checkpoints import CHECKPOINTS, newest_whole
from qlora_lite.train.determinism import deterministic
from qlora_lite.train.out_of_memory import explaining_memory
from qlora_lite.train.processes import ALONE, FirstRankLostError, Processes, RankLostError
from qlora_lite.train.rendezvous import joined
from qlora_lite.train.shared_cores import sharing_cores
from qlora_lite.units import format_bytes, format_seconds

from .launch import HEARD_SECONDS, ending_with_launcher, launched
from .resume import Continuation, follow, path_to_continue, reopen
from .signals import Stop, stop_signals
from .stages import Progress, Trained, prepare, prove
from .training import train

log = logging.getLogger("qlora_lite")
SAMPLES = 4
TWICE_SECONDS = 5.0


class StoppedAtOnce(Interrupted):
    """A signal has ended the run where the processes had not agreed on it."""


def run_recipe(
    recipe: Recipe,
    progress: Progress | None = None,
    resume: str | Path | None = None,
    force: bool = False,
    watch: Watch | None = None,
) -> Path:
    """Run a recipe to its end; return the run folder.

    Args:
        progress: called after every step with its metrics and the total number of steps.
        resume: run folder to resume, from its newest whole checkpoint; "" takes the recipe's newest run, None
            begins a new one. A run without a checkpoint begins afresh.
        force: go on although the recipe or the data make another run of it.
        watch: called with what is being done ("evaluation", "answers", or "micro-batches of step 7" where a step is
            slow), how many are done, and of how many.

    Raises:
        QloraLiteError: see its subclasses; the summary then says "failed" or "interrupted", if the folder is kept.
    """
    require_recipe(recipe)
    if (found := launched()) is None:
        return _run(recipe, progress, resume, force, watch)
    with ending_with_launcher(), joined(*found, recipe.model.device) as processes, _speaking(processes):
        check_packs(recipe, speeds_of(recipe, processes))
        try:
            if processes.is_first:
                return _run(recipe, progress, resume, force, watch, processes)
            return _follow(recipe, force, processes)
        except StoppedAtOnce:  # perhaps alone: the others wait for this rank elsewhere, and its end is their answer
            raise
        except Interrupted:
            with suppress(LaunchError):
                processes.wait(long=True)  # until the first rank has saved: the end of one is the end of all
            raise


def _run(
    recipe: Recipe,
    progress: Progress | None,
    resume: str | Path | None,
    force: bool,
    watch: Watch | None,
    processes: Processes = ALONE,
) -> Path:
    """See ``run_recipe``."""
    if (begun := processes.recall(recipe.recipe_hash)) and Path(begun).is_dir():
        log.info("resume: these processes were started in the place of others, which began %s", begun)
        resume = begun
    path = None if resume is None else path_to_continue(recipe, resume)
    was_there = path is not None or bool(recipe.output.dir and Path(recipe.output.dir).exists())
    is_new, path = path is None, path or new_path(recipe)
    with locked(path):
        begins, was_empty = is_new or not is_begun(path), not any(path.iterdir())
        run, continuation = create_run(path, recipe, replace=not is_new) if begins else None, None
        with logging_to(path / LOG), _signals(recipe, processes) as stop:
            if run is None and is_complete(path, recipe):
                log.info("resume: %s is complete", path)
                processes.tell(json.dumps([str(path.absolute()), COMPLETE]))
                return path
            if run is None:
                run, continuation = reopen(path, recipe, force)
            processes.remember(recipe.recipe_hash, str(path.absolute()))  # now that it is ours
            step = continuation.checkpoint.step if continuation else None
            processes.tell(json.dumps([str(path.absolute()), step]))
            processes.wait()  # until the others have read the checkpoint too
            try:
                _execute(recipe, run, continuation, stop, progress, watch, processes)
            except QloraLiteError as error:
                if was_empty and not run.trains and not isinstance(error, Interrupted):  # the error says it all
                    undo_start(path, was_there)
                raise
    return path


def _follow(recipe: Recipe, force: bool, processes: Processes) -> Path:
    """Train beside the first rank, which alone writes the run; what this one would write is for nobody."""
    with _signals(recipe, processes) as stop, TemporaryDirectory(prefix="qlora-lite-rank-") as own:
        told, step = json.loads(processes.tell(""))
        if step != COMPLETE:
            continuation = None if step is None else follow(Path(told), recipe, force, step)
            processes.wait()
            train = recipe.train.model_copy(update={"trackers": []})
            recipe = recipe.model_copy(update={"train": train})
            _execute(recipe, create_run(Path(own), recipe), continuation, stop, None, None, processes)
    return Path(told)


def _signals(recipe: Recipe, processes: Processes) -> AbstractContextManager[Stop]:
    """Note signals; one that both a batch system and torchrun's agent send to a rank is one."""
    twice_seconds = TWICE_SECONDS if processes.world_size > 1 else 0.0
    return stop_signals(recipe.train.max_hours, twice_seconds, speaks=processes.is_first)


@contextmanager
def _speaking(processes: Processes) -> Iterator[None]:
    """Let the first rank speak, and another one only where it has a warning or an error that the first has not."""
    rank = processes.rank

    def heard(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            record.msg = f"rank {rank}: {record.msg}"
        return record.levelno >= logging.WARNING

    handlers = list(log.handlers) if rank else []
    for handler in handlers:
        handler.addFilter(heard)
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        if not rank:
            raise
        raise _said("", Interrupted.exit_code) from error  # the first rank says it, and what is saved
    except RankLostError as error:
        # for what that rank says itself, or its launcher, which then ends this one
        was_told = error.stop is not None and error.stop.has_come
        is_unheard = not was_told and _wait(3 * HEARD_SECONDS)
        if is_unheard and (not rank or isinstance(error, FirstRankLostError)):  # a first rank that hangs says nothing
            raise
        raise _said("", error.exit_code) from error
    except QloraLiteError as error:
        if not rank:
            raise
        # the first rank may have found the same, and its end ends this one
        raise _said(f"rank {rank}: {error}" if _wait(HEARD_SECONDS) else "", error.exit_code) from error
    finally:
        for handler in handlers:
            handler.removeFilter(heard)


def _said(words: str, exit_code: int) -> LaunchError:
    error = LaunchError(words)
    error.exit_code = exit_code
    return error


def _wait(seconds: float) -> bool:
    """Return whether no signal came within some seconds."""
    try:
        time.sleep(seconds)
    except KeyboardInterrupt:
        return False
    return True


def _execute(
    recipe: Recipe,
    run: RunFolder,
    continuation: Continuation | None,
    stop: Stop,
    progress: Progress | None,
    watch: Watch | None,
    processes: Processes,
) -> None:
    """Go through the stages, or leave a summary and a report that say how far the run came and why no further."""
    try:
        device = resolve_device(recipe.model.device)
        repeatable = deterministic(recipe.train.deterministic)
        with repeatable, sharing_cores(device.type), PeakMeter(device) as meter:
            with explaining_memory():
                with stop.at_once():
                    with processes.one_ahead():
                        prepared = prepare(recipe, run, continuation, stop, meter, progress, watch, processes)
                    proven = prove(prepared)
                trained = train(proven)
            _conclude(trained)
    except KeyboardInterrupt as cut:  # before training, or by a second signal
        processes.announce_stop(reason := str(cut) or "SIGINT")
        raise _stopped_at_once(run, reason) from None
    except RankLostError as error:
        if announced := processes.stop_announced():
            raise _stopped_at_once(run, announced) from None
        error.stop = stop
        _leave(run, error)
        raise
    except QloraLiteError as error:
        _leave(run, error)
        raise
    finally:
        if run.summary.get("status") == "running":  # what nobody foresaw
            _leave(run, sys.exception())


def _stopped_at_once(run: RunFolder, reason: str) -> StoppedAtOnce:
    """Return the error that says so, after it is written down."""
    whole, _ = newest_whole(run.path / CHECKPOINTS)
    there = newest_checkpoint(whole.step if whole else None)
    error = StoppedAtOnce(f"stopped at once by {reason}; {there}. {how_to_go_on(run.path)}")
    _leave(run, error)
    return error


def _leave(run: RunFolder, error: BaseException | None) -> None:
    """Write down why the run ended early, if the disk lets us; a run that was not resumed stays as it was."""
    if not run.proven:
        return
    can_go_on = isinstance(error, Interrupted | CheckpointError | LaunchError)
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
    log.info(
        "done: %d steps in %s, peak memory %s",
        trained.trainer.step,
        format_seconds(run.summary["seconds"]),
        format_bytes(run.summary["peak_bytes"]),
    )


def _samples(trained: Trained) -> list[dict]:
    before, after, rows = trained.before, trained.after, trained.data.eval_data
    if not (before and after and rows and rows.template):  # without one no row has an answer
        return []
    template = rows.template

    def plain(prompt: str) -> str:
        ids = trained.tokenizer(prompt, add_special_tokens=False).input_ids
        return trained.tokenizer.decode(ids, skip_special_tokens=True)

    answers = before.answers, before.matches, after.answers, after.matches
    examples = answered(rows.examples, find_preference(trained.recipe), len(before.answers))
    return [
        {
            "prompt": plain(row.prompt),
            "question": plain(last_turn(template, row.prompt)),
            "reference": row.answer,
            "before": b,
            "before_matches": b_matches,
            "after": a,
            "after_matches": a_matches,
        }
        for row, b, b_matches, a, a_matches in zip(examples, *answers, strict=False)
        if row.answer
    ][:SAMPLES]
