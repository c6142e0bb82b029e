"""Keep quantised models on disk, found again by content and not by name.

The key is a hash over every weight file's SHA-256, the configurations and the quantisation settings, so a
changed file under an old name is never mistaken for the old one.

An entry is a checkpoint folder as ``save.save_for_cache`` writes it, moved into place when it is whole.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qlora_lite.files import cache_root, content_digest

from .locate import ModelFiles

FORMAT_VERSION = 2  # raise it when the bytes that quantisation produces change, or the configuration beside them


def cache_entry(files: ModelFiles, **settings) -> Path:
    """Return the folder where this content with these settings is, or would be, kept."""
    key = json.dumps([FORMAT_VERSION, _digests(files), settings], sort_keys=True)
    return cache_root() / "models" / hashlib.sha256(key.encode()).hexdigest()[:32]


def base_fingerprint(files: ModelFiles) -> str:
    """Return 16 hexadecimal digits that name a model by its content: weights and configuration."""
    return hashlib.sha256(json.dumps(_digests(files)).encode()).hexdigest()[:16]


def _digests(files: ModelFiles) -> list[str]:
    beside = [files.folder / name for name in ("config.json", "generation_config.json")]
    paths = [*files.weights] + ([] if files.gguf_file else [path for path in beside if path.is_file()])
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(content_digest, paths))
