"""Keep tokenised sets on disk, found again by everything that their tokens depend on.

The key is a hash over the SHA-256 of every file read, the sources' settings, the tokenizer with its chat template,
the template chosen, the settings, the libraries' versions, and this package's own data modules, so that neither an
edited file nor an upgrade finds tokens of before. (``datasets`` keys its cache by a hash of pickled functions, which
misses what they read and changes where nothing did.) Paths are in the key because the places of rows are kept.

An entry is a folder that is moved into place when it is whole and flushed to disk; ``set.json``, in it, has the SHA-256
of each of the others, and of itself, and every use compares them. Problems are kept too: a set that is refused is
refused again at once.

All entries together take at most MAX_BYTES, or $QLORA_LITE_TOKEN_CACHE_GIB: after a new one is made, those that were
not used for longest are removed until they do. The new one stays, whatever its size, and a run that has a removed one
open keeps its tokens: its files are mapped, and live on until the run ends. The time of use is that of ``set.json``,
touched at each use, since many disks do not note when a file was read.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, astuple
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_lite.data.chat.template import choose_template
from qlora_lite.data.readers.data_files import find_files
from qlora_lite.data.readers.problems import Problems, RowProblem
from qlora_lite.data.readers.sources import Source
from qlora_lite.errors import DataError
from qlora_lite.files import content_digest, read_sealed, sha256, write_sealed
from qlora_lite.units import format_bytes

from .statistics import ReadSettings, RowReader, Statistics, no_counts
from .storage import FILES, Examples, load_arrays

if TYPE_CHECKING:  # transformers takes seconds to import, and a check of a recipe needs none of it
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("qlora_lite")
MAX_BYTES = 20 << 30  # some thirty million short rows
_MAX_GIB = "QLORA_LITE_TOKEN_CACHE_GIB"
_SET = "set.json"
_ORDER = "order.npy"
_LIBRARIES = ("tokenizers", "transformers", "jinja2", "numpy", "pyarrow")


def cache_key(
    sources: Sequence[Source], tokenizer: "PreTrainedTokenizerFast | None", settings: ReadSettings, reader: RowReader
) -> str | None:
    """Return the key of a set of tokens: 32 hexadecimal digits; None if it cannot be cached.

    Rows in memory, rows without tokens and files that cannot be read are not.

    Args:
        sources: where the rows are.
        tokenizer: what makes them tokens.
        settings: how rows become tokens.
        reader: what the rows are.
    """
    if tokenizer is None or any(source.rows is not None for source in sources):
        return None
    try:
        files = [[(str(path), content_digest(path)) for path in find_files(source.path)] for source in sources]
        text = _template_text(settings.template)
    except (DataError, OSError, UnicodeDecodeError):
        return None  # reading them says what is wrong
    parts = [
        files,
        [astuple(source) for source in sources],
        text,
        astuple(settings),
        (type(reader).__qualname__, astuple(reader)),
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        _code(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _template_text(template: str | None) -> str | None:
    """Return a template's file content, or its name; the text behind a name is part of the code."""
    if template is None or not template.endswith(".jinja"):
        return template
    return Path(os.path.expanduser(template)).read_text(encoding="utf-8")


@cache
def _code() -> list[str]:
    """Return what identifies the code that makes tokens."""
    modules = sorted(Path(__file__).parent.parent.rglob("*.py"))
    return [*(sha256(module) for module in modules), *(version(name) for name in _LIBRARIES)]


