"""Keep quantised models on disk, found again by content and not by name.

The key is a hash over every weight file's SHA-256, the configurations and the quantisation settings, so a
changed file under an old name is never mistaken for the old one. Hashing 13 GiB takes longer than loading
the cache, so digests are remembered per (path, size, modification time, inode), as git's index does.

An entry is an ordinary bitsandbytes checkpoint folder, moved into place when it is whole.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qlora_lite.errors import OutputError
from qlora_lite.files import sha256, write_text

from .locate import ModelFiles

FORMAT_VERSION = 1  # raise it when the bytes that quantisation produces change


def cache_root() -> Path:
    """Return the cache folder: ``$QLORA_LITE_CACHE``, else ``~/.cache/qlora_lite``."""
    return Path(os.environ.get("QLORA_LITE_CACHE") or Path.home() / ".cache" / "qlora_lite")


def cache_entry(files: ModelFiles, **settings) -> Path:
    """Return the folder where this content with these settings is, or would be, kept."""
    beside = [files.folder / name for name in ("config.json", "generation_config.json")]
    paths = [*files.weights] + ([] if files.gguf_file else [path for path in beside if path.is_file()])
    with ThreadPoolExecutor(max_workers=2) as pool:
        digests = list(pool.map(content_digest, paths))
    key = json.dumps([FORMAT_VERSION, digests, settings], sort_keys=True)
    return cache_root() / "models" / hashlib.sha256(key.encode()).hexdigest()[:32]


def content_digest(path: Path) -> str:
    """Return a file's SHA-256, remembered while its path, size, modification time and inode stay the same."""
    stat = path.stat()
    identity = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
    note = cache_root() / "digests" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if note.is_file():
        return note.read_text(encoding="utf-8")
    digest = sha256(path)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, digest)
    except (
        OSError,
        OutputError,
    ):  # the note only saves time; a cache that cannot be written is reported later
        return digest
    return digest
