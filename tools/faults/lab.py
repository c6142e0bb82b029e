"""One small fine-tune in processes that are killed, hindered and damaged, compared with an undisturbed one.

Everything is imported once and each run is a forked child, so that hundreds of runs take minutes. Faults are put in
by the child itself, around functions of the standard library and a few of ours, before it calls the command line; the
package knows nothing of them.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

# One thread in the parent: a forked child has only the thread that forked, and would wait for the others' locks.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from remembered_plans import remember_predictions
from safetensors.torch import load_file
from tiny_files import save_tiny, write_recipe
from tqdm import tqdm

import qlora_lite.runs.run  # noqa: F401 - imported before the first fork, as are the next
from qlora_lite.adapters.lora.layer import LoraLinear
from qlora_lite.cli.main import main
from qlora_lite.data.picture_files import decoding_threads
from qlora_lite.files import sha256
from qlora_lite.models import quantizer
from qlora_lite.quant import tensor_file
from qlora_lite.quant.product import FrozenMatmul
from qlora_lite.train import loop
from qlora_lite.train.process_group import ProcessGroup

tqdm.monitor_interval = 0  # else it has a thread too
STEPS, SAVE_EVERY = 8, 2
FILE_OPERATIONS = ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
TIMES = {"seconds", "tokens_per_second", "peak_bytes"}
TRACE_CODE = 99
CALLS = {
    "forward": (LoraLinear, "forward"),
    "backward": (FrozenMatmul, "backward"),
    "save": (tensor_file, "save_file"),
    "load": (quantizer, "quantize"),
    "rehearsal": (loop, "probe_step"),
    "step": (loop, "train_step"),
    "evaluation": (loop, "evaluate_loss"),
    "exchange": (ProcessGroup, "exchange"),
    "sum": (ProcessGroup, "add_up"),
}

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
    ended_wrongly: int = 0  # of runs of several processes: too late, without some, or with other words
    longest_end_seconds: float = 0.0  # from a fault until all processes had ended, where it was measured
    failures: list[str] = field(default_factory=list)


class Lab:
    """A recipe and its undisturbed run.

    Args:
        folder: an empty folder for everything.
        overrides: settings that replace the recipe's.
    """

    options: tuple[str, ...] = ()  # of the command line, beside the recipe and its settings

    def __init__(self, folder: Path, overrides: tuple[str, ...] = ()):
        self.folder, self.overrides = folder, overrides
        folder.mkdir(exist_ok=True)
        self.recipe = self.write(folder)
        self.whole = folder / "whole"
        self._warm_up()
        self.operations: list[tuple[str, str]] = []
        self.calls: dict[str, int] = {}
        started = time.monotonic()
        counts = folder / "counts.json"
        code = self.wait(self.start(self.whole, install=self.counting(counts)))
        assert code == 0, self.log_of(self.whole)
        self.seconds = time.monotonic() - started
        counted = json.loads(counts.read_text())
        self.operations, self.calls = [tuple(pair) for pair in counted["file"]], counted["calls"]

    def write(self, folder: Path) -> Path:
        """Write the model, the examples and the recipe; return its path."""
        save_tiny(folder / "model")
        train = {
            "max_steps": STEPS,
            "eval_every_steps": 3,
            "save_every_steps": SAVE_EVERY,
            "keep_checkpoints": 2,
            "optimizer": "paged_adamw_8bit",
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.003,
            "warmup_ratio": 0.3,
            "metrics_examples": 1,
        }
        return write_recipe(
            folder, folder / "model", train=train, lora={"rank": 64, "dropout": 0.1}, data={"max_tokens": 96}
        )

    def counting(self, path: Path) -> Install:
        """Return what counts an undisturbed run's calls and file operations."""
        return lambda: count_calls(path)

    def _warm_up(self) -> None:
        """Run once in this process, so that the children have its plan and all imports."""
        remember_predictions()
        os.environ["QLORA_LITE_CACHE"] = str(self.folder / "warm-up.cache")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                main(["train", str(self.recipe), *self.overrides, f"output.dir={self.folder / 'warm-up'}"])
        except SystemExit as end:
            assert not end.code, end.code
        decoding_threads().shutdown()  # a child would take the parent's threads for its own
        decoding_threads.cache_clear()
        assert threading.active_count() == 1, threading.enumerate()

    def start(self, out: Path, resume: bool = False, install: Install | None = None) -> int:
        """Begin, or resume, a run in a child process; return its process id."""
        arguments = ["train", str(self.recipe), *self.overrides, *self.options, f"output.dir={out}"]
        arguments += ["--resume", str(out)] if resume else []
        child = os.fork()
        if not child:
            become_command(arguments, self.log_path(out), Path(f"{out}.cache"), install)
        return child

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
        """Resume a run to its end, as a user would: one command, nothing repaired by hand."""
        if not out.is_dir():  # killed before there was a folder: there is nothing to resume
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
        damaged = not complete or not (
            same(out, self.whole, lines, wanted) if exact else alike(out, self.whole, lines, wanted)
        )
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


