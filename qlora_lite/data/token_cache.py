"""Keep tokenised sets on disk, found again by everything that their tokens depend on.

The key is a hash over the SHA-256 of every file read, the sources' settings, the tokenizer with its chat template,
the template chosen, the settings, the libraries' versions, and this package's own data modules, so that neither an
edited file nor an upgrade finds tokens of before. (`datasets` keys its cache by a hash of pickled functions, which
misses what they read and changes where nothing did.) Paths are in the key because the places of rows are kept.

An entry is a folder that is moved into place when it is whole and flushed to disk; `set.json`, in it, names the sizes
of the others. Problems are kept too: a set that is refused is refused again at once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, astuple
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_lite.data.account import Account, Settings
from qlora_lite.data.lines import Problems, RowProblem
from qlora_lite.data.opening import find_files
from qlora_lite.data.read import Source
from qlora_lite.data.stored import Examples, load_arrays, sizes
from qlora_lite.data.template import choose_template
from qlora_lite.errors import DataError
from qlora_lite.files import content_digest, sha256, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SET = "set.json"
_ORDER = "order.npy"
_LEFTOVER_SECONDS = 24 * 3600
_LIBRARIES = ("tokenizers", "transformers", "jinja2", "numpy", "pyarrow")


def cache_key(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerFast, template: str | None, settings: Settings
) -> str | None:
    """Return the key of a set of tokens: 32 hexadecimal digits; None if a file cannot be read.

    Args:
        sources: where the rows are.
        tokenizer: what makes them tokens.
        template: see `template.choose_template`.
        settings: how rows become tokens.
    """
    try:
        files = [[(str(path), content_digest(path)) for path in find_files(source.path)] for source in sources]
        text = _template_text(template)
    except (DataError, OSError, UnicodeDecodeError):
        return None  # reading them says what is wrong
    parts = [
        files, [astuple(source) for source in sources], text, astuple(settings),
        tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template, _code(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _template_text(template: str | None) -> str | None:
    """Return a template's file content, or its name; the text behind a name is part of the code."""
    if template is None or not template.endswith(".jinja"):
        return template
    return Path(template).expanduser().read_text(encoding="utf-8")


@cache
def _code() -> list[str]:
    """Return what identifies the code that makes tokens."""
    modules = sorted(Path(__file__).parent.glob("*.py"))
    return [*(sha256(module) for module in modules), *(version(name) for name in _LIBRARIES)]


def save_set(folder: Path, examples: Examples, account: Account) -> None:
    """Write what belongs to the arrays that an `ExampleWriter` wrote into a folder.

    Args:
        folder: where the arrays are.
        examples: what they hold.
        account: what became of the rows.
    """
    np.save(folder / _ORDER, examples.order)
    content = {
        "sizes": sizes(folder),
        "files": examples.files,
        "rows_read": account.rows_read, "dropped": account.dropped, "truncated": account.truncated,
        "split": account.split, "end_token_ids": sorted(account.end_token_ids),
        "has_template": account.template is not None,
        "problems": [asdict(problem) for problem in account.problems.found],
        "problem_counts": account.problems.counts, "fatal": account.problems.fatal,
    }  # fmt: skip
    write_text(folder / _SET, json.dumps(content))


def load_set(folder: Path, tokenizer: PreTrainedTokenizerFast, template: str | None) -> tuple[Examples, Account] | None:
    """Map a set that `save_set` finished; None if there is none, or it is damaged.

    Args:
        folder: the cache entry.
        tokenizer: as for `cache_key`.
        template: as for `cache_key`.
    """
    try:
        content = json.loads((folder / _SET).read_text(encoding="utf-8"))
        if sizes(folder) != content["sizes"]:
            return None
        order = np.load(folder / _ORDER, mmap_mode="r", allow_pickle=False)
        examples = load_arrays(folder, content["files"], np.asarray(order))
        found = [RowProblem(**problem) for problem in content["problems"]]
        problems = Problems(found, Counter(content["problem_counts"]), content["fatal"])
        account = Account(
            problems, content["rows_read"], Counter(content["dropped"]), content["truncated"], content["split"],
            end_token_ids=set(content["end_token_ids"]),
            template=choose_template(tokenizer, template) if content["has_template"] else None,
        )  # fmt: skip
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    return examples, account


def remove_leftovers(cache: Path) -> None:
    """Remove half-made entries of processes that were killed, a day after they wrote last.

    A live one may belong to another machine that shares the folder, so its process number says nothing.
    """
    for folder in cache.glob(".*.partial"):
        times = [path.stat().st_mtime for path in (folder, *folder.glob("*")) if path.exists()]
        if time.time() - max(times, default=time.time()) > _LEFTOVER_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
