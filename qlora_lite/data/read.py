"""Read rows from JSON, JSONL, CSV, TSV, Parquet, Arrow and plain text, and name every row that is not whole.

`datasets.load_dataset` is not used here: it stops at the first bad line without saying which one, keeps the
last of two equal keys, accepts NaN, and fills nested fields with nulls. Reading line by line costs little
beside tokenising and gives each row a place, `file:line` (for Parquet and Arrow `file:row`, counted from 1),
that all later messages use.

JSONL and CSV are streamed, so memory does not grow with the file. A JSON array and a text file are read
whole. Plain text: documents are separated by blank lines; a file without a blank line has one document per
line.
"""

from __future__ import annotations

import csv
import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_lite.data.json_rows import read_json, read_jsonl
from qlora_lite.data.lines import Problems, numbered_lines
from qlora_lite.errors import DataError

_READER_OF_SUFFIX = {
    ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".arrow": "arrow", ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"\xff\xfe": "UTF-16",
          b"\xfe\xff": "UTF-16"}  # fmt: skip
_BLANK_LINE = re.compile(rb"\n[ \t\r\f\v]*\n")


@dataclass(frozen=True, slots=True)
class Source:
    """Name one place that rows come from.

    Args:
        path: a file, a folder (its data files, in order of name) or a glob pattern.
        format: None to recognise it from the first row, or one of `formats.FORMATS`.
        weight: how often each row is used per epoch, above 0; 2 means twice, 0.5 every second row.
        prompt: with `completion`, a template such as "Q: {question}" over the row's columns.
        completion: the template of the answer.
    """

    path: str
    format: str | None = None
    weight: float = 1.0
    prompt: str | None = None
    completion: str | None = None


def read_rows(source: Source, problems: Problems | None = None) -> Iterator[tuple[str, dict]]:
    """Read the rows of a source in order.

    Args:
        source: where to read.
        problems: collects rows that cannot be read; None to raise after the last row instead.

    Returns:
        An iterator of (where, row), where being "file.jsonl:12".

    Raises:
        DataError: a file is missing, not readable or has no rows; without `problems`, also any malformed row.
    """
    found = problems if problems is not None else Problems()
    for path in find_files(source.path):
        rows_before, problems_before = 0, found.count
        try:
            for where, row in _read_file(path, found):
                rows_before += 1
                yield where, row
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        if rows_before == 0 and found.count == problems_before:
            raise DataError(f"{path}: the file has no rows")
    if problems is None:
        found.raise_if_any()


def find_files(pattern: str) -> list[Path]:
    """List the data files that a path, folder or glob pattern means.

    Args:
        pattern: "rows.jsonl", "folder" or "folder/*.parquet"; "~" is the home folder.

    Returns:
        At least one path, sorted by name; a folder gives its files with a known suffix, subfolders included.

    Raises:
        DataError: nothing is there, or something is that is not a file.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _READER_OF_SUFFIX and p.is_file())
        if not files:
            suffixes = ", ".join(sorted(_READER_OF_SUFFIX))
            raise DataError(f"{pattern}: no data file in this folder (looked for {suffixes})")
        return files
    if path.is_file():
        return [path]
    if path.exists():
        raise DataError(f"{pattern}: not an ordinary file; write its contents to a file first")
    files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not files:
        link = " (a symbolic link that leads nowhere)" if path.is_symlink() else ""
        raise DataError(f"{pattern}: no such file{link}; check data.train and data.eval")
    return files


def _read_file(path: Path, problems: Problems) -> Iterator[tuple[str, dict]]:
    with path.open("rb") as file:
        head = file.read(4)
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{path}: this is a {kind} file; unpack it or convert it to UTF-8 text first")
    reader = _READER_OF_SUFFIX.get(path.suffix.lower(), "text")
    if reader == "jsonl":
        return read_jsonl(path, problems)
    if reader == "json":
        return read_json(path, problems)
    if reader == "csv":
        return _read_csv(path, problems)
    if reader == "text":
        return _read_text(path, problems)
    return _read_columns(path, reader)


def _read_csv(path: Path, problems: Problems) -> Iterator[tuple[str, dict]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines_of_row: list[int] = []  # the numbers of the lines that the csv reader took for the row at hand

    def lines() -> Iterator[str]:
        for number, line in numbered_lines(path, problems):
            lines_of_row.append(number)
            yield line + "\n"

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        lines_of_row.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            problems.add(f"{path}:{lines_of_row[0]}", f"not CSV: {error}; check the quotes of this row")
            continue
        if cells is None:
            return
        where = f"{path}:{lines_of_row[0]}"
        if not cells:
            continue
        if header is None:
            header = [name.strip() for name in cells]
            if "" in header or len(set(header)) < len(header):
                raise DataError(f"{where}: the first line must name every column once, it is {', '.join(cells)!r}")
        elif len(cells) != len(header):
            problems.add(where, f"{len(cells)} fields, but the header names {len(header)} columns")
        else:
            yield where, dict(zip(header, cells, strict=True))


def _read_columns(path: Path, kind: str) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        row = 0
        for batch in _record_batches(path, kind):
            for values in batch.to_pylist():
                row += 1
                yield f"{path}:{row}", values
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise DataError(f"{path}: not a whole {kind} file ({str(error).splitlines()[0]})") from error


def _record_batches(path: Path, kind: str) -> Iterator:
    import pyarrow
    import pyarrow.parquet

    if kind == "parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=1000)
        return
    with path.open("rb") as file:
        is_file_format = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file_format:
            reader = pyarrow.ipc.open_file(file)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from pyarrow.ipc.open_stream(file)


def _read_text(path: Path, problems: Problems) -> Iterator[tuple[str, dict]]:
    """Yield {"text": document}; blank lines part documents, and without any each line is one."""
    each_line = _BLANK_LINE.search(path.read_bytes().strip()) is None
    start, lines = 0, []
    for number, line in numbered_lines(path, problems):
        if line.strip():
            start = start or number
            lines.append(line)
        if lines and (each_line or not line.strip()):
            yield f"{path}:{start}", {"text": "\n".join(lines)}
            start, lines = 0, []
    if lines:
        yield f"{path}:{start}", {"text": "\n".join(lines)}
