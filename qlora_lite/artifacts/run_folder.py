"""The run folder: what a run writes while it goes, and what the other commands read of it.

``summary.json`` exists from the start with status "running"; only a run that reached its end says
"complete", so nothing half-written looks finished.
"""

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qlora_lite.errors import CheckpointError, ModelError, OutputError, RecipeError
from qlora_lite.files import (
    explain_write_errors,
    flush_to_disk,
    open_no_link,
    refuse_link,
    remove_leftovers,
    sha256,
    write_text,
)
from qlora_lite.prepare.method import find_method
from qlora_lite.recipe.load import load_recipe, resolve_to_yaml
from qlora_lite.recipe.schema import Recipe
from qlora_lite.terminal import LogFormatter
from qlora_lite.train.checkpoints import CHECKPOINTS, folder_of, newest_whole, steps_on_disk

from .run_files import METRICS, RECIPE, SAMPLES, SUMMARY, with_present_names

log = logging.getLogger("qlora_lite")
ADAPTER, ADAPTER_LAST = "adapter", "adapter-last"
MODEL, MODEL_LAST = "model", "model-last"  # in their place, of full fine-tuning: model folders as transformers has them
# ``adapters.read`` has these names too, and takes seconds to import.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIGESTS = {  # what a summary calls them
    ADAPTER: "adapter_sha256",
    ADAPTER_LAST: "adapter_last_sha256",
    MODEL: "model_sha256",
    MODEL_LAST: "model_last_sha256",
}
TOKENIZER = "tokenizer.json"
TOKENIZER_DIGEST = "tokenizer_sha256"  # in a summary, of the base model's; see ``digests_of`` for those beside weights
TEMPLATE = "template.jinja"
LOG = "log.txt"
COMPLETE = "complete"  # the status of a run that came to its end
_OUTPUTS = (
    METRICS,
    SUMMARY,
    TEMPLATE,
    "report.html",
    "data.html",
    "data.json",
    ADAPTER,
    ADAPTER_LAST,
    MODEL,
    MODEL_LAST,
    CHECKPOINTS,
    SAMPLES,
)
VERSIONED = ("qlora-lite", "torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "tokenizers")


def package_versions() -> dict[str, str]:
    """Return the versions that a run's result can depend on, torch's with the CUDA build that its metadata lacks."""
    return {name: importlib.metadata.version(name) for name in VERSIONED} | {"torch": str(torch.__version__)}


@dataclass(slots=True)
class RunFolder:
    """A run's folder and the summary that grows in it.

    Args:
        recipe: of the run.
        summary: content of ``summary.json``.
        metrics_bytes: size of ``metrics.jsonl`` as it was last written; what lies behind it is a torn line.
        metrics_hash: SHA-256 over these bytes.
        waiting: lines of metrics that could not be written yet.
        proven: False while nothing shows yet that this is the run to resume: values are kept, not written.
        trains: its first step has begun, so that it is worth a look even if it fails.
    """

    path: Path
    recipe: Recipe
    summary: dict = field(default_factory=dict)
    metrics_bytes: int = 0
    metrics_hash: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    waiting: list[str] = field(default_factory=list)
    proven: bool = True
    trains: bool = False

    def log_metrics(self, values: dict) -> None:
        """Append one line to ``metrics.jsonl``, with null for a value that is not finite.

        A disk that does not take it is no reason to lose a night's training: the line waits for the next.
        """
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        self.waiting.append(json.dumps(finite) + "\n")
        try:
            self.write_metrics()
        except OutputError as error:
            if len(self.waiting) == 1:
                log.warning("%s. Training continues, and the lines wait until it can be written", error)

    def write_metrics(self) -> None:
        """Write the lines that wait.

        Raises:
            OutputError: they cannot be written.
        """
        self._make_again()
        file = self.path / METRICS
        with explain_write_errors(file), open(file, "ab", opener=open_no_link) as stream:
            there = min(self.metrics_bytes, os.fstat(stream.fileno()).st_size)
            stream.truncate(there)
            if there < self.metrics_bytes:  # somebody removed or cut it
                self.metrics_hash = hashlib.sha256(file.read_bytes())
            lines = "".join(self.waiting).encode()
            stream.write(lines)
            stream.flush()
            self.metrics_hash.update(lines)
            self.metrics_bytes = there + len(lines)
        self.waiting.clear()

    def _make_again(self) -> None:
        """Make the folder again if somebody removed it: what is still to come is worth more than a reproach."""
        if not (self.path / RECIPE).is_file():
            with explain_write_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / RECIPE, resolve_to_yaml(self.recipe))
            log.warning("%s was removed; it is created again, without its former content", self.path)

    def flush_metrics(self) -> None:
        """Wait until the metrics written so far would survive a power cut.

        Raises:
            OutputError: they cannot be written.
        """
        with explain_write_errors(self.path / METRICS):
            flush_to_disk(self.path / METRICS)

    def update(self, **values) -> None:
        """Put values into ``summary.json``; where it cannot be written just now, a later call writes them.

        A moment's fault of the disk is no reason to end a run; at its begin and its end ``write_summary`` says so.
        """
        self.summary.update(values)
        try:
            self.write_summary()
        except OutputError as error:
            log.warning("%s. The run continues, and its summary waits until it can be written", error)

    def write_summary(self) -> None:
        """Write ``summary.json``.

        Raises:
            OutputError: it cannot be written.
        """
        if not self.proven:
            return
        self._make_again()
        write_text(self.path / SUMMARY, json.dumps(self.summary, indent=2) + "\n")


