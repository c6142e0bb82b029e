"""Pictures with labels as examples: found in folders and tables, looked at one by one, decoded, and made pixels of.

A source is a folder with a folder of pictures for each class, or a table (CSV, TSV, JSONL, Parquet, Arrow) whose rows
name a picture file, or hold a picture's bytes as data sets of the hub do, and its label. Bytes are written once into
the cache, under a name made of their content, so that an example always names a file.

An example of a picture is an ``Example`` as any other: its prompt is the file's path, its answer the label, and its
TOKENS token ids are the first bits of the file's SHA-256. So whatever orders, holds out, compares and digests rows of
text does so with pictures by their content, wherever they lie; the model never sees these numbers.

Every picture is decoded once before training, by threads: what is broken is then a bad row with a place and a reason.
(Trusting the header, the usual way, ends a run hours later in a worker.)

What augmentations draw (``pixels``) follows from the run's seed, the step and the picture alone, so that
neither threads nor a resumed run change a bit.

Shapes: pixels float32 [N, 3, H, W].
"""

import hashlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np

from qlora_lite.data.captions import CAPTION_COLUMNS, CAPTIONS, Fit, caption_in, caption_of, metadata_of
from qlora_lite.data.labelled_rows import LABEL_COLUMNS
from qlora_lite.data.labels import MASKS, ONE_LABEL, label_if_any, label_text
from qlora_lite.data.picture_files import BROKEN, decode, decoding_threads, file_of, pillow, relative_file
from qlora_lite.data.readers.data_files import READER_OF_SUFFIX, data_suffix
from qlora_lite.data.readers.fields import columns_of, fill
from qlora_lite.data.readers.hub import PREFIX
from qlora_lite.data.readers.sources import Source, read_rows
from qlora_lite.data.tokens.statistics import ReadSettings, Statistics, count_unused, no_counts
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import DataError
from qlora_lite.files import leads_up

from .masks import classes_of, label_of_mask
from .pixels import Processor

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
PICTURE_COLUMNS = "image", "path", "file_name", "file", "filename", "image_path", "picture", "img"
FORMAT = "pictures"  # what a report calls such rows
NO_CLASS, NO_MASK = "picture without a class", "picture without a mask"
MASK_COLUMNS = "mask", "masks", "annotation", "segmentation", "label", "labels"
TOKENS = 2  # of an example: 62 bits of its content
_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"})
_AT_ONCE = 256  # pictures that are looked at together


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture file with its label as text, None where it has none and needs none; or with the file of its mask."""

    path: str
    label: str | None
    where: str
    mask: str | None = None


def is_folder_of_pictures(path: str) -> bool:
    """Return whether a source is a folder with pictures in it, and no table."""
    return not path.startswith(PREFIX) and os.path.isdir(os.path.expanduser(path)) and any(_pictures_in(path))


def _pictures_in(path: str) -> Iterator[Path]:
    return (each for each in _files_in(path) if each.suffix.lower() in SUFFIXES)


def _files_in(path: str) -> Iterator[Path]:
    """Yield the files below a folder by name, links followed, without hidden ones and what lies in hidden folders."""
    folder = Path(os.path.expanduser(path))
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not leads_up(Path(here, name)))
        yield from (Path(here, name) for name in sorted(names) if not name.startswith("."))


def not_read(path: str) -> list[Path]:
    """Return the files of a folder of pictures that are no pictures by their names."""
    return [each for each in _files_in(path) if each.suffix.lower() not in SUFFIXES]


def classes_without_pictures(path: str) -> list[str]:
    """Return the names of folders in a folder of pictures that have none in them."""
    folder = Path(os.path.expanduser(path))
    used = {picture.relative_to(folder).parts[0] for picture in _pictures_in(path)}
    return sorted(
        each.name
        for each in folder.iterdir()
        if each.is_dir() and each.name not in used and not each.name.startswith(".")
    )


def read_pictures(
    source: Source,
    statistics: Statistics,
    problem: str,
    needs_label: bool = True,
    max_rows: int | None = None,
    fit: Fit | None = None,
) -> Iterator[tuple[Picture, str]]:
    """Yield the good pictures of a source in order, each with its content's SHA-256; others are noted.

    Args:
        fit: of pictures with captions, what they are cut to.

    Raises:
        DataError: the source has none, or no columns that are known.
    """
    pillow()
    source = with_metadata(source) if problem == CAPTIONS else source
    rows = _of_folder if is_folder_of_pictures(source.path) and source.rows is None else _of_table
    found = islice(rows(source, statistics, problem, needs_label, fit), max_rows)
    while True:
        bad_before = statistics.problems.count
        chunk = list(islice(found, _AT_ONCE))
        looked_at = list(zip(chunk, decoding_threads().map(partial(_looked_at, fit=fit), chunk), strict=True))
        for picture, result in looked_at:
            statistics.seen_kinds[_kind(picture, problem)] += 1
            if isinstance(result, DataError):
                statistics.problems.add(picture.where, result)
        good = [result for _, result in looked_at if not isinstance(result, DataError)]
        statistics.kept_kinds.update(_kind(picture, problem) for picture, _ in good)
        statistics.kept_files.update(picture.where.rpartition(":")[0] for picture, _ in good)
        statistics.rows_read += len(good) + statistics.problems.count - bad_before
        if not chunk:
            return
        yield from good


def with_metadata(source: Source) -> Source:
    """Return a source that is a folder with a table of its pictures' captions as that table."""
    is_folder = source.rows is None and is_folder_of_pictures(source.path)
    table = metadata_of(Path(os.path.expanduser(source.path))) if is_folder else None
    return replace(source, path=str(table)) if table else source


