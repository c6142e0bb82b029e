"""One small fine-tune in processes that are killed, hindered and damaged, compared with an undisturbed one.

Everything is imported once and each run is a forked child, so that hundreds of runs take minutes. Faults are put in
by the child itself, around functions of the standard library and a few of ours, before it calls the command line; the
package knows nothing of them.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# One thread in the parent: a forked child has only the thread that forked, and would wait for the others' locks.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from remembered_plans import remember_predictions
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_files import save_tiny, write_recipe
from tqdm import tqdm

import qlora_lite.run  # noqa: F401 - imported before the first fork, as are the next
from qlora_lite.cli.main import main
from qlora_lite.files import sha256
from qlora_lite.lora.layer import LoraLinear
from qlora_lite.quant import tensor_file
from qlora_lite.quant.linear import FrozenMatmul
from qlora_lite.train.checkpoints import folder_of, steps_on_disk

tqdm.monitor_interval = 0  # else it has a thread too
STEPS, SAVE_EVERY = 8, 2
FILE_OPERATIONS = ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
TIMES = {"seconds", "tokens_per_second", "peak_bytes"}
TRACE_CODE = 99
OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
)

Install = Callable[[], None]


@dataclass
class Row:
    """What came of one kind of fault."""

    fault: str
    tried: int = 0
    survived: int = 0
    lost_steps: int = 0
    damaged_results: int = 0
    steps_done_again: int = 0
    failures: list[str] = field(default_factory=list)


class Lab:
    """A recipe and its undisturbed run.

    Args:
        folder: an empty folder for everything.
        overrides: settings that replace the recipe's.
    """

    def __init__(self, folder: Path, overrides: tuple[str, ...] = ()):
        self.folder, self.overrides = folder, overrides
        folder.mkdir(exist_ok=True)
        save_tiny(folder / "model")
        train = {"max_steps": STEPS, "eval_every_steps": 3, "save_every_steps": SAVE_EVERY, "keep_checkpoints": 2,
                 "optimizer": "paged_adamw_8bit", "gradient_accumulation_steps": 2, "learning_rate": 0.003,
                 "warmup_ratio": 0.3, "exact_match_rows": 1}  # fmt: skip
        self.recipe = write_recipe(
            folder, folder / "model", train=train, lora={"rank": 64, "dropout": 0.1}, data={"max_tokens": 96}
        )
        self.whole = folder / "whole"
        self._warm_up()
        self.operations: list[tuple[str, str]] = []
        self.calls: dict[str, int] = {}
        started = time.monotonic()
        counts = folder / "counts.json"
        code = self.wait(self.start(self.whole, install=lambda: _count(counts)))
        assert code == 0, self.log_of(self.whole)
        self.seconds = time.monotonic() - started
        counted = json.loads(counts.read_text())
        self.operations, self.calls = [tuple(pair) for pair in counted["file"]], counted["calls"]

    def _warm_up(self) -> None:
        """Run once in this process, so that the children have its plan and all imports."""
        remember_predictions()
        os.environ["QLORA_LITE_CACHE"] = str(self.folder / "warm-up.cache")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                main(["train", str(self.recipe), *self.overrides, f"output.dir={self.folder / 'warm-up'}"])
        except SystemExit as end:
            assert not end.code, end.code
        assert threading.active_count() == 1, threading.enumerate()

    def start(self, out: Path, resume: bool = False, install: Install | None = None) -> int:
        """Begin, or go on with, a run in a child process; return its process id."""
        arguments = ["train", str(self.recipe), *self.overrides, f"output.dir={out}"]
        arguments += ["--resume", str(out)] if resume else []
        child = os.fork()
        if child:
            return child
        with open(self.log_path(out), "a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ["QLORA_LITE_CACHE"] = str(out) + ".cache"
        code = TRACE_CODE
        try:
            if install:
                install()
            main(arguments)
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    @staticmethod
    def wait(child: int) -> int:
        """Return a child's exit code, or the negative number of the signal that killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    @staticmethod
    def log_path(out: Path) -> Path:
        """Return where the output of a run's processes is kept."""
        return out.with_name(f"{out.name}.log")

    def log_of(self, out: Path) -> str:
        """Return what the processes of a run printed."""
        return self.log_path(out).read_text(encoding="utf-8")

    def resume(self, out: Path) -> int:
        """Go on with a run to its end, as a user would: one command, nothing repaired by hand."""
        if not out.is_dir():  # killed before there was a folder: there is nothing to go on with
            return self.wait(self.start(out))
        return self.wait(self.start(out, resume=True))

    def judge(self, row: Row, out: Path, name: str, codes: tuple[int, int], allowed: set[int], exact=True) -> None:
        """Compare a run that is said to be complete with the undisturbed one, and remove it if it is right."""
        row.tried += 1
        reasons = []
        if codes[0] not in allowed or codes[1] != 0 or "Traceback" in self.log_of(out):
            reasons.append(f"exit codes {codes}")
        try:
            lines, wanted = lines_of(out), lines_of(self.whole)
            complete = json.loads((out / "summary.json").read_text())["status"] == "complete"
        except (OSError, ValueError, KeyError) as error:
            lines, wanted, complete = [], lines_of(self.whole), False
            reasons.append(repr(error))
        steps = [line["step"] for line in lines if "loss" in line]
        lost = len(set(range(1, STEPS + 1)) ^ set(steps)) + len(steps) - len(set(steps))
        damaged = not complete or not (same(out, self.whole, lines, wanted) if exact else
                                       alike(out, self.whole, lines, wanted))  # fmt: skip
        row.lost_steps += lost
        row.damaged_results += damaged
        row.steps_done_again = max(row.steps_done_again, self.done_again(out))
        if lost or damaged or reasons:
            row.failures.append(f"{name}: lost {lost}, damaged {damaged}, {reasons}; see {out}")
        else:
            row.survived += 1
            shutil.rmtree(out)
            shutil.rmtree(f"{out}.cache", ignore_errors=True)
            self.log_path(out).unlink()

    @staticmethod
    def done_again(out: Path) -> int:
        """Return how many finished steps the resumed process had to do again."""
        before = 0
        for line in (out / "log.txt").read_text(errors="replace").splitlines() if (out / "log.txt").exists() else []:
            if "resume: going on after step " in line:
                marker = out.with_name(f"{out.name}.steps")
                before = int(marker.read_text()) - int(line.rsplit(" ", 1)[1]) if marker.exists() else 0
        return max(0, before)

    def note_steps(self, out: Path) -> None:
        """Write down how many steps a run has finished before it is resumed."""
        steps = [line["step"] for line in lines_of(out, strict=False) if "loss" in line]
        out.with_name(f"{out.name}.steps").write_text(str(max(steps, default=0)))


