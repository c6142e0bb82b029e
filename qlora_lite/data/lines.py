"""Read the lines of a text file, name those that are no text, and collect what is wrong with rows.

A file is decoded line by line: decoding it whole, the usual way, reports one byte offset and says nothing of
the rest. A byte-order mark at the start and CRLF line ends are accepted; they carry no meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qlora_lite.data.opening import open_bytes
from qlora_lite.errors import DataError

MAX_ROW_BYTES = 5_000_000
MAX_SHOWN_PROBLEMS = 20
_BOM = "\ufeff"


@dataclass(slots=True)
class Problems:
    """Collect what is wrong with rows, so that one error names many of them.

    Args:
        shown: the first problems, at most MAX_SHOWN_PROBLEMS, each "file:line: what is wrong; the cure".
        count: how many there are in all.
    """

    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, where: str, message: str) -> None:
        """Note one problem of the row at `where`."""
        self.count += 1
        if len(self.shown) < MAX_SHOWN_PROBLEMS:
            self.shown.append(f"{where}: {message}")

    def raise_if_any(self) -> None:
        """Raise a DataError that lists the problems, if there are any."""
        if self.count == 0:
            return
        rest = self.count - len(self.shown)
        raise DataError("\n".join(self.shown + ([f"... and {rest} more problems of this kind"] if rest else [])))


def numbered_lines(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """Yield (line number, text without line end) of each good line; name the others."""
    with open_bytes(path) as file:
        number = 0
        while raw := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(raw) > MAX_ROW_BYTES:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_ROW_BYTES)
                problems.add(where, f"a line of more than {MAX_ROW_BYTES:,} bytes; split this row")
                continue
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                problems.add(where, f"byte {error.start + 1} of the line is not UTF-8; convert the file to UTF-8")
                continue
            if "\0" in text:
                problems.add(where, "the line holds a NUL character; remove it")
                continue
            yield number, text.removeprefix(_BOM if number == 1 else "").rstrip("\r\n")
