"""Fetch data sets of the Hugging Face hub: hub:OWNER/NAME, then /CONFIG and :SPLIT where they are not the default.

`datasets` does what it is good at, downloading, and turning the many layouts of hub repositories into one kind of
file, Arrow, in its own cache. The rows are then read from those files like any other Arrow file, so they have a place,
the token cache finds them by content, and keys that Arrow filled with nulls are taken out again.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from qlora_lite.errors import DataError

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
    from datasets.exceptions import DatasetsError

    try:
        data = load_dataset(name, config, split=split)
    except ConnectionError as error:
        return f"the hub cannot be reached ({error}); connect to the network once, or give files of this disk"
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        return f"cannot be fetched ({reason}); correct owner, name, configuration or split"
    return tuple(Path(file["filename"]) for file in data.cache_files)
