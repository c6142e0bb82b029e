"""What a run leaves for use: its adapter, checked against the base model that it was trained on.

A base that was replaced or moved since, a run that did not reach its end, an adapter that changes nothing: each is
found here, before a merge or an export works for an hour on it.

An adapter alone, in a folder as peft writes it, is opened like a run. Its base is the one that it names, loaded as a
recipe's defaults say; its chat template is what lies beside it, else the base's; what ends an answer is what the
template writes there. So is a bare base model, a recipe's or one by its name, for use without an adapter.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from reprlib import repr as short

import torch
from torch import nn

from qlora_lite.adapters.files import MODEL_CONFIG_NAME
from qlora_lite.adapters.lora.qera import QERA
from qlora_lite.adapters.lora.start import FIRST_NAME, First, first_sum_of, load_first, sum_of
from qlora_lite.adapters.read import Adapter as ReadAdapter
from qlora_lite.adapters.read import begins_with_qera, named_base, read_adapter, trained_tokens, warn_of_other_split
from qlora_lite.adapters.saved import Saved
from qlora_lite.data.chat.conversation import Conversation
from qlora_lite.data.chat.render import end_of_answers, for_pictures
from qlora_lite.data.chat.row_formats import read_conversations
from qlora_lite.data.chat.template import Template, choose_template, template_in
from qlora_lite.data.readers.problems import Problems
from qlora_lite.errors import CheckpointError, DataError, ModelError, RecipeError
from qlora_lite.models.load import load_model, resolve_device
from qlora_lite.models.locate import ModelFiles, locate, read_json
from qlora_lite.models.pretrained import tokenizer_of
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.models.weights import first_lora_weights
from qlora_lite.prepare.datasets import build_sources
from qlora_lite.prepare.method import find_method
from qlora_lite.prepare.model import build_skeleton, build_to_use, fingerprint
from qlora_lite.prepare.settings import with_plan
from qlora_lite.prepare.start import resolve_start, without_start
from qlora_lite.prepare.task import Task as Kind
from qlora_lite.prepare.task import find_task
from qlora_lite.prepare.transformer import quantization
from qlora_lite.recipe.load import load_recipe
from qlora_lite.recipe.part import Part
from qlora_lite.recipe.schema import Adapter, Data, Model, Recipe, Task
from qlora_lite.registry import find, names

from .run_files import HELD_OUT_DIGEST, SUMMARY
from .run_folder import (
    ADAPTER_CONFIG,
    TOKENIZER,
    TOKENIZER_DIGEST,
    OpenedRun,
    check_adapter,
    how_to_go_on,
    is_adapter_alone,
    open_run,
    tokenizer_sha256,
)

log = logging.getLogger("qlora_lite")
SYSTEM_ROWS = 200  # of each source, looked at for a system message that all share


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """A run whose adapter is to be used, an adapter alone, or a bare base model.

    Args:
        name: the folder's name.
        recipe: with the base model where it lies now, a device of this machine, and what the run recorded: its
            template and the memory options of its plan.
        adapter: folder of the adapter; None for a bare base model.
        end_token_ids: the tokens that training taught to end an answer.
        files: of the base model.
        own_template: Jinja text that lies beside an adapter alone, used in place of the tokenizer's own.
        began_as: of a run that trained a whole model, which is what ``recipe`` names then, the base model's path.
        held_out: ``prepare.datasets.held_out_digest`` of the rows that it held out of its training rows, where known.
    """

    name: str
    recipe: Recipe
    adapter: Path | None
    end_token_ids: tuple[int, ...]
    files: ModelFiles
    own_template: str | None = None
    began_as: str | None = None
    held_out: str | None = None

    @property
    def is_alone(self) -> bool:
        """Whether this is an adapter or a model alone, which names no rows."""
        return not self.recipe.data.train

    @property
    def has_base(self) -> bool:
        """Whether the model is its base model where the adapter is left out."""
        return not self.began_as and (self.adapter is None or resolve_start(self.recipe) is None)

    def require_base(self) -> None:
        """Check that the base model is there without what was trained.

        Raises:
            ModelError: all weights of it were, or a part of each is in the LoRA weights.
        """
        if not self.has_base and not self.began_as:
            m, start = self.recipe.model.path, self.recipe.lora.start
            raise ModelError(
                f"{self.name} began with lora.start {start}, and its base without the LoRA weights is no "
                f"model: use the model by its own name, {m}"
            )
        if self.began_as:
            raise ModelError(
                f"{self.name} trained all weights of its base model, which is another model now: use that "
                f"by its own name, {self.began_as}"
            )

    def require_adapter(self, instead: str) -> None:
        """Check that what was trained is an adapter.

        Args:
            instead: of it, what can be done with a whole model.

        Raises:
            ModelError: it is a whole model.
        """
        if self.began_as:
            raise ModelError(
                f"{self.name} is a run of full fine-tuning and has no adapter: its model is a folder of "
                f"its own, {self.recipe.model.path}; {instead}"
            )

    @property
    def device(self) -> torch.device:
        """Return the device to compute on."""
        return resolve_device(self.recipe.model.device)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the type to compute in."""
        return find_task(self.recipe).compute_dtype(self.recipe, self.device)

    @property
    def fingerprint(self) -> str:
        """Return what names the base model by its content, and by how its weights were split."""
        return fingerprint(self.recipe, self.files)

    @property
    def quantization(self) -> tuple[str, bool]:
        """Return how the run saw the linear layers: their type, and whether their absmax values were quantised too."""
        return quantization(self.recipe, self.files.config)

    def skeleton(self) -> nn.Module:
        """Return the base model on the meta device, its layers 4-bit where the run's were."""
        return build_skeleton(self.recipe)

    def tokenizer(self):
        """Return the tokenizer with the chat template that training used; of pictures their processor."""
        task = find_task(self.recipe)
        if not task.has_tokens:
            return task.reader(self.recipe)
        tokenizer = load_tokenizer(self.recipe.model.path, self.recipe.model.revision, self.recipe.adapter.train_tokens)
        if self.recipe.data.template or self.own_template or tokenizer.chat_template:
            tokenizer.chat_template = self.template(tokenizer).source
        return tokenizer

    def template(self, tokenizer) -> Template:
        """Return the chat template that training used, or would use.

        Raises:
            DataError: there is none: the rows were plain text, or an adapter alone came without.
        """
        if self.adapter and self.is_alone and not (self.own_template or tokenizer.chat_template):
            raise DataError(
                f"neither the adapter {self.adapter} nor its base model has a chat template; put the one "
                "that it was trained with into that folder, as chat_template.jinja"
            )
        found = choose_template(tokenizer, self.recipe.data.template, self.own_template)
        reader = find_task(self.recipe).picture_reader(self.recipe)
        return for_pictures(found, reader.token) if reader else found

    def shared_system(self) -> str | None:
        """Return the system message of the training rows, if the first ones all have the same.

        Raises:
            DataError: the rows cannot be read.
        """
        if self.is_alone:
            raise DataError("the adapter comes without a run")
        found = set()
        for source in build_sources(self.recipe, "train", compares=False):
            for row in islice(read_conversations(source, Problems()), SYSTEM_ROWS):
                if not isinstance(row, Conversation):
                    break
                found.add(row.turns[0].content if row.turns[0].role == "system" else None)
        return found.pop() if len(found) == 1 else None

    def read_adapter(self, skeleton: nn.Module) -> ReadAdapter | Saved:
        """Read the adapter for the base model; a bare one has an adapter without layers.

        Raises:
            ModelError: it does not fit, or holds NaN.
        """
        if self.adapter is None:
            return ReadAdapter({}, 0.0)
        adapter = read_adapter(skeleton, self.adapter)
        return adapter if isinstance(adapter, Saved) else replace(adapter, merge_aware=self.recipe.train.merge_aware)

    def adapter_to_merge(self, skeleton: nn.Module) -> ReadAdapter:
        """Read the adapter for a merge or an export.

        Raises:
            ModelError: it does not fit, holds NaN, changes nothing, or cannot be merged.
        """
        adapter = self.read_adapter(skeleton)
        if self.adapter is None:  # the model itself
            return ReadAdapter({}, 0.0)
        if isinstance(adapter, Saved):
            raise ModelError(f"{self.adapter} can be neither merged nor exported: {adapter.method.why_not_merged}")
        if not adapter.weights and not any(factors.lora_B.any() for factors in adapter.layers.values()):
            raise ModelError(f"the adapter {self.adapter} changes nothing: every lora_B is zero; was it trained?")
        return adapter

    def split_base(self) -> nn.Module | None:
        """Load the base model as the run saw it into host memory, from the cache if it is there; None where its weights
        were not split (``lora.start``)."""
        if (start := resolve_start(self.recipe)) is None:
            return None
        m = self.recipe.model
        base = load_model(
            m.path, m.quant, m.double_quant, self.compute_dtype, "cpu", m.revision, keep_16bit=m.keep_16bit, start=start
        )
        self._check_split(base)
        return base

    def _check_split(self, base: nn.Module) -> None:
        if self.adapter:
            warn_of_other_split(self.adapter, first_sum_of(base))

    def for_files(self, adapter: ReadAdapter) -> ReadAdapter:
        """Return an adapter for the model as its files have it, in 16 bit: of a base whose weights were split, that is
        the difference to what its LoRA weights began as.

        Args:
            adapter: the run's.
        """
        if self.adapter and begins_with_qera(self.adapter):
            first = _first_beside(self.adapter, adapter)
        elif start := resolve_start(self.recipe):
            m = self.recipe.model
            first = first_lora_weights(self.files, start, m.quant, m.double_quant, self.compute_dtype, m.keep_16bit)
            if self.adapter:
                warn_of_other_split(self.adapter, sum_of(first))
        else:
            return adapter
        own = adapter.layers.items()
        layers = {path: factors.without(*first[path]) if path in first else factors for path, factors in own}
        return replace(adapter, layers=layers)

    @property
    def start(self) -> str | None:
        """The ``lora.start`` whose LoRA weights fit no model but the one that they began with; None of another."""
        if self.adapter and begins_with_qera(self.adapter):
            return QERA
        start = resolve_start(self.recipe)
        return start.kind if start else None

    def build_base(self) -> nn.Module:
        """Load the base model as the run saw it, without LoRA layers, its weights on the device as far as they fit."""
        model = build_to_use(self.recipe, [self.adapter] if self.adapter else [])
        self._check_split(model)
        return model


