"""A sweep: one recipe, and axes along which its settings vary.

    recipe: gsm8k                      # a recipe's file, or the name of a built-in one
    axes:
      lora.rank: [1, 4, 16]            # a setting and its values
      train.learning_rate: {from: 1e-4, to: 1e-2, log: true}     # a range, for a sampler
      targets:                         # several settings at a time: a name for each choice
        attention: {lora.targets: [q_proj, v_proj]}
        all: {lora.targets: all-linear}
      train.seed: [0, 1, 2]            # repetitions of every point

A point's settings are overrides of the recipe; all of a grid are checked before any of it runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from qlora_lite.errors import Problem, RecipeError
from qlora_lite.recipe.catalog import find_recipe, list_recipes
from qlora_lite.recipe.load import load_recipe
from qlora_lite.recipe.overrides import override_number
from qlora_lite.recipe.reference import field_at, rule_of
from qlora_lite.recipe.schema import Recipe
from qlora_lite.recipe.strict_yaml import parse, plain

SEED = "train.seed"
Goal = Literal[
    "eval_loss",
    "exact_match",
    "number_match_strict",
    "number_match_flexible",
    "accuracy_generated",
    "accuracy_likelihood",
    "bleu",
    "chrf",
    "rouge1",
    "rouge2",
    "rougeL",
    "answer_loss",
]
_SUFFIXES = "_strict", "_flexible", "_generated", "_likelihood", "1", "2", "L"  # of scores of one metric
Settings = dict[str, Any]  # values by dotted key
_WRITE = "a sweep's file has `recipe:`, the path of one, and `axes:` (qlora-lite explain sweep)"


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class Range(_Strict):
    """Numbers that a sampler chooses from."""

    low: float = Field(alias="from")
    high: float = Field(alias="to")
    log: bool = False

    @model_validator(mode="after")
    def _has_numbers(self):
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("from must be below to, and above 0 with log")
        return self


def _range_or_choices(value: object) -> object:
    return Range.model_validate(value) if isinstance(value, dict) and {"from", "to"} & value.keys() else value


Axis = Annotated[
    Range | Annotated[dict[str, Settings], Field(min_length=1)] | Annotated[list[Any], Field(min_length=1)],
    BeforeValidator(_range_or_choices),
]


class Sweep(_Strict):
    """What a sweep's file says.

    Args:
        recipe: path of the recipe.
        axes: values, ranges or named choices by setting or name.
        search: every point of the grid, or as many as ``trials`` that an Optuna sampler chooses.
        trials: how many points a sampler chooses, repetitions not counted.
        goal: what points are compared by: eval_loss, or a score of train.metrics; a loss is to be low, all else high.
        storage: URL of an Optuna database; None keeps the study beside the runs.
    """

    recipe: str
    axes: Annotated[dict[str, Axis], Field(min_length=1)]
    search: Literal["grid", "tpe", "random"] = "grid"
    trials: Annotated[int, Field(ge=1)] = 20
    goal: Goal = "eval_loss"
    storage: str | None = None

    @property
    def searched(self) -> dict[str, Axis]:
        """The axes without the repetitions."""
        return {name: axis for name, axis in self.axes.items() if name != SEED}

    @property
    def seeds(self) -> list[Settings]:
        """The settings of a point's repetitions."""
        return [{SEED: seed} for seed in self.axes[SEED]] if SEED in self.axes else [{}]

    def grid(self) -> Iterator[dict[str, str]]:
        """Yield each point without its repetitions: the label of its choice by axis."""
        for labels in product(*(choices(name, axis) for name, axis in self.searched.items())):
            yield dict(zip(self.searched, labels, strict=True))

    def settings(self, point: Mapping[str, Any]) -> Settings:
        """Return the settings of a point: labels, or numbers of a range, by axis."""
        found: Settings = {}
        for name, value in point.items():
            axis = self.axes[name]
            found |= {name: value} if isinstance(axis, Range) else choices(name, axis)[value]
        return found


def choices(name: str, axis: Axis) -> dict[str, Settings]:
    """Return the settings of each choice of an axis by its label; a range has none to list."""
    if isinstance(axis, list):
        labels = [value if isinstance(value, str) else json.dumps(value) for value in axis]
        if len({*labels}) < len(labels):  # "null" and null
            labels = [json.dumps(value) for value in axis]
        return {label: {name: value} for label, value in zip(labels, axis, strict=True)}
    return {} if isinstance(axis, Range) else axis


