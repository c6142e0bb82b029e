"""Random recipes over tiny models of every family and kind: checked, planned, trained, killed, resumed and used.

A recipe is a subject (a model and what it is trained for) and a few random settings with legal values; what
``recipes check`` refuses is removed until the rest passes. Each command runs in a forked child through the command
line's own entry. What must not happen is a trace, a hang, a run that refuses what its plan accepted for a reason that
is none of its examples', or another result: after a kill and ``--resume``, or with other memory options.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from faults.lab import (
    TRACE_CODE,
    become_command,
    lines_of,
    weights_of,
)  # first: it sets how many threads torch may have

# isort: split
import yaml

from faults.faults import at_call, kill
from faults.subjects import Subject, subjects, with_settings
from qlora_lite.errors import DataError, RecipeError
from qlora_lite.recipe.load import load_recipe
from qlora_lite.recipe.reference import choices_of, choices_of_items, known_keys, setting

LIMIT_SECONDS, STEPS = 240, 2
ROUNDING, ROUNDING_16_BIT = 1e-3, 5e-2  # by which losses may differ with other memory options, relative
KEPT = "model.path", "model.device", "task.kind", "data.train", "data.eval", "output.dir"  # what a subject sets

# Values of settings that are not a few words, small enough for the tiny models; a setting without any stays as it is.
VALUES: dict[str, list] = {
    "model.keep_16bit": ["*.0.*", ["q_proj"], "down_proj", "query"],
    "adapter.switch_every": [1],
    "adapter.train_also": [["norms"], ["biases"], ["head"], ["embeddings"], ["embeddings", "head"]],
    "adapter.train_also_lr_ratio": [0.5],
    "adapter.train_tokens": [["<|call|>"], ["a"]],
    "lora.rank": [1, 3, 8],
    "lora.alpha": [4.0, 32.0],
    "lora.dropout": [0.0, 0.5],
    "lora.targets": ["all-linear", "experts", ["all-linear", "experts"], ["q_proj", "v_proj"], ["*.0.*"], []],
    "lora.start_alternations": [0, 2],
    "bottleneck.width": [3, 16],
    "prompt.virtual_tokens": [1, 5],
    "prompt.init_text": ["hello"],
    "prompt.encoder_width": [8],
    "data.eval_share": [0.25],
    "data.max_bad_rows": [1],
    "data.max_tokens": [64, 100, 128, 200],
    "data.resolution": [28, 32, 56],
    "data.caption": ["a photo"],
    "train.epochs": [1.0, 2.5],
    "train.learning_rate": ["auto", 1e-3],
    "train.micro_batch_size": [1, 2, 3],
    "train.gradient_accumulation_steps": [1, 2, 3],
    "train.warmup_ratio": [0.0, 0.5],
    "train.max_grad_norm": [0.0, 0.1],
    "train.weight_decay": [0.1],
    "train.loraplus_lr_ratio": [4.0],
    "train.seed": [7],
    "train.eval_every_steps": [1],
    "train.early_stopping_patience": [1],
    "train.metrics": [["exact_match"], ["number_match"], ["accuracy"], ["chrf", "rouge"], ["answer_loss"]],
    "train.metrics_examples": [2],
    "train.metrics_every_steps": [1],
    "train.metrics_new_tokens": [3],
    "objective.beta": [0.5],
    "objective.label_smoothing": [0.1],
    "objective.gamma": [0.5],
    "objective.sft_weight": [0.5],
    "objective.desirable_weight": [2.0],
    "objective.undesirable_weight": [0.5],
    "objective.group_size": [2, 3],
    "objective.max_completion_tokens": [4],
    "objective.sampling_temperature": [0.7],
    "diffusion.min_snr_gamma": [2.0],
    "diffusion.shift": [2.0],
    "diffusion.caption_dropout": [0.1, 0.5],
    "diffusion.sample_prompts": [[], ["hot"]],
    "diffusion.sample_steps": [2],
    "diffusion.guidance_scale": [1.0, 3.0],
    "memory.uncheckpointed_layers": ["auto", 0, 1],
    "memory.layers_per_checkpoint": ["auto", 1, 2],
    "memory.loss_chunk_tokens": ["auto", 3, 64],
    "memory.tile_tokens": ["auto", "off", 8, 32],
    "memory.resident_layers": ["auto", "all"],
    "memory.offload_checkpoints": [False],
    "memory.cache_dequantized": ["auto", True, False],
    "memory.cache_merged": ["auto", True, False],
}
# Not drawn: without a GPU, a compiler or a network they do nothing but fail.
LEFT_OUT = {"model.revision", "train.trackers", "train.compile", "train.save_every_minutes", "data.streaming"}
OTHER_MEMORY = [
    f"memory.{name}"
    for name in (
        "checkpointing",
        "uncheckpointed_layers",
        "layers_per_checkpoint",
        "loss_chunk_tokens",
        "tile_tokens",
        "cache_dequantized",
        "cache_merged",
    )
]


@dataclass
class Trial:
    """What came of a random recipe."""

    number: int
    subject: str
    settings: dict[str, object]
    outcomes: dict[str, str] = field(default_factory=dict)  # of each stage
    faults: list[str] = field(default_factory=list)
    predicted_bytes: int = 0
    measured_bytes: int = 0


def drawn(subject: Subject, chance: random.Random) -> dict[str, object]:
    """Draw a few settings with legal values."""
    keys = [key for key in known_keys() if "." in key and key not in LEFT_OUT and key not in KEPT]
    keys = [key for key in keys if _legal(key) is not None]
    return {key: chance.choice(_legal(key) or []) for key in chance.sample(keys, chance.randint(3, 12))}


def _legal(key: str) -> list | None:
    found = setting(key)
    if key in VALUES:
        return VALUES[key]
    if words := choices_of(found):
        return list(words)
    if items := choices_of_items(found):
        return [[item] for item in items]
    return [True, False] if found.annotation is bool else None


def checked(base: str, path: Path, settings: dict[str, object]) -> dict[str, object] | None:
    """Return the settings with which a recipe passes the check, those that problems name removed; None if none does."""
    settings = dict(settings)
    while True:
        path.write_text(base)
        with_settings(path, settings)
        try:
            load_recipe(path)
        except RecipeError as error:
            named = [key for problem in error.problems for key in settings if key == problem.key or key in str(problem)]
            if not settings:
                return None
            for key in {*named[:1]} or {next(reversed(settings))}:
                del settings[key]
        else:
            return settings


@dataclass(frozen=True)
class End:
    """How a command ended; ``error`` is the class of what ended it."""

    code: int
    said: str
    error: str

    @property
    def last_line(self) -> str:
        """The last line that says why."""
        return next((line for line in reversed(self.said.splitlines()) if line.startswith("error:")), "")[:300]


def command(arguments: list[str], folder: Path, install: Callable[[], None] | None = None) -> End:
    """Run a command in a forked child, at most ``LIMIT_SECONDS``."""
    log, kind = folder / "output.txt", folder / "error.txt"
    for path in (log, kind):
        path.unlink(missing_ok=True)
    child = os.fork()
    if not child:

        def ended(error: BaseException | None) -> None:
            kind.write_text("DataError" if isinstance(error, DataError) else type(error).__name__ if error else "")

        become_command(arguments, log, folder / "cache", install, ended)
    deadline = time.monotonic() + LIMIT_SECONDS
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return End(-1000, log.read_text(errors="replace"), "hang")
        time.sleep(0.02)
    error = kind.read_text() if kind.exists() else ""
    return End(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), error)


def difference(run: Path, other: Path) -> str:
    """Return in what two runs differ, "" if in nothing."""
    mine, theirs = lines_of(run), lines_of(other)
    parts = [] if weights_of(run) == weights_of(other) else ["weights"]
    if mine != theirs:
        pairs = zip(mine, theirs, strict=False)
        unequal = sorted({key for a, b in pairs for key in a.keys() | b.keys() if a.get(key) != b.get(key)})
        parts.append(f"metrics ({', '.join(unequal) or 'number of lines'})")
    return " and ".join(parts)


def distance(run: Path, other: Path) -> float:
    """Return by how much the losses of two runs differ at most, relative to the larger."""
    losses = [[line["loss"] for line in lines_of(each) if line.get("loss") is not None] for each in (run, other)]
    if len(losses[0]) != len(losses[1]):
        return float("inf")
    return max((abs(a - b) / max(abs(a), abs(b), 1e-3) for a, b in zip(*losses, strict=True)), default=0.0)


def tried(number: int, subject: Subject, models: Path, folder: Path) -> Trial:
    """Draw recipe ``number`` and put it through every stage."""
    chance = random.Random(number)
    model, base = models / subject.name.replace(" ", "-"), folder / "given"
    if not model.exists():
        subject.save(model)
    base.mkdir(parents=True)
    path = subject.write(base, model)
    train = {"train.max_steps": STEPS, "train.save_every_steps": 1}
    with_settings(path, train | {"memory.micro_batches": "auto", "output.dir": str(folder / "whole")})
    settings = checked(path.read_text(), path, drawn(subject, chance))
    trial = Trial(number, subject.name, settings or {})
    if settings is None:
        trial.outcomes["check"] = "refused"
        return trial
    plan = _stage(trial, "plan", ["plan", str(path)], folder)
    whole = _stage(trial, "train", ["train", str(path)], folder)
    if plan.code == 0 and whole.code not in (0, TRACE_CODE) and whole.error != "DataError":
        trial.faults.append(f"plan accepts what train refuses: {whole.last_line}")
    if plan.code and whole.code == 0:
        trial.faults.append(f"plan refuses what train accepts: {plan.last_line}")
    if whole.code:
        return trial
    planned = plan_of(folder / "whole")
    trial.predicted_bytes, trial.measured_bytes = planned["predicted_peak_bytes"], planned["measured_peak_bytes"]
    _interrupted(trial, path, folder)
    _with_other_memory(trial, path, folder, chance)
    _stage(trial, "evaluate", ["evaluate", str(folder / "whole")], folder)
    _stage(trial, "merge", ["merge", str(folder / "whole"), "--out", str(folder / "merged")], folder)
    return trial


def _stage(trial: Trial, name: str, arguments: list[str], folder: Path) -> End:
    """Run a command and note how it ended; a trace or a hang is a fault."""
    end = command(arguments, folder)
    trial.outcomes[name] = outcome(end)
    if end.code == TRACE_CODE or end.code < 0:
        trial.faults.append(f"{name}: {outcome(end)}: {end.said[-600:]}")
    return end


def outcome(end: End) -> str:
    """Return how a command ended in a few words."""
    words = {0: "complete", TRACE_CODE: "trace", -1000: "hang"}
    return words.get(end.code) or f"{end.error or end.code}: {end.last_line}"


def plan_of(run: Path) -> dict:
    """Return what a run says of its plan."""
    return json.loads((run / "summary.json").read_text())["plan"]


def _interrupted(trial: Trial, path: Path, folder: Path) -> None:
    run = folder / "killed"
    killed = command(["train", str(path), f"output.dir={run}"], folder, at_call("step", 1, kill))
    if killed.code != -signal.SIGKILL:  # a run of one step
        return
    resumed = _stage(trial, "resume", ["train", str(path), f"output.dir={run}", "--resume", str(run)], folder)
    unequal = difference(run, folder / "whole") if resumed.code == 0 else outcome(resumed)
    if unequal and resumed.code == 0 and plan_of(run)["chosen"] != plan_of(folder / "whole")["chosen"]:
        trial.outcomes["resume"] = "planned otherwise"  # beside other work, of two plans that are about as fast
    elif unequal:
        trial.outcomes["resume"] = f"differs in {unequal}"
        trial.faults.append(f"resume: differs in {unequal}")


def _with_other_memory(trial: Trial, path: Path, folder: Path, chance: random.Random) -> None:
    run, other = folder / "other", folder / "given" / "other.yaml"
    base = yaml.safe_load(path.read_text())
    base["output"]["dir"] = str(run)
    changes = {key: chance.choice(_legal(key) or []) for key in chance.sample(OTHER_MEMORY, 3)}
    if base.get("lora", {}).get("dropout"):  # tiles draw other masks: explain memory-options
        changes.pop("memory.tile_tokens", None)
    changes = checked(yaml.safe_dump(base), other, changes)
    name = "other memory options"
    if _stage(trial, name, ["train", str(other)], folder).code == 0:
        far = distance(run, folder / "whole")
        trial.outcomes[name] = f"complete, losses within {far:.0e}"
        if far > (ROUNDING if base["model"].get("compute_dtype") == "float32" else ROUNDING_16_BIT):
            trial.faults.append(f"{name} {changes}: losses differ by {far:.1e}")


def trials(numbers: range, folder: Path) -> Iterator[Trial]:
    """Yield what came of each of the recipes of these numbers; the folder of one with a fault is kept."""
    kinds = subjects()
    models = folder / "models"
    for number in numbers:
        chance = random.Random(f"subject {number}")
        subject = chance.choice(kinds[chance.choice([*kinds])])
        own = folder / f"recipe-{number}"
        shutil.rmtree(own, ignore_errors=True)
        trial = tried(number, subject, models, own)
        if not trial.faults:
            shutil.rmtree(own, ignore_errors=True)
        yield trial
