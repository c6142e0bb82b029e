"""What a policy is trained with: functions of the user's that judge answers, and what makes the answers.

A function is named in the recipe, and stands in a file of the user's or in an installed module. It is called by the
names of what it takes: completions, references, prompts, each a list of texts, of which those of one row stand side by
side. (trl calls such functions with the same names and the columns of the rows; here rows are tokens and texts by then,
and what a function has to know of a row is its answer, the reference.)
"""

import hashlib
import importlib
import importlib.util
import inspect
import logging
import math
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from numbers import Real
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import RecipeError, TrainingError
from qlora_lite.files import sha256
from qlora_lite.inference.generate import Sampling, answers, stop_ids
from qlora_lite.train.out_of_memory import is_out_of_memory
from qlora_lite.train.workload import Workload

from .policy import Answered, GroupPolicy

log = logging.getLogger("qlora_lite")
LARGEST_REWARD = 1e30  # whose sums over functions, groups and steps are finite in float32
GIVEN = "completions", "references", "prompts"  # texts that a function may take, by name


@dataclass(frozen=True)
class Judges:
    """Functions that give a reward for each answer.

    Args:
        functions: by the name that a recipe has for each.
    """

    functions: Mapping[str, Callable[..., Sequence[float]]]

    def __call__(self, examples: Sequence[Example], texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return what each function gives for answers, float32 [R], by its own name.

        Raises:
            TrainingError: one raises an exception, or does not give a number for each that can be added up.
            RuntimeError, MemoryError: memory ran out.
        """
        texts_of = list(texts), [each.answer for each in examples], [each.prompt for each in examples]
        given = dict(zip(GIVEN, texts_of, strict=True))
        found = {name: _numbers(name, each, given) for name, each in self.functions.items()}
        return {name.rpartition(":")[2]: torch.tensor(numbers) for name, numbers in found.items()}


def _numbers(name: str, function: Callable[..., Sequence[float]], given: Mapping[str, list[str]]) -> list[float]:
    wanted = inspect.signature(function).parameters.values()
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in wanted)
    taken = given if takes_all else {each.name: given[each.name] for each in wanted if each.name in given}
    try:
        with _keeping_grad_mode():
            found = function(**taken)
    except SystemExit as error:
        raise TrainingError(f"{name} ended Python ({error}); let it return numbers") from error
    except Exception as error:  # the user's own code, which may raise anything
        if is_out_of_memory(error):  # of which the step takes fewer tokens at once
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise TrainingError(f"{name} raised {what} ({_place_of(error, function)}); correct the function") from error
    count = len(given["completions"])
    if isinstance(found, torch.Tensor) and not found.dim():
        found = found.item()
    if not isinstance(found, Sequence | torch.Tensor) or len(found) != count:
        what = f"{len(found)} numbers" if isinstance(found, Sequence | torch.Tensor) else type(found).__name__
        raise TrainingError(f"{name} returned {what} for {count} completions; let it return a list of {count} numbers")
    numbers = [_number(each) for each in found]
    for place, number in enumerate(numbers):
        if not abs(number) <= LARGEST_REWARD:
            of = f"the completion {given['completions'][place]!r}"[:300]
            raise TrainingError(
                f"{name} returned {found[place]!r} for {of}; a reward is a finite number, of at most {LARGEST_REWARD:g}"
            )
    return numbers


def _keeping_grad_mode() -> AbstractContextManager:
    """Return a context at whose end gradients are recorded as before, whatever the user's code set globally."""
    return torch.set_grad_enabled(torch.is_grad_enabled())


def _number(found: object) -> float:
    """Return a reward as it is in float32; NaN for what is none."""
    try:
        return torch.tensor(float(found)).item() if isinstance(found, Real | torch.Tensor) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):  # a tensor of several, a complex or a too large number
        return math.nan


def _place_of(error: Exception, function: Callable[..., Sequence[float]]) -> str:
    """Return file and line of what was raised in the file of a function; elsewhere, if none of its lines led there."""
    frames = traceback.extract_tb(error.__traceback__)
    file = getattr(inspect.getmodule(function), "__file__", None)
    last = [*frames, *(frame for frame in frames if frame.filename == file)][-1]
    return f"{last.filename}:{last.lineno}"


