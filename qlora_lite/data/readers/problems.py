"""Collect what is wrong with rows, and write the places of rows."""

import re
from collections import Counter
from dataclasses import dataclass, field

from qlora_lite.errors import DataError

MAX_SHOWN_PROBLEMS = 20
_PLACE = re.compile(r"(.*):([0-9]+)(?: \(row ([0-9]+)\))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class RowProblem:
    """Hold one thing that is wrong with the data.

    Args:
        where: "file.jsonl:12", "file.json:1 (row 12)" of several on a line, or "" where no single row is meant.
        rule: what is broken, in a few words; also the reason under which a dropped row is counted.
        message: what is wrong; the cure.
    """

    where: str
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


@dataclass(slots=True)
class Problems:
    """Collect what is wrong with rows, so that one error names many of them.

    Args:
        found: the first problems of each rule, at most MAX_SHOWN_PROBLEMS of one.
        counts: rule -> problems in all.
        files: file -> problems of its rows.
        fatal: whether one of them is more than a bad row among good ones.
        warnings: what was asked for, and is still to be known; not counted.
    """

    found: list[RowProblem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    fatal: bool = False
    files: Counter[str] = field(default_factory=Counter)
    warnings: list[RowProblem] = field(default_factory=list)
    _last: RowProblem | None = None

    @property
    def count(self) -> int:
        """Return how many problems there are in all."""
        return self.counts.total()

    @property
    def shown(self) -> list[str]:
        """Return the problems found as lines "file:line: what is wrong; the cure"."""
        return [str(problem) for problem in self.found]

    def add(self, where: str, fault: str | DataError, rule: str = DataError.rule, fatal: bool = False) -> None:
        """Note one problem.

        Args:
            where: the row's place, or "" for all rows.
            fault: what is wrong; an error brings its own rule.
            rule: what is broken.
            fatal: True for what leaving out this row does not cure.
        """
        rule = fault.rule if isinstance(fault, DataError) else rule
        problem = RowProblem(where, rule, str(fault))
        if where and problem == self._last:  # of a part of a split row, looked at again
            return
        self._last = problem
        self.fatal = self.fatal or fatal
        self.counts[rule] += 1
        if where:
            self.files[where.rpartition(":")[0]] += 1
        if self.counts[rule] <= MAX_SHOWN_PROBLEMS:
            self.found.append(problem)

    def too_many(self, allowed: int) -> bool:
        """Return whether there are more problems than allowed, or a fatal one."""
        return self.fatal or self.count > allowed

    def raise_if_any(self, allowed: int = 0) -> None:
        """Raise a DataError that lists the problems, if there are more than allowed."""
        if not self.too_many(allowed):
            return
        lines = self.shown[:MAX_SHOWN_PROBLEMS]
        rest = self.count - len(lines)
        raise DataError("\n".join(lines + ([f"... and {rest} more problems"] if rest else [])))


def write_place(file: str, line: int, row: int = 0) -> str:
    """Return what messages call a row: its file and line, and its number where that line holds several rows."""
    return f"{file}:{line} (row {row})" if row else f"{file}:{line}"


def read_place(where: str) -> tuple[str, int, int] | None:
    """Return file, line and row as ``write_place`` took them; None if no place is written."""
    found = _PLACE.fullmatch(where)
    return found and (found[1], int(found[2]), int(found[3] or 0))
