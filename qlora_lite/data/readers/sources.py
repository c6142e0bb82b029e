"""Read rows from JSON, JSONL, CSV, TSV, Parquet, Arrow and plain text, and name every row that is not whole.

``datasets.load_dataset`` is not used here: it stops at the first bad line without saying which one, keeps the
last of two equal keys, accepts NaN, and fills nested fields with nulls. Reading line by line costs little
beside tokenising and gives each row a place, ``file:line`` (for Parquet and Arrow ``file:row``, counted from 1; for
several rows on a line of a JSON file ``file:line (row 12)``), that all later messages use.

Every text kind may be compressed with gzip or zstd. Files are streamed, so memory does not grow with them; only
a JSON array is read whole, and a .json file that does not begin with a row. Plain text: unless the source says what a
document is, documents are separated by blank lines; a file without a blank line has one document per line.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qlora_lite.errors import DataError, first_line
from qlora_lite.units import format_bytes

from .data_files import MAX_BLANK_BYTES, MAX_ROW_BYTES, all_lines, find_files, numbered_lines, open_bytes, reader_of
from .fields import kind_of, without_absent
from .hub import PREFIX, hub_rows
from .json_rows import HALF_A_PAIR, NUL, read_json, read_jsonl
from .problems import Problems

DOCUMENTS = "lines", "blank-lines", "file"
_PIECE_BYTES = 1 << 20
_FIRST_LINE = re.compile(r'sep=([^\w\s"]|\t)\1*', re.IGNORECASE)  # in which Excel names the sign between columns
_PROSE = re.compile("[;,] ")  # signs that part words, as in a column "text, cleaned"
_SIGNS = {
    ";": ("semicolons", "save it with commas, or write sep=; as its first line"),
    "\t": ("tabs", "name it .tsv"),
    ",": ("commas", "name it .csv"),
}
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # is no text, in files neither (``json_rows``)
_ROWS_PER_BATCH = 1000
_BATCH_BYTES = 1 << 26
MAX_STORED_ROW_BYTES = 1 << 28  # of a Parquet or Arrow file, which may hold pictures
_PLAIN_KINDS = {"Value", "List", "LargeList", "Sequence", "ClassLabel", "Json"}


@dataclass(frozen=True, slots=True)
class Source:
    """Name one place that rows come from.

    Args:
        path: a file, a folder (its data files, in order of name), a glob pattern, or hub:OWNER/NAME.
        format: None to recognise it from the first row, or one of ``row_formats.FORMATS``.
        weight: how often each row is used per epoch, above 0; 2 means twice, 0.5 every second row.
        prompt: with ``completion``, a template such as "Q: {question}" over the row's columns.
        completion: the template of the answer.
        streaming: read a hub data set over the network, row by row, instead of downloading it first.
        rows: rows in memory (a list of dicts, a ``datasets.Dataset``) in place of files; ``path`` is then what messages
            call them. Pictures of a Dataset are taken as it stores them, and not decoded.
        documents: what a document of a plain-text file is, one of DOCUMENTS; None for blank-lines where there are any,
            else lines.
        setting: the setting that names it, for messages.
        rejected: the template of the answer that ``completion`` is preferred to, where answers are compared.
        with_pictures: whether chats may hold pictures.
        class_names: whether the numbers of a column of classes, which ``datasets`` writes beside their names into Arrow
            and Parquet files (ClassLabel), are read as these names.
    """

    path: str
    format: str | None = None
    weight: float = 1.0
    prompt: str | None = None
    completion: str | None = None
    streaming: bool = False
    rows: Iterable[Mapping[str, object]] | None = None
    documents: str | None = None
    setting: str = "data.train"
    rejected: str | None = None
    with_pictures: bool = False
    class_names: bool = False


def read_rows(source: Source, problems: Problems | None = None) -> Iterator[tuple[str, dict]]:
    """Read the rows of a source in order.

    Args:
        source: where to read.
        problems: collects rows that cannot be read; None to raise after the last row instead.

    Returns:
        An iterator of (where, row), where being "file.jsonl:12".

    Raises:
        DataError: a file is missing, not readable or has no rows; without ``problems``, also any malformed row.
    """
    found = problems if problems is not None else Problems()
    for path, read in _parts(source, found):
        rows_before, problems_before = 0, found.count
        try:
            for where, row in read():
                rows_before += 1
                yield where, row
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from error
        if rows_before == 0 and found.count == problems_before:
            raise DataError(f"{path}: the file has no rows")
    if problems is None:
        found.raise_if_any()


def _parts(source: Source, problems: Problems) -> list[tuple[str | Path, Callable[[], Iterator[tuple[str, dict]]]]]:
    """Return the parts of a source, each with what reads it."""
    if source.documents not in (None, *DOCUMENTS):
        raise DataError(f"{source.path}: documents is {source.documents!r}; choose one of {', '.join(DOCUMENTS)}")
    if source.documents and (source.rows is not None or source.path.startswith(PREFIX)):
        raise DataError(f"{source.path}: documents is for files of plain text; remove it")
    if source.rows is not None:
        return [(source.path, partial(_in_memory, source, problems))]
    if source.streaming and source.path.startswith(PREFIX):
        return [(source.path, partial(hub_rows, source.path))]
    return [(path, partial(_read_file, path, source, problems)) for path in find_files(source.path)]


def _in_memory(source: Source, problems: Problems) -> Iterator[tuple[str, dict]]:
    name, rows = source.path, source.rows
    assert rows is not None
    is_arrow = hasattr(rows, "features")  # a Dataset's: nulls stand where a row's objects lack a key
    for number, row in enumerate(_as_stored(rows, source.class_names) if is_arrow else rows, start=1):
        if isinstance(row, Mapping) and (odd := next(filter(None, map(_NO_TEXT.search, _texts(row))), None)):
            problems.add(f"{name}:{number}", NUL if odd[0] == "\0" else HALF_A_PAIR)
        elif isinstance(row, Mapping):
            yield f"{name}:{number}", {str(key): without_absent(v) if is_arrow else v for key, v in row.items()}
        else:
            problems.add(f"{name}:{number}", f"the row is {kind_of(row)}, not an object with columns")


def _as_stored(rows: Any, class_names: bool) -> Iterable[object]:
    """Return the rows of a ``datasets.Dataset`` as files have them where it would decode pictures, or numbers classes.

    Args:
        class_names: see ``Source``.
    """
    kinds = set(_kinds(rows.features.to_dict())) if rows.features else set()
    transforms = getattr(rows, "format", {}).get("type") == "custom"  # a user's own, which stays
    if transforms or not ("Image" in kinds or (class_names and "ClassLabel" in kinds)):
        return rows
    tables = rows.with_format("arrow").iter(_ROWS_PER_BATCH)
    return (row for table in tables for row in map(_decoder(table.schema, class_names), table.to_pylist()))


def _texts(value: object) -> Iterator[str]:
    """Yield every text in a row, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _read_file(path: Path, source: Source, problems: Problems) -> Iterator[tuple[str, dict]]:
    reader = reader_of(path, source.format == "text")
    if source.documents and reader != "text":
        raise DataError(f"{path}: documents is for files of plain text, not for {reader}; remove it")
    if reader == "jsonl":
        return read_jsonl(path, problems)
    if reader == "json":
        return read_json(path, problems)
    if reader in ("csv", "tsv"):
        return _read_csv(path, "\t" if reader == "tsv" else ",", problems)
    if reader == "text":
        return _read_text(path, _documents_of(path, source), problems)
    return _read_columns(path, reader, source.class_names)