def new_path(recipe: Recipe) -> Path:
    """Make the folder of a new run.

    Raises:
        OutputError: it cannot be made.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = Path(recipe.output.dir) if recipe.output.dir else Path("runs") / f"{_name(recipe)}-{stamp}"
    with explain_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def newest_path(recipe: Recipe) -> Path | None:
    """Return the folder of a recipe's newest run, None if it has none; of one that failed before it came to a
    checkpoint, the folder of the run before it."""
    if recipe.output.dir:
        return Path(recipe.output.dir) if Path(recipe.output.dir).is_dir() else None
    digits = "[0-9]"
    paths = sorted(Path("runs").glob(f"{_name(recipe)}-{digits * 8}-{digits * 6}"), reverse=True)
    return next((path for path in paths if not _never_began(path)), paths[0] if paths else None)


def _never_began(path: Path) -> bool:
    """Check whether a run failed and left nothing to resume from."""
    return _status(path) == "failed" and not steps_on_disk(path / CHECKPOINTS)


def _status(path: Path) -> str | None:
    """Return what a run's summary says of it, None where there is none."""
    return summary_in(path).get("status")


def summary_in(path: Path) -> dict:
    """Return a run's summary; nothing of one that is missing or broken."""
    try:
        summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return with_present_names(summary) if isinstance(summary, dict) else {}


def _failed_at_once(path: Path) -> bool:
    """Check whether a run failed before its first step, so that the same folder may be used again."""
    return _never_began(path) and not (path / METRICS).exists()


def _name(recipe: Recipe) -> str:
    return recipe.output.name or "run"


def create_run(path: Path, recipe: Recipe, replace: bool = False) -> RunFolder:
    """Begin a run in its folder, with its resolved recipe; call it with the folder locked.

    Args:
        replace: remove what a run that never came to a checkpoint has left in it; of one that failed before its first
            step, it is removed in any case.

    Raises:
        OutputError: the folder cannot be written, or holds something else already.
    """
    if replace:
        remove_leftovers(path)
    with explain_write_errors(path):
        is_run = (replace or _failed_at_once(path)) and is_begun(path)
        if any(path.iterdir()) and not is_run and not has_only_recipe(path, recipe):
            raise OutputError(f"{path} is not empty; {_other_place(path)}")
        for name in _OUTPUTS:
            output = path / name
            shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
    run = RunFolder(path, recipe)
    write_text(path / RECIPE, resolve_to_yaml(recipe))
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    run.summary.update(status="running", name=_name(recipe), model=recipe.model.path, started=started)
    run.write_summary()
    return run


