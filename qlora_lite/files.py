"""Write files and folders so that a reader finds the old content or the new, never half of either.

A folder is written beside its place, flushed to disk, and moved there by rename. Operating-system errors
become one line with the path and the free space.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError
from .units import format_bytes


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block into an ``OutputError`` that names the path and the cure.

    Raises:
        OutputError: the disk is full or read-only, permission is missing, or the path cannot be used.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {_reason(error, path)}") from error


def _reason(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        parent = next((p for p in (path, *path.parents) if p.exists()), None)
        free = f" ({format_bytes(shutil.disk_usage(parent).free)} free)" if parent else ""
        return f"the disk is full{free}; free some space or set output.dir to another disk"
    if error.errno == errno.EROFS:
        return "the disk is read-only; set output.dir to a place that can be written"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "no permission; change the folder's owner or set output.dir to one of your own"
    return f"{error.strerror or error}; check the path or set output.dir"


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step.

    Raises:
        OutputError: it cannot be written.
    """
    with explain_write_errors(path):
        beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        beside.write_text(text, encoding="utf-8")
        _flush(beside)
        beside.replace(path)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``path`` when the block ends without an error.

    Raises:
        OutputError: it cannot be written; ``path`` is then as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    with explain_write_errors(path):
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            yield beside
            for file in sorted(beside.rglob("*")):
                _flush(file)
            _flush(beside)
            if path.exists():
                path.rename(old)
            try:
                beside.rename(path)
            except BaseException:
                if old.exists():
                    old.rename(path)
                raise
            _flush(path.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def require_empty(path: Path) -> None:
    """Check that a folder may be written: it is new, or holds nothing.

    Raises:
        OutputError: something is there.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path} is not an empty folder; choose another --out")


def require_space(path: Path, needed_bytes: int) -> None:
    """Check that the disk of a folder to be written has room, before the work begins.

    Raises:
        OutputError: naming the path, what is needed and what is free.
    """
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        raise OutputError(
            f"{path} needs {format_bytes(needed_bytes)} and its disk has {format_bytes(free_bytes)} free; "
            "free some space or choose another --out"
        )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_root() -> Path:
    """Return the cache folder: ``$QLORA_LITE_CACHE``, else ``~/.cache/qlora_lite``."""
    return Path(os.environ.get("QLORA_LITE_CACHE") or Path.home() / ".cache" / "qlora_lite")


def content_digest(path: Path) -> str:
    """Return a file's SHA-256, remembered while its path, size, modification time and inode stay the same.

    Hashing a large file takes longer than loading what a cache made of it; git's index remembers in the same way.
    """
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
