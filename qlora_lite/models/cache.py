"""Keep quantised models on disk, found again by content and not by name.

The key is a hash over every weight file's SHA-256, the configurations and the quantisation settings, so a
changed file under an old name is never mistaken for the old one.

An entry is a checkpoint folder as ``save.save_for_cache`` writes it, moved into place when it is whole. A sum over
each of its files lies beside them, and every load compares it: the cached weights of a 7B model, 5.2 GiB, cost 0.8
seconds of a processor. (The digests of the model's own files are remembered: of those one reads what was downloaded,
and a damaged one is another entry.)
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qlora_lite.errors import ModelError
from qlora_lite.files import cache_root, content_digest
from qlora_lite.quant.tensor_file import file_sum

from .locate import ModelFiles

SUMS = "sums.json"
FORMAT_VERSION = 2  # raise it when the bytes that quantisation produces change, or the configuration beside them


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
    return {path.name: file_sum(path) for path in sorted(folder.iterdir()) if path.name != SUMS}


def base_fingerprint(files: ModelFiles) -> str:
    """Return 16 hexadecimal digits that name a model by its content: weights and configuration."""
    return hashlib.sha256(json.dumps(_digests(files)).encode()).hexdigest()[:16]


def _digests(files: ModelFiles) -> list[str]:
    beside = [files.folder / name for name in ("config.json", "generation_config.json")]
    paths = [*files.weights] + ([] if files.gguf_file else [path for path in beside if path.is_file()])
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(content_digest, paths))