def lines_of(out: Path, strict: bool = True) -> list[dict]:
    """Return a run's lines of metrics without times; not strict leaves out what is torn."""
    found = []
    path = out / "metrics.jsonl"
    for line in path.read_text().splitlines() if strict or path.exists() else []:
        try:
            found.append({key: value for key, value in json.loads(line).items() if key not in TIMES})
        except ValueError:
            if strict:
                raise
    return found


def same(out: Path, whole: Path, lines: list[dict], wanted: list[dict]) -> bool:
    """Tell whether a run gave the very same lines and adapters."""
    files = [f"{name}/adapter_model.safetensors" for name in ("adapter", "adapter-last")]
    there = all((out / file).is_file() for file in files)
    return there and lines == wanted and all(sha256(out / file) == sha256(whole / file) for file in files)


def alike(out: Path, whole: Path, lines: list[dict], wanted: list[dict]) -> bool:
    """Tell whether a run gave the same steps and, within the rounding of another order of sums, the same adapter."""
    exact = ("step", "tokens", "labelled_tokens", "learning_rate", "eval_labelled_tokens")
    pairs = list(zip(lines, wanted, strict=False))
    equal = len(lines) == len(wanted) and all(a.get(key) == b.get(key) for a, b in pairs for key in exact)
    close = all(abs(a.get("loss", 0) - b.get("loss", 0)) <= 1e-3 * b.get("loss", 1) for a, b in pairs)
    mine, theirs = (load_file(folder / "adapter-last" / "adapter_model.safetensors") for folder in (out, whole))
    near = all((mine[name] - tensor).float().norm() <= 1e-2 * tensor.float().norm() for name, tensor in theirs.items())
    return equal and close and mine.keys() == theirs.keys() and near


# --- faults, put in by a child into itself


def around(owner: object, name: str, before: Callable[..., None]) -> None:
    """Call ``before`` with the arguments of each call of a function, first."""
    real = getattr(owner, name)

    def wrapped(*arguments, **options):
        before(*arguments)
        return real(*arguments, **options)

    setattr(owner, name, staticmethod(wrapped) if owner is FrozenMatmul else wrapped)


def _count(path: Path) -> None:
    """Write down every file operation and count the calls of forward and backward, at the end of the process."""
    operations: list[tuple[str, str]] = []
    calls = {"forward": 0, "backward": 0, "save": 0}

    def note(kind):
        calls[kind] += 1

    for name in FILE_OPERATIONS:
        around(os, name, lambda *arguments, name=name: operations.append((name, str(arguments[0]))))
    for kind, (owner, name) in CALLS.items():
        around(owner, name, lambda *_arguments, kind=kind: note(kind))
    real = os._exit

    def leave(code):
        path.write_text(json.dumps({"file": operations, "calls": calls}))
        real(code)

    os._exit = leave


CALLS = {"forward": (LoraLinear, "forward"), "backward": (FrozenMatmul, "backward"),
         "save": (tensor_file, "save_file")}  # fmt: skip


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


# --- what is tried


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


def hindered(lab: Lab, row: Row, number: int, code: int, lasting: bool) -> None:
    """Let the disk of a run fail, and go on when it is well again."""
    out = lab.folder / f"trial-{row.fault.replace(' ', '-')}-{row.tried}"
    first = lab.wait(lab.start(out, install=failing_disk(number, code, lasting)))
    lab.note_steps(out)
    lab.judge(row, out, f"operation {number}", (first, lab.resume(out)), {0, 2})


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
    source = stopped_run(lab, STEPS - SAVE_EVERY - 2)
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
    starts = [next(i for i, (_, path) in enumerate(lab.operations) if f".step-{number:08d}." in path)
              for number in (step, step + SAVE_EVERY)]  # fmt: skip
    return list(range(*starts))


def disk_error(chance: random.Random) -> int:
    """Return ENOSPC or EIO."""
    return chance.choice((errno.ENOSPC, errno.EIO))
