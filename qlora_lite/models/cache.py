"""Keep quantised models, and what transformers makes of a GGUF header, on disk, found by content and not by name.

The key of a quantised model is a hash over every weight file's SHA-256, the configurations and the quantisation
settings, so a changed file under an old name is never mistaken for the old one. Such an entry is a checkpoint folder as
``save.save_for_cache`` writes it, moved into place when it is whole.

A sum over each of an entry's files lies beside them, and every load compares it, which is part of the time that
``tools/bench/load`` shows. (The digests of the model's own files are remembered: of those one reads what was
downloaded, and a damaged one is another entry.)

transformers parses a GGUF header, all tokens of its vocabulary, in Python for each part that it makes of it, and in
every process. So the configuration and the tokenizer are converted once, and kept in transformers' own
files. Their key is the header's SHA-256 and the version of transformers, whose conversion it is. One process converts
at a time: one that started beside it would do the same work, and move its entry to where the other one reads.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import transformers

from qlora_lite.errors import ModelError, OutputError
from qlora_lite.files import cache_root, content_digest, explain_write_errors, locked, replacing_folder
from qlora_lite.quant.tensor_file import file_sum

from .gguf_header import read_header
from .locate import ModelFiles

SUMS = "sums.json"
log = logging.getLogger("qlora_lite")

FORMAT_VERSION = 4  # raise it when what entries hold changes: bytes that quantisation produces, files beside them


class _Saved(Protocol):
    def save_pretrained(self, folder: Path) -> object: ...


_Part = TypeVar("_Part", bound=_Saved)


def cache_entry(files: ModelFiles, **settings) -> Path:
    """Return the folder where this content with these settings is, or would be, kept."""
    key = json.dumps([FORMAT_VERSION, _digests(files), settings], sort_keys=True)
    return cache_root() / "models" / hashlib.sha256(key.encode()).hexdigest()[:32]


def write_sums(folder: Path) -> None:
    """Write a sum of each file of an entry beside them."""
    (folder / SUMS).write_text(json.dumps(_sums(folder), indent=1) + "\n", encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Compare the files of an entry with the sums written beside them.

    Raises:
        ModelError: one is missing or was changed, or there are no sums, as in an entry of an earlier version.
    """
    try:
        written, found = json.loads((folder / SUMS).read_text(encoding="utf-8")), _sums(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} cannot be checked: {error}") from None
    if written != found:
        raise ModelError(f"files in {folder} are not what was written")


def _sums(folder: Path) -> dict[str, str]:
    return {path.name: file_sum(path) for path in sorted(folder.iterdir()) if path.name != SUMS and path.is_file()}


def from_gguf_header(path: Path, part: str, convert: Callable[..., _Part], load: Callable[[Path], _Part]) -> _Part:
    """Return what transformers makes of a GGUF file's header, converted once and read back from then on.

    Args:
        path: the GGUF file.
        part: what is made, "config" or "tokenizer".
        convert: makes it from a folder and the file's name as ``gguf_file``; what it returns has ``save_pretrained``.
        load: reads from a folder what was saved.
    """
    key = json.dumps([FORMAT_VERSION, read_header(path).sha256, transformers.__version__, part])
    entry = cache_root() / "headers" / hashlib.sha256(key.encode()).hexdigest()[:32]
    converted = None
    try:
        if not _is_whole(entry):
            with explain_write_errors(entry):
                entry.parent.mkdir(parents=True, exist_ok=True)
            with locked(entry.parent, wait=True):
                if not _is_whole(entry):  # by another process meanwhile
                    converted = convert(path.parent, gguf_file=path.name)
                    with replacing_folder(entry) as new:
                        converted.save_pretrained(new)
                        write_sums(new)
    except OutputError as error:
        log.warning("the %s of %s is not cached: %s", part, path.name, error)
        return convert(path.parent, gguf_file=path.name) if converted is None else converted
    return load(entry)


def _is_whole(entry: Path) -> bool:
    try:
        check_sums(entry)
    except ModelError:
        return False
    return True


def base_fingerprint(files: ModelFiles, start: Mapping[str, object] | None = None) -> str:
    """Return 16 hexadecimal digits that name a model by its content: weights and configuration.

    Args:
        start: settings that decide how its weights were split (``lora.start``), and stored; None if they were not.
    """
    digests = _digests(files)
    named = digests if start is None else [digests, start]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]


def _digests(files: ModelFiles) -> list[str]:
    beside = [files.folder / name for name in ("config.json", "generation_config.json")]
    paths = [*files.weights] + ([] if files.gguf_file else [path for path in beside if path.is_file()])
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(content_digest, paths))
