"""The faults of ``tools/torture``: how each is put into a run of ``lab.Lab``, and how the run is judged then."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from faults.lab import CALLS, FILE_OPERATIONS, SAVE_EVERY, STEPS, Install, Lab, Row, around

import torch  # isort: skip - behind lab, which sets how many threads it may have
from safetensors import SafetensorError

from qlora_lite.train.checkpoints import folder_of, newest_whole, steps_on_disk

OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
)


def at_call(kind: str, number: int, act: Callable[[], None]) -> Install:
    """Act at the call of that number of a kind: "file", or one of ``CALLS``."""

    def install() -> None:
        calls = iter(range(10**9))

        def before(*_arguments):
            if next(calls) == number:
                act()

        owners = [(os, name) for name in FILE_OPERATIONS] if kind == "file" else [CALLS[kind]]
        for owner, name in owners:
            around(owner, name, before)

    return install


def kill() -> None:
    """End this process as a power cut would, for what it had in memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def failing_disk(number: int, code: int, lasting: bool) -> Install:
    """Let the disk fail at an operation, once or from then on."""

    def install() -> None:
        calls = iter(range(10**9))

        def failing(*_arguments):
            call = next(calls)
            if call == number or (lasting and call > number):
                raise OSError(code, os.strerror(code))

        def failing_save(*_arguments):
            try:
                failing()
            except OSError as error:
                raise SafetensorError(f"I/O error: {error.strerror} (os error {code})") from None

        for name in ("fsync", "rename", "replace", "mkdir"):
            around(os, name, failing)
        around(*CALLS["save"], failing_save)

    return install


def raising(error: BaseException) -> Callable[[], None]:
    """Return a function that raises an error."""

    def act() -> None:
        raise error

    return act


def killed_at(lab: Lab, row: Row, name: str, install: Install) -> None:
    """Kill a run at a point of its own, and go on."""
    out = lab.folder / f"trial-{row.fault.replace(' ', '-')}-{row.tried}"
    first = lab.wait(lab.start(out, install=install))
    lab.note_steps(out)
    lab.judge(row, out, name, (first, lab.resume(out)), {-signal.SIGKILL, 0})


def signalled(lab: Lab, row: Row, number: int, seconds: float, allowed: set[int]) -> None:
    """Send a run a signal after a time, and go on."""
    out = lab.folder / f"trial-{row.fault.replace(' ', '-')}-{row.tried}"
    child = lab.start(out)
    time.sleep(seconds)
    os.kill(child, number)
    first = lab.wait(child)
    lab.note_steps(out)
    lab.judge(row, out, f"after {seconds:.3f} s", (first, lab.resume(out)), allowed)


def signalled_twice(lab: Lab, row: Row, pair: tuple[int, int], gap: float, at: tuple[str, int] | float) -> None:
    """Send a run two signals, and go on.

    Args:
        gap: seconds between them.
        at: the call (kind, number) that the first one comes at, or seconds after the start.
    """
    out = lab.folder / f"trial-{row.fault.replace(' ', '-')}-{row.tried}"

    def send(process: int) -> None:
        os.kill(process, pair[0])
        time.sleep(gap)
        os.kill(process, pair[1])

    if isinstance(at, float):
        child = lab.start(out)
        time.sleep(at)
        send(child)
    else:
        child = lab.start(out, install=at_call(*at, lambda: threading.Thread(target=send, args=(os.getpid(),)).start()))
    first = lab.wait(child)
    lab.note_steps(out)
    lab.judge(row, out, f"{at}, {1000 * gap:.0f} ms apart", (first, lab.resume(out)), {130, -pair[1], 0})


def hindered(lab: Lab, row: Row, number: int, code: int, lasting: bool) -> None:
    """Let the disk of a run fail, and go on when it is well again."""
    out = lab.folder / f"trial-{row.fault.replace(' ', '-')}-{row.tried}"
    first = lab.wait(lab.start(out, install=failing_disk(number, code, lasting)))
    lab.note_steps(out)
    lab.judge(row, out, f"operation {number}", (first, lab.resume(out)), {0, 2})


def signalled_at(lab: Lab, row: Row, place: str, call: int, number: int) -> None:
    """Send a run a signal at a call of a kind, and go on."""
    out = lab.folder / f"trial-{row.fault.replace(' ', '-')}-{row.tried}"
    first = lab.wait(lab.start(out, install=at_call(place, call, lambda: os.kill(os.getpid(), number))))
    lab.note_steps(out)
    lab.judge(row, out, f"{place} {call}", (first, lab.resume(out)), {130, 0})  # 0: all was done, but for the end


def file_size_limit(size_bytes: int) -> Install:
    """Let no file of the process grow beyond a size, as a quota of the shell's does."""

    def install() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))

    return install


def limited_files(lab: Lab, row: Row, share: float) -> None:
    """Let no file of a run be larger than a share of a checkpoint's largest, and go on without the limit."""
    out = lab.folder / f"trial-{row.fault.replace(' ', '-')}-{row.tried}"
    newest = folder_of(lab.whole / "checkpoints", STEPS)
    size_bytes = int(share * max(file.stat().st_size for file in newest.iterdir()))
    first = lab.wait(lab.start(out, install=file_size_limit(size_bytes)))
    if "no checkpoint was written" not in lab.log_of(out):
        row.failures.append(f"{share}: the limit did not show")
    lab.note_steps(out)
    lab.judge(row, out, f"share {share}", (first, lab.resume(out)), {0, 2})