def open_trained(
    run: str | Path,
    model_path: str | None = None,
    unfinished: bool = False,
    has_head: bool | None = False,
    draws: bool = False,
) -> TrainedRun:
    """Open a run for use, or an adapter alone.

    Args:
        run: a run folder, or an adapter's in the PEFT format.
        model_path: where the base model is, if not where the run or the adapter says.
        unfinished: take the best adapter so far, else the last, of a run that did not reach its end.
        has_head: what is wanted: a head that labels texts, or (False) a language model; None takes either.
        draws: a denoiser is wanted.

    Raises:
        RecipeError: it is no such folder, has no adapter, or the run did not reach its end.
        ModelError: the base model is gone or is another one, an adapter alone names none, or the adapter is damaged.
        DataError: the chat template beside an adapter alone cannot be used.
    """
    folder = Path(run)
    if is_adapter_alone(folder):
        alone = _open_alone(folder, model_path)
        require_kind(alone.recipe, folder, has_head, draws)
        return alone
    opened = open_run(folder)
    require_kind(opened.recipe, folder, has_head, draws)
    if (status := opened.summary.get("status")) != "complete" and not unfinished:
        raise RecipeError(
            f"the run {folder} did not finish (status {status}); add --unfinished to use its adapter "
            f"{opened.adapter}. {how_to_go_on(folder)}"
        )
    if status != "complete":
        log.warning("the run %s did not finish; using %s", folder, opened.adapter)
    if find_method(opened.recipe).trains_base:
        return _open_whole(folder, opened, model_path)
    recipe = _where_it_lies_now(_as_it_ran(opened), model_path)
    try:
        files = find_task(recipe).locate(recipe)
    except ModelError as error:
        moved = f"the base model of {folder} is not where it was ({opened.recipe.model.path}): {error}"
        raise ModelError(moved if model_path else f"{moved}. Give its new location with --model PATH") from error
    _check_base(opened.summary, fingerprint(recipe, files), files, folder, "--model PATH")
    name = folder.resolve().name
    held_out = opened.summary["data"].get(HELD_OUT_DIGEST)
    return TrainedRun(name, recipe, opened.adapter, opened.end_token_ids, files, held_out=held_out)


