"""Find the files that a path, folder or glob pattern means, open them, gzip and zstd included, and read their lines.

What a file is, its name says; the first bytes must agree. Going by the first bytes alone, the other known way,
would let a file train whose name a user reads wrongly; going by the name alone gives "not UTF-8 in line 1" for
a gzip. A name that says nothing is an error, since JSON that is read as plain text trains without a complaint.
Unpacking is pyarrow's, which comes with ``datasets``: it knows both kinds and, unlike Python's gzip module, has one
exception for every kind of damage.

Text is decoded line by line: decoding a file whole, the usual way, reports one byte offset and says nothing of the
rest. A byte-order mark at the start and CRLF line ends are accepted; they carry no meaning.
"""

import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from qlora_lite.errors import DataError
from qlora_lite.files import TooManyFolders, matches

from .hub import PREFIX, hub_files
from .problems import Problems, RowProblem

READER_OF_SUFFIX = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_COMPRESSION_OF_SUFFIX = {".gz": "gzip", ".zst": "zstd"}
_CARD_SUFFIX = ".md"  # of what may describe the rows beside it and be none of them
_ABOUT = re.compile(r"(readme|license|licence|changelog|contributing)(?![a-z])", re.IGNORECASE)  # texts that do
_DESCRIPTIONS = {"dataset_info.json", "state.json"}  # beside what ``datasets.save_to_disk`` wrote, one folder a split,
_SPLITS = "dataset_dict.json"  # and above the folders of several
_COLUMN_READERS = ("parquet", "arrow")
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])")
_SUFFIX_OF_MAGIC = {"gzip": ".gz", "zstd": ".zst"}
MAX_ROW_BYTES = 5_000_000
MAX_BLANK_BYTES = 1_000_000  # in a row: a small compressed file can hold gigabytes of them
ASK_OLD_MAC = (
    "do the lines end with a carriage return alone, as on old Macs? then save it with those of Windows or Linux"
)
_BOM = "\ufeff"
_RETURN = re.compile(rb"\r(?!\n|$)")  # alone, not before a line end


def local_files(paths: Iterable[str]) -> list[Path]:
    """List the data files that paths mean, as far as they are on this machine and there."""
    found: list[Path] = []
    for path in paths:
        with suppress(DataError, OSError):
            found += [] if path.startswith(PREFIX) else find_files(path)
    return found


def find_files(pattern: str) -> list[Path]:
    """List the data files that a path, folder, glob pattern or hub path means.

    Args:
        pattern: "rows.jsonl", "folder", "folder/*.parquet" or "hub:owner/name"; "~" is the home folder.

    Returns:
        At least one path, sorted by name; a folder gives its files with a known suffix, subfolders included,
        without what ``left_out`` lists, hidden files and hidden folders. Its .md files are data where it has no others;
        a .md, .txt or .text file whose name begins with the word readme, license, licence, changelog or
        contributing never is. Of one that ``datasets.save_to_disk`` wrote, the data set is, and nothing beside it.

    Raises:
        DataError: nothing is there, something is that is not a file, one file is there under two names, or
            files of several kinds, or a folder with those of several splits.
    """
    if pattern.startswith(PREFIX):
        return hub_files(pattern)
    path = Path(os.path.expanduser(pattern))
    if path.is_dir():
        files = _data_files(_visible(path))
        if not files:
            suffixes = ", ".join(sorted(READER_OF_SUFFIX))
            raise DataError(
                f"{pattern}: no data file in this folder (looked for {suffixes}, each also with .gz or .zst); "
                "rename the files, or name plain text of other names with a pattern such as folder/* and format: text"
            )
        _check_one_split(path, files)
    elif path.exists():
        files = [path]
    else:
        try:
            files = sorted(Path(name) for name in matches(str(path)) if not os.path.isdir(name))
        except TooManyFolders as error:
            raise DataError(f"{pattern}: {error}") from None
        if not files:
            link = " (a symbolic link that leads nowhere)" if path.is_symlink() else ""
            raise DataError(f"{pattern}: no such file{link}; check data.train and data.eval")
    _check_files(files)
    _check_one_kind(pattern, files)
    return files


def left_out(pattern: str) -> list[Path]:
    """List what is in a folder and not read: files that are no data (see ``find_files``), and links to folders.

    Args:
        pattern: as for ``find_files``; what is no folder leaves nothing out.
    """
    folder = Path(os.path.expanduser(pattern))
    found = _visible(folder) if folder.is_dir() else []
    read = set(_data_files(found))
    return [path for path in found if (path.is_symlink() if path.is_dir() else path not in read)]


def _visible(folder: Path) -> list[Path]:
    """Return all that is in a folder and its subfolders, links to folders not followed."""
    found = folder.rglob("*")
    return sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts))


def _data_files(found: list[Path]) -> list[Path]:
    """Return the data files of a folder, as ``find_files`` says which they are."""
    files = [path for path in found if data_suffix(path) in READER_OF_SUFFIX and not path.is_dir()]
    files = [path for path in files if READER_OF_SUFFIX[data_suffix(path)] != "text" or not _ABOUT.match(path.name)]
    files = _without_what_describes(files)
    return [path for path in files if data_suffix(path) != _CARD_SUFFIX] or files


