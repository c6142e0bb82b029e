"""Read rows of text, and say how they were read: what tasks of text have in common. Needs no torch."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from qlora_lite.data.chat.row_formats import check_format, recognise, used_columns
from qlora_lite.data.labelled_rows import LabelReader
from qlora_lite.data.picture_reader import PictureReader
from qlora_lite.data.readers.data_files import left_out
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.readers.sources import Source, read_rows, text_files
from qlora_lite.data.tokens.encode import TextReader
from qlora_lite.data.tokens.examples import Dataset, read_examples
from qlora_lite.data.tokens.statistics import ReadSettings, unused_of
from qlora_lite.errors import DataError
from qlora_lite.files import cache_root
from qlora_lite.recipe.schema import Recipe

from .method import virtual_tokens
from .objective import find_objective

_SHOWN_NAMES = 5
_HOW = {
    "lines": "each line is a document",
    "blank-lines": "blank lines part documents",
    "file": "each file is a document",
}


def read_texts(
    recipe: Recipe,
    sources: Sequence[Source],
    tokenizer,
    preference: str | None,
    max_rows: int | None,
    labels: str | None = None,
    pictures: PictureReader | None = None,
) -> Dataset:
    """Read rows of text; see ``prepare.task.Task.read`` and ``data.tokens.examples.read_examples``.

    Args:
        labels: the kind of label that rows have; None of rows for a language model.
        pictures: what reads the pictures of chats.
    """
    d = recipe.data
    settings = ReadSettings(
        template=d.template,
        train_on="last" if find_objective(recipe).answers else d.train_on,  # what the model itself is to answer
        max_tokens=d.max_tokens - virtual_tokens(recipe) * (2 if preference else 1),  # of two sequences, or one
        overflow=d.overflow,
        train_on_end=d.train_on_end,
        max_rows=max_rows,
    )
    reader = LabelReader(labels) if labels else TextReader(preference, pictures)
    cache = cache_root() / "tokens" if max_rows is None and pictures is None else None
    return read_examples(sources, tokenizer, settings, reader, cache)


def format_of_row(row: dict, where: str, source: Source, preference: str | None) -> str:
    """Return the format of a source, the one that it has been given or what its first row looks like."""
    return check_format(source, preference) or recognise(row, where, source, preference)


def describe_source(source: Source, unused: Mapping[str, Counter[str]], preference: str | None) -> dict:
    """Name the format of a source, and how it was read.

    What is left out of a source by design is no problem, but said: a user may have meant it to be trained on.
    """
    chosen, notes = None, []
    with suppress(DataError, StopIteration, OSError):  # the rows were read before: what is wrong is among the problems
        chosen = check_format(source, preference)
        notes += [*files_not_read(source, left_out(source.path)), *_documents(source)]
        where, row = next(read_rows(source, Problems()))
        chosen = chosen or format_of_row(row, where, source, preference)
        for what, names in unused_of(unused, used_columns(chosen, source)):
            notes.append(f"{what} not used: {first_names(names)}")
    return {"path": source.path, "format": chosen, "weight": source.weight, "notes": notes}


def files_not_read(source: Source, files: Iterable[Path]) -> list[str]:
    """Say what of a folder is not read."""
    unread = [str(path.relative_to(os.path.expanduser(source.path))) for path in files]
    return [f"{len(unread):,} not read: {first_names(unread)}"] if unread else []


def _documents(source: Source) -> Iterator[str]:
    """Say what a document of each plain-text file is."""
    files = [(path.name, documents) for path, documents in text_files(source)]
    for documents, how in _HOW.items():
        if names := [name for name, each in files if each == documents]:
            yield f"{how}: {first_names(names)}"


def first_names(names: Sequence[str]) -> str:
    """Return some names in one line, and that there are more."""
    return ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")