def require_kind(recipe: Recipe, name: str | Path, has_head: bool | None, draws: bool = False) -> None:
    """Check that a recipe is of what is wanted.

    Args:
        name: of the recipe or run, for messages.
        has_head, draws: see ``open_trained``.

    Raises:
        RecipeError: it is of another kind.
    """
    task, kind = find_task(recipe), recipe.task.kind
    if draws and not task.draws:
        raise RecipeError(f"{name} is of task.kind {kind}, and draws no pictures")
    if task.draws:
        if draws:
            return
        raise RecipeError(f"{name} draws pictures (task.kind {kind}): use `qlora-lite generate`")
    if has_head is False and task.has_head:
        what = f"has a head that labels {'texts' if task.has_tokens else 'pictures'} (task.kind {kind})"
        raise RecipeError(
            f"{name} {what}, and this is for models that write text: use `qlora-lite predict` or "
            "`evaluate`, or its adapter folder with peft"
        )
    if has_head and not task.has_head:
        raise RecipeError(f"{name} is a language model without a head for labels: use `qlora-lite generate`")


def _open_whole(folder: Path, opened: OpenedRun, model_path: str | None) -> TrainedRun:
    if model_path:
        raise ModelError(f"{folder} has a whole model, and needs no base model: leave out --model")
    recipe, path = _where_it_lies_now(_as_it_ran(opened), str(opened.adapter)), opened.recipe.model.path
    files, held_out = find_task(recipe).locate(recipe), opened.summary["data"].get(HELD_OUT_DIGEST)
    return TrainedRun(folder.resolve().name, recipe, None, opened.end_token_ids, files, None, path, held_out)