def _kind(picture: Picture, problem: str) -> str:
    if problem == CAPTIONS:
        return "with a caption"
    return "with a mask" if picture.mask else f"with the label {picture.label!r}"


def _looked_at(picture: Picture, fit: Fit | None) -> tuple[Picture, str] | DataError:
    """Return a picture, its mask described, with the SHA-256 of its file; or what is wrong with either."""
    try:
        size = decode(picture.path).size
        if fit:
            fit.size_of(*size)
        if picture.mask:
            picture = replace(picture, label=label_of_mask(picture.mask, size))
        return picture, hashlib.sha256(Path(picture.path).read_bytes()).hexdigest()
    except DataError as error:
        return error
    except OSError as error:
        return DataError(f"cannot be read ({error.strerror or error})", BROKEN)


def _of_folder(
    source: Source, statistics: Statistics, problem: str, needs_label: bool, fit: Fit | None
) -> Iterator[Picture]:
    """Yield the pictures of a folder, each labelled by the folder below it that it lies in."""
    folder = Path(os.path.expanduser(source.path))
    if source.prompt:
        raise DataError(
            f"{source.path}: prompt and completion are for the columns of a table, and this is a folder of "
            "pictures; remove them, or name the table in it"
        )
    if problem == MASKS:
        yield from _with_masks(folder, statistics, needs_label)
        return
    if fit:
        yield from _with_captions(folder, statistics, fit)
        return
    names = {path.relative_to(folder).parts[0].lower() for path in _pictures_in(source.path)}
    if needs_label and len(splits := sorted(names & _SPLITS)) > 1:
        raise DataError(
            f"{source.path}: its folders are splits ({', '.join(splits)}), not classes; name one of them, "
            f"such as {folder / splits[0]}"
        )
    for path in _pictures_in(source.path):
        inside, where = path.relative_to(folder).parts, f"{path}:1"
        if not str(path).isprintable():  # of bytes that are no UTF-8 too
            statistics.problems.add("", f"{str(path)!a}: the name is not plain text; rename the file", BROKEN)
        elif len(inside) > 1:
            yield Picture(str(path), label_text(inside[0], problem), where)
        elif needs_label:
            message = "the picture lies in no folder of a class; move it into one, or name pictures in a table"
            statistics.problems.add(where, message, NO_CLASS)
        else:
            yield Picture(str(path), None, where)


def _with_captions(folder: Path, statistics: Statistics, fit: Fit) -> Iterator[Picture]:
    """Yield the pictures of a folder, each with its caption."""
    for path in _pictures_in(str(folder)):
        try:
            yield Picture(str(path), caption_of(path, folder, fit), f"{path}:1")
        except DataError as error:
            statistics.problems.add(f"{path}:1", error)