def save_set(folder: Path, examples: Examples, statistics: Statistics) -> None:
    """Write what belongs to the arrays that an ``ExampleWriter`` wrote into a folder.

    Args:
        folder: where the arrays are.
        examples: what they hold.
        statistics: what became of the rows.
    """
    np.save(folder / _ORDER, examples.order)
    content = {
        "sha256": _digests(folder),
        "files": examples.files,
        "rows_read": statistics.rows_read,
        "dropped": statistics.dropped,
        "dropped_at": statistics.dropped_at,
        "truncated": statistics.truncated,
        "split": statistics.split,
        "examples_of": statistics.examples_of,
        "unused": statistics.unused,
        "end_token_ids": sorted(statistics.end_token_ids),
        "has_template": statistics.template is not None,
        "problems": [asdict(problem) for problem in statistics.problems.found],
        "problem_counts": statistics.problems.counts,
        "fatal": statistics.problems.fatal,
        "warnings": [asdict(problem) for problem in statistics.problems.warnings],
    }
    write_sealed(folder / _SET, json.dumps(content))


def _digests(folder: Path) -> dict[str, str]:
    return {name: sha256(folder / name) for name in (*FILES, _ORDER)}


def load_set(
    folder: Path, tokenizer: "PreTrainedTokenizerFast", template: str | None
) -> tuple[Examples, Statistics] | None:
    """Map a set that ``save_set`` finished, and note its use; None if there is none, or it is damaged.

    Args:
        folder: the cache entry.
        tokenizer: as for ``cache_key``.
        template: as for ``cache_key``.
    """
    try:
        content = json.loads(read_sealed(folder / _SET))
        if _digests(folder) != content["sha256"]:
            return None
        order = np.load(folder / _ORDER, mmap_mode="r", allow_pickle=False)
        examples = load_arrays(folder, content["files"], np.asarray(order))
        found, warnings = ([RowProblem(**each) for each in content[name]] for name in ("problems", "warnings"))
        problems = Problems(found, Counter(content["problem_counts"]), content["fatal"], warnings=warnings)
        statistics = Statistics(
            problems,
            content["rows_read"],
            Counter(content["dropped"]),
            content["dropped_at"],
            content["truncated"],
            content["split"],
            content["examples_of"],
            [{what: Counter(counts[what]) for what in no_counts()} for counts in content["unused"]],
            end_token_ids=set(content["end_token_ids"]),
            template=choose_template(tokenizer, template) if content["has_template"] else None,
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    with suppress(OSError):  # a cache that cannot be written can still be read
        os.utime(folder / _SET)
    return examples, statistics


def most_bytes() -> int:
    """Return how many bytes all entries may take together.

    Raises:
        DataError: the environment variable that says so holds no such number.
    """
    given = os.environ.get(_MAX_GIB)
    if not given:
        return MAX_BYTES
    try:
        gib = float(given)
    except ValueError:
        gib = math.nan
    if not 0 <= gib < math.inf:
        raise DataError(f"${_MAX_GIB} is {given!r}; set it to a number of GiB, 0 or more, or unset it")
    return int(gib * 2**30)


def remove_least_used(cache: Path, newest: Path, most_bytes: int) -> None:
    """Remove the entries that were not used for longest until all take at most ``most_bytes``.

    Args:
        cache: the folder of the entries.
        newest: the entry that stays in any case.
        most_bytes: bytes of all entries.
    """
    entries = [entry for entry in cache.glob("[!.]*") if entry.is_dir() and entry != newest]
    room = most_bytes - _bytes_of(newest)
    for entry in sorted(entries, key=_last_use, reverse=True):
        size_bytes = _bytes_of(entry)
        room -= size_bytes
        if room < 0:
            log.info("data: removed cached tokens %s, %s", entry, format_bytes(size_bytes))
            shutil.rmtree(entry, ignore_errors=True)


def _last_use(entry: Path) -> float:
    return _stat(entry / _SET, "st_mtime")  # 0 for what was left when the removal of an entry was cut short


def _bytes_of(entry: Path) -> int:
    return int(sum(_stat(file, "st_size") for file in entry.glob("*")))


def _stat(path: Path, field: str) -> float:
    """Return a field of a file's status; 0 if another process has just removed it."""
    try:
        return getattr(path.stat(), field)
    except OSError:
        return 0