def _open_alone(folder: Path, model_path: str | None) -> TrainedRun:
    base, revision = named_base(folder)
    if not (path := base or model_path):
        raise ModelError(f"the adapter {folder} does not name its base model; give that with --model PATH")
    task = _task_of(folder)
    implied = {name: value for (_, name), value in find("tasks", task.kind, Part).implied.items()}
    model = Model.model_validate({"path": path, "revision": revision, **implied})
    named = Recipe(model=model, task=task, data=Data.model_construct(train=(), resolution=_size_of(folder)))
    recipe = _where_it_lies_now(named, model_path)
    try:
        files = locate(recipe.model.path, recipe.model.revision)
    except ModelError as error:
        said = f"the base model of the adapter {folder} is not found: {error}"
        raise ModelError(said if model_path else f"{said}. Give its location with --model PATH") from error
    recipe = recipe.model_copy(update={"adapter": Adapter(train_tokens=_new_tokens(folder, recipe))})
    trained = TrainedRun(folder.resolve().name, recipe, folder, (), files, template_in(folder))
    if find_task(recipe).has_head:
        return trained
    try:
        tokenizer = trained.tokenizer()
        return _with_end_of_template(trained, tokenizer) if tokenizer.chat_template else trained
    except DataError as error:
        raise DataError(f"the chat template of the adapter {folder}: {error}") from error


def _labels_in(folder: Path) -> tuple[str, ...] | None:
    """Return the names of the outputs that ``config.json`` beside weights says; None without one.

    Raises:
        ModelError: they have no numbers.
    """
    path = folder / MODEL_CONFIG_NAME
    labels = read_json(path).get("id2label") if path.is_file() else None
    try:
        return tuple(str(labels[key]) for key in sorted(labels, key=int)) if isinstance(labels, dict) else None
    except ValueError as error:
        raise ModelError(
            f"{path}: id2label must name each output by its number, 0 and so on: {short(str(labels))}"
        ) from error


def _task_of(folder: Path) -> Task:
    """Return what an adapter alone is for; of one with a head, ``config.json`` beside it says the labels.

    Raises:
        ModelError: it does not.
    """
    config = read_json(folder / MODEL_CONFIG_NAME) if (folder / MODEL_CONFIG_NAME).is_file() else {}
    adapter, labels = read_json(folder / ADAPTER_CONFIG), _labels_in(folder)
    tasks = {name: find("tasks", name, Kind) for name in names("tasks")}
    kind = next((name for name, each in tasks.items() if each.trained(adapter, config, labels)), None)
    has_head = adapter.get("task_type") == "SEQ_CLS" or str(config.get("architectures")).endswith(
        "ForImageClassification']"
    )
    if has_head and (kind is None or labels is None):
        raise ModelError(
            f"{folder} is an adapter with a head, and no config.json beside it says its labels (id2label) "
            "and problem_type: add them, or use the run that trained it"
        )
    if kind is None:
        return Task()
    try:
        return Task.model_validate({"kind": kind, "labels": labels if "task.labels" in tasks[kind].settings else None})
    except ValueError as error:  # pydantic's are such too
        raise ModelError(
            f"{folder / MODEL_CONFIG_NAME}: id2label must name each output by its number, 0 and so "
            f"on: {short(str(labels))}"
        ) from error