def _read_csv(path: Path, delimiter: str, problems: Problems) -> Iterator[tuple[str, dict]]:
    """Yield a dict per row; a row with a bad line in it is left out whole, and named by that line.

    A first line such as sep=; names the sign between columns in place of ``delimiter``, as in Excel.
    """
    lines_of_row: list[int] = []  # the numbers of the lines that the csv reader took for the row at hand
    bad_lines: list[int] = []
    header: list[str] | None = None

    def lines() -> Iterator[str]:
        for number, line, fault in all_lines(path):
            lines_of_row.append(number)
            if fault and header is None:
                raise DataError(str(fault))
            if fault:  # the reader still gets the line, for its quotes; those of one that is not read are not known
                problems.add(fault.where, fault.message, fault.rule, fatal=line is None)
                bad_lines.append(number)
            yield (line or "") + "\n"

    def refuse(fault: str) -> None:
        """Name the row at hand; one of several lines may have taken in good rows, which leaving it out would lose."""
        first, last = lines_of_row[0], lines_of_row[-1]
        if last > first:
            fault += f"; lines {first:,} to {last:,} were read as one row: a quote may be missing in the first"
        if header is None:
            raise DataError(f"{path}:{first}: {fault}")
        problems.add(f"{path}:{first}", fault, fatal=last > first)

    all_rows = lines()
    reader = csv.reader(all_rows, delimiter=delimiter, strict=True)
    while True:
        lines_of_row.clear()
        bad_lines.clear()
        try:
            cells = _next_row(reader)
        except csv.Error as error:
            fault = f"not CSV: {error}; check the quotes of this row"
            if header is None and "new-line" in str(error):  # a carriage return outside quotes
                cure = "save it with those of Windows or Linux"
                fault = f"the lines end with a carriage return alone, as on old Macs; {cure}"
            refuse(fault)
            continue
        if cells is None:
            return
        where = f"{path}:{lines_of_row[0]}"
        if not cells or bad_lines:
            continue
        if header is None and (named := _FIRST_LINE.fullmatch(delimiter.join(cells))) and lines_of_row == [1]:
            delimiter = named[1]
            reader = csv.reader(all_rows, delimiter=delimiter, strict=True)
        elif header is None:
            header = _column_names(cells, where, delimiter)
        elif len(cells) != len(header):
            cure = f"; {asked}" if (asked := ask_for_sign(header, delimiter)) else ""
            refuse(f"{len(cells)} fields, but the header names {len(header)} columns{cure}")
        else:
            yield where, dict(zip(header, cells, strict=True))


