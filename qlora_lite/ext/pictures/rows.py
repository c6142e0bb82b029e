"""Say how rows of pictures were read. Needs no torch."""

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress

from qlora_lite.data.captions import BESIDE, CAPTIONS, METADATA
from qlora_lite.data.labels import MASKS
from qlora_lite.data.readers.fields import columns_of
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.readers.sources import Source, read_rows
from qlora_lite.data.tokens.statistics import unused_of
from qlora_lite.errors import DataError
from qlora_lite.prepare.text_rows import files_not_read, first_names

from .examples import FORMAT, classes_without_pictures, is_folder_of_pictures, not_read, picture_columns


def describe_source(source: Source, unused: Mapping[str, Counter[str]], labels: str) -> dict:
    """Describe a source of pictures: the columns of a table, and what of it is not used."""
    notes = []
    with suppress(DataError, StopIteration, OSError):  # the rows were read before: what is wrong is among the problems
        if is_folder_of_pictures(source.path):
            own = {BESIDE, *METADATA} if labels == CAPTIONS else set()
            files = [path for path in not_read(source.path) if not own & {path.name, path.suffix}]
            notes += files_not_read(source, files)
            if empty := classes_without_pictures(source.path) if labels not in (CAPTIONS, MASKS) else []:
                notes.append(f"no pictures in {first_names(empty)}")
        else:
            where, row = next(read_rows(source, Problems()))
            held, label = picture_columns(row, where, source, problem=labels)
            notes += [f"picture: {held}; label: {label}"] if held and label else []
            used = {held or "", label or "", *columns_of(source.prompt), *columns_of(source.completion)}
            notes += [f"{what} not used: {first_names(names)}" for what, names in unused_of(unused, used)]
    return {"path": source.path, "format": FORMAT, "weight": source.weight, "notes": notes}


def check_first_row(source: Source, labels: str, needs_label: bool = True) -> str:
    """Check the columns of a table of pictures, and return the format.

    Raises:
        DataError: a file cannot be read, or its columns are not known.
    """
    if not is_folder_of_pictures(source.path):
        problems = Problems()
        where, row = next(read_rows(source, problems), ("", {}))
        problems.raise_if_any()
        picture_columns(row, where, source, needs_label, labels)
    return FORMAT