def _size_of(folder: Path) -> int | None:
    """Return the size of the pictures that an adapter alone was trained on, if its files say it."""
    path = folder / "preprocessor_config.json"
    edges = read_json(path).get("crop_size") if path.is_file() else None
    return edges.get("height") if isinstance(edges, dict) else None


def _new_tokens(folder: Path, recipe: Recipe) -> tuple[str, ...]:
    """Return the tokens that the tokenizer beside an adapter has, and its base's lacks, if it has rows for any."""
    rows = trained_tokens(folder)
    if not rows or not (folder / "tokenizer.json").is_file():
        return ()
    known = load_tokenizer(recipe.model.path, recipe.model.revision).get_vocab()
    added = {number: token for token, number in tokenizer_of(folder).get_vocab().items() if token not in known}
    return tuple(added[number] for number in sorted(added.keys() & rows))


def _with_end_of_template(trained: TrainedRun, tokenizer) -> TrainedRun:
    """Return it with the token with which its template ends an answer, if it does."""
    end = end_of_answers(trained.template(tokenizer))
    return replace(trained, end_token_ids=(tokenizer.convert_tokens_to_ids(end),)) if end else trained


def open_model(
    name: str | Path,
    model_path: str | None = None,
    unfinished: bool = False,
    template: str | None = None,
    overrides: Sequence[str] = (),
    with_pictures: bool = False,
) -> TrainedRun:
    """Open what can answer: a run, an adapter alone, or the bare base model of a recipe or of its name.

    Args:
        name: a run folder, an adapter's, a recipe (.yaml), or a model as ``model.path`` names it.
        model_path, unfinished: see ``open_trained``.
        template: chat template of a bare base model, as ``data.template`` names it; None is the recipe's, the model's
            own, or plain for a model without one.
        overrides: settings of a recipe, as "key=value".
        with_pictures: a model by its name is one that is asked about pictures.

    Raises:
        RecipeError: it is none of these, a run is given a template, or a model another base model.
        ModelError: the base model is not there, or is another one.
        DataError: there is no such template.
    """
    path = Path(name)
    is_recipe = path.suffix in (".yaml", ".yml") and not path.is_dir()
    if path.is_dir() and ((path / ADAPTER_CONFIG).exists() or not (path / "config.json").is_file()):
        if template:
            raise RecipeError(f"{name} has a chat template of its own; --template is for a recipe or a model")
        return open_trained(path, model_path, unfinished)
    if is_recipe:
        recipe = without_start(load_recipe(path, overrides, check_files=False))
    else:
        multimodal = (kind for kind in names("tasks") if find("tasks", kind, Kind).multimodal)
        task = Task(kind=next(multimodal)) if with_pictures else Task()
        recipe = Recipe(model=Model(path=str(name)), task=task, data=Data.model_construct(train=()))
    require_kind(recipe, name, has_head=False)
    if is_recipe:
        recipe = _where_it_lies_now(recipe, model_path)
    try:
        files = locate(recipe.model.path, recipe.model.revision)
    except ModelError as error:
        if is_recipe or path.exists():
            raise
        kinds = "a run folder, an adapter folder or a recipe (.yaml)"
        raise RecipeError(f"{name} is not {kinds}, nor a model: {error}") from None
    if model_path and not is_recipe:
        raise RecipeError(
            f"--model {model_path} is the base model of a run, and {name} is a model itself: leave one out"
        )
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision, recipe.adapter.train_tokens)
    if not is_recipe and not template and not tokenizer.chat_template:
        template = "plain"
        log.warning("%s has no chat template; prompts are written with the template plain (--template)", name)
    data = recipe.data.model_copy(update={"template": template or recipe.data.template})
    called = path.stem if is_recipe or path.suffix == ".gguf" else path.name
    bare = TrainedRun(called, recipe.model_copy(update={"data": data}), None, (), files)
    return _with_end_of_template(bare, tokenizer)