def judges_of(names: Sequence[str]) -> Judges:
    """Return the functions that a recipe names.

    Raises:
        RecipeError: one of them is not there, takes something else than ``GIVEN``, or is called like another.
    """
    own = [name.rpartition(":")[2] for name in names]
    if twice := next((each for each in own if own.count(each) > 1), None):
        raise RecipeError(
            f"objective.rewards: two functions are called {twice}, and each is reported by its name; rename one"
        )
    return Judges({name: _function(name) for name in names})


def _function(name: str) -> Callable[..., Sequence[float]]:
    """Import a function, FILE.py:FUNCTION or MODULE:FUNCTION; a file once in a process as long as it is the same."""
    path, _, attribute = name.rpartition(":")
    try:
        with _keeping_grad_mode():
            module = _file_module(Path(path), sha256(Path(path))) if path.endswith(".py") else _module(path)
    except (Exception, SystemExit) as error:  # the user's own code, which may raise anything
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RecipeError(f"objective.rewards: {name} cannot be imported: {what}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        there = ", ".join(each for each, value in vars(module).items() if inspect.isfunction(value)) or "none"
        raise RecipeError(f"objective.rewards: {name} is no function; of functions there are {there}")
    try:
        wanted = inspect.signature(found).parameters.values()
    except ValueError:  # of a builtin
        raise RecipeError(
            f"objective.rewards: {name} does not say what it takes; write a function of your own around it"
        ) from None
    for each in wanted:
        is_open = each.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        if each.name not in GIVEN and each.default is inspect.Parameter.empty and not is_open:
            raise RecipeError(f"objective.rewards: {name} wants {each.name!r}; there are {', '.join(GIVEN)}")
    return found


@cache
def _module(name: str) -> ModuleType:
    """Import a module."""
    log.info("objective.rewards runs the code of the module %s", name)
    return importlib.import_module(name)


@cache
def _file_module(path: Path, digest: str) -> ModuleType:
    """Import a file with a SHA-256 of its content."""
    log.info("objective.rewards runs the code of %s (SHA-256 %s...)", path, digest[:12])
    name = f"rewards_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the names of their types
    spec.loader.exec_module(module)
    return module


def digest_of(names: Sequence[str]) -> dict[str, str]:
    """Return what a resumed run compares: the content of the files that functions stand in, which are not run."""
    found = hashlib.sha256()
    for name in names:
        path, _, function = name.rpartition(":")
        found.update(f"{function}\n".encode())
        file = path if path.endswith(".py") else _origin(path)
        found.update(Path(file).read_bytes() if file else path.encode())
    return {"rewards": found.hexdigest()} if names else {}


def _origin(module: str) -> str | None:
    """Return the file of a module, None where it has none or is not there."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # the latter of a module that was made at run time
        return None
    return spec.origin if spec and spec.has_location else None


def with_answers(
    work: Workload, names: Sequence[str], tokenizer: PreTrainedTokenizerFast, end_token_ids: Collection[int]
) -> Workload:
    """Return a workload that answers with the model that it trains, and judges with a recipe's functions.

    Args:
        end_token_ids: the tokens that end an answer in the rows.
    """

    def answer(
        model: nn.Module,
        prompts: Sequence[list[int]],
        temperature: float,
        seed: int,
        numbers: Sequence[int],
        max_completion_tokens: int,
        at_once: int,
    ) -> list[Answered]:
        sampling = Sampling(temperature, seed=seed)
        stop = stop_ids(model, tokenizer, end_token_ids)
        said = answers(model, tokenizer, prompts, max_completion_tokens, stop, at_once, sampling, numbers=numbers)
        return [Answered(each.token_ids, each.text, each.finish == "length") for each in said]

    assert isinstance(work.objective, GroupPolicy)
    return replace(work, objective=replace(work.objective, answer=answer, judge=judges_of(names)))