def undo_start(path: Path, was_there: bool) -> None:
    """Empty the folder of a run that failed before its training, and remove it if it was made for the run."""
    with suppress(OSError):
        for name in (RECIPE, LOG, *_OUTPUTS):  # nothing of a user's that has come meanwhile
            output = path / name
            shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
        if not was_there:
            path.rmdir()


def _other_place(path: Path) -> str:
    """Return what to do when the folder of a new run is not empty; what keeps its content comes first."""
    steps = steps_on_disk(path / CHECKPOINTS)
    if not steps or _status(path) == COMPLETE:
        return "choose another output.dir or remove it"
    return f"its run reached a checkpoint of step {steps[0]}. {how_to_go_on(path)}. Or choose another output.dir"


def rewind_run(run: RunFolder, has_best: bool, metrics_sha256: str | None) -> None:
    """Go back to where a run was: cut off the metrics of later steps, and write the recipe that it resumes with.

    Args:
        run: with the summary and the ``metrics_bytes`` of then.
        has_best: the adapter (or model) that is there is the best one by evaluation, not the end of an earlier run.
        metrics_sha256: of the ``metrics_bytes`` of then; None where an earlier version wrote the checkpoint.

    Raises:
        OutputError: the folder cannot be written.
    """
    refuse_link(run.path / CHECKPOINTS)
    remove_leftovers(run.path)
    remove_leftovers(run.path / CHECKPOINTS)
    if not has_best:
        shutil.rmtree(run.path / trained_folders(run.recipe)[0], ignore_errors=True)
    file = run.path / METRICS
    written = file.read_bytes()[: run.metrics_bytes] if file.is_file() else b""
    whole = written.rfind(b"\n") + 1
    lost, run.metrics_bytes, run.metrics_hash = run.metrics_bytes - whole, whole, hashlib.sha256(written[:whole])
    if lost:
        log.warning("%s lacks %d bytes of earlier steps; new lines are appended to what is there", file, lost)
    elif metrics_sha256 not in (None, run.metrics_hash.hexdigest()):
        log.warning(
            "%s is damaged: its lines of earlier steps are not those that were written (their SHA-256 "
            "differs); new lines are appended to them",
            file,
        )
    run.write_metrics()
    write_text(run.path / RECIPE, resolve_to_yaml(run.recipe))


def is_complete(path: Path, recipe: Recipe) -> bool:
    """Check whether a recipe's run is complete, so that there is nothing to resume.

    Raises:
        CheckpointError: it did with another recipe, or its adapter is lost, and it has no checkpoint to resume from.
    """
    try:
        is_same = load_recipe(path / RECIPE, check_files=False).recipe_hash == recipe.recipe_hash
    except (OSError, ValueError, RecipeError):
        return False
    if _status(path) != COMPLETE:
        return False
    adapter = path / trained_folders(recipe)[0]
    is_there = _holds_weights(adapter) and weights_sha256(adapter) is not None
    is_whole = is_same and is_there and _changed(adapter) is None
    if not is_whole and newest_whole(path / CHECKPOINTS)[0] is None:
        raise CheckpointError(f"{path} is complete and has no checkpoint to continue from; choose another output.dir")
    if is_same and not is_whole:
        log.warning("resume: %s is lost or damaged; it is written again", adapter)
    return is_whole


def trained_folders(recipe: Recipe) -> tuple[str, str]:
    """Return the names of the folders of what a run trains: the best by evaluation, and the last."""
    return (MODEL, MODEL_LAST) if find_method(recipe).trains_base else (ADAPTER, ADAPTER_LAST)


