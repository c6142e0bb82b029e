"""Run the points of a sweep, each as an ordinary run in a process of its own, and collect what they found.

A run's folder is named after its settings, so that no point is trained twice, a sweep that was cut off continues where
it was (within a run, too), and several machines that share the folder and its study divide the points among them. Runs
of an earlier version, which lacks a setting of today and so names folders otherwise, are known by their recipes.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from qlora_lite.artifacts.run_files import number
from qlora_lite.artifacts.run_folder import COMPLETE, RECIPE, summary_in
from qlora_lite.data.readers.data_files import local_files
from qlora_lite.errors import (
    DoesNotFitError,
    Interrupted,
    ModelError,
    OutputError,
    Problem,
    RecipeError,
    how_to_install,
)
from qlora_lite.files import explain_write_errors, locked, write_text
from qlora_lite.planning.machine import Machine
from qlora_lite.prepare.plan import Plan, budget_of, plan_recipe
from qlora_lite.recipe.load import load_recipe
from qlora_lite.recipe.schema import Recipe
from qlora_lite.runs.signals import describe_kill

from .axes import Axis, Range, Sweep, choices, is_whole, overrides, recipe_of_point
from .page import render_sweep

log = logging.getLogger("qlora_lite")
HASH_LETTERS = 12  # of a recipe's hash, in the name of a run's folder
RUNS, RESULT, PAGE, STUDY = "runs", "sweep.json", "sweep.html", "optuna.log"
FIGURES = (
    "eval_loss_before",
    "eval_loss_after",
    "seconds",
    "tokens_per_second",
    "peak_bytes",
    "trainable_parameters",
    "learning_rate",
    "steps",
)
NOT_PLANNED = {  # what a plan does not depend on
    "train": {"learning_rate", "seed", "lr_scheduler", "warmup_ratio", "weight_decay", "max_steps"},
    "lora": {"alpha"},
    "output": {"dir", "name"},
}
DOES_NOT_FIT, FAILED, ELSEWHERE = "does not fit", "failed", "run by another process"


@dataclass(slots=True)
class Point:
    """A point of a sweep, and what its runs found, one per seed.

    Args:
        choice: label of its choice, or number of a range, by axis.
        runs: folder, status and figures of each.
    """

    choice: dict[str, Any]
    runs: list[dict] = field(default_factory=list)

    @property
    def status(self) -> str:
        """That of the first run that is not complete, if there is one."""
        return next((run["status"] for run in self.runs if run["status"] != COMPLETE), COMPLETE)

    def figures(self, key: str) -> list[float]:
        """Return a figure of all runs that have it."""
        found = (number(run.get(key)) for run in self.runs)
        return [value for value in found if value is not None]

    def as_json(self) -> dict:
        """Return the point as plain values, with mean and standard deviation of its figures over the seeds."""
        keys = dict.fromkeys(key for run in self.runs for key in run)
        means = {key: fmean(values) for key in keys if (values := self.figures(key))}
        spread = {key: stdev(values) for key in keys if len(values := self.figures(key)) > 1}
        return {
            "choice": self.choice,
            "status": self.status,
            "mean": means,
            "standard_deviation": spread,
            "runs": self.runs,
        }


class _Runs:
    """The points of a sweep that have been run, and where they lie."""

    def __init__(self, sweep: Sweep, folder: Path, name: str):
        self.sweep, self.folder, self.name = sweep, folder, name
        self.points: list[Point] = []
        there = ((_name_of(path), path) for path in (folder / RUNS).iterdir())
        self.known = {known: path for known, path in there if known}

    def add(self, point: Point) -> Point:
        """Run a point, as far as its runs are not there yet, and write the results of all; return it."""
        log.info("sweep: %s", ", ".join(f"{axis} {value}" for axis, value in point.choice.items()))
        for seed in self.sweep.seeds:
            settings = self.sweep.settings(point.choice) | seed
            try:
                point.runs.append(_run(self.sweep, self.path_of(settings), settings))
            except RecipeError as error:  # settings that a sampler drew and that do not go together
                log.warning("sweep: %s: %s", FAILED, error)
                point.runs.append({"settings": settings, "status": FAILED, "error": str(error)})
            if point.status != COMPLETE:
                break  # the other seeds need as much
        self.points.append(point)
        write_results(self.sweep, self.points, self.folder, self.name)
        return point

    def path_of(self, settings: Mapping[str, Any]) -> Path:
        """Return the folder of a run.

        Raises:
            RecipeError: the settings are wrong.
        """
        name = recipe_of_point(self.sweep, settings).recipe_hash[:HASH_LETTERS]
        return self.known.get(name, self.folder / RUNS / name)

    def is_cut_off(self, choice: Mapping[str, Any]) -> bool:
        """Return whether a point has runs that nobody is at work on, and not all of them complete."""
        try:
            paths = [self.path_of(self.sweep.settings(choice) | seed) for seed in self.sweep.seeds]
            begun = [path for path in paths if path.is_dir()]
            for path in begun:
                with locked(path):
                    pass
        except (OutputError, RecipeError):  # of settings that do not go together none was begun
            return False
        return bool(begun) and any(summary_in(path).get("status") != COMPLETE for path in paths)


def run_sweep(sweep: Sweep, folder: Path, name: str) -> list[Point]:
    """Run a sweep; return its points. The files of results are written after each.

    Args:
        folder: for the runs and the results.
        name: what the page calls it.

    Raises:
        RecipeError: the recipe is wrong, or a point of a grid; before any is run.
        ModelError: Optuna is wanted and not installed.
        Interrupted: a run was stopped.
    """
    points = [Point(choice) for choice in sweep.grid()] if sweep.search == "grid" else []
    for point in points:
        for seed in sweep.seeds:
            recipe_of_point(sweep, sweep.settings(point.choice) | seed)
    if not points:
        recipe_of_point(sweep, sweep.seeds[0])
    with explain_write_errors(folder):
        (folder / RUNS).mkdir(parents=True, exist_ok=True)
    runs = _Runs(sweep, folder, name)
    if sweep.search == "grid":
        for point in points:
            runs.add(point)
    else:
        _sample(sweep, runs)
    return runs.points


def planned(sweep: Sweep, machine_of: Callable[[Recipe], Machine]) -> Iterator[tuple[dict[str, str], Plan, int]]:
    """Yield each point of a grid, the plan of its step, and its number of steps (0 where its epochs decide that).

    Points whose plans cannot differ share one.

    Raises:
        RecipeError: a point's settings are wrong.
    """
    plans: dict[str, Plan] = {}
    for choice in sweep.grid():
        recipe = recipe_of_point(sweep, sweep.settings(choice) | sweep.seeds[0])
        said = recipe.model_dump(mode="json")
        for section, names in NOT_PLANNED.items():
            said[section] = {name: value for name, value in said[section].items() if name not in names}
        key = json.dumps(said, sort_keys=True)
        if key not in plans:
            machine = machine_of(recipe)
            plans[key] = plan_recipe(recipe, machine, budget_of(recipe, machine))
        yield choice, plans[key], recipe.train.max_steps or 0


def _sample(sweep: Sweep, runs: _Runs) -> None:
    """Run points that Optuna chooses; one that was cut off comes first the next time.

    A point that is chosen again counts as a trial, and is neither run nor shown again.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise ModelError(
            f"search tpe and random need Optuna: {how_to_install('sweep')}; or write search: grid"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = sweep.storage or optuna.storages.JournalStorage(JournalFileBackend(str(runs.folder / STUDY)))
    state = optuna.trial.TrialState
    sampler = optuna.samplers.TPESampler() if sweep.search == "tpe" else optuna.samplers.RandomSampler()
    directions = optuna.study.StudyDirection
    direction = directions.MINIMIZE if sweep.goal.endswith("loss") else directions.MAXIMIZE
    study = optuna.create_study(
        study_name=runs.folder.name, storage=storage, sampler=sampler, load_if_exists=True, direction=direction
    )
    goal = study.user_attrs.get("goal", sweep.goal)  # earlier versions did not write it
    if goal != sweep.goal or study.direction != direction:
        raise RecipeError(Problem(f"{runs.folder} has a study with another goal; choose another --out", "goal"))
    study.set_user_attr("goal", goal)
    for known in study.get_trials(deepcopy=False):
        _check_axes(sweep, known.distributions, runs.folder)
    for known in study.get_trials(deepcopy=False, states=[state.RUNNING]):
        if (choice := known.user_attrs.get("choice")) and runs.is_cut_off(choice):  # by what left no time to say so
            study.tell(known.number, state=state.FAIL)
            study.enqueue_trial(known.params)
    ended, points = (state.COMPLETE, state.PRUNED), {}

    def add(choice: dict[str, Any]) -> Point:
        key = json.dumps(choice, sort_keys=True)
        if key not in points:
            points[key] = runs.add(Point(choice))
        return points[key]

    for known in study.get_trials(states=ended):
        add(known.user_attrs["choice"])
    while len(study.get_trials(states=ended)) < sweep.trials:
        trial = study.ask()
        choice = {axis: _suggested(trial, axis, sweep.axes[axis]) for axis in sweep.searched}
        trial.set_user_attr("choice", choice)
        try:
            point = add(choice)
            values = point.figures(f"{sweep.goal}_after")
        except Interrupted:
            study.tell(trial, state=state.FAIL)
            study.enqueue_trial(trial.params)
            raise
        found = point.status == COMPLETE and values
        study.tell(trial, fmean(values) if found else None, state=None if found else state.PRUNED)


def _check_axes(sweep: Sweep, distributions: Mapping[str, Any], folder: Path) -> None:
    """Check that a trial of an earlier start was of these axes: with the same choices, or of numbers as these."""
    wanted = {
        name: (is_whole(name, axis), axis.log) if isinstance(axis, Range) else tuple(choices(name, axis))
        for name, axis in sweep.searched.items()
    }
    found = {
        name: tuple(kind.choices) if hasattr(kind, "choices") else (isinstance(kind.low, int), kind.log)
        for name, kind in distributions.items()
    }
    if found and found != wanted:
        names = sorted({name for name, _ in found.items() ^ wanted.items()})
        raise RecipeError(
            Problem(f"{folder} has a study with other values of {', '.join(names)}; choose another --out", "axes")
        )


def _suggested(trial, name: str, axis: Axis) -> str | float:
    if not isinstance(axis, Range):
        return trial.suggest_categorical(name, list(choices(name, axis)))
    if is_whole(name, axis):
        return trial.suggest_int(name, int(axis.low), int(axis.high), log=axis.log)
    return trial.suggest_float(name, axis.low, axis.high, log=axis.log)


def _name_of(path: Path) -> str | None:
    """Return what the folder of a run is called today; None where it has no recipe that is one today."""
    try:
        return load_recipe(path / RECIPE, check_files=False).recipe_hash[:HASH_LETTERS]
    except (OSError, RecipeError):
        return None


def _run(sweep: Sweep, path: Path, settings: Mapping[str, Any]) -> dict:
    """Train a point with one seed, or go on where it was, or read what it found; return folder, status and figures."""
    found = {"run": str(Path(RUNS) / path.name), "settings": dict(settings)}
    if summary_in(path).get("status") == COMPLETE:
        _warn_of_new_rows(sweep, path, settings)
    else:
        given = overrides({**settings, "output.dir": str(path)})
        command = [sys.executable, "-m", "qlora_lite", "train", sweep.recipe, *given]
        if path.is_dir():
            try:
                with locked(path):
                    command += ["--resume", str(path)]
            except OutputError:
                return found | {"status": ELSEWHERE}
        exit_code, said = _in_a_process(command, path.with_suffix(".log"))
        if exit_code == Interrupted.exit_code:
            raise Interrupted("stopped; the same command continues from here")
        if exit_code:
            lines = [line for line in said.splitlines() if line.startswith("error: ")] or ["error: no reason"]
            if exit_code < 0:
                lines = [f"the run was killed by {describe_kill(-exit_code)}"]
            status = DOES_NOT_FIT if exit_code == DoesNotFitError.exit_code else FAILED
            why = lines[0].removeprefix("error: ").removeprefix(f"{DOES_NOT_FIT}: ").partition(" (")[0]
            log.warning("sweep: %s: %s", status, why)
            return found | {"status": status, "error": why}
    summary = summary_in(path)
    scores = {
        f"{name}_{when}": score["value"]
        for when, measured in summary.get("metrics", {}).items()
        for name, score in measured.items()
    }
    return found | {"status": COMPLETE} | {key: summary[key] for key in FIGURES if key in summary} | scores


def _warn_of_new_rows(sweep: Sweep, path: Path, settings: Mapping[str, Any]) -> None:
    """Warn where rows that a complete run read have been written anew since it began."""
    data, begun = recipe_of_point(sweep, settings).data, (path / RECIPE).stat().st_mtime
    for file in local_files(source.path for source in (*data.train, *(data.eval or ()))):
        if file.stat().st_mtime > begun:
            log.warning(
                "sweep: %s was written anew after the run %s had begun, whose figures are of what it held "
                "then; if the rows are others now, remove the run to train it again",
                file,
                path,
            )


def _in_a_process(command: Sequence[str], log_file: Path) -> tuple[int, str]:
    """Run a command, its messages in a file; return its exit code and what it said.

    It is out of reach of a terminal's signals, and one that reaches this process is handed on once, so that the run
    finishes its step and saves.
    """
    with explain_write_errors(log_file), log_file.open("w", encoding="utf-8") as messages:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=messages, start_new_session=True)
        try:
            exit_code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()  # it may be killed where it has no handler yet, or come to its end
            exit_code = Interrupted.exit_code
    return exit_code, log_file.read_text(encoding="utf-8", errors="replace")


def as_result(sweep: Sweep, points: Iterable[Point], name: str) -> dict:
    """Return what was found as plain values."""
    return {
        "name": name,
        "goal": sweep.goal,
        "axes": list(sweep.searched),
        "seeds": len(sweep.seeds),
        "points": [point.as_json() for point in points],
    }


def write_results(sweep: Sweep, points: Iterable[Point], folder: Path, name: str) -> None:
    """Write what was found so far, as JSON and as a page."""
    result = as_result(sweep, points, name)
    write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")
    write_text(folder / PAGE, render_sweep(result))
