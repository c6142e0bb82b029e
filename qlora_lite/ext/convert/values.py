"""What becomes of the values of another trainer's settings; `foreign_names` alone says what the settings are called.

Rules are functions of the draft and a setting, by local key where all names of a key are read alike, by place where a
trainer nests its settings. What is not taken over as it is becomes a note, of one of three kinds:

- lost: what is learned depends on it, and nothing here is like it;
- changed: taken over, and it means something else here;
- unused: left out, and nothing is lost.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qlora_lite.errors import Problem, RecipeError
from qlora_lite.recipe import foreign_names, paths, reference
from qlora_lite.recipe.strict_yaml import NOT_TEXT, scalar_value, shown

from .files import ALPACA, CHAT_TEMPLATE, Code, Setting

Kind = Literal["lost", "changed", "unused"]
_KINDS: dict[str, Kind] = {"not needed": "unused", "otherwise": "changed", "not offered": "lost"}
_MAX_INFO_BYTES = 2**22
_LOADERS = {"json", "csv", "text", "parquet", "arrow"}
_LOCAL_KEY = re.compile(r"\b(model|lora|data|train|objective)\.[a-z_]+")
_SECRET = re.compile(r"(?<!pad_)(?<!eos_)(?<!bos_)(?<!unk_)(token|key|secret|password)$")
_OFF = (False, 0, "none", "no", "off")
_SAME = {  # values that ask for no more than what is done here anyway, texts in small letters
    name: values
    for values, names in (
        (
            (True,),
            "init_lora_weights finetune_vision_layers finetune_language_layers finetune_attention_modules "
            "finetune_mlp_modules freeze_vision_tower freeze_multi_modal_projector shuffle "
            "shuffle_merged_datasets use_peft",
        ),
        (("lora", "qlora"), "adapter finetuning_type training_type peft_type"),
        (("bnb", "bitsandbytes"), "quantization_method quantization_type quant_method"),
        (("steps",), "eval_strategy evaluation_strategy save_strategy"),
        (("none", "all", ["none"], ["all"]), "report_to log_with"),
        (("sft", "nll"), "stage loss_type"),
        (("messages", "conversations"), "field_messages conversation_column"),
        (("role", "from"), "role message_field_role"),
        (("content", "value"), "content message_field_content"),
        ((1e-8,), "adam_epsilon eps"),
    )
    for name in names.split()
} | {
    "adam_beta1": (0.9,),
    "adam_beta2": (0.999,),
    "betas": ([0.9, 0.999],),
    "num_cycles": (0.5,),
    "max_steps": (-1,),
    "mix_strategy": ("concat",),
    "dataset_text_field": ("text",),
    "loraplus_lr_embedding": (1e-6,),
    "train_on_eos": ("turn", "all"),
    "roles_to_train": (["assistant"], ["gpt"], ["gpt", "assistant"]),
    "conversation_style": ("sharegpt", "openai"),
    "chat_template": ("jinja", "tokenizer_default"),
    "field": ("text",),
    "field_prompt": ("prompt",),
    "field_chosen": ("chosen",),
    "field_rejected": ("rejected",),
    "epsilon": (0.2,),
    "num_iterations": (1,),
    "importance_sampling_level": ("token",),
}
_FORMATS = {
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
    "raw": "text",
    "chat_template": None,
    "auto": None,
    "chatml": None,
    "conversational": None,
    "openai": None,
    "chat_dataset": None,
    "instruct_dataset": None,
    "text_completion_dataset": "text",
    "alpaca_dataset": "alpaca",
    "alpaca_cleaned_dataset": "alpaca",
    "slimorca_dataset": "sharegpt",
    "preference_dataset": None,
    "stack_exchange_paired_dataset": None,
    "llama3": None,
    "gemma": None,
}
_STACK_EXCHANGE = "lvwerra/stack-exchange-paired"  # of which torchtune reads one folder
_DATASETS = {  # of torchtune's builders of one data set
    "alpaca_dataset": "tatsu-lab/alpaca",
    "alpaca_cleaned_dataset": "yahma/alpaca-cleaned",
    "slimorca_dataset": "Open-Orca/SlimOrca-Dedup",
    "stack_exchange_paired_dataset": _STACK_EXCHANGE,
}
_COLUMNS = {  # of data sets, and of axolotl's kinds of preferences
    "stack_exchange_paired_dataset": ("question", "response_j", "response_k"),
    "intel": ("question", "chosen", "rejected"),
    "icr": ("input", "chosen", "rejected"),
    "argilla": ("instruction", "chosen_response", "rejected_response"),
}
_LOSSES = {  # of torchtune
    "CEWithChunkedOutputLoss": "sft",
    "LinearCrossEntropyLoss": "sft",
    "CrossEntropyLoss": "sft",
    "DPOLoss": "dpo",
    "IPOLoss": "ipo",
    "RSOLoss": "hinge",
    "SimPOLoss": "simpo",
}
FOUR_BIT = "nf4", "fp4"
_QUANTS = {4: "nf4", "nf4": "nf4", "fp4": "fp4", "none": "none", "bnb.nf4": "nf4", "gguf": "keep"}
_METHODS = {"adapter", "finetuning_type", "training_type", "peft_type"}
_STYLES = {"default", "ultra", "argilla_chat", "prompt_pairs", "load_role", *_COLUMNS}
_ROLES = {"system", "user", "human", "assistant", "gpt", "model", "tool", "observation", "function_call"}


@dataclass(frozen=True, slots=True)
class Note:
    """Hold what became of a setting that was not taken over as it is.

    Args:
        kind: see the module.
        where: the file and its line.
        text: the setting with its value, and what to know or do.
        key: the local setting that it is about, if one; a lost one is settled by an override of it.
    """

    kind: Kind
    where: str
    text: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@dataclass(slots=True)
class Draft:
    """Collect a recipe's settings in the order of another trainer's file, and the notes.

    Args:
        trainer: whose file it is.
        path: the file.
        values: by dotted local key.
        notes: in the file's order.
        given: the file's settings by name, for those that go together.
    """

    trainer: str
    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    given: dict[str, Setting] = field(default_factory=dict)
    is_answered: bool = False  # whether something has become of the present setting

    def note(self, kind: Kind, setting: Setting, text: str, key: str = "") -> None:
        """Add a note about a setting."""
        self.is_answered = True
        value = "" if _SECRET.search(setting.name) else f" = {shown(as_text(setting.value))}"
        self.notes.append(Note(kind, setting.where, f"{shown(setting.name)}{value}: {text}", key))

    def put(self, key: str, value: object, setting: Setting) -> None:
        """Set a local key; of several settings for it the first counts."""
        self.is_answered = True
        if self.values.setdefault(key, value) != value:
            self.note("changed", setting, f"{key} is {shown(self.values[key])} already, by a setting above", key)

    def replace(self, key: str, value: object) -> None:
        """Set a local key, whatever it was."""
        self.values[key], self.is_answered = value, True

    def add(self, kind: Kind, text: str, key: str = "") -> None:
        """Add a note about the file as a whole."""
        self.notes.append(Note(kind, str(self.path), text, key))

    @property
    def is_code(self) -> bool:
        """Whether the file is a script or a notebook."""
        return self.path.suffix in (".py", ".ipynb")

    def number(self, key: str, otherwise: Any) -> Any:
        """Return the whole number above 0 that a local key has, or another value where it has none."""
        value = self.values.get(key)
        return value if type(value) is int and value > 0 else otherwise

    def source_of(self, key: str) -> Setting:
        """Return the setting that a local key has its value of; the file, where there is none."""
        value = self.values.get(key)
        found = [
            s for s in self.given.values() if (answer := _answer(s.name)) and answer.text == key and s.value is not None
        ]
        found.sort(key=lambda s: _loose(s.value) != value)
        return next(iter(found), Setting(key, value, str(self.path)))

    def is_settled(self, key: str) -> bool:
        """Return whether the file says something about a local key."""
        return key in self.values or any(note.key == key for note in self.notes)


def as_text(value: object) -> str:
    """Return a value on one line, as its file has it or nearly so."""
    if isinstance(value, str | Code):
        return " ".join((value.text if isinstance(value, Code) else value).split())
    return json.dumps(value, ensure_ascii=False, default=str)


def take(draft: Draft, setting: Setting) -> None:
    """Convert one setting.

    Raises:
        RecipeError: it makes the file train something that is not offered here.
    """
    draft.given[setting.name] = setting
    name, value = setting.name.rpartition(".")[2].lower().replace("-", "_"), setting.value
    usual = _SAME.get(name, ())
    if value in (None, [], {}, "") or (value.lower() if isinstance(value, str) else value) in usual:
        return
    place = f"{draft.trainer}:{setting.name}"
    if rule := _BY_PLACE.get(place):
        rule(draft, setting)
        return
    key = _KEY_BY_PLACE.get(place)
    found = foreign_names.Answer("renamed", key) if key else _answer(setting.name)
    if found is None:
        draft.note("lost", setting, "not known here; remove it there if training does not need it")
    elif found.effect == "renamed":
        _rename(draft, setting, found.text)
    elif found == foreign_names.answer("warmup_steps"):
        draft.given["warmup_steps"] = setting  # with the number of steps, in `warmup`
    elif value in _OFF and True not in usual:
        return
    elif found.effect == "other training":
        raise RecipeError(Problem(f"{shown(setting.name)} = {shown(as_text(value))}: {found.text}", setting.where))
    else:
        kind = _KINDS[found.effect]
        text = found.text.removeprefix("remove it; ")
        section = setting.name.partition(".")[0]
        if section == setting.name or foreign_names.answer(section) is not found:
            named = _LOCAL_KEY.search(text)  # what would take its place settles it
            draft.note(kind, setting, text, named[0] if named and kind == "lost" else "")
        elif not any(note.text == f"{shown(section)}: {text}" for note in draft.notes):
            draft.notes.append(Note(kind, setting.where, f"{shown(section)}: {text}"))  # one line for all of it


def _answer(dotted: str) -> foreign_names.Answer | None:
    """Return what a setting is here, by its own name, by ours, or by the section that it stands in."""
    parts = dotted.split(".")
    sections = [found for part in parts[:-1] if (found := foreign_names.answer(part))]
    if sections and sections[0].effect == "not needed":
        return sections[0]
    for part, above in zip(parts[::-1], [*parts[-2::-1], ""], strict=True):
        if found := foreign_names.answer(part, above):
            return found
        ours = (key for key in reference.known_keys() if key.endswith(f".{part}"))
        if part not in ("path", "dir", "name", "train", "eval") and (key := next(ours, None)):
            return foreign_names.Answer("renamed", key)
    return None


def _rename(draft: Draft, setting: Setting, key: str) -> None:
    """Convert a setting that has a counterpart."""
    if key.startswith("memory.") or key in ("model.compute_dtype", "model.device"):
        _machine(draft, setting, key)
    elif isinstance(setting.value, Code):
        text = f"an expression, which is not evaluated; here it is {key}"
        draft.note("unused" if key in _AROUND else "lost", setting, text, key)
    else:
        draft.is_answered = False
        _BY_KEY.get(key, _copy)(draft, setting, key)
        if not draft.is_answered and _loose(setting.value) not in _OFF:
            text = f"not known here; {key} is {reference.rule_of(reference.setting(key))}"
            draft.note("unused" if key in _AROUND else "lost", setting, text, key)


def _copy(draft: Draft, setting: Setting, key: str) -> None:
    """Take a value over, as one of the setting's choices where it has some."""
    value, choices = setting.value, reference.choices_of(reference.setting(key))
    is_text = reference.rule_of(reference.setting(key)).startswith(("text", "at most"))
    if isinstance(value, str) and choices:
        value = foreign_names.same_value(value.rpartition(".")[2], choices)
    if value is not None:
        draft.put(key, value if is_text else _loose(value), setting)


