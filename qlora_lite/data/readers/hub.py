"""Fetch data sets of the Hugging Face hub: hub:OWNER/NAME, then /CONFIG and :SPLIT where they are not the default.

``datasets`` does what it is good at, downloading, and turning the many layouts of hub repositories into one kind of
file, Arrow, in its own cache. The rows are then read from those files like any other Arrow file, so they have a place,
the token cache finds them by content, and keys that Arrow filled with nulls are taken out again.

With data.streaming nothing is kept on disk: ``datasets`` hands out the rows while they come over the network, in the
same order, once more for every epoch. Their place is their number.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from qlora_lite.errors import DataError

from .fields import without_absent

PREFIX = "hub:"
_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::(\w+))?", re.ASCII)


def hub_files(path: str) -> list[Path]:
    """Return the Arrow files of a hub data set, downloading it on first use.

    Args:
        path: "hub:owner/name", "hub:owner/name/config" or "hub:owner/name/config:split"; the split is train
            unless given.

    Raises:
        DataError: the hub cannot be reached, or has no such data set.
    """
    name, config, split = parse(path)
    found = _fetch(name, config, split)
    if isinstance(found, str):
        raise DataError(f"{path}: {found}")
    return list(found)


def parse(path: str) -> tuple[str, str | None, str]:
    """Return name, configuration (None for the default) and split of a hub path.

    Raises:
        DataError: it is not of that form.
    """
    match = _NAME.fullmatch(path)
    if match is None:
        raise DataError(f"{path}: must be hub:OWNER/NAME, hub:OWNER/NAME/CONFIG, or one of them with :SPLIT")
    return match[1], match[2], match[3] or "train"


@cache
def _fetch(name: str, config: str | None, split: str) -> tuple[Path, ...] | str:
    """Return the files, or what is wrong; remembered, since finding out that there is no network takes a while."""
    from datasets import load_dataset

    try:
        with hub_errors("connect to the network once"):
            data = load_dataset(name, config, split=split)
    except DataError as error:
        return str(error)
    return tuple(Path(file["filename"]) for file in data.cache_files)


def hub_rows(path: str) -> Iterator[tuple[str, dict]]:
    """Yield the rows of a hub data set while they are downloaded.

    Args:
        path: as for ``hub_files``.

    Returns:
        An iterator of ("hub:owner/name:12", row), rows counted from 1.

    Raises:
        DataError: the hub cannot be reached, or has no such data set.
    """
    name, config, split = parse(path)
    from datasets import load_dataset

    try:
        with hub_errors("connect to the network"):
            for number, row in enumerate(load_dataset(name, config, split=split, streaming=True), start=1):
                yield f"{path}:{number}", {column: without_absent(value) for column, value in row.items()}
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


@contextmanager
def hub_errors(cure: str) -> Iterator[None]:
    """Say what to do about the errors of ``datasets``; ``cure`` is for a hub that cannot be reached."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except ConnectionError as error:
        raise DataError(f"the hub cannot be reached ({error}); {cure}, or give files of this disk") from error
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        fault = f"cannot be fetched ({reason}); correct owner, name, configuration or split"
        raise DataError(fault) from error
