"""Settings that are good by themselves and do not go together.

Each check is given a function from a setting's place to its value as written (None where it is not), and yields the
place of what it complains about, with the cure.
"""

from collections.abc import Mapping
from functools import partial

from qlora_lite.constraints import UPDATES_IN_FLOAT16, WITH_COMPILE, WITH_UPDATES_IN_BACKWARD
from qlora_lite.registry import find, names

from .part import NAMING, USUAL, Found, Needs, Part, Value, implied_settings, parts
from .reference import default_value, either, settings_in, written
from .schema import Lora, Memory, Recipe
from .strict_yaml import shown

# Settings, or whole sections, that have a meaning with some tasks, methods or objectives only, which say so themselves.
_OWNED = {
    "tasks": ("task.labels", "data.resolution", "data.augment", "data.buckets", "data.caption", "diffusion"),
    "methods": (
        "lora",
        "bottleneck",
        "prompt",
        "adapter.switch_every",
        "adapter.train_also",
        "adapter.train_also_lr_ratio",
        "adapter.train_tokens",
    ),
    "objectives": ("objective",),
}


def refused(value: Value, needs: Needs, beside: str, why: str = "") -> Found:
    """Yield the settings that are not one of what they may be.

    Args:
        beside: what they do not go with, such as "train.compile".
        why: added to that.
    """
    for location, allowed in needs.items():
        given = value(*location)
        if given is None or any(given == each for each in allowed):
            continue
        message = f"{'.'.join(location)} = {written(given)}: not possible with {beside}{why}"
        yield location, f"{message}; write {' or '.join(map(written, allowed))} here"


def conflicts(value: Value) -> Found:
    """Yield place and message of every setting that does not go with others."""
    named = parts(value)
    value = partial(_as_loaded, value, implied_settings(value))
    for check in (
        _kept_16_bit,
        _patience,
        _measured,
        _held_out,
        _streaming,
        _update_in_backward,
        _compile,
        _head,
        _all_kept,
        _kept_and_streamed,
        _segments,
        _folder,
        _stream_from,
        _start,
        _merge_aware,
    ):
        yield from check(value)
    if not any(getattr(part, "preference", None) == "pairs" for part in named.values()):
        yield from _rejected(value)
    for group, part in named.items():
        yield from _of_others(value, group, part)
        yield from part.conflicts(value)


def _as_loaded(value: Value, implied: Mapping[tuple[str, str], object], *location: str | int) -> object:
    """Return a value as written, or as it follows from what the recipe names."""
    given = value(*location)
    return implied.get((str(location[0]), str(location[-1]))) if given is None else given


def _of_others(value: Value, group: str, part: Part) -> Found:
    """Yield settings that have a meaning with other parts than the one that the recipe names."""
    key = next(".".join(place) for place, name in NAMING.items() if name == group)
    for setting in (each for owned in _OWNED[group] for each in settings_in(owned)):
        if _owns(part, setting):
            continue
        section, _, name = setting.partition(".")
        given, default = value(section, name), default_value(section, name)
        if given is None or given == default or (isinstance(default, tuple) and given == list(default)):
            continue
        whose = [other for other in names(group) if _owns(find(group, other, Part), setting)]
        yield (section, name), f"{setting}: only with {key} {either(whose)}; remove one of the two"


def _owns(part: Part, setting: str) -> bool:
    return setting in part.settings or setting.partition(".")[0] in part.settings


def _rejected(value: Value) -> Found:
    """Yield an objective that has no use for a template of answers that others are preferred to."""
    parts_of_data = (value("data", "train"), value("data", "eval"))
    sources = [each for part in parts_of_data if isinstance(part, list | tuple) for each in part]
    if any(isinstance(each, dict) and each.get("rejected") for each in sources):
        objective = value("train", "objective") or USUAL["objectives"]
        message = f"train.objective = {objective}: the template rejected is of rows with two answers"
        yield ("train", "objective"), f"{message}; write dpo here, or remove the template"


def without_evaluation(value: Value) -> Found:
    """Yield the settings that need evaluation rows where there are none."""
    if value("data", "eval") is None and not value("data", "eval_share"):
        for name in ("eval_every_steps", "early_stopping_patience", "metrics_examples", "metrics_every_steps"):
            given = value("train", name)
            if isinstance(given, int) and given > 0:
                yield (
                    ("train", name),
                    f"train.{name} = {given}: needs evaluation data; write data.eval or data.eval_share, or 0 here",
                )
        if value("train", "metrics_examples") is None and value("train", "metrics") is not None:
            message = "train.metrics: needs evaluation data; write data.eval or data.eval_share, or remove this"
            yield ("train", "metrics"), message