@contextlib.contextmanager
def small_file_system(folder: Path, size_bytes: int) -> Iterator[None]:
    """Mount an empty file system of a size on a folder.

    Raises:
        OSError: the machine does not permit it.
    """
    folder.mkdir()
    _mount(f"size={size_bytes}", folder)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def _mount(options: str, folder: Path) -> None:
    try:
        command = ["mount", "-t", "tmpfs", "-o", options, "qlora-lite-torture", folder]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise OSError(error.stderr.strip()) from None


def full_file_system(lab: Lab, row: Row, checkpoints: float) -> None:
    """Give a run a file system with room for so many checkpoints beside its other files, then more, and go on.

    Raises:
        OSError: the machine permits no file system of its own.
    """
    out, small = (lab.folder / f"{name}-{row.fault.replace(' ', '-')}-{row.tried}" for name in ("trial", "small"))
    newest = folder_of(lab.whole / "checkpoints", STEPS)
    others = [file for file in lab.whole.iterdir() if file.is_file()]
    with small_file_system(small, int(_pages(others) + checkpoints * _pages(newest.iterdir()))):
        first = lab.wait(lab.start(small, install=lambda: None))
        if " free" not in lab.log_of(small):
            row.failures.append(f"{checkpoints}: the message does not say what is free; see {lab.log_path(small)}")
        if newest_whole(small / "checkpoints")[1]:
            row.failures.append(f"{checkpoints}: a damaged checkpoint was left")
        lab.note_steps(small)
        _mount(f"remount,size={2**30}", small)
        second = lab.resume(small)
        shutil.copytree(small, out)
    small.rmdir()
    for suffix in (".log", ".steps"):
        if small.with_name(small.name + suffix).exists():
            small.with_name(small.name + suffix).rename(out.with_name(out.name + suffix))
    lab.judge(row, out, f"{checkpoints} checkpoints", (first, second), {0, 2})


def _pages(files: Iterable[Path]) -> int:
    """Return what files take in memory pages."""
    return sum(-(-file.stat().st_size // resource.getpagesize()) * resource.getpagesize() for file in files)


def short_of_memory(lab: Lab, row: Row, kind: str, number: int, error: BaseException) -> None:
    """Let memory run out once in a run, which has to end by itself."""
    out = lab.folder / f"trial-{row.fault.replace(' ', '-')}-{row.tried}"
    first = lab.wait(lab.start(out, install=at_call(kind, number, raising(error))))
    allowed = {0, 3}  # 3: before training, or in an evaluation, one row alone
    lab.judge(row, out, f"{kind} {number}", (first, lab.resume(out)), allowed, exact=False)


def stopped_run(lab: Lab, step: int) -> Path:
    """Return a run that was stopped after a step, with all its checkpoints."""
    out = lab.folder / f"stopped-{step}"
    if not out.exists():
        point = next(i for i, (_, path) in enumerate(lab.operations) if f".step-{step + SAVE_EVERY:08d}." in path)
        lab.wait(lab.start(out, install=at_call("file", point, kill)))
        assert steps_on_disk(out / "checkpoints")[0] == step
    return out


def flip(share: float) -> Callable[[Path], None]:
    """Return a damage that flips one bit, at a share of the file."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(share * (len(content) - 1))] ^= 4
        path.write_bytes(content)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "first bit": flip(0.0),
    "middle bit": flip(0.5),
    "last bit": flip(1.0),
    "another step's": lambda path: shutil.copy(
        folder_of(path.parent.parent, steps_on_disk(path.parent.parent)[1]) / path.name, path
    ),
}


def damaged(lab: Lab, row: Row, file: str, kind: str) -> None:
    """Damage a file of a stopped run's newest checkpoint, and go on."""
    source = stopped_run(lab, STEPS - SAVE_EVERY)
    out = lab.folder / f"trial-{row.fault.replace(' ', '-')}-{row.tried}"
    shutil.copytree(source, out)
    lab.log_path(out).touch()
    lab.note_steps(out)
    newest = folder_of(out / "checkpoints", steps_on_disk(out / "checkpoints")[0])
    DAMAGES[kind](newest / file)
    code = lab.resume(out)
    if "skipped a damaged checkpoint" not in lab.log_of(out):
        row.failures.append(f"{file} {kind}: the damage was not said")
    lab.judge(row, out, f"{file} {kind}", (0, code), {0})


def points_of_a_save(lab: Lab, step: int) -> list[int]:
    """Return the numbers of all file operations from the start of a save to the start of the next one."""
    starts = [
        next(i for i, (_, path) in enumerate(lab.operations) if f".step-{number:08d}." in path)
        for number in (step, step + SAVE_EVERY)
    ]
    return list(range(*starts))


def disk_error(chance: random.Random) -> int:
    """Return ENOSPC or EIO."""
    return chance.choice((errno.ENOSPC, errno.EIO))


def disk_operations(lab: Lab) -> int:
    """Return how many operations of an undisturbed run ``disk_error`` may come at."""
    return sum(name in ("fsync", "rename", "replace", "mkdir") for name, _ in lab.operations) + lab.calls["save"]