def adapter_to_begin_with(recipe: Recipe) -> Path | None:
    """Return the folder of the adapter that ``lora.init_from`` means: a run's is its best one.

    Raises:
        ModelError: the run has no adapter, it is damaged, or it is of another base model.
    """
    if recipe.lora.init_from is None:
        return None
    folder = Path(recipe.lora.init_from)
    try:
        if (folder / ADAPTER_CONFIG).is_file():
            check_adapter(folder)
            return folder
        opened = open_run(folder)
        files = find_task(recipe).locate(recipe)
        where = "model.path, and the settings of its lora.start"
        _check_base(opened.summary, fingerprint(recipe, files), files, folder, where)
    except (RecipeError, ModelError) as error:
        raise ModelError(f"lora.init_from: {error}") from error
    return opened.adapter


def with_labels_of(adapter: Path, recipe: Recipe) -> Recipe:
    """Return a recipe with the labels of the adapter that ``lora.init_from`` means, whose head is for those alone.

    Raises:
        ModelError: the adapter is for another kind of task, or for other labels than the recipe has already.
    """
    task = _task_of(adapter)
    if not (find("tasks", task.kind, Kind).has_head or find_task(recipe).has_head):
        return recipe
    if task.kind != recipe.task.kind:
        raise ModelError(
            f"lora.init_from: the adapter is of task.kind {task.kind}, this recipe's is {recipe.task.kind}"
        )
    if recipe.task.labels not in (None, task.labels):
        own, theirs = (f"[{', '.join(labels or ())}]" for labels in (recipe.task.labels, task.labels))
        raise ModelError(
            f"lora.init_from: the adapter's head is for the labels {short(theirs)}, and this run's are "
            f"{short(own)}: write task.labels: {theirs}, and leave out rows with others"
        )
    return recipe.model_copy(update={"task": recipe.task.model_copy(update={"labels": task.labels})})


def _as_it_ran(opened: OpenedRun) -> Recipe:
    """Return a run's recipe with the labels and the plan that it recorded; an earlier version's may say nothing now."""
    recipe = opened.recipe
    task = find_task(recipe)
    if task.has_head and "task.labels" in task.settings and (labels := opened.summary.get("labels")):
        if (said := _labels_in(opened.adapter)) not in (None, tuple(labels)):
            own, theirs = (short([*each]) for each in (labels, said))
            raise ModelError(
                f"{opened.adapter.parent / SUMMARY} names the labels {own}, and "
                f"{opened.adapter / MODEL_CONFIG_NAME} {theirs}: one of them was changed; restore it from "
                "a copy"
            )
        recipe = recipe.model_copy(update={"task": recipe.task.model_copy(update={"labels": tuple(labels)})})
    if classes := opened.summary.get("classes"):
        recipe = recipe.model_copy(update={"task": recipe.task.model_copy(update={"labels": tuple(classes)})})
    try:
        return with_plan(recipe, opened.summary["plan"]["chosen"], micro_batches=False)
    except (KeyError, TypeError, CheckpointError):
        return recipe


def _where_it_lies_now(recipe: Recipe, model_path: str | None) -> Recipe:
    changes = {"path": model_path, "revision": None} if model_path else {}
    if recipe.model.device == "cuda" and not torch.cuda.is_available():
        changes["device"] = "auto"
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=changes)})


def _check_base(summary: dict, found: str, files: ModelFiles, folder: Path, where: str) -> None:
    recorded = summary.get("base_fingerprint")
    if recorded is None:  # a run of an earlier version; shapes are still compared
        return
    if found != recorded:
        raise ModelError(
            f"{folder} was trained on {summary.get('model')} with fingerprint {recorded}; {files.name} has fingerprint "
            f"{found} and is another model: give the right one with {where} (what config.json and "
            "generation_config.json say is part of it)"
        )
    known = summary.get(TOKENIZER_DIGEST)
    if known and not files.gguf_file and tokenizer_sha256(files.folder) not in (None, known):
        raise ModelError(
            f"{files.folder / TOKENIZER} is not the tokenizer that {folder} was trained with: give the "
            f"model with that one with {where}, or remove {TOKENIZER_DIGEST} from {folder / SUMMARY} to "
            "use this one"
        )


def _first_beside(folder: Path, adapter: ReadAdapter) -> First:
    """Read what the LoRA weights of an adapter began as from the file beside it."""
    first = load_first(folder)
    for path, (lora_a, lora_b) in first.items():
        factors = adapter.layers.get(path)
        if factors is None or (lora_a.shape, lora_b.shape) != (factors.lora_A.shape, factors.lora_B.shape):
            raise ModelError(f"{folder / FIRST_NAME} does not fit the adapter beside it: {path}")
    return first