def _holds_weights(folder: Path) -> bool:
    names = ("config.json", "model_index.json") if folder.name in (MODEL, MODEL_LAST) else (ADAPTER_CONFIG,)
    return any((folder / name).is_file() for name in names)


def weights_sha256(folder: Path) -> str | None:
    """Return the SHA-256 of the safetensors file of a folder, of several files that of theirs; None without any.

    Of a diffusion pipeline's folder it is the denoiser's.
    """
    files = [file for part in (".", "transformer", "unet") for file in (folder / part).glob("*.safetensors")]
    digests = [sha256(file) for file in sorted(files)]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest() if len(digests) > 1 else next(iter(digests), None)


def how_to_go_on(folder: Path) -> str:
    """Return the command that resumes a run, as a sentence."""
    return f"To resume: {_resume_command(folder)}"


def _resume_command(folder: Path) -> str:
    return f"qlora-lite train {shlex.quote(str(folder / RECIPE))} --resume {shlex.quote(str(folder))}"


def is_begun(folder: Path) -> bool:
    """Check whether a folder has a run: its recipe and summary, or a checkpoint, which contains both.

    A recipe alone may be the user's own, beside models and rows that no run may touch.
    """
    is_run = all((folder / name).is_file() for name in (RECIPE, SUMMARY))
    return is_run or bool(steps_on_disk(folder / CHECKPOINTS))


def has_only_recipe(path: Path, recipe: Recipe) -> bool:
    """Check whether a folder has no more than what a run of the recipe writes first, after which it was killed."""
    if [file.name for file in path.iterdir()] != [RECIPE]:
        return False
    return (path / RECIPE).read_bytes() == resolve_to_yaml(recipe).encode()


def newest_checkpoint(step: int | None) -> str:
    """Return in words what can be resumed: the step of the newest checkpoint, None for none."""
    return "no checkpoint is there" if step is None else f"the newest checkpoint is of step {step}"