def table_columns(source: dict) -> str | None:
    """Return what is wrong with a source's templates over the columns of a table, or None."""
    prompt, completion, row_format = source.get("prompt"), source.get("completion"), source.get("format")
    if (prompt is None) != (completion is None):
        return "prompt and completion go together; write both or neither"
    if prompt is None and row_format == "table":
        return 'format table needs templates over its columns; write prompt: "{...}" and completion: "{...}"'
    if prompt is not None and row_format not in (None, "table"):
        return f"prompt and completion are for tables, not for {shown(row_format)}; remove them, or the format"
    return None


def _kept_16_bit(value: Value) -> Found:
    packs = {
        "none": "all layers are in 16 bit; remove it, or write model.quant: nf4",
        "keep": "the model's files say what is packed; remove one of the two",
    }
    why = packs.get(str(quant := value("model", "quant")))
    if why and value("model", "keep_16bit") not in (None, []):
        yield ("model", "keep_16bit"), f"model.keep_16bit: with model.quant {quant} {why}"


def _patience(value: Value) -> Found:
    patience = value("train", "early_stopping_patience")
    if isinstance(patience, int) and patience > 0 and not value("train", "eval_every_steps"):
        message = f"train.early_stopping_patience = {patience}: needs evaluations during training; write "
        yield ("train", "early_stopping_patience"), f"{message}train.eval_every_steps, or 0 here"


def _measured(value: Value) -> Found:
    metrics, choices = value("train", "metrics"), value("train", "metrics_choices")
    if value("train", "metrics_examples") == 0:
        is_meant = {
            "metrics": metrics not in (None, "exact_match", ["exact_match"]),
            "metrics_every_steps": value("train", "metrics_every_steps"),
        }
        for name in filter(is_meant.get, is_meant):
            message = f"train.{name}: nothing is measured; write train.metrics_examples (with evaluate, --rows), or "
            yield ("train", name), f"{message}remove this"
    if choices and "accuracy" not in (metrics if isinstance(metrics, list | str) else ()):
        yield ("train", "metrics_choices"), "train.metrics_choices: write accuracy in train.metrics, or remove this"


def _held_out(value: Value) -> Found:
    share = value("data", "eval_share")
    if not isinstance(share, int | float) or share == 0:
        return
    if value("data", "eval") is not None:
        yield (
            ("data", "eval_share"),
            f"data.eval_share = {written(share)}: data.eval names the rows; remove one of the two",
        )
    if value("data", "streaming") is True:
        message = f"data.eval_share = {written(share)}: nothing can be held out from a stream"
        yield ("data", "eval_share"), f"{message}; name evaluation rows in data.eval"


def _streaming(value: Value) -> Found:
    if value("data", "streaming") is not True:
        return
    needs = {
        "data.order: as-is": value("data", "order") == "as-is",
        "train.max_steps": value("train", "max_steps") is not None,
    }
    if missing := " and ".join(setting for setting, is_there in needs.items() if not is_there):
        yield ("data", "streaming"), f"data.streaming = true: a stream has no order or end of its own; write {missing}"


def _update_in_backward(value: Value) -> Found:
    if value("memory", "optimizer_in_backward") is not True:
        return
    needs, given = WITH_UPDATES_IN_BACKWARD, Recipe.model_fields["train"].default.model_dump()
    given |= {name: own for name in needs if (own := value("train", name)) is not None}
    if missing := " and ".join(f"train.{key}: {only}" for key, only in needs.items() if given[key] != only):
        message = "memory.optimizer_in_backward = true: the gradients of a whole step never exist at the same time"
        yield ("memory", "optimizer_in_backward"), f"{message}; write {missing}"
    if value("model", "compute_dtype") == "float16":
        yield ("memory", "optimizer_in_backward"), f"memory.optimizer_in_backward = true: {UPDATES_IN_FLOAT16}"


def _compile(value: Value) -> Found:
    if value("train", "compile") is not True:
        return
    needs = {("lora", "dropout"): 0, **{("memory", name): only for name, only in WITH_COMPILE.items()}}
    if value("memory", "checkpointing") == "selective":
        needs["memory", "checkpointing"] = "block"
    parts = value("adapter", "train_also")
    if "norms" in (parts if isinstance(parts, list | tuple) else [parts]):
        message = "adapter.train_also norms: not possible with train.compile; leave norms out"
        yield ("adapter", "train_also"), f"{message}, or write train.compile: false"
    for location, only in needs.items():
        if (given := value(*location)) not in (None, "auto", only):
            message = f"{'.'.join(location)} = {written(given)}: not possible with train.compile; write "
            yield location, f"{message}{written(only)} here, or train.compile: false"


def _head(value: Value) -> Found:
    if value("memory", "head") == "host" and value("model", "quant_head") is True:
        yield (
            ("memory", "head"),
            "memory.head = host: only for a 16-bit head; write model.quant_head: false, or device here",
        )