def _loose(value: object) -> object:
    """Return what a text means that YAML 1.1, or a value in quotes there, has as a number or a truth value."""
    words = {"yes": True, "on": True, "no": False, "off": False}
    return words.get(value.lower(), scalar_value(value)) if isinstance(value, str) else value


def _machine(draft: Draft, setting: Setting, key: str) -> None:
    """Leave what depends on the machine to it: types and memory options are auto."""
    words = [word for word in re.split(r"\W", as_text(setting.value).lower()) if word]
    named = words[-1] if words else ""
    if key == "model.compute_dtype" and named in ("float32", "fp32"):
        draft.put(key, "float32", setting)
    elif key == "model.device" and named == "cpu":
        draft.put(key, "cpu", setting)
    elif key == "memory.optimizer_in_backward" and isinstance(setting.value, bool):
        draft.put(key, setting.value, setting)
    elif setting.value is not False:
        how = {
            "model.compute_dtype": "bfloat16, or float16 on GPUs that have no fast bfloat16",
            "model.device": "a CUDA GPU, if there is one",
        }
        advice = foreign_names.value_advice(key, named) or f"{key} is auto: {how.get(key, 'planned for the machine')}"
        draft.note("unused", setting, advice)


def _every(draft: Draft, setting: Setting, key: str) -> None:
    steps, name = _loose(setting.value), setting.name
    if type(steps) is int and ("_steps" in name or "interval" in name or "every" in name or "per_eval" in name):
        if steps > 0:
            draft.put(key, steps, setting)
    elif steps is not False:
        draft.note("unused", setting, f"here it is {key}, a number of steps")