def is_whole(name: str, axis: Range) -> bool:
    """Return whether a range is of whole numbers: its ends are, and from 0 the setting takes no others."""
    field = field_at(tuple(name.split(".")))
    ends_are = axis.low.is_integer() and axis.high.is_integer()
    return ends_are and (axis.low >= 1 or (field is not None and rule_of(field).startswith("a whole number")))


def load_sweep(path: Path) -> Sweep:
    """Read a sweep's file.

    Raises:
        RecipeError: naming what is wrong in it.
    """
    try:
        document = parse(path.read_bytes(), str(path))
    except OSError as error:
        raise RecipeError(Problem(f"{str(error.strerror).lower()}; {_WRITE}", str(path))) from None
    values = plain(document.root) if document.root is not None else None
    if document.problems or not isinstance(values, dict):
        raise RecipeError(document.problems or Problem(_WRITE, str(path)))
    if values.keys() & {"model", "data"}:
        raise RecipeError(Problem(f"this is a recipe, not a sweep of one; {_WRITE}", str(path)))
    try:
        sweep = Sweep.model_validate(values)
    except ValidationError as error:
        raise RecipeError(
            list(dict.fromkeys(_problem(path, each) for each in error.errors(include_url=False)))
        ) from None
    if problems := [Problem(message, str(path)) for message in _faults(sweep)]:
        raise RecipeError(problems)
    named = sweep.recipe in dict(list_recipes())
    recipe = find_recipe(sweep.recipe) if named else path.parent / os.path.expanduser(sweep.recipe)
    return sweep.model_copy(update={"recipe": str(recipe)})


def _faults(sweep: Sweep) -> Iterator[str]:
    if not isinstance(sweep.axes.get(SEED, []), list):
        yield f"axes.{SEED} repeats every point: write a list of seeds"
    if not sweep.searched:
        yield f"axes: name another one than {SEED}"
    setters: dict[str, str] = {}
    for name, axis in sweep.axes.items():
        if isinstance(axis, Range) and sweep.search == "grid":
            yield f"axes.{name}: a range is for search tpe or random; write the values of a grid"
        keys = {key for settings in choices(name, axis).values() for key in settings} or {name}
        if any(key.partition(".")[0] == "output" for key in keys):
            yield f"axes.{name}: the sweep itself says where its runs go"
        for key in sorted(keys):
            if (other := setters.setdefault(key, name)) != name:
                yield f"axes.{name}: {key} is set by axes.{other} too; leave it to one of them"


def _problem(path: Path, error: Mapping[str, Any]) -> Problem:
    place = [str(part) for part in error["loc"]]
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    known = {"missing": f"is missing; {_WRITE}", "extra_forbidden": "is no key of a sweep"}
    message = known.get(error["type"], message)
    if place[:1] == ["axes"] and len(place) > 2 and error["type"] != "value_error":
        place, message = place[:2], "write a list of values, {from: 1, to: 2}, or a mapping of names to settings"
    return Problem(f"{'.'.join(place)}: {message}", str(path))


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as the command line takes them."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]


def recipe_of_point(sweep: Sweep, settings: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a point and a seed.

    Raises:
        RecipeError: a setting is wrong.
    """
    try:
        recipe = load_recipe(sweep.recipe, overrides(settings))
    except RecipeError as error:
        places = [("axes" if override_number(problem.where) else problem.where, problem) for problem in error.problems]
        raise RecipeError([Problem(problem.message, where, problem.key) for where, problem in places]) from None
    if why := _unmeasured(sweep.goal, recipe):
        raise RecipeError(Problem(f"{sweep.goal} is not measured: {why}", "goal"))
    return recipe


def _unmeasured(goal: str, recipe: Recipe) -> str | None:
    """Return why a recipe's runs do not measure what points are compared by; None if they do."""
    if not recipe.data.has_eval:
        return "there are no evaluation rows; set data.eval_share, or name some in data.eval"
    if goal == "eval_loss":
        return None
    if not recipe.train.metrics_examples:
        return "train.metrics_examples is 0"
    measured = any(goal == name or goal.removeprefix(name) in _SUFFIXES for name in recipe.train.metrics)
    return None if measured else f"train.metrics is {', '.join(recipe.train.metrics)}"
