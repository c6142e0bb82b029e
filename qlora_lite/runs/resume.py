"""Resume a run: which one, from which checkpoint, and whether that gives the run it would have been.

A change that leaves every number of the run as it would have been is accepted and said. Any other is refused, setting
by setting, because a run that silently became another one is worse than none; ``force`` takes it all the same, and
the run's summary says so from then on. Files that moved are no change: rows, tokenizer and base model are compared by
what they hold. The base model by what its files hold, and not by the bits of its 4-bit weights: the mean that double
quantization takes of the absmax values is a sum in an order of the machine (threads, a GPU's multiprocessors), so that
its last bit differs from one machine to another. Other bits are said like another version of torch.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qlora_lite.adapters.read import CONFIG_NAME, is_of_qera
from qlora_lite.artifacts.run_folder import (
    CHECKPOINTS,
    RECIPE,
    SUMMARY,
    RunFolder,
    create_run,
    has_only_recipe,
    is_begun,
    newest_path,
    package_versions,
)
from qlora_lite.data.readers.data_files import find_files
from qlora_lite.data.readers.hub import PREFIX
from qlora_lite.data.tokens.examples import Dataset
from qlora_lite.errors import CheckpointError, LaunchError
from qlora_lite.files import content_digest, write_text
from qlora_lite.prepare.datasets import build_sources
from qlora_lite.prepare.objective import find_objective
from qlora_lite.prepare.task import Labels, find_task
from qlora_lite.recipe.load import settings_to_yaml
from qlora_lite.recipe.schema import FORMER_NAMES, Recipe, Train
from qlora_lite.train.checkpoints import Checkpoint, newest_whole
from qlora_lite.train.settings import TrainSettings, lr_factor
from qlora_lite.train.state import STATE, numbers_of

log = logging.getLogger("qlora_lite")
BASE_MODEL = "base model"  # what names it by its content in a checkpoint's identity
FROZEN_WEIGHTS = "frozen weights"  # their checksum in a checkpoint's environment
RANKS = "ranks"  # how many there are, likewise
INSTRUCTIONS = "instructions"  # of the CPU that torch uses, likewise: AVX2, AVX512, ...
OF_RANKS = "plan of ranks"  # each one's settings, where they differ
RUN = "run.json"  # what a checkpoint holds of the run, beside the trainer's state
# Of weights, which change no number; merged ones are kept only where none are streamed.
PLACES = "memory.resident_layers", "memory.stream_from", "memory.cache_merged"
# What these settings lead to is compared by itself, or changes nothing of what a step computes.
HARMLESS = {
    *PLACES,
    "model.path",
    "model.revision",
    "lora.init_from",
    "data.train",
    "data.eval",
    "data.template",
    "data.max_bad_rows",
    "objective.rewards",
    "train.max_steps",
    "train.epochs",
    "train.early_stopping_patience",
    "train.save_every_steps",
    "train.save_every_minutes",
    "train.keep_checkpoints",
    "train.max_hours",
    "train.on_not_finite",
    "train.max_skipped_steps",
    "train.trackers",
    "memory.budget",
    "memory.host_budget",
    "memory.offload_folder",
    "output.dir",
    "output.name",
}
PLACE = {"output.dir", "output.name"}  # of the run, which is the folder that is resumed, whatever they say
_RATE = "train.learning_rate"
_LABELS = "task.labels"
_PARTS = {
    "recipe": dict,
    "identity": dict,
    "environment": dict,
    "plan": dict,
    "progress": dict,
    "summary": dict,
    "metrics_bytes": int,
}


@dataclass(slots=True)
class Continuation:
    """A checkpoint to resume from, and what is different now.

    Args:
        force: take changes that make another run of it.
        accepted: changes that do not.
        forced: changes that do.
    """

    checkpoint: Checkpoint
    force: bool = False
    accepted: list[str] = field(default_factory=list)
    forced: list[str] = field(default_factory=list)

    @property
    def run(self) -> dict:
        """What the checkpoint holds of the run."""
        return self.checkpoint.documents[RUN]

    @property
    def is_of_qera(self) -> bool:
        """Whether its LoRA weights began as what makes up for the error of 4 bits, here or in ``lora.init_from``."""
        return is_of_qera(self.checkpoint.documents.get(CONFIG_NAME, {}))

    @property
    def keeps_plan(self) -> bool:
        """Whether steps are run as the checkpoint's plan says, and not as one that forced changes ask for."""
        options = ("memory.", "train.micro_batch_size", "train.gradient_accumulation_steps")
        return not any(change.startswith(options) for change in self.forced)

    def plan_of(self, ranks: int) -> dict[str, object]:
        """Return the checkpoint's plan, without where weights wait if that, or the number of ranks, is another now."""
        moved = any(change.startswith(PLACES) for change in self.accepted)
        if ranks == self.run["environment"][RANKS] and not moved:
            return self.run["plan"]
        return {key: value for key, value in self.run["plan"].items() if key not in PLACES}

    def plan_of_ranks(self, ranks: int) -> list[dict[str, object]] | None:
        """Return the settings of each rank, none where all have ``plan_of``; None if the ranks are others now, or where
        weights wait is."""
        moved = any(change.startswith(PLACES) for change in self.accepted)
        if ranks != self.run["environment"][RANKS] or moved:
            return None
        return self.run.get(OF_RANKS, [])

    @property
    def learning_rate(self) -> float:
        """The peak learning rate that the run began with."""
        return self.run["recipe"]["train"]["learning_rate"]

    @property
    def ranks(self) -> dict[str, tuple[int, float]]:
        """Rank and alpha by path of the layers of a run with lora.start eva.

        Raises:
            CheckpointError: the checkpoint does not say them.
        """
        try:
            return {
                path: (int(rank), float(alpha)) for path, (rank, alpha) in self.run["summary"]["lora_ranks"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint does not say the ranks of its layers: {error!r}") from None

    def compare_settings(self, recipe: Recipe) -> None:
        """Compare the recipe with the run's.

        Raises:
            CheckpointError: naming each setting that makes another run of it.
        """
        old, new = _flat(self.run["recipe"]), _flat(recipe.model_dump(mode="json"))
        sections = {name: type(section).model_construct() for name, section in recipe}  # of defaults
        unsaid = _flat({name: section.model_dump(mode="json") for name, section in sections.items()})
        old = {key: unsaid.get(key) for key in new} | old  # of settings that are newer than the checkpoint
        if new[_RATE] == "auto":
            new[_RATE] = self.learning_rate
        if new[_LABELS] is None:  # those of the rows, whose labels are compared by themselves
            new[_LABELS] = old.get(_LABELS)
        changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        words = {key: f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed}
        harmless = {key for key in changed if key in HARMLESS or _only_pages(key, old.get(key), new.get(key))}
        if find_objective(recipe).needs_reference:  # which is the model that the run began with
            harmless.discard("lora.init_from")
        self.accepted += [words[key] for key in changed if key in harmless - PLACE]
        self.refuse([words[key] for key in changed if key not in harmless])

    def compare_identity(self, now: Mapping[str, str | None]) -> None:
        """Compare what rows, tokenizer, model or device are with what they were, as far as the checkpoint says.

        Args:
            now: digests by what they are of.

        Raises:
            CheckpointError: naming each that is another.
        """
        before = self.run["identity"]
        self.refuse([f"other {name} than before" for name, value in now.items() if before.get(name, value) != value])

    def compare_schedule(self, total_steps: int, settings: TrainSettings | Train) -> None:
        """Compare the number of steps, and with it the learning rates of the steps that are done.

        Raises:
            CheckpointError: they would have been others, or there are fewer steps than that.
        """
        state = self.checkpoint.documents[STATE]
        before, done = state["total_steps"], self.checkpoint.step
        if total_steps < done:
            raise CheckpointError(
                f"the checkpoint is of step {done}, and the run now ends after {total_steps} steps; "
                "set train.max_steps or train.epochs to more"
            )
        if total_steps == before:
            return
        rates = [
            [lr_factor(step, total, settings.lr_scheduler, settings.warmup_ratio) for step in range(1, done + 1)]
            for total in (before, total_steps)
        ]
        change = f"steps: {before} -> {total_steps}"
        if rates[0] == rates[1]:
            self.accepted.append(change)
        else:
            self.refuse(
                [
                    f"{change}, for which train.lr_scheduler {settings.lr_scheduler} gives the {done} steps that "
                    "are done other learning rates"
                ]
            )

    def say_changes(self, now: Mapping[str, object]) -> None:
        """Say what is different and accepted, once everything has been compared.

        Args:
            now: see ``environment``.
        """
        for change in self.accepted:
            log.info("resume: accepted: %s", change)
        before = self.run["environment"]
        changed = [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]
        if changed:
            log.warning("resume: %s; the last digits may differ from an uninterrupted run's", ", ".join(changed))
            self.accepted += changed

    def refuse(self, changes: list[str]) -> None:
        """Refuse changes that make another run of it, or log them with ``force``.

        Raises:
            CheckpointError: naming them.
        """
        if changes and not self.force:
            raise CheckpointError(
                "\n".join(
                    [
                        "this would not be the run that was begun:",
                        *changes,
                        "undo that, start a new run, or go on all the same with --force",
                    ]
                )
            )
        self.forced += changes
        for change in changes:
            log.warning("resume: %s (forced: no longer the run that was begun)", change)


def path_to_continue(recipe: Recipe, resume: str | Path) -> Path | None:
    """Return the run folder to resume, None if there is none.

    Args:
        resume: the folder, or "" for that of the recipe's newest run.

    Raises:
        CheckpointError: the folder has something in it and is no run's.
    """
    if resume == "":
        newest = newest_path(recipe)
        if newest is None:
            log.info("resume: there is no run of this recipe yet; a new one begins")
        return newest
    path = Path(resume)
    if path.is_dir() and any(path.iterdir()) and not (is_begun(path) or has_only_recipe(path, recipe)):
        lost = SUMMARY if (path / RECIPE).is_file() else RECIPE
        raise CheckpointError(f"{path} is not a run folder: it has no {lost}; name the folder that train printed")
    return path


def recover_recipe(folder: Path) -> None:
    """Write a run's lost ``recipe.yaml`` again as its newest whole checkpoint has it, if there is one.

    Raises:
        CheckpointError: the checkpoint is not what this version writes.
    """
    checkpoint, _ = newest_whole(folder / CHECKPOINTS)
    if checkpoint:
        write_text(folder / RECIPE, settings_to_yaml(checked(checkpoint).documents[RUN]["recipe"]))
        log.warning("%s was lost; it is written again from the checkpoint of step %d", folder / RECIPE, checkpoint.step)


def reopen(path: Path, recipe: Recipe, force: bool) -> tuple[RunFolder, Continuation | None]:
    """Find where a run can go on; one without a checkpoint begins afresh. Nothing of the run is changed yet.

    Raises:
        CheckpointError: the recipe makes another run of it.
    """
    continuation = _find_checkpoint(path, force)
    if continuation is None:
        log.info("resume: %s has no checkpoint yet; it begins afresh", path)
        return create_run(path, recipe, replace=True), None
    continuation.compare_settings(recipe)
    if recipe.train.max_steps is not None:
        continuation.compare_schedule(recipe.train.max_steps, recipe.train)
    run = RunFolder(path, recipe, continuation.run["summary"], continuation.run["metrics_bytes"], proven=False)
    return run, continuation


def follow(path: Path, recipe: Recipe, force: bool, step: int) -> Continuation:
    """Return the checkpoint that the first rank resumes from, as another rank reads it; nothing is written.

    Raises:
        LaunchError: this rank does not find it.
        CheckpointError: see ``reopen``.
    """
    continuation = _find_checkpoint(path, force)
    if continuation is None or continuation.checkpoint.step != step:
        raise LaunchError(
            f"rank 0 resumes from step {step} in {path}, whose newest checkpoint here is not that one: "
            "all ranks must see one run folder"
        )
    continuation.compare_settings(recipe)
    return continuation


def _find_checkpoint(path: Path, force: bool) -> Continuation | None:
    """Return the newest whole checkpoint of a run; None if it has none. What is skipped, and why, is logged.

    Raises:
        CheckpointError: none of those that are there is whole, or what one holds of the run is not what this version
            writes.
    """
    checkpoint, reasons = newest_whole(path / CHECKPOINTS)
    for reason in reasons:
        log.warning("resume: skipped a damaged checkpoint, %s", reason)
    if checkpoint is None:
        if reasons:  # to begin afresh would remove what may be worth a look
            cure = f"to begin afresh, remove {path / CHECKPOINTS}"
            raise CheckpointError(f"no whole checkpoint is left in {path}; {cure} ({reasons[0]})")
        return None
    log.info("resume: going on after step %d", checkpoint.step)
    return Continuation(checked(checkpoint), force)


def checked(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint that says of its run what one of this version says.

    Raises:
        CheckpointError: it lacks something, or holds it in another form.
    """
    numbers_of(checkpoint)
    run = checkpoint.documents.get(RUN, {})
    wrong = [name for name, kind in _PARTS.items() if type(run.get(name)) is not kind]
    if not wrong and not isinstance(_flat(run["recipe"]).get(_RATE), int | float):
        wrong.append(_RATE)
    if not wrong and not run["plan"]:
        wrong.append("plan")
    if not wrong and run["metrics_bytes"] < 0:
        wrong.append("metrics_bytes")
    if not wrong and not isinstance(run["summary"].get("resumed", []), list):
        wrong.append("summary")
    if wrong:
        raise CheckpointError(f"the checkpoint of step {checkpoint.step} lacks {', '.join(wrong)} in their right form")
    if FROZEN_WEIGHTS not in run["environment"]:  # earlier versions had their checksum where its content names the base
        run["environment"][FROZEN_WEIGHTS] = run["identity"].get(BASE_MODEL)
        run["identity"][BASE_MODEL] = run["summary"].get("base_fingerprint")
    run["environment"].setdefault("kernels", [])  # earlier versions had none
    run["environment"].setdefault(RANKS, 1)  # and did not say it
    run["environment"].setdefault(INSTRUCTIONS, torch.backends.cpu.get_cpu_capability())
    return checkpoint


def _only_pages(key: str, old: object, new: object) -> bool:
    """Return whether a change is one between a paged optimizer and the same one unpaged: the same numbers elsewhere."""
    return key == "train.optimizer" and str(old).removeprefix("paged_") == str(new).removeprefix("paged_")


def _flat(recipe: dict) -> dict[str, object]:
    """Return a recipe's settings by dotted key; those of an earlier version by their present names."""
    flat: dict[str, object] = {}
    for section, settings in recipe.items():
        values = settings if isinstance(settings, dict) else {"": settings}
        keys = {name: f"{section}.{name}" for name in values}
        flat |= {FORMER_NAMES.get(key, key): values[name] for name, key in keys.items()}
    return flat


def data_identity(recipe: Recipe, tokenizer, data: Dataset, eval_data: Dataset | None) -> dict[str, str | None]:
    """Return digests of what is learned and measured; of a stream, of its first rows and the files that lie here."""
    training = data.examples.digest()
    if recipe.data.streaming:
        local = [source.path for source in build_sources(recipe, "train") if not source.path.startswith(PREFIX)]
        files = [file for path in local for file in find_files(path)]
        training = " ".join([training, *map(content_digest, files)])
    task = find_task(recipe)
    labels = {"labels": _digest_of_labels(task.labels, data, eval_data)} if task.labels else {}
    return labels | {
        "training rows": hashlib.sha256(training.encode()).hexdigest(),
        "evaluation rows": eval_data.examples.digest() if eval_data else None,
        **_digest_of_reader(tokenizer),
        **({"picture processor": reader.digest} if (reader := task.picture_reader(recipe)) else {}),
    }


def _digest_of_reader(reader) -> dict[str, str | None]:
    """Return a digest of a tokenizer, or of what makes pixels of pictures."""
    if not hasattr(reader, "backend_tokenizer"):
        return {"picture processor": reader.digest}
    return {"tokenizer": hashlib.sha256(reader.backend_tokenizer.to_str().encode()).hexdigest()}


def _digest_of_labels(labels: Labels, data: Dataset, eval_data: Dataset | None) -> str:
    """Return a digest of the labels of texts, which are no tokens."""
    found = hashlib.sha256()
    for part in filter(None, (data, eval_data)):
        for example in part.examples:
            found.update(f"{labels.content(example.answer)}\n".encode())
    return found.hexdigest()


def environment(
    device_name: str, loss: str, kernels: Sequence[str], frozen_weights: str, ranks: int = 1
) -> dict[str, object]:
    """Return what a result's last bits can depend on, by name.

    Args:
        loss: whose loss is computed.
        kernels: fused ones that are used, see ``models.kernels``.
        frozen_weights: see ``guards.frozen_checksum``.
        ranks: that share each step.
    """
    return {
        **package_versions(),
        "device": device_name,
        "threads": torch.get_num_threads(),
        INSTRUCTIONS: torch.backends.cpu.get_cpu_capability(),
        "loss": loss,
        "kernels": [*kernels],
        FROZEN_WEIGHTS: frozen_weights,
        RANKS: ranks,
    }