def _max_steps(draft: Draft, setting: Setting, key: str) -> None:
    if (steps := _loose(setting.value)) not in (0, -1):
        draft.put(key, steps, setting)


def _batch(draft: Draft, setting: Setting, key: str) -> None:
    name = setting.name.rpartition(".")[2]
    if "eval" in name:
        draft.note("unused", setting, "evaluation batches are like training's")
    elif name == "global_batch_size" or (name == "batch_size" and draft.trainer == "axolotl"):
        text = "examples of a step; write train.micro_batch_size and train.gradient_accumulation_steps"
        draft.note("lost", setting, text, key)
    else:
        _copy(draft, setting, key)


def _quant(draft: Draft, setting: Setting, key: str) -> None:
    """Convert how the base is stored: of two settings one may say whether it has 4 bits, the other which."""
    value, known = _loose(setting.value), draft.values.get(key)
    bits = {"load_in_8bit": 8, "load_in_16bit": 16}.get(setting.name.rpartition(".")[2], 4)
    is_on = {name for name in ("load_in_4bit", "load_in_8bit") if _loose(_given(draft, name)) is True}
    if value is False:
        if bits == 4 and "load_in_8bit" not in is_on:
            draft.replace(key, "none")
    elif value is True and bits == 16:
        draft.put(key, "none", setting)
    elif value == 8 or (value is True and bits == 8):
        draft.put(key, "nf4", setting)
        text = "the base is in NF4 here, which needs less memory; model.quant none keeps it in 16 bit"
        draft.note("changed", setting, "4 bits are taken of the two" if "load_in_4bit" in is_on else text, key)
    elif isinstance(value, int | str) and (kind := _QUANTS.get(4 if value is True else value)):
        if value in FOUR_BIT and known in FOUR_BIT:
            draft.replace(key, kind)
        else:
            draft.put(key, known if value in (True, 4) and known in FOUR_BIT else kind, setting)