class _LogFile(logging.FileHandler):
    """A log file whose disk may fail: what could not be logged is not worth a trace on the terminal each time."""

    def _open(self):
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=open_no_link)

    def handleError(self, _record) -> None:
        return


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append our log to a file as well."""
    with explain_write_errors(path):
        handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(LogFormatter("%(asctime)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    if not log.isEnabledFor(logging.INFO):  # a caller that has not set up logging still gets the whole log.txt
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        with suppress(OSError):
            handler.close()


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """What another command needs of a run: its recipe, its best adapter, and the tokens that end an answer.

    The adapter is the best one by evaluation, else the last one, else that of the newest whole checkpoint; of full
    fine-tuning it is a model folder, and no checkpoint's, which has no tokenizer. The
    recipe's template is the one that the run recorded; the summary is what ``summary.json`` holds.
    """

    recipe: Recipe
    adapter: Path
    end_token_ids: tuple[int, ...]
    summary: dict


def open_run(path: str | Path) -> OpenedRun:
    """Open a run folder for use.

    Raises:
        RecipeError: it is not a run folder, or has no adapter yet.
        ModelError: the adapter is damaged.
    """
    folder = Path(path)
    if not (folder / RECIPE).is_file() and is_begun(folder):
        raise RecipeError(f"{folder} has lost its {RECIPE}; its checkpoints contain it: {_resume_command(folder)}")
    if not (folder / RECIPE).is_file():
        if around := _run_around(folder):
            raise RecipeError(f"{folder} is not a run folder: it has no {RECIPE}; name the run, {around}")
        raise RecipeError(
            f"{folder} is not a run folder: it has no {RECIPE}; nor an adapter folder: it has no {ADAPTER_CONFIG}"
        )
    try:
        summary = with_present_names(json.loads((folder / SUMMARY).read_text(encoding="utf-8")))
        end_token_ids = tuple(int(token) for token in summary["data"]["end_token_ids"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RecipeError(f"{folder / 'summary.json'} is missing or broken; is this a complete run folder?") from None
    recipe = load_recipe(folder / RECIPE, check_files=False)
    adapter = next((folder / name for name in trained_folders(recipe) if _holds_weights(folder / name)), None)
    if adapter:
        check_adapter(adapter)
    elif find_method(recipe).trains_base:
        steps = steps_on_disk(folder / CHECKPOINTS)
        go_on = f"{newest_checkpoint(steps[0])}. {how_to_go_on(folder)}" if steps else f"see {folder / LOG}"
        raise RecipeError(f"{folder} has no model; the run ended before one was saved: {go_on}")
    else:
        checkpoint, _ = newest_whole(folder / CHECKPOINTS)
        adapter = folder_of(folder / CHECKPOINTS, checkpoint.step) if checkpoint else None
    if adapter is None:
        raise RecipeError(f"{folder} has no adapter; the run ended before one was saved (see {folder / LOG})")
    if (folder / TEMPLATE).is_file():
        data = recipe.data.model_copy(update={"template": str(folder / TEMPLATE)})
        recipe = recipe.model_copy(update={"data": data})
    return OpenedRun(recipe, adapter, end_token_ids, summary)


def check_adapter(folder: Path) -> None:
    """Compare an adapter's weights and tokenizer with the SHA-256 that its run's summary has of them.

    Nothing is compared where none is known: of an adapter without a run, as peft writes it, and of a run that was
    killed or is still going on.

    Raises:
        ModelError: they are not what was written; the cure names what the run has instead.
    """
    if (what := _changed(folder)) is None:
        return
    run = folder.parent
    checkpoint, _ = newest_whole(run / CHECKPOINTS)
    cures = []
    if checkpoint:
        cures.append(f"write it again from the checkpoint of step {checkpoint.step}: {_resume_command(run)}")
    last = run / {ADAPTER: ADAPTER_LAST, MODEL: MODEL_LAST}.get(folder.name, folder.name)
    if last != folder and _holds_weights(last):
        cures.append(f"remove {folder} to use {last}, that of the last step")
    cure = ", or ".join(cures) or "restore it from a copy, or train again"
    raise ModelError(f"{what} is damaged: its SHA-256 is not the one in {run / SUMMARY}; {cure}")


def digests_of(folder: Path) -> dict[str, str | None]:
    """Return the SHA-256 of the weights and of the tokenizer in the folder of what a run trained, as its summary names
    them; none of other folders."""
    if (name := DIGESTS.get(folder.name)) is None:
        return {}
    return {name: weights_sha256(folder), f"{name}_of_tokenizer": tokenizer_sha256(folder)}


def tokenizer_sha256(folder: Path) -> str | None:
    """Return the SHA-256 of a folder's ``tokenizer.json``; None without one."""
    return sha256(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else None


def _changed(folder: Path) -> Path | None:
    """Return the weights or the tokenizer of a run's folder that have not the SHA-256 that the run recorded, if any."""
    summary, weights = summary_in(folder.parent), folder
    if folder.name in (ADAPTER, ADAPTER_LAST):
        weights = folder / ADAPTER_WEIGHTS
    for (name, digest), what in zip(digests_of(folder).items(), (weights, folder / TOKENIZER), strict=False):
        if isinstance(recorded := summary.get(name), str) and digest not in (None, recorded):
            return what
    return None


def is_adapter_alone(folder: Path) -> bool:
    """Check whether a folder holds an adapter that belongs to no run folder, as peft writes it."""
    is_adapter = (folder / ADAPTER_CONFIG).is_file() and not (folder / RECIPE).is_file()
    return is_adapter and _run_around(folder) is None


def _run_around(folder: Path) -> Path | None:
    parents = folder.absolute().parents[:2]
    return next((p for p in parents if (p / RECIPE).is_file() and (p / SUMMARY).is_file()), None)
