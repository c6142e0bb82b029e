"""Make a recipe of another trainer's file.

`files` reads its settings, the core's `foreign_names` says what they are called here, `values` what becomes of their
values; here the recipe is made of that. What the file leaves to its trainer's defaults is written down where
ours differ, since the recipe is to train what the file trains. For the same reason a file with an objective or a method
that is not here is refused, and so is one with settings that what is learned depends on and that have no counterpart,
unless a part of it is asked for.

source of the defaults: axolotl, src/axolotl/utils/schemas; LlamaFactory, src/llamafactory/hparams; transformers,
TrainingArguments; torchtune, recipes/configs and torch.optim.AdamW; unsloth, unsloth_cli/config.py and
unsloth/models/rl.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_lite.errors import Problem, RecipeError
from qlora_lite.recipe import reference
from qlora_lite.recipe.load import recipe_of
from qlora_lite.recipe.overrides import apply_overrides
from qlora_lite.recipe.schema import Recipe
from qlora_lite.recipe.strict_yaml import dump, parse, plain, shown
from qlora_lite.units import counted

from .files import is_command, read_command, read_script, read_settings
from .values import FOUR_BIT, Draft, Kind, Note, take, take_dataset, warmup

MAX_LINES = 50  # of notes of a kind in the recipe's comments, for a recipe has to stay small
_TITLES: dict[Kind, str] = {
    "lost": "NOT CONVERTED, although training depends on it",
    "changed": "Converted, with a different meaning here",
    "unused": "Left out; not needed",
}
_TRANSFORMERS = {
    "train.epochs": 3.0,
    "train.lr_scheduler": "linear",
    "train.warmup_ratio": 0.0,
    "train.optimizer": "adamw_torch",
    "data.packing": False,
}
_THEIR_DEFAULTS: dict[str, dict[str, object]] = {
    "axolotl": {"model.quant": "none", "data.packing": False, "data.max_tokens": 512, "train.optimizer": "adamw_torch"},
    "LlamaFactory": _TRANSFORMERS
    | {
        "model.quant": "none",
        "lora.rank": 8,
        "data.max_tokens": 2048,
        "train.learning_rate": 5e-5,
        "train.micro_batch_size": 8,
    },
    "torchtune": {
        "data.packing": False,
        "train.max_grad_norm": 0.0,
        "train.weight_decay": 0.01,
        "train.lr_scheduler": "constant",
        "train.warmup_ratio": 0.0,
    },
    "trl": _TRANSFORMERS | {"model.quant": "none", "data.train_on": "all", "data.max_tokens": 1024},
    "unsloth": _TRANSFORMERS | {"data.train_on": "all", "data.max_tokens": 2048},
    "unsloth-studio": {
        "lora.rank": 64,
        "lora.alpha": 16,
        "data.max_tokens": 2048,
        "data.packing": False,
        "data.train_on": "all",
        "train.epochs": 3,
        "train.micro_batch_size": 2,
        "train.gradient_accumulation_steps": 4,
        "train.weight_decay": 0.01,
    },
}
_OF_UNSLOTH_CONFIGS = {  # which it writes into trl's classes; transformers' TrainingArguments keep their own
    "train.gradient_accumulation_steps": 2,
    "train.optimizer": "adamw_8bit",
    "train.weight_decay": 0.01,
    "train.warmup_ratio": 0.1,
}
_REQUIRED = "model.path", "data.train"
_BY_VERSION = "lora.rank", "lora.alpha", "train.learning_rate", "train.micro_batch_size"  # trl's and unsloth's defaults
_OF_TRL_COMMANDS = {"lora.rank": 16, "lora.alpha": 32, "train.micro_batch_size": 8}  # and of its YAML files
_PROMPT_TOKENS = 512  # of trl's GRPO, where nothing is said
_SCRIPTS = "trl", "unsloth"
_OVER_GPUS = "deepspeed", "fsdp", "num_processes"
_SAID_OF_PROMPTS = "completion_only_loss", "dataset_text_field", "formatting_func", "training.train_on_completions"
_HELD_OUT = "test", "valid", "eval", "dev"  # names of splits, in a script
_WORD = re.compile(r"(?!(?:true|false|null)$)[a-z]\w*")  # which needs no quotes in a list
_DATASET = re.compile(r"(datasets|test_datasets|dataset|dataset_val)\.(\d+\.)?")


@dataclass(frozen=True, slots=True)
class Conversion:
    """Hold a recipe made of another trainer's file.

    Args:
        trainer: whose file it is.
        text: the recipe, with the notes as comments above it.
        notes: what was not taken over as it is, in the file's order.
    """

    trainer: str
    text: str
    notes: tuple[Note, ...]


def convert(path: str | Path, overrides: Sequence[str] = (), *, partial: bool = False) -> Conversion:
    """Make a recipe of an axolotl, LlamaFactory, torchtune, trl or unsloth file; nothing in it is run.

    Args:
        path: a YAML file, a Python or shell script or a notebook, or the command that starts a script of trl.
        overrides: settings of the recipe, such as "data.train=rows.jsonl", for what the file does not say.
        partial: whether to go without settings that what is learned depends on.

    Raises:
        RecipeError: the file cannot be read or trains something else, or such settings would be lost.
    """
    if str(path).endswith(".sh"):
        path = read_script(Path(path))
    if is_command(str(path)):
        path, settings = read_command(str(path))
        trainer = "trl"
    else:
        trainer, settings = read_settings(Path(path))
    draft = Draft(trainer, Path(path), given={setting.name: setting for setting in settings})
    datasets: set[str] = set()
    for setting in settings:
        found = _DATASET.match(setting.name)
        if found is None:
            take(draft, setting)
        elif (prefix := found[0]) not in datasets:
            datasets.add(prefix)
            item = {s.name.removeprefix(prefix): s for s in settings if s.name.startswith(prefix)}
            is_held_out = trainer in _SCRIPTS and "split" in item and str(item["split"].value).startswith(_HELD_OUT)
            part = "eval" if is_held_out or found[1] in ("test_datasets", "dataset_val") else "train"
            take_dataset(draft, part, item)
    assumed = _finish(draft)
    values = _checked(draft, overrides)
    given = {text.partition("=")[0].strip() for text in overrides}
    notes = tuple(note for note in draft.notes if note.kind != "lost" or note.key not in given)
    if lost := [note for note in notes if note.kind == "lost"]:
        missing = _missing(values)
        if missing or not partial:
            raise RecipeError([*(Problem(n.text, n.where) for n in lost), Problem(_ways(lost, missing), str(path))])
    text = _header(draft, notes) + _body(values, dict.fromkeys(assumed - given, f"  # the default of {trainer}"))
    return Conversion(trainer, text, notes)


def _finish(draft: Draft) -> set[str]:
    """Convert what depends on several settings, and write down what the file leaves to its trainer; return the keys."""
    defaults = _defaults(draft)
    warmup(draft)
    _trained(draft, defaults)
    _targets(draft, defaults)
    _rows(draft)
    assumed = {key for key in defaults if not draft.is_settled(key)}
    draft.values |= {key: defaults[key] for key in assumed}
    is_full, by_version = draft.values.get("adapter.method") == "full", draft.trainer in _SCRIPTS
    for key in (*_REQUIRED, *(_BY_VERSION if by_version else ())):
        if not draft.is_settled(key) and not (is_full and key.startswith("lora.")):
            draft.add("lost", f"{key} is not in it", key)
    has_limit = draft.is_settled("data.max_tokens") or draft.trainer != "torchtune"
    becomes = "dropped" if draft.trainer == "axolotl" else "cut"
    is_divided = any(name.startswith(_OVER_GPUS) and setting.value for name, setting in draft.given.items())
    for is_so, text, key in (
        (
            "data.train_on" in assumed and draft.given.keys().isdisjoint(_SAID_OF_PROMPTS),
            "prompts of rows with prompt and completion are not learned there; data.train_on: assistant is for them",
            "data.train_on",
        ),
        (
            is_divided,
            "batch sizes are per GPU there; multiply train.gradient_accumulation_steps by the number of GPUs",
            "",
        ),
        (
            not has_limit,
            "an example may have any length there; here data.max_tokens is 1024, and a longer one an error",
            "data.max_tokens",
        ),
        (
            has_limit and "data.overflow" not in draft.values,
            f"examples over data.max_tokens are {becomes} there; here they are an error unless data.overflow says so",
            "",
        ),
        (
            draft.values.get("data.packing") is False,
            "a step has as many examples as there; with data.packing its micro-batches are packed sequences instead",
            "",
        ),
    ):
        if is_so:
            draft.add("changed", text, key)
    if not (draft.values.get("data.eval") or draft.values.get("data.eval_share")):
        for key in ("train.eval_every_steps", "train.early_stopping_patience"):
            if draft.values.get(key):
                draft.note("unused", draft.source_of(key), "there are no evaluation examples")
            draft.values.pop(key, None)
    return assumed


def _defaults(draft: Draft) -> dict[str, object]:
    """Return what the file's trainer does where it says nothing."""
    defaults = dict(_THEIR_DEFAULTS[draft.trainer])
    if draft.trainer == "unsloth" and "config_class" in draft.given:
        defaults |= _OF_UNSLOTH_CONFIGS
    if draft.trainer == "trl" and not draft.is_code:
        defaults |= _OF_TRL_COMMANDS
    if draft.trainer == "LlamaFactory":
        defaults["lora.alpha"] = 2 * draft.number("lora.rank", 8)
    if "train.max_steps" in draft.values:
        defaults.pop("train.epochs", None)
    return defaults