def _method(draft: Draft, setting: Setting, key: str) -> None:
    """Convert what is trained: a word, or a switch."""
    name, said = setting.name.rpartition(".")[2], as_text(setting.value).lower()
    if _loose(setting.value) is True:
        said = "full" if name == "full_finetuning" else "dora"
    if said in ("dora", "full"):
        draft.put(key, said, setting)
    elif name in _METHODS and said not in ("false", "no", "none"):
        text = foreign_names.value_advice(key, said) or "what is converted is trained with lora, dora or full"
        raise RecipeError(Problem(f"{shown(setting.name)} = {shown(said)}: {text}", setting.where))


def _objective(draft: Draft, setting: Setting, key: str) -> None:
    """Convert what is learned: a stage, a loss within it, or a trainer's class."""
    said = re.sub("trainer$|config$", "", as_text(setting.value).lower())
    choices = reference.choices_of(reference.setting(key))
    policy_losses = reference.choices_of(reference.setting("objective.policy_loss"))
    found = {"sigmoid": draft.values.get(key, "dpo"), **{name: name for name in choices}}.get(said)
    if setting.name.endswith("loss_type") and said in (*policy_losses, "bnpo"):
        draft.put("objective.policy_loss", "dapo" if said == "bnpo" else said, setting)
    elif said in ("rm", "reward"):
        draft.put("task.kind", "reward", setting)
    elif found is None and setting.name.rpartition(".")[2] in ("stage", "rl"):
        problem = f"{setting.name} = {as_text(setting.value)}: {foreign_names.OTHER_TRAINING}"
        raise RecipeError(Problem(problem, setting.where))
    elif found:  # a loss says more than the stage or the class that it is of
        draft.replace(key, draft.values.get(key, found) if found == "dpo" else found)


def _rewards(draft: Draft, setting: Setting, key: str) -> None:
    """Convert names of functions: those of a module, and those of a script, which have to move out of it."""
    names = setting.value if isinstance(setting.value, list) else [setting.value]
    found = []
    for module, _, function in (str(name).rpartition(".") for name in names):
        file = f"{module.replace('.', '/')}.py" if module else "rewards.py"
        found.append(f"{file if not module or os.path.isfile(file) else module}:{function}")
    draft.put(key, found, setting)
    text = f"functions get lists of texts (qlora-lite explain rewards); write such ones: {shown(', '.join(found))}"
    draft.note("changed", setting, text, key)


def _scale(draft: Draft, setting: Setting, key: str) -> None:
    if setting.value == "batch":
        draft.note("changed", setting, "rewards are divided by the standard deviation of their group", key)
    else:
        draft.put(key, setting.value not in (False, "none"), setting)


def _parts(draft: Draft, setting: Setting, key: str) -> None:
    names = setting.value.split(",") if isinstance(setting.value, str) else setting.value
    words = {
        "embed": "embeddings",
        "wte": "embeddings",
        "head": "head",
        "output": "head",
        "norm": "norms",
        "ln_": "norms",
    }
    parts: list[str] = []
    for name in names if isinstance(names, list) else [names]:
        found = next((part for word, part in words.items() if word in as_text(name)), None)
        if found is None:
            draft.note("lost", setting, f"{shown(as_text(name))} is not among what can be trained whole here", key)
        elif found not in parts:
            parts.append(found)
    if parts:
        draft.put(key, parts, setting)


def _targets(draft: Draft, setting: Setting, key: str) -> None:
    name, value = setting.name.rpartition(".")[2], setting.value
    mlp = ["gate_proj", "up_proj", "down_proj"]
    if name == "apply_lora_to_output":
        if value:
            draft.note("lost", setting, "the head stays frozen", key)
        return
    if isinstance(value, bool):
        found = {"lora_target_linear": "all-linear", "apply_lora_to_mlp": mlp}.get(name) if value else None
    elif isinstance(value, str):
        found = "all-linear" if value in ("all", "all-linear") else [part.strip() for part in value.split(",")]
    else:
        found = ["o_proj" if layer == "output_proj" else layer for layer in value] if isinstance(value, list) else None
    if isinstance(found, list):
        if not all(isinstance(layer, str) and re.fullmatch(r"[\w.]+", layer) for layer in found):
            return
        for layer in {"lm_head", "embed_tokens"} & set(found):
            draft.note("lost", setting, f"{layer} stays frozen", key)
        found = [layer for layer in found if layer not in ("lm_head", "embed_tokens")]
        if isinstance(earlier := draft.values.get(key), list):
            found = list(dict.fromkeys([*earlier, *found]))
    if found and draft.values.get(key) == "all-linear" != found:
        draft.note("unused", setting, f"{key} is all-linear already")
    elif found:
        draft.replace(key, found)


