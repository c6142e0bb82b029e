"""Every error this package raises on purpose, each with the exit code the command line ends with.

They are shown as plain lines without a stack trace, so their text must say what is wrong and what to do. One
small tree with the code on the class (and not a table in the command line) keeps the two from drifting apart.

Exit codes: 2 the recipe, the data, the model, the disk or the arguments are wrong; 3 does not fit in memory;
130 interrupted (128 + SIGINT, the shell's convention); 1 anything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata


class QloraLiteError(Exception):
    """Report a problem that the user can act on; shown without a stack trace."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """Hold one thing that is wrong with a recipe.

    Args:
        message: what is wrong and the cure, without the place.
        where: "file.yaml:7", "override 1", or "" when the whole recipe is meant.
        key: dotted setting it is about, such as "lora.rank"; "" when it is about the file.
    """

    message: str
    where: str = ""
    key: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class RecipeError(QloraLiteError):
    """Report every problem of a recipe at once; `str()` is one problem per line.

    Args:
        problems: what is wrong, in the order of the file; a plain string is a problem without a place.
    """

    exit_code = 2

    def __init__(self, problems: Sequence[Problem | str] | Problem | str) -> None:
        if isinstance(problems, Problem | str):
            problems = [problems]
        self.problems: list[Problem] = [p if isinstance(p, Problem) else Problem(p) for p in problems]
        super().__init__("\n".join(str(problem) for problem in self.problems))


class DataError(QloraLiteError):
    """Report a data file or a row that cannot be used.

    Args:
        message: what is wrong and what to do.
        rule: what a row breaks, in a few words; rows are counted under it.
    """

    exit_code = 2
    rule = "malformed row"

    def __init__(self, message: str, rule: str | None = None) -> None:
        super().__init__(message)
        self.rule = rule or self.rule


class ModelError(QloraLiteError):
    """Report a model, tokenizer or adapter that cannot be found, read or used."""

    exit_code = 2


def matches_nothing(patterns: Sequence[str], known: Iterable[str], what: str = "linear layer") -> str:
    """Return that patterns match none of a model's layers, with those that were perhaps meant."""
    names = sorted(known)
    near = {near for pattern in patterns for near in get_close_matches(pattern, names)}
    hint = f"did you mean {', '.join(sorted(near))}?" if near else f"this model has {', '.join(names)}"
    return f"{', '.join(map(repr, patterns))} matches no {what} of this model; {hint}"


def first_line(error: BaseException) -> str:
    """Return another library's words without its advice and traces: their first line, and the next if it ends in a
    colon."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}"[:300] if others and first.endswith(":") else first[:300]


def how_to_install(extra: str) -> str:
    """Return the command that installs the packages of an extra, wherever this package itself was installed from."""
    try:
        declared = metadata.requires("qlora-lite") or []
    except metadata.PackageNotFoundError:  # run from a clone
        declared = []
    in_clone = f"'.[{extra}]'"
    parts = [line.partition(";") for line in declared]
    packages = [f"'{package.strip()}'" for package, _, when in parts if re.search(rf"extra == ['\"]{extra}['\"]", when)]
    return f"pip install {' '.join(packages or [in_clone])}"


@contextmanager
def tokenizer_faults() -> Iterator[None]:
    """Raise what the tokenizers library, which is Rust, raises as a ModelError.

    For a pattern that it cannot compile that is a bare ``Exception``; for one that gives up on a text, it is a
    PanicException, which no module exports and which is no ``Exception``.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"the tokenizer fails ({first_line(error)}): the patterns in its tokenizer.json cannot be "
            "used; download that file again, or choose another model"
        ) from error


def require_one_of(name: str, value: object, choices: Iterable[str | None]) -> None:
    """Check an argument that has few values.

    Raises:
        ModelError: it is none of them.
    """
    known = list(choices)
    if value not in known:
        raise ModelError(f"{name} is {value!r}; choose one of {', '.join(map(str, known))}")


class LaunchError(QloraLiteError):
    """Report that a launcher started several processes; without a text where another rank says it."""

    exit_code = 2


class ExtensionError(QloraLiteError):
    """Report an extension that cannot be loaded, or does not go with another one."""

    exit_code = 2


class OutputError(QloraLiteError):
    """Report a folder or file that cannot be written (permission, full or read-only disk)."""

    exit_code = 2


class CheckpointError(QloraLiteError):
    """Report a checkpoint that is damaged, or that the run asked for cannot resume from."""

    exit_code = 2


class DoesNotFitError(QloraLiteError):
    """Report that the work needs more memory than there is."""

    exit_code = 3


class TrainingError(QloraLiteError):
    """Report that training had to stop: a loss that is not finite, or a guard that failed."""

    exit_code = 1


class Interrupted(QloraLiteError):
    """Report that the user stopped the run."""

    exit_code = 130
