"""Read the lines of a text file, name those that are no text, and collect what is wrong with rows.

A file is decoded line by line: decoding it whole, the usual way, reports one byte offset and says nothing of
the rest. A byte-order mark at the start and CRLF line ends are accepted; they carry no meaning.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qlora_lite.errors import DataError

from .data_files import open_bytes

MAX_ROW_BYTES = 5_000_000
MAX_BLANK_BYTES = 1_000_000  # in a row: a small compressed file can hold gigabytes of them
MAX_SHOWN_PROBLEMS = 20
ASK_OLD_MAC = (
    "do the lines end with a carriage return alone, as on old Macs? then save it with those of Windows or Linux"
)
_BOM = "\ufeff"
_PLACE = re.compile(r"(.*):([0-9]+)(?: \(row ([0-9]+)\))?", re.DOTALL)
_RETURN = re.compile(rb"\r(?!\n|$)")  # alone, not before a line end


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
    """

    found: list[RowProblem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    fatal: bool = False
    files: Counter[str] = field(default_factory=Counter)

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
        self.fatal = self.fatal or fatal
        self.counts[rule] += 1
        if where:
            self.files[where.rpartition(":")[0]] += 1
        if self.counts[rule] <= MAX_SHOWN_PROBLEMS:
            self.found.append(RowProblem(where, rule, str(fault)))

    def too_many(self, allowed: int) -> bool:
        """Tell whether there are more problems than allowed, or a fatal one."""
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


def numbered_lines(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """Yield (line number, text without line end) of each good line; name the others."""
    for number, text, fault in all_lines(path):
        if fault:
            problems.add(fault.where, fault.message, fault.rule)
        else:
            yield number, text


def all_lines(path: Path) -> Iterator[tuple[int, str | None, RowProblem | None]]:
    """Yield (line number, text without line end, what is wrong with it) of each line.

    The text of a bad line is what can be read of it, None if it is too long to be read.

    Raises:
        DataError: MAX_BLANK_BYTES in a row are blank.
    """
    with open_bytes(path) as file:
        number = blank = 0
        while raw := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            where, fault = f"{path}:{number}", None
            blank = blank + len(raw) if raw.isspace() else 0
            if blank > MAX_BLANK_BYTES:
                raise DataError(f"{where}: more than {MAX_BLANK_BYTES:,} bytes of blank lines; remove them")
            if len(raw) > MAX_ROW_BYTES:
                cure = f"{ASK_OLD_MAC}; if not, split this row" if _RETURN.search(raw) else "split this row"
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_ROW_BYTES)
                message = f"a line of more than {MAX_ROW_BYTES:,} bytes; {cure}"
                yield number, None, RowProblem(where, DataError.rule, message)
                continue
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                text = raw.decode("utf-8", "replace")
                message = f"byte {error.start + 1} of the line is not UTF-8; convert the file to UTF-8"
                fault = RowProblem(where, "not UTF-8", message)
            if "\0" in text and fault is None:
                fault = RowProblem(where, DataError.rule, "the line holds a NUL character; remove it")
            yield number, text.removeprefix(_BOM if number == 1 else "").rstrip("\r\n"), fault