def _train_on(draft: Draft, setting: Setting, key: str) -> None:
    name, value = setting.name.rpartition(".")[2], _loose(setting.value)
    if name == "roles_to_train":
        draft.note("lost", setting, "the assistant's turns are target tokens, or all tokens (data.train_on: all)", key)
    elif name in ("train_on_inputs", "train_on_input", "train_on_prompt") and isinstance(value, bool):
        draft.put(key, "all" if value else "assistant", setting)
    elif value is True:
        draft.put(key, "last" if name == "mask_history" else "assistant", setting)
    elif isinstance(value, str) and name.endswith(("_template", "_part")):
        draft.put(key, "assistant", setting)
        draft.note("unused", setting, "where answers begin is known from the chat template")


def _eval_share(draft: Draft, setting: Setting, key: str) -> None:
    value = _loose(setting.value)
    if isinstance(value, int | float) and 0 < value < 1:
        draft.put(key, value, setting)
    elif value not in (0, False):
        draft.note("lost", setting, "a number of examples; here it is a share of them", key)


def _packing(draft: Draft, setting: Setting, key: str) -> None:
    if setting.name != "neat_packing" or setting.value is True:
        draft.put(key, _loose(setting.value), setting)


def _order(draft: Draft, setting: Setting, key: str) -> None:
    if _loose(setting.value) is setting.name.startswith(("disable_", "curriculum")):
        draft.put(key, "as-is", setting)


def _overflow(draft: Draft, setting: Setting, key: str) -> None:
    switches = {"truncation": "truncate", "drop_long_rows": "drop"}
    said = switches.get(setting.name, "") if _loose(setting.value) is True else as_text(setting.value)
    if value := {"raise": "error", "truncate": "truncate", "drop": "drop"}.get(said):
        draft.put(key, value, setting)


def _template(draft: Draft, setting: Setting, key: str) -> None:
    value = as_text(setting.value)
    if value in paths.TEMPLATES or value.endswith(".jinja"):
        draft.put(key, value, setting)
    elif "{%" in value or "{{" in value:
        draft.note("lost", setting, "save it in a file and name that, as in data.template=mine.jinja", key)
    elif value not in ("default", "empty", "vanilla", "original", "fewshot"):
        text = "the model's own chat template is used; see what it writes with `qlora-lite data`"
        draft.note("changed", setting, text, key)


def _trackers(draft: Draft, setting: Setting, key: str) -> None:
    name, value = setting.name.rpartition(".")[2], setting.value
    named = [part for part in ("wandb", "mlflow", "tensorboard", "swanlab", "comet") if part in name]
    words = named or (value if isinstance(value, list) else as_text(value).split(","))
    if named and isinstance(_loose(value), str):
        draft.note("unused", setting, "a tracker's project has the name output.name here")
    if value is False or (named and draft.trainer == "unsloth-studio" and isinstance(value, str)):
        return  # which is set whether it is used or not
    known = get_trackers()
    words = [{"comet": "comet_ml"}.get(word.strip(), word.strip()) for word in map(str, words)]
    if taken := [word for word in words if word in known]:
        draft.replace(key, list(dict.fromkeys([*draft.values.get(key, []), *taken])))
    if unknown := [word for word in words if word not in known]:
        draft.note("unused", setting, f"{shown(', '.join(unknown))} is not a tracker known here")


def get_trackers() -> tuple[str, ...]:
    """Return the names that train.trackers takes."""
    return reference.choices_of_items(reference.setting("train.trackers"))


def _data(draft: Draft, setting: Setting, key: str) -> None:
    """Convert the names of data sets that stand in one value."""
    value, part = setting.value, key.partition(".")[2]
    names = value if isinstance(value, list) else as_text(value).split(",")
    for name in (str(name).strip() for name in names):
        if draft.trainer == "LlamaFactory":
            _from_info(draft, setting, part, name)
        else:
            config, split = (_given(draft, f"dataset_{what}") for what in ("config", "train_split"))
            _add(draft, setting, part, {"path": _location(name, config, split)})
            held_out = _location(name, config, _given(draft, "dataset_test_split") or "test")
            evaluates = draft.trainer == "trl" and _given(draft, "eval_strategy") not in (None, "no")
            if evaluates and held_out.startswith("hub:"):
                _add(draft, setting, "eval", {"path": held_out})


def _given(draft: Draft, name: str) -> object:
    return draft.given[name].value if name in draft.given else None


def _add(draft: Draft, setting: Setting, part: str, source: Mapping[str, object]) -> None:
    path = str(source["path"])
    is_name = "/" not in path and not os.path.splitext(path)[1]
    if is_name or (path.startswith("hub:") and not paths.is_hub_data(path)):
        draft.note("lost", setting, "give the file, or hub:OWNER/NAME", f"data.{part}")
    else:
        sources = draft.values.get(f"data.{part}", [])
        draft.replace(f"data.{part}", [*sources, {k: v for k, v in source.items() if v is not None}])


def _location(path: str, config: object = None, split: object = None) -> str:
    """Return a path, or hub:OWNER/NAME where it is no file's."""
    if path.startswith((".", "/", "~")) or os.path.splitext(path)[1] or path.count("/") != 1 or os.path.isdir(path):
        return path
    config_text, split_text = f"/{config}" if config else "", f":{split}" if split and split != "train" else ""
    return f"hub:{path}{config_text}{split_text}"