def _column_names(cells: list[str], where: str, delimiter: str) -> list[str]:
    """Return the names of a table's columns; one without a name, as pandas writes its index, is called by its place.

    Raises:
        DataError: none has a name, two have the same, or they are parted by another sign.
    """
    if len(cells) == 1 and (asked := ask_for_sign([_PROSE.sub(" ", cells[0])], delimiter)):
        raise DataError(f"{where}: the first line names one column, {cells[0]!r}; {asked}")
    header = [name.strip() or f"column {number}" for number, name in enumerate(cells, 1)]
    if not any(name.strip() for name in cells):
        raise DataError(f"{where}: the first line must name the columns, it is {', '.join(cells)!r}")
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise DataError(f"{where}: the first line names the column {twice[0]!r} twice; rename one")
    return header


def ask_for_sign(names: Sequence[str], delimiter: str) -> str | None:
    """Ask whether the columns of a table are parted by another sign, if that gives more of them, and say what to do."""
    for sign, (called, cure) in _SIGNS.items():
        if sign != delimiter and sum(name.count(sign) for name in names) >= len(names):
            return f"are the columns parted by {called}? then {cure}"
    return None


def _next_row(reader: Iterator[list[str]]) -> list[str] | None:
    """Return the next row, None after the last; csv's limit of a field is the whole process's, so it is put back."""
    limit_before = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit_before)


def text_files(source: Source) -> Iterator[tuple[Path, str]]:
    """Yield the plain-text files of a source, each with what a document of it is, one of DOCUMENTS."""
    for path in () if source.path.startswith(PREFIX) else find_files(source.path):
        if reader_of(path, source.format == "text") == "text":
            yield path, _documents_of(path, source)


def _documents_of(path: Path, source: Source) -> str:
    return source.documents or ("blank-lines" if _has_blank_line(path) else "lines")


def _read_text(path: Path, documents: str, problems: Problems) -> Iterator[tuple[str, dict]]:
    """Yield {"text": document} of each document, without the blank lines around it."""
    start = 0
    lines: list[str] = []
    blank: list[str] = []
    for number, line in numbered_lines(path, problems):
        if line.strip():
            start = start or number
            lines += [*blank, line]
            blank = []
        elif lines and documents == "file":
            blank.append(line)
        if lines and (documents == "lines" or (documents == "blank-lines" and not line.strip())):
            yield f"{path}:{start}", {"text": "\n".join(lines)}
            start, lines = 0, []
    if lines:
        yield f"{path}:{start}", {"text": "\n".join(lines)}


def _has_blank_line(path: Path) -> bool:
    """Say whether a blank line stands between two lines that are not."""
    seen_text, seen_blank, blank = False, False, 0
    with open_bytes(path) as file:
        while piece := file.readline(_PIECE_BYTES):
            if piece.strip():
                if seen_blank:
                    return True
                seen_text, blank = True, 0
                continue
            blank += len(piece)
            if blank > MAX_BLANK_BYTES:  # which the reading of the lines refuses
                break
            if piece.endswith(b"\n"):
                seen_blank = seen_text
    return False