def become_command(
    arguments: list[str],
    log: Path,
    cache: Path,
    install: Install | None = None,
    ended: Callable[[BaseException | None], object] = lambda _: None,
) -> NoReturn:
    """Run the command line in this process, a forked child, and end the process with its exit code.

    Args:
        log: what it prints is added to this file.
        cache: folder of its cache.
        install: puts in a fault.
        ended: gets the error that ended the command, None if none did.
    """
    with open(log, "a", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ["QLORA_LITE_CACHE"] = str(cache)
    code = TRACE_CODE
    try:
        if install:
            install()
        main(arguments)
    except SystemExit as end:
        code = end.code or 0
        ended(end.__context__ if code else None)
    except BaseException as error:
        traceback.print_exc()
        ended(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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


def weights_of(out: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of weights that a run left, its checkpoints apart."""
    files = (path for path in out.rglob("*.safetensors") if "checkpoints" not in path.parts)
    return {str(path.relative_to(out)): sha256(path) for path in files}


def same(out: Path, whole: Path, lines: list[dict], wanted: list[dict]) -> bool:
    """Return whether a run gave the very same lines and weights."""
    return lines == wanted and weights_of(out) == weights_of(whole)


def alike(out: Path, whole: Path, lines: list[dict], wanted: list[dict]) -> bool:
    """Return whether a run gave the same steps and, within the rounding of another order of sums, the same adapter."""
    exact = ("step", "tokens", "target_tokens", "learning_rate", "eval_target_tokens")
    pairs = list(zip(lines, wanted, strict=False))
    equal = len(lines) == len(wanted) and all(a.get(key) == b.get(key) for a, b in pairs for key in exact)
    close = all(abs(a.get("loss", 0) - b.get("loss", 0)) <= 1e-3 * b.get("loss", 1) for a, b in pairs)
    mine, theirs = (load_file(folder / "adapter-last" / "adapter_model.safetensors") for folder in (out, whole))
    near = all((mine[name] - tensor).float().norm() <= 1e-2 * tensor.float().norm() for name, tensor in theirs.items())
    return equal and close and mine.keys() == theirs.keys() and near


def around(owner: object, name: str, before: Callable[..., None]) -> None:
    """Call ``before`` with the arguments of each call of a function, first."""
    real = getattr(owner, name)

    def wrapped(*arguments, **options):
        before(*arguments)
        return real(*arguments, **options)

    setattr(owner, name, staticmethod(wrapped) if owner is FrozenMatmul else wrapped)


def count_calls(path: Path) -> None:
    """Write down every file operation and count the calls of forward and backward, at the end of the process."""
    operations: list[tuple[str, str]] = []
    calls = dict.fromkeys(CALLS, 0)

    def note(kind):
        calls[kind] += 1

    for name in FILE_OPERATIONS:
        around(os, name, lambda *arguments, name=name: operations.append((name, str(arguments[0]))))
    for kind, (owner, name) in CALLS.items():
        around(owner, name, lambda *_arguments, kind=kind: note(kind))

    def write(*_arguments):
        path.write_text(json.dumps({"file": operations, "calls": calls}))

    atexit.register(write)
    around(os, "_exit", write)  # a forked child's end