def _trained(draft: Draft, defaults: dict[str, object]) -> None:
    """Convert which weights are trained: LoRA's, of which layers, or all."""
    switch = {"axolotl": "adapter", "trl": "use_peft"}.get(draft.trainer, "")
    if switch and not (switch in draft.given and draft.given[switch].value):
        draft.values["adapter.method"] = "full"
    if draft.values.get("adapter.method") == "full":
        for key in [key for key in (*draft.values, *defaults) if key.startswith("lora.")]:
            defaults.pop(key, None)
            if key in draft.values:
                draft.note("unused", draft.source_of(key), "all weights are trained, and no LoRA weights")
                del draft.values[key]
        if draft.values.get("model.quant", "none") != "none":
            draft.add("changed", "all weights are trained, and so none are in 4 bit", "model.quant")
        draft.values["model.quant"] = "none"
        if parts := draft.given.get("unfrozen_parameters"):
            text = "all weights are trained; adapter.train_also, with lora.targets [], trains parts of the base alone"
            draft.note("lost", parts, text, "adapter.method")
    elif "finetune_vision_layers" in draft.given and draft.values.get("task.kind") == "image-text-to-text":
        draft.values["lora.targets"] = ["all-linear", "*vis*"]
    elif draft.trainer in ("axolotl", "trl") and not draft.is_settled("lora.targets"):
        draft.values["lora.targets"] = ["q_proj", "v_proj"]
        text = "no layers are named, and peft takes those of its list for the family: q_proj and v_proj for most"
        draft.add("changed", text, "lora.targets")
    if draft.trainer == "trl" and draft.values.get("model.quant") in FOUR_BIT:
        defaults["model.double_quant"] = False
        if draft.is_code and "bnb_4bit_quant_type" not in draft.given:
            draft.values["model.quant"] = "fp4"
            text = "4 bits are FP4 there where no type is named; NF4, with model.quant=nf4, loses less"
            draft.add("changed", text, "model.quant")