def _with_masks(folder: Path, statistics: Statistics, needs_mask: bool) -> Iterator[Picture]:
    """Yield the pictures of a folder's folder images, each with the mask of its name in the folder masks."""
    images, masks = folder / "images", folder / "masks"
    if not images.is_dir() and not needs_mask:
        yield from (Picture(str(path), None, f"{path}:1") for path in _pictures_in(str(folder)))
        return
    if not images.is_dir() or (needs_mask and not masks.is_dir()):
        raise DataError(
            f"{folder}: pictures with masks are a folder with the folders images and masks, each mask with "
            "its picture's name, or a table with the columns image and mask"
        )
    found = {path.relative_to(masks).with_suffix(""): path for path in _pictures_in(str(masks))}
    for path in _pictures_in(str(images)):
        mask, where = found.get(path.relative_to(images).with_suffix("")), f"{path}:1"
        if mask is None and needs_mask:
            statistics.problems.add(where, f"there is no mask of this name in {masks}; add it", NO_MASK)
        else:
            yield Picture(str(path), None, where, None if mask is None else str(mask))


def _of_table(
    source: Source, statistics: Statistics, problem: str, needs_label: bool, fit: Fit | None
) -> Iterator[Picture]:
    """Yield the pictures that the rows of a table name or hold."""
    columns, unused = None, statistics.unused[-1] if statistics.unused else no_counts()
    if source.rows is None and os.path.isdir(os.path.expanduser(source.path)) and not _has_table(source.path):
        raise DataError(
            f"{source.path}: neither a picture ({', '.join(sorted(SUFFIXES))}) nor a table in this folder; "
            "give a folder with a folder of pictures for each class, or a table"
        )
    if source.rows is None and Path(source.path).suffix.lower() in SUFFIXES:
        raise DataError(
            f"{source.path}: pictures are found by a folder with a folder for each class, or by a table; "
            "name one of these"
        )
    for where, row in read_rows(replace(source, class_names=True), statistics.problems):
        is_needed = needs_label and (fit is None or fit.caption is None)
        columns = columns or picture_columns(row, where, source, is_needed, problem)
        try:
            held, label = columns
            path = file_of(row.get(held), where) if held else relative_file(fill(source.prompt, row), where)
            names = columns_of(source.completion) if label is None and source.completion else ()
            value = row.get(label) if label else _filled(source.completion, names, row, is_needed)
            mask = None
            if fit:
                value = caption_in(value, fit)
            elif value is None and needs_label:
                what, kind = ("mask", NO_MASK) if problem == MASKS else ("label", NO_CLASS)
                raise DataError(f"the {what} is missing or null; every row needs it", kind)
            elif problem == MASKS:
                mask, value = (None if value is None else str(file_of(value, where))), None
            else:
                value = (label_text if needs_label else label_if_any)(value, problem)
        except DataError as error:
            statistics.problems.add(where, error)
            continue
        used = {held, label, *names, *columns_of(source.prompt)} - {None}
        count_unused(unused, row, frozenset(used))
        yield Picture(str(path), value, where, mask)


def _filled(template: str | None, columns: Sequence[str], row: Mapping[str, object], is_needed: bool) -> object:
    """Return what a template says of a row's label: of one that is a column, the column's value, of whatever kind."""
    if not template or (not is_needed and any(row.get(name) is None for name in columns)):
        return None
    is_whole = len(columns) == 1 and template == f"{{{columns[0]}}}" and columns[0] in row
    return row[columns[0]] if is_whole else fill(template, row)


def _has_table(path: str) -> bool:
    return any(data_suffix(each) in READER_OF_SUFFIX for each in _files_in(path))


def picture_columns(
    row: Mapping[str, object], where: str, source: Source, needs_label: bool = True, problem: str = ONE_LABEL
) -> tuple[str | None, str | None]:
    """Return the columns of picture and label of a table by one of its rows; None where templates name them.

    Raises:
        DataError: there are no such columns, or the source says a format of texts.
    """
    if source.format not in (None, "table"):
        raise DataError(
            f"{source.path}: format {source.format} is of rows for a language model; pictures are found by "
            "folders or columns, or named by prompt and completion"
        )
    if source.prompt:
        named = columns_of(source.prompt)
        whole = named[0] if named and source.prompt == f"{{{named[0]}}}" else None
        if whole and whole not in row:
            raise DataError(f"{where}: there is no column {whole!r} among {', '.join(map(repr, row))}")
        return whole, None
    held = next((name for name in PICTURE_COLUMNS if name in row), None)
    of = {MASKS: MASK_COLUMNS, CAPTIONS: CAPTION_COLUMNS}.get(problem, LABEL_COLUMNS)
    label = next((name for name in of if name in row), None)
    if held is None or (label is None and needs_label):
        missing = {MASKS: "no mask", CAPTIONS: "no caption"}.get(problem, "no label")
        what, columns = "no picture" if held is None else missing, ", ".join(map(repr, row))
        cure = ", or write data.caption for all" if what == "no caption" else ""
        raise DataError(
            f"{where}: {what} is recognised among the columns {columns}; name them with prompt and "
            f"completion, as in {{path: rows.csv, prompt: '{{photo}}', completion: '{{kind}}'}}{cure}"
        )
    return held, label