def _from_info(draft: Draft, setting: Setting, part: str, name: str) -> None:
    """Convert a name that LlamaFactory looks up in the dataset_info.json of its data folder."""
    folder = str(_given(draft, "dataset_dir") or "data")
    places = [os.path.join(str(base), folder) for base in (*draft.path.parents, os.curdir)]
    found = next((place for place in places if os.path.isfile(os.path.join(place, "dataset_info.json"))), None)

    def lose(text: str) -> None:
        draft.note("lost", setting, text, f"data.{part}")

    if found is None:
        lose(f"{shown(name)} is a name in {shown(folder)}/dataset_info.json, which no folder above the file has")
        return
    info_path = os.path.join(found, "dataset_info.json")
    try:
        with open(info_path, encoding="utf-8") as file:
            entry = json.loads(file.read(_MAX_INFO_BYTES))[name]
        columns, tags = dict(entry.get("columns", {})), dict(entry.get("tags", {}))
        hub = entry.get("hf_hub_url")
        path = (
            _location(hub, entry.get("subset"), entry.get("split")) if hub else os.path.join(found, entry["file_name"])
        )
        if NOT_TEXT.search(json.dumps(entry, ensure_ascii=False)):
            raise ValueError("not text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        lose(f"{info_path} has no readable entry for {shown(name)} that names a file or a data set of the hub")
        return
    ranking, formatting = entry.get("ranking"), str(entry.get("formatting", "alpaca"))
    if ranking or "kto_tag" in columns:
        draft.given["ranking"] = setting
    if count := entry.get("num_samples"):
        text = f"{shown(name)} has num_samples {count}; without a weight below 1 there all rows are used"
        draft.note("changed", setting, text, f"data.{part}")
    usual = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
    usual |= {"chosen": "chosen", "rejected": "rejected"} if ranking else {}
    source: dict[str, object] = {"path": path, "format": None if ranking else _FORMATS.get(formatting)}
    if formatting == "alpaca" and any(usual.get(role) not in (None, column) for role, column in columns.items()):
        filled = {role: f"{{{columns.get(role) or column}}}" for role, column in usual.items()}
        prompt = filled["prompt"] + (f"\n{filled['query']}" if columns.get("query") else "")
        source |= {"format": None, "prompt": prompt, "completion": filled["response"]}
        source |= {"completion": filled["chosen"], "rejected": filled["rejected"]} if ranking else {}
        if unread := [role for role in ("system", "history", "tools") if columns.get(role)]:
            lose(f"{', '.join(unread)}: rows with other columns for prompt and answer have these two alone here")
    elif columns.get("messages") not in (None, "messages", "conversations"):
        lose(f"its turns are in the column {shown(columns['messages'])}; here it is messages")
    elif tags.get("role_tag", "from") != "from":
        source["format"] = None
    if columns.get("images") in ("images", "image"):
        draft.values["task.kind"] = "image-text-to-text"
    elif "images" in columns:
        lose(f"its pictures are in the column {shown(columns['images'])}; here it is images")
    if unread := sorted({"videos", "audios"} & columns.keys()):
        lose(f"{', '.join(unread)}: video and audio are not supported")
    _add(draft, setting, part, source)


def take_dataset(draft: Draft, part: str, item: Mapping[str, Setting]) -> None:
    """Convert one data set that is a mapping of settings: of axolotl and torchtune, or a call of load_dataset.

    Args:
        draft: the recipe so far.
        part: "train" or "eval".
        item: its settings by their name within it, such as "path" or "type.field_instruction".
    """
    rest = {name: s for name, s in item.items() if s.value not in (None, "", [], {})}
    value = {name: s.value for name, s in rest.items()}
    first = next(iter(item.values()))
    named = str(value.get("type", value.get("_component_", "auto")))
    kind, *style = [named.rpartition(".")[2]] if "_component_" in value else re.split(r"[.:]", named)
    source: dict[str, object] = {"format": _FORMATS.get(kind)}
    if kind not in _FORMATS:
        at = rest.get("type", rest.get("_component_", first))
        draft.note("lost", at, "a format, or a data set, that is not known here", f"data.{part}")
    if "rl" in draft.given and kind in paths.TEMPLATES:
        draft.put("data.template", kind, rest["type"])
    if style and not _STYLES.issuperset(style):
        draft.note("changed", rest["type"], "how it writes prompts is not known here; see `qlora-lite data`")
    if of_kind := _COLUMNS.get(kind, _COLUMNS.get("".join(style))):
        prompt, chosen, rejected = (f"{{{column}}}" for column in of_kind)
        pair: dict[str, object] = {"prompt": prompt, "completion": chosen, "rejected": rejected}
        source |= {"prompt": prompt, "completion": "{completion}"} if _given(draft, "rl") == "kto" else pair
    if kind == "alpaca_dataset" or kind == "alpaca_cleaned_dataset":
        draft.note("changed", rest["_component_"], "here the prompt is the chat template's, without Alpaca's sentences")
        if "train_on_input" not in value:
            draft.put("data.train_on", "all", first)
    handled = {"path", "source", "name", "subset", "split", "data_files", "data_dir", "type", "_component_", "ds_type"}
    if columns := _columns(draft, rest, handled):
        source |= {"format": None, **columns}
    for name, setting in rest.items():
        is_usual = name.startswith("roles.") and isinstance(setting.value, list) and _ROLES.issuperset(setting.value)
        is_usual |= name == "field_messages" and value[name] == "conversation" and "field_chosen" in rest
        if name not in handled and not is_usual:
            take(draft, Setting(name, setting.value, setting.where))
    for path in _paths(draft, part, rest, first, _DATASETS.get(kind)):
        _add(draft, first, part, {"path": path, **source})


def _paths(draft: Draft, part: str, rest: Mapping[str, Setting], first: Setting, usual: str | None) -> list[str]:
    """Return where the rows of a data set are; what no path says becomes a note."""
    key, value = f"data.{part}", {name: s.value for name, s in rest.items()}
    path, config, split = value.get("path", value.get("source", usual)), value.get("name", value.get("subset")), "train"
    folder = path if isinstance(path, str) and os.path.isdir(path) else None

    def lose(name: str, text: str) -> None:
        draft.note("lost", rest.get(name, first), text, key)

    if re.fullmatch(r"\w+", said := str(value.get("split", split))):
        split = said
    else:
        lose("split", "a part of a split; give data.train a file of those examples")
    inside = value.get("data_dir", "data/rl" if path == _STACK_EXCHANGE else None)
    if isinstance(inside, str) and folder:
        path = folder = os.path.join(os.curdir, folder, inside)
    elif inside:
        lose("data_dir", f"the folder {shown(as_text(inside))} of it; give data.train the files in that")
    files = value.get("data_files")
    if isinstance(files, Mapping):
        files, split = files.get(split), "train"
    names = files if isinstance(files, list) else [files] if files and not isinstance(files, Code) else []
    if names and (folder or path in (None, *_LOADERS)):
        if config or split != "train":
            lose(
                "name" if "name" in rest else "subset" if config else "split", "a part of files; give those of it alone"
            )
        return [os.path.join(folder or "", str(name)) for name in names]
    if not isinstance(path, str) or not isinstance(config, str | None):
        lose("", "which data this is cannot be determined")
        return []
    if "data_files" in rest:
        lose("data_files", "files of a data set; give data.train copies of them")
    found = _location(path, config, split)
    if not found.startswith("hub:") and (config or split != "train"):
        lose("split", "a part of a folder; give the files of it")
    return [found]


def _columns(draft: Draft, rest: Mapping[str, Setting], handled: set[str]) -> dict[str, str]:
    """Return prompt and completion over the columns that a data set names, if it does."""
    names = {"instruction": "type.field_instruction", "input": "type.field_input", "output": "type.field_output"}
    if not any(name in rest for name in names.values()):
        names = {"input": "column_map.input", "output": "column_map.output"}
    column = {role: str(rest[name].value) for role, name in names.items() if name in rest}
    handled |= {*names.values(), "type.format", "type.no_input_format", "type.field_system"}
    if not column:
        return {}
    order = [role for role in ("instruction", "input") if role in column]
    prompt = "\n".join(f"{{{role}}}" for role in order)
    if written := rest.get("type.format"):
        prompt = str(written.value)
        draft.note(
            "changed", written, "the chat template is written around it; data.template: plain adds nothing around it"
        )
    for role in order:
        prompt = prompt.replace(f"{{{role}}}", f"{{{column[role]}}}")
    return {"prompt": prompt, "completion": f"{{{column.get('output', 'output')}}}"}


def warmup(draft: Draft) -> None:
    """Convert a number of warm-up steps, of which here is a share; a constant rate has no warm-up in transformers."""
    setting, steps = draft.given.get("warmup_steps"), draft.values.get("train.max_steps")
    key = "train.warmup_ratio"
    schedulers = (draft.given.get(name) for name in ("lr_scheduler", "lr_scheduler_type"))
    if constant := next((s for s in schedulers if s and as_text(s.value).lower() == "constant"), None):
        if draft.values.get(key) or (setting and setting.value):
            draft.note("changed", constant, "a constant rate has no warm-up there, so that it has none here", key)
        draft.values[key] = 0.0
        return
    if setting is None:
        return
    number = _loose(setting.value)
    if key in draft.values:
        if number:
            text = f"{key} is {shown(draft.values[key])} already; transformers 4 takes the steps where both are given"
            draft.note("changed", setting, text, key)
        return
    if isinstance(number, int | float) and (number == 0 or 0 < number < 1):
        draft.put("train.warmup_ratio", float(number), setting)
    elif isinstance(number, int) and isinstance(steps, int):
        draft.put("train.warmup_ratio", min(1.0, round(number / steps, 4)), setting)
    else:
        text = "here the warm-up is a share of all steps, train.warmup_ratio; its default of 0.03 is used"
        draft.note("changed", setting, text, "train.warmup_ratio")


def _torchtune_model(draft: Draft, setting: Setting) -> None:
    name = as_text(setting.value).rpartition(".")[2]
    draft.put("model.quant", "nf4" if name.startswith("qlora_") else "none", setting)
    if not name.startswith(("lora_", "qlora_")):
        draft.put("adapter.method", "full", setting)
    draft.note("unused", setting, "a model's files say what it is")


def _torchtune_loss(draft: Draft, setting: Setting) -> None:
    found = _LOSSES.get(as_text(setting.value).rpartition(".")[2])
    if found is None:
        message = f"{setting.name} = {as_text(setting.value)}: not among {', '.join(_LOSSES)}"
        raise RecipeError(Problem(message, setting.where))
    if found != "sft":
        draft.put("train.objective", found, setting)


def _torchtune_logger(draft: Draft, setting: Setting) -> None:
    name = as_text(setting.value).lower()
    if found := next((word for word in ("wandb", "tensorboard", "comet") if word in name), None):
        _trackers(draft, Setting("report_to", found, setting.where), "train.trackers")


def _read_elsewhere(_draft: Draft, _setting: Setting) -> None:
    """Convert nothing: what depends on it too reads it, a data set's name or the trainer's defaults."""


def _formatting(draft: Draft, setting: Setting) -> None:
    """Convert a function that makes texts of rows, where what it applies to them is known."""
    if setting.value == ALPACA:
        draft.put("data.template", "alpaca", setting)
        draft.note(
            "changed",
            setting,
            "data.template alpaca has Stanford's words and leaves out an empty input; see `qlora-lite data`",
            "data.template",
        )
    elif setting.value == CHAT_TEMPLATE:
        draft.note("changed", setting, "the rows' turns are rendered with data.template, or the model's own")
    else:
        draft.note(
            "lost",
            setting,
            "rows are rebuilt by code; give data.train a file of its results, or columns as in "
            '[{path: FILE, prompt: "{question}", completion: "{answer}"}]',
            "data.train",
        )


def _pixels(draft: Draft, setting: Setting) -> None:
    """Convert the most pixels of a picture: into an edge that is a multiple of what a token of Qwen-VL stands for."""
    model = str(draft.values.get("model.path")).lower()
    if "qwen" in model and type(setting.value) is int and setting.value > 0:
        step = 28 if "qwen2" in model else 32
        draft.put("data.resolution", max(step, math.isqrt(setting.value) // step * step), setting)
    else:
        draft.note("changed", setting, "pictures have the size that the model's files say, or data.resolution")


def _unsloth_length(draft: Draft, setting: Setting) -> None:
    draft.values["data.max_tokens"] = setting.value  # where rows are cut; before comes what the model is loaded for


def _studio_format(draft: Draft, setting: Setting) -> None:
    for source in draft.values.get("data.train", []):
        if found := _FORMATS.get(as_text(setting.value)):
            source["format"] = found


_BY_PLACE: dict[str, Callable[[Draft, Setting], None]] = {
    "torchtune:model._component_": _torchtune_model,
    "torchtune:loss._component_": _torchtune_loss,
    "torchtune:metric_logger._component_": _torchtune_logger,
    "unsloth-studio:data.format_type": _studio_format,
    "unsloth:formatting_func": _formatting,
    "trl:formatting_func": _formatting,
    "LlamaFactory:image_max_pixels": _pixels,
    "unsloth:max_length": _unsloth_length,
    **dict.fromkeys(
        (
            "LlamaFactory:dataset_dir",
            "trl:dataset_config",
            "trl:dataset_train_split",
            "trl:config_class",
            "unsloth:config_class",
        ),
        _read_elsewhere,
    ),
}
_KEY_BY_PLACE = {  # of settings whose names mean something else in other places
    "torchtune:checkpointer.checkpoint_dir": "model.path",
    "unsloth-studio:model": "model.path",
    "torchtune:tokenizer.max_seq_len": "data.max_tokens",
    "torchtune:tokenizer.prompt_template": "data.template",
    **dict.fromkeys(
        ("unsloth:temperature", "trl:temperature", "axolotl:trl.temperature"), "objective.sampling_temperature"
    ),
}
_BY_KEY: dict[str, Callable[[Draft, Setting, str], None]] = {
    "model.quant": _quant,
    "adapter.method": _method,
    "adapter.train_also": _parts,
    "lora.targets": _targets,
    "data.train": _data,
    "data.eval": _data,
    "train.objective": _objective,
    "data.eval_share": _eval_share,
    "data.template": _template,
    "data.train_on": _train_on,
    "data.packing": _packing,
    "data.order": _order,
    "data.overflow": _overflow,
    "train.micro_batch_size": _batch,
    "train.max_steps": _max_steps,
    "train.gradient_accumulation_steps": _batch,
    "train.eval_every_steps": _every,
    "train.save_every_steps": _every,
    "train.trackers": _trackers,
    "objective.rewards": _rewards,
    "objective.scale_rewards": _scale,
}
_AROUND = {  # settings on which nothing that is learned depends
    "train.trackers",
    "train.eval_every_steps",
    "train.save_every_steps",
    "train.keep_checkpoints",
    "train.compile",
    "train.max_hours",
    "data.eval",
    "output.dir",
    "output.name",
}