def _all_kept(value: Value) -> Found:
    if value("memory", "checkpointing") != "none":
        return
    given = {name: value("memory", name) for name in Memory.model_fields}
    dequantized_once = given["cache_dequantized"] is True and given["tile_tokens"] == "off"
    for name, is_lost, why in (
        ("uncheckpointed_layers", given["uncheckpointed_layers"] not in (None, "auto", 0), "no layer is checkpointed"),
        ("layers_per_checkpoint", given["layers_per_checkpoint"] not in (None, "auto", 1), "no block is recomputed"),
        ("offload_checkpoints", given["offload_checkpoints"] is True, "no block inputs wait for backward"),
        ("cache_dequantized", dequantized_once, "only tiles dequantise weights again"),
        ("resident_layers", given["resident_layers"] not in (None, "auto", "all"), "blocks cannot be streamed"),
    ):
        if is_lost:
            message = f"memory.{name} = {written(given[name])}: with memory.checkpointing none, {why}"
            yield ("memory", name), f"{message}; remove one of the two"


def _kept_and_streamed(value: Value) -> Found:
    kept, resident = value("memory", "uncheckpointed_layers"), value("memory", "resident_layers")
    is_merged = value("memory", "cache_merged") is True and value("train", "merge_aware") not in (None, "off")
    if is_merged and resident not in (None, "auto", "all"):
        message = f"memory.resident_layers = {written(resident)}: not possible with memory.cache_merged true; write "
        yield ("memory", "resident_layers"), f"{message}all here, or memory.cache_merged: false"
    is_checkpointed = value("memory", "checkpointing") != "none"
    if is_checkpointed and type(kept) is int and type(resident) is int and 0 <= resident < kept:
        message = (
            f"memory.uncheckpointed_layers = {kept}: layers whose weights are streamed cannot keep their activations"
        )
        yield (
            ("memory", "uncheckpointed_layers"),
            f"{message}; write at most {resident} here, or raise memory.resident_layers",
        )


def _segments(value: Value) -> Found:
    every, resident = value("memory", "layers_per_checkpoint"), value("memory", "resident_layers")
    if every not in (None, "auto", 1) and resident not in (None, "auto", "all"):
        message = f"memory.layers_per_checkpoint = {written(every)}: only for weights that are not streamed"
        yield ("memory", "layers_per_checkpoint"), f"{message}; write 1 here, or memory.resident_layers: all"


def _folder(value: Value) -> Found:
    unused = {"offload_checkpoints": False, "checkpointing": "none"}
    if value("memory", "offload_folder") is None:
        return
    for name, without in unused.items():
        if (given := value("memory", name)) == without:
            message = f"memory.{name} = {written(given)}: leaves nothing to offload to memory.offload_folder"
            yield ("memory", name), f"{message}; remove one of the two"


def _stream_from(value: Value) -> Found:
    source = value("memory", "stream_from")
    if source not in ("disk", "ranks"):
        return
    for place, without, why in (
        (("memory", "resident_layers"), "all", "no weights are streamed"),
        (("memory", "checkpointing"), "none", "no weights are streamed"),
        (("model", "quant"), "none" if source == "disk" else "", "weights are not prepared in a file"),
    ):
        if value(*place) == without:
            message = f"memory.stream_from = {source}: with {'.'.join(place)} {without} {why}"
            yield ("memory", "stream_from"), f"{message}; remove one of the two"


def _start(value: Value) -> Found:
    start, quant = value("lora", "start"), value("model", "quant")
    if start in ("loftq", "qera") and quant == "none":
        message = f"lora.start = {start}: begins with the error of 4 bits, and model.quant none has none"
        yield ("lora", "start"), f"{message}; write pissa, or remove one of the two"
    if start in ("eva", "qera") and value("lora", "init_from") is not None:
        message = f"lora.start = {start}: lora.init_from has LoRA weights to begin with"
        yield ("lora", "start"), f"{message}; remove one of the two"
    if start not in (None, "kaiming", "eva") and quant == "keep":
        message = f"lora.start = {written(start)}: needs 16-bit weights, and quant keep has none"
        yield ("lora", "start"), f"{message}; remove one of the two"
    usual = None, Lora.model_fields["start_alternations"].default
    if value("lora", "start") != "loftq" and value("lora", "start_alternations") not in usual:
        message = "lora.start_alternations: only with lora.start loftq"
        yield ("lora", "start_alternations"), f"{message}; remove one of the two"


def _merge_aware(value: Value) -> Found:
    if (to := value("train", "merge_aware")) in (None, "off"):
        return
    needs = {
        ("adapter", "method"): "lora",
        ("lora", "dropout"): 0,
        ("lora", "start"): "kaiming",
        ("train", "compile"): False,
    }
    if to == "nf4":
        needs["model", "quant"] = "nf4"
    elif value("model", "quant") == "keep":
        needs["model", "quant"] = "none"
    for location, only in needs.items():
        if (given := value(*location)) not in (None, only):
            message = f"{'.'.join(location)} = {written(given)}: not possible with train.merge_aware {to}; write "
            yield location, f"{message}{written(only)} here, or train.merge_aware: off"