@dataclass(frozen=True, slots=True)
class LabelledPictureReader:
    """Read pictures with labels, masks or captions, see ``statistics.RowReader``.

    Args:
        labels: their kind, see ``labels``.
        fit: of pictures with captions, what they are cut to.
    """

    labels: str
    fit: Fit | None = None
    needs_tokenizer: ClassVar[bool] = False
    ends_answers: ClassVar[bool] = False

    def read(
        self, source: Source, tokenizer: None, settings: ReadSettings, statistics: Statistics
    ) -> Iterator[list[Example]]:
        """See ``RowReader`` and ``read_pictures``."""
        statistics.unused.append(no_counts())
        found = read_pictures(source, statistics, self.labels, max_rows=settings.max_rows, fit=self.fit)
        while chunk := list(islice(found, _AT_ONCE)):
            yield [example_of(picture, digest) for picture, digest in chunk]

    def cure_of_long_rows(self, settings: ReadSettings) -> str:
        """See ``RowReader``; no picture is too long."""
        return "or leave them out"


def example_of(picture: Picture, digest: str) -> Example:
    """Return the example of a picture.

    Args:
        digest: SHA-256 of its file.
    """
    words = np.frombuffer(bytes.fromhex(digest)[: 4 * TOKENS], np.uint32) >> 1
    is_target = np.arange(TOKENS) == TOKENS - 1
    return Example(words.astype(np.int32), is_target, picture.path, picture.label or "", picture.where)


class Decoder:
    """Make pixels of pictures in threads, and of those that will be asked for next ahead of time."""

    def __init__(self) -> None:
        self._begun: dict[tuple, Future] = {}

    def expect(
        self, examples: Sequence[Example], processor: Processor, draw: tuple[int, int] | None, problem: str
    ) -> None:
        """Begin with pictures that ``made`` will be asked for next; what was begun before is forgotten."""
        keys = [(_key(each, processor, draw), each) for each in examples]
        self._begun = {
            key: self._begun.get(key) or decoding_threads().submit(_made, each, processor, draw, problem)
            for key, each in keys
        }

    def made(
        self, examples: Sequence[Example], processor: Processor, draw: tuple[int, int] | None, problem: str
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Return the pixels of pictures, and the classes of pixels where they have masks.

        Args:
            draw: seed of the run and step, by which pictures are augmented; None augments nothing.
            problem: MASKS, or another, of pictures without masks.

        Raises:
            DataError: a picture is broken by now, or gone.
        """
        pool = decoding_threads()
        waiting = [
            self._begun.get(_key(each, processor, draw)) or pool.submit(_made, each, processor, draw, problem)
            for each in examples
        ]
        return [each.result() for each in waiting]


def _key(example: Example, processor: Processor, draw: tuple[int, int] | None) -> tuple:
    return example.prompt, example.answer, example.token_ids.tobytes(), processor, draw


def _made(
    example: Example, processor: Processor, draw: tuple[int, int] | None, problem: str
) -> tuple[np.ndarray, np.ndarray | None]:
    drawn_by = None if draw is None else f"{draw[0]}/{draw[1]}/{example.token_ids.tobytes().hex()}"
    chances = [None if drawn_by is None else random.Random(drawn_by) for _ in range(2)]  # of both the same
    try:
        pixels = processor.pixels(decode(example.prompt), chances[0])
        return pixels, classes_of(example, processor, chances[1]) if problem == MASKS and example.answer else None
    except DataError as error:
        raise DataError(f"{example.where}: {error}", error.rule) from None


@cache
def decoder() -> Decoder:
    """Return the process's decoder."""
    return Decoder()