def _targets(draft: Draft, defaults: dict[str, object]) -> None:
    """Convert what an example is: an answer, two that are compared, or a group that is rewarded."""
    objective, kind = draft.values.get("train.objective", "sft"), draft.values.get("task.kind")
    if objective == "sft" and kind != "reward":
        if pairs := draft.given.get("ranking"):
            text = "its examples are pairs or judgements, and the file names no objective for them"
            draft.note("lost", pairs, text, "train.objective")
        return
    defaults.pop("data.train_on", None)
    key, limit = "data.max_tokens", draft.number("data.max_tokens", defaults.get("data.max_tokens"))
    if objective == "grpo":
        answers, steps = draft.number("objective.group_size", 8), draft.number("train.gradient_accumulation_steps", 1)
        prompt = draft.given.get("max_prompt_length")
        prompt_tokens = prompt.value if prompt and isinstance(prompt.value, int) else _PROMPT_TOKENS
        limit = draft.number(key, prompt_tokens + draft.number("objective.max_completion_tokens", 256))
        draft.values[key] = answers * limit
        draft.add("changed", f"data.max_tokens is for all {answers} answers to a prompt, each with the prompt", key)
        batch = steps * draft.number("train.micro_batch_size", 8)
        draft.values |= {"train.micro_batch_size": 1, "train.gradient_accumulation_steps": max(1, batch // answers)}
        draft.add("changed", f"a step's {counted(batch, 'answer')} are counted in prompts here")
        if draft.values.get("objective.beta"):
            draft.note("changed", draft.source_of("objective.beta"), "there is no term of a reference model here")
        draft.values.pop("objective.beta", None)
    elif limit and objective != "kto":
        draft.values[key] = 2 * limit
        draft.add("changed", "data.max_tokens is twice what it is there: here it is for both answers to a prompt", key)


def _rows(draft: Draft) -> None:
    """Convert what all data sets have to share."""
    formats = {source.get("format") == "alpaca" for source in draft.values.get("data.train", [])}
    if draft.trainer == "axolotl" and formats == {True}:
        draft.values["data.template"] = "alpaca"  # which is not the model's own there either
    elif draft.trainer == "axolotl" and True in formats:
        text = "Alpaca's prompts and others are mixed; here all data have one data.template"
        draft.add("lost", text, "data.template")
    elif draft.trainer in _SCRIPTS and len(draft.values.get("data.train", [])) > 1:
        draft.add("lost", "which of its data sets are trained on is decided by code", "data.train")


def _checked(draft: Draft, overrides: Sequence[str]) -> dict[str, dict[str, object]]:
    """Return the settings by section, with the overrides; those that the recipe's rules refuse become notes."""
    while True:
        values: dict[str, dict[str, object]] = {section: {} for section in Recipe.model_fields}
        for key, value in draft.values.items():
            section, _, name = key.partition(".")
            values[section][name] = value
        document = parse(dump(values).encode(), str(draft.path))
        assert document.root is not None
        apply_overrides(document.root, overrides, document)
        if document.problems:
            raise RecipeError(document.problems)
        whole = plain(document.root)
        try:
            recipe_of(values, overrides, str(draft.path))
        except RecipeError as error:
            refused = {".".join(problem.key.split(".")[:2]): problem for problem in error.problems}
            ours = {key: problem for key, problem in refused.items() if key in draft.values}
            if not ours and refused.keys() <= set(_missing(whole)):
                return whole
            if not ours:
                raise  # of an override
            for key, problem in ours.items():
                kind: Kind = "unused" if key.startswith("memory.") else "lost"
                draft.note(kind, draft.source_of(key), problem.message, key)
                del draft.values[key]
        else:
            return whole


def _missing(values: dict[str, dict[str, object]]) -> list[str]:
    pairs = [(key, *key.split(".")) for key in _REQUIRED]
    return [key for key, section, name in pairs if name not in (values.get(section) or {})]


def _ways(lost: Sequence[Note], missing: Sequence[str]) -> str:
    keys = list(dict.fromkeys(note.key for note in lost if note.key))
    ways = [f"give {' '.join(f'{key}=...' for key in keys)} after the file"] if keys else []
    ways += [] if missing else ["leave them out, with --partial"]
    return f"training depends on {counted(len(lost), 'setting')} not converted; {', or '.join(ways)}"


def _header(draft: Draft, notes: Sequence[Note]) -> str:
    lines = [f"Converted from {shown(draft.path.name)} ({draft.trainer}) by `qlora-lite recipes convert`."]
    for kind, title in _TITLES.items():
        if of_kind := [str(note) for note in notes if note.kind == kind]:
            more = [f"and {len(of_kind) - MAX_LINES} more"] if len(of_kind) > MAX_LINES else []
            lines += ["", f"{title}:", *(f"  {line}" for line in [*of_kind[:MAX_LINES], *more])]
    return "".join(f"# {line}".rstrip().replace("\n", " ") + "\n" for line in lines)


def _body(values: dict[str, dict[str, object]], remarks: dict[str, str]) -> str:
    """Return the settings that differ from the defaults, by section and in the file's order."""
    text = ""
    for section, settings in values.items():
        lines = ""
        for name, value in (settings or {}).items():
            field = reference.setting(f"{section}.{name}")
            if (not field.is_required() and value == field.default) or (name == "targets" and value == "all-linear"):
                continue
            if isinstance(value, list) and all(isinstance(item, str) and _WORD.fullmatch(item) for item in value):
                lines += f"  {name}: [{', '.join(value)}]\n"
                continue
            match value:
                case [{"path": path, **others}] if not others:
                    value = path
            first, *rest = dump({name: value}).splitlines()
            lines += f"  {first}{remarks.get(f'{section}.{name}', '')}\n" + "".join(f"    {line}\n" for line in rest)
        text += f"{section}:\n{lines}" if lines else ""
    return text