def _without_what_describes(files: list[Path]) -> list[Path]:
    """Leave out what ``datasets`` writes beside the rows of a saved data set, results of map and filter among them."""
    names: dict[Path, set[str]] = {}
    for path in files:
        names.setdefault(path.parent, set()).add(path.name)
    saved = {folder for folder, found in names.items() if found >= _DESCRIPTIONS}
    above = {folder.parent for folder in saved}
    return [
        path
        for path in files
        if not (path.name == _SPLITS and path.parent in above)
        and not (path.parent in saved and (path.name in _DESCRIPTIONS or path.match("cache-*.arrow")))
    ]


def _check_one_split(folder: Path, files: list[Path]) -> None:
    """Refuse a folder whose names speak of training and of other rows, as those of a hub data set do."""
    found: dict[str, Path] = {}
    for path in files:
        inside = path.relative_to(folder)
        for part in (inside, *inside.parents):
            if split := _SPLIT.search(part.name.lower()):
                found.setdefault(split[0], folder / part)
                break
    if "train" in found and len(found) > 1:
        raise DataError(
            f"{folder}: files of several splits ({', '.join(sorted(found))}); name those to read, each by itself or "
            f"with a pattern, such as {found['train']}"
        )


def _check_one_kind(pattern: str, files: list[Path]) -> None:
    """Refuse files of several kinds: the same rows in two of them, or what is about the rows, would be trained on."""
    kinds = Counter(READER_OF_SUFFIX.get(data_suffix(path), "other") for path in files)
    if len(kinds) > 1:
        counted = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        raise DataError(
            f"{pattern}: files of several kinds ({counted}); name those of one kind with a pattern such as "
            "folder/**/*.jsonl, or each file by itself"
        )


def _check_files(files: list[Path]) -> None:
    """Refuse what is no ordinary file, and a file under two names: its rows would count twice, unseen."""
    seen: dict[str, Path] = {}
    for path in files:
        if not path.is_file():
            if path.is_symlink() and not path.exists():
                raise DataError(f"{path}: a symbolic link that leads nowhere; remove or correct it")
            raise DataError(f"{path}: not an ordinary file; write its contents to a file first")
        earlier = seen.setdefault(os.path.realpath(path), path)
        if earlier is not path:
            raise DataError(f"{path}: the same file as {earlier}, through a symbolic link; remove the link")


def data_suffix(path: Path) -> str:
    """Return the suffix that says what a file holds: ".jsonl" for rows.jsonl and for rows.jsonl.gz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _COMPRESSION_OF_SUFFIX else suffix


def reader_of(path: Path, is_text: bool = False) -> str:
    """Name the reader of a file: "json", "jsonl", "csv", "tsv", "parquet", "arrow" or "text".

    Args:
        path: the file.
        is_text: whether a file whose name does not say what is in it is plain text.

    Raises:
        DataError: the name does not say what is in the file, or the first bytes are those of another kind.
    """
    suffix = data_suffix(path)
    reader = READER_OF_SUFFIX.get(suffix, "text" if is_text else None)
    expected = _COMPRESSION_OF_SUFFIX.get(path.suffix.lower())
    with path.open("rb") as file:
        head = file.read(8)
    kind = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    if expected is None and kind is not None and not (reader in _COLUMN_READERS and kind.lower() == reader):
        raise DataError(f"{path}: {_cure(path, kind)}")
    if reader is None:
        example = f"rows.jsonl{path.suffix}" if expected else "rows.jsonl"
        raise DataError(
            f"{path}: the name does not say what is in it; name it like {example} (known are "
            f"{', '.join(sorted(READER_OF_SUFFIX))}), or write format: text in the recipe if it is plain text"
        )
    if expected and reader in _COLUMN_READERS:
        raise DataError(f"{path}: {suffix[1:]} files are compressed inside; unpack this one first")
    if expected and kind != expected:
        raise DataError(f"{path}: the name says {expected}, the content does not; rename it to {path.stem}")
    return reader


def _cure(path: Path, kind: str) -> str:
    what = f"the content is {kind}"
    if kind in _SUFFIX_OF_MAGIC:
        return f"{what}; rename it to {path.name}{_SUFFIX_OF_MAGIC[kind]}"
    if kind in ("Parquet", "Arrow"):
        return f"{what}; rename it to {path.stem}.{kind.lower()}"
    return f"{what}; unpack it or convert it to UTF-8 text first"


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, unpacked if its name ends in .gz or .zst.

    Raises:
        OSError: it cannot be read; so do later reads where the compressed content is damaged or cut short.
    """
    compression = _COMPRESSION_OF_SUFFIX.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression))


def numbered_lines(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """Yield (line number, text without line end) of each good line; name the others."""
    for number, text, fault in all_lines(path):
        if fault:
            problems.add(fault.where, fault.message, fault.rule)
        elif text is not None:
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