def _read_columns(path: Path, kind: str, class_names: bool) -> Iterator[tuple[str, dict]]:
    """Read a Parquet or Arrow file row by row.

    Args:
        path: the file.
        kind: "parquet" or "arrow" (of the file or the stream format).
        class_names: see ``Source``.

    Returns:
        An iterator of ("file.parquet:12", row), rows counted from 1.

    Raises:
        DataError: the file is not whole, or a row is too large.
    """
    import pyarrow

    try:
        row = 0
        for batch in _record_batches(path, kind):
            batch.validate(full=True)  # Arrow trusts a file's offsets: a damaged one would end this process
            decode = _decoder(batch.schema, class_names)
            for piece in _pieces(batch, row):
                for values in map(decode, piece.to_pylist()):
                    row += 1
                    yield f"{path}:{row}", {column: without_absent(value) for column, value in values.items()}
    except (pyarrow.ArrowException, ValueError, TypeError, KeyError, AttributeError, MemoryError) as error:
        raise DataError(f"{path}: not a whole {kind} file ({first_line(error)})") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _decoder(schema, class_names: bool) -> Callable[[dict], dict]:
    """Return what turns a stored row into the row; ``datasets`` stores objects of mixed kinds as JSON text.

    Args:
        class_names: see ``Source``.

    Raises:
        DataError: what the file says of its columns is damaged, or has files or addresses opened.
    """
    described = (schema.metadata or {}).get(b"huggingface", b"")
    try:
        said = ((json.loads(described) if described else {}).get("info") or {}).get("features") or {}
        columns = {name: (said[name], set(_kinds(said[name]))) for name in schema.names if name in said}
        names = {
            name: dict(enumerate(column["names"]))
            for name, (column, _) in columns.items()
            if class_names and isinstance(column, dict) and column.get("_type") == "ClassLabel"
        }
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DataError(f"what it says of its columns cannot be read ({str(error)[:200]!r})") from error
    mixed = {name: column for name, (column, kinds) in columns.items() if "Json" in kinds}
    if others := {kind for name in mixed for kind in columns[name][1]} - _PLAIN_KINDS:
        # images, sounds and the like are read from paths and addresses that rows name
        raise DataError(f"columns of {', '.join(sorted(others))[:200]} are not read; leave them out")
    decode = _json_decoder(mixed) if mixed else dict

    def decoded(row: dict) -> dict:
        row = row | decode({name: row[name] for name in mixed})
        return row | {name: classes.get(row[name], row[name]) for name, classes in names.items()}

    return decoded if mixed or names else dict


def _json_decoder(columns: dict) -> Callable[[dict], dict]:
    from datasets import Features

    try:
        return Features.from_dict(columns).decode_example
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"what it says of its columns cannot be used ({str(error)[:200]!r})") from error


def _kinds(described: object) -> Iterator[str]:
    """Yield the names of all types in a description of columns."""
    if isinstance(described, dict):
        if "_type" in described:
            yield str(described["_type"])
        described = list(described.values())
    for part in described if isinstance(described, list) else ():
        yield from _kinds(part)


def _pieces(batch, before: int) -> Iterator:
    """Cut a record batch into pieces of which Python's copies take little memory.

    Args:
        before: rows of the file before it.

    Raises:
        DataError: a row is too large.
    """
    count = max(1, min(_ROWS_PER_BATCH, len(batch) * _BATCH_BYTES // max(1, batch.nbytes)))
    for start in range(0, len(batch), count):
        piece = batch.slice(start, count)
        for number in range(len(piece)) if piece.nbytes > MAX_STORED_ROW_BYTES else ():
            _check_size(piece.slice(number, 1).nbytes, f"row {before + start + number + 1} has")
        yield piece


def _check_size(row_bytes: int, which: str) -> None:
    if row_bytes > MAX_STORED_ROW_BYTES:
        most = format_bytes(MAX_STORED_ROW_BYTES)
        raise DataError(f"{which} {format_bytes(row_bytes)}, and at most {most} are read; split it, or leave it out")


def _record_batches(path: Path, kind: str) -> Iterator:
    import pyarrow
    import pyarrow.parquet

    if kind == "parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            row_bytes = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
            _check_size(row_bytes, "a row, on average, has")  # before anything of it is unpacked
            yield from file.iter_batches(batch_size=max(1, min(_ROWS_PER_BATCH, _BATCH_BYTES // max(1, row_bytes))))
        return
    with path.open("rb") as file:
        is_file_format = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file_format:
            reader = pyarrow.ipc.open_file(file)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from pyarrow.ipc.open_stream(file)
