"""Settings that are good by themselves and do not go together.

Each check is given a function from a setting's place to its value as written (None where it is not), and yields the
place of what it complains about, with the cure.
"""

from collections.abc import Callable, Iterator
from functools import partial

from qlora_lite.constraints import (
    OF_CHATS,
    STREAMED_TRAINED,
    UPDATES_IN_FLOAT16,
    WITH_COMPILE,
    WITH_DENOISERS,
    WITH_FULL,
    WITH_HEAD,
    WITH_PICTURES,
    WITH_UPDATES_IN_BACKWARD,
    WITH_VISION,
)

from .reference import written
from .schema import (
    CLASSIFYING_PICTURES,
    GENERATING_PICTURES,
    GRPO,
    OF_PICTURES,
    PREFERENCES,
    SHORTEST_ROW,
    WITH_VIRTUAL_TOKENS,
    Data,
    Diffusion,
    Lora,
    Memory,
    Objective,
    Prompt,
    Recipe,
)
from .strict_yaml import shown

Location = tuple[str | int, ...]
OF_ANSWERS = "language-model", "image-text-to-text"  # kinds of tasks whose models write answers
RATES_TO_BEGIN_WITH = {"prompt": "2e-2", "prefix": "5e-2"}  # of methods whose rate no rule is known for
_Found = Iterator[tuple[Location, str]]
_Value = Callable[..., object]


def conflicts(value: _Value) -> _Found:
    """Yield place and message of every setting that does not go with others."""
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
        _other_methods,
        _full,
        _known_rate,
        _virtual,
        _start,
        _no_layers,
        _merge_aware,
        _preferences,
        _with_head,
        _pictures,
        _denoisers,
    ):
        yield from check(partial(_as_loaded, value))


def _as_loaded(value: _Value, *location: str | int) -> object:
    """Return a value as written, and model.quant also where it follows from task.kind."""
    given = value(*location)
    follows = given is None and location == ("model", "quant") and value("task", "kind") in CLASSIFYING_PICTURES
    return "none" if follows else given


def without_evaluation(value: _Value) -> _Found:
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


def _virtual(value: _Value) -> _Found:
    if value("adapter", "method") == "prefix" and value("prompt", "encoder_width") is not None:
        message = "prompt.encoder_width: only with adapter.method prompt"
        yield ("prompt", "encoder_width"), f"{message}; remove one of the two"
    own = value("prompt", "virtual_tokens"), value("data", "max_tokens")
    defaults = Prompt.model_fields["virtual_tokens"].default, Data.model_fields["max_tokens"].default
    tokens, room = (default if given is None else given for given, default in zip(own, defaults, strict=True))
    if (
        value("adapter", "method") not in WITH_VIRTUAL_TOKENS
        or not isinstance(tokens, int)
        or not isinstance(room, int)
    ):
        return
    if room - tokens < SHORTEST_ROW:
        message = f"prompt.virtual_tokens = {tokens}: leaves {room - tokens} of data.max_tokens {room} for a row"
        yield ("prompt", "virtual_tokens"), f"{message}; raise data.max_tokens"


def _with_head(value: _Value) -> _Found:
    kind = value("task", "kind") or "language-model"
    labels = value("task", "labels")
    if kind in ("language-model", "regression", "reward", "image-text-to-text"):
        if labels is not None:
            yield ("task", "labels"), f"task.labels: only with a task.kind that gives labels, not {kind}"
    elif value("data", "streaming") is True and labels is None:
        yield ("task", "labels"), "task.labels: a stream is not read for its labels beforehand; write their names"
    if kind in ("classification", *CLASSIFYING_PICTURES) and isinstance(labels, list) and len(labels) == 1:
        yield ("task", "labels"), "task.labels: one label is nothing to choose from; write at least two"
    if kind in OF_ANSWERS:
        return
    method = value("adapter", "method") or "lora"
    is_denoiser = kind == GENERATING_PICTURES
    if method not in ("lora", "full", *(() if is_denoiser else ("dora",))):
        what, methods = ("a denoiser", "lora or full") if is_denoiser else ("a head", "lora, dora or full")
        message = f"adapter.method = {written(method)}: {what} (task.kind {kind}) is trained with {methods}"
        yield ("adapter", "method"), f"{message}; write one of these"
    if value("data", "overflow") == "split":
        yield ("data", "overflow"), f"data.overflow = split: a text of task.kind {kind} has one label; write truncate"
    for (section, name), only in WITH_HEAD.items():
        if kind == "reward" and (section, name) in OF_CHATS:
            continue
        if (given := value(section, name)) not in (None, only):
            message = f"{section}.{name} = {written(given)}: for a language model, not with task.kind {kind}"
            yield (section, name), f"{message}; remove it"


def _pictures(value: _Value) -> _Found:
    kind, has_vision = value("task", "kind"), value("task", "kind") == "image-text-to-text"
    if kind not in OF_PICTURES:
        for name in ("augment",) if has_vision else ("resolution", "augment"):
            if value("data", name) not in (None, "none"):
                kinds = " or ".join(CLASSIFYING_PICTURES if name == "augment" else OF_PICTURES)
                yield ("data", name), f"data.{name}: only with task.kind {kinds}; remove it"
        if not has_vision:
            return
    allowed_there = WITH_VISION if has_vision else WITH_PICTURES
    if kind == GENERATING_PICTURES:
        allowed_there = WITH_PICTURES | WITH_DENOISERS
    for (section, name), allowed in allowed_there.items():
        given = value(section, name)
        if given is None or given == "auto" or any(given == each for each in allowed):
            continue
        example = "has pictures" if has_vision else "is a picture"
        why = f"not possible with task.kind {kind}, where an example {example}"
        cure = "remove it" if name == "max_tokens" else f"write {' or '.join(map(written, allowed))}, or remove it"
        yield (section, name), f"{section}.{name} = {written(given)}: {why}; {cure}"


def _denoisers(value: _Value) -> _Found:
    own = {"data": {"buckets": True, "caption": None}, "diffusion": Diffusion().model_dump()}
    if value("task", "kind") != GENERATING_PICTURES:
        for section, unset in own.items():
            for name, usual in unset.items():
                given = value(section, name)
                if (tuple(given) if isinstance(given, list) else given) not in (None, usual):
                    message = f"{section}.{name}: only with task.kind {GENERATING_PICTURES}"
                    yield (section, name), f"{message}; remove it"
        return
    if value("lora", "targets") == [] and value("adapter", "method") in (None, "lora"):
        yield ("lora", "targets"), "lora.targets = []: nothing is trained; name layers, or remove it"
    prediction, weighting = value("diffusion", "prediction"), value("diffusion", "weighting")
    fitting = {"flow": ("sigma_sqrt", "cosmap"), "epsilon": ("min_snr",), "v": ("min_snr",)}.get(str(prediction), ())
    if fitting and weighting not in (None, "none", *fitting):
        message = f"diffusion.weighting = {written(weighting)}: not with diffusion.prediction {prediction}"
        yield ("diffusion", "weighting"), f"{message}; write none or {' or '.join(fitting)}"
    usual_gamma = Diffusion.model_fields["min_snr_gamma"].default
    if value("diffusion", "min_snr_gamma") not in (None, usual_gamma) and weighting != "min_snr":
        message = "diffusion.min_snr_gamma: only with diffusion.weighting min_snr"
        yield ("diffusion", "min_snr_gamma"), f"{message}; remove it, or write that"
    if prediction in ("epsilon", "v") and value("diffusion", "shift") not in (None, "auto", 1):
        yield ("diffusion", "shift"), "diffusion.shift: only with diffusion.prediction flow; remove it"


def _no_layers(value: _Value) -> _Found:
    if value("lora", "targets") != [] or value("task", "kind") not in (None, "language-model", "image-text-to-text"):
        return
    plain = {("adapter", "method"): "lora", ("lora", "start"): "kaiming", ("train", "merge_aware"): "off"}
    for (section, name), usual in plain.items():
        if (given := value(section, name)) not in (None, usual):
            yield (section, name), f"{section}.{name} = {written(given)}: needs layers, and lora.targets is []"
    if not value("adapter", "train_also") and not value("adapter", "train_tokens"):
        yield ("lora", "targets"), "lora.targets = []: nothing is trained; write adapter.train_also, or train_tokens"


def _kept_16_bit(value: _Value) -> _Found:
    packs = {
        "none": "all layers are in 16 bit; remove it, or write model.quant: nf4",
        "keep": "the model's files say what is packed; remove one of the two",
    }
    why = packs.get(str(quant := value("model", "quant")))
    if why and value("model", "keep_16bit") not in (None, []):
        yield ("model", "keep_16bit"), f"model.keep_16bit: with model.quant {quant} {why}"


def _patience(value: _Value) -> _Found:
    patience = value("train", "early_stopping_patience")
    if isinstance(patience, int) and patience > 0 and not value("train", "eval_every_steps"):
        message = f"train.early_stopping_patience = {patience}: needs evaluations during training; write "
        yield ("train", "early_stopping_patience"), f"{message}train.eval_every_steps, or 0 here"


def _measured(value: _Value) -> _Found:
    metrics, choices = value("train", "metrics"), value("train", "metrics_choices")
    kind, examples = value("task", "kind") or "language-model", value("train", "metrics_examples")
    if examples == 0:
        is_meant = {
            "metrics": metrics not in (None, "exact_match", ["exact_match"]),
            "metrics_every_steps": value("train", "metrics_every_steps"),
        }
        for name in filter(is_meant.get, is_meant):
            message = f"train.{name}: nothing is measured; write train.metrics_examples (with evaluate, --rows), or "
            yield ("train", name), f"{message}remove this"
    elif metrics is not None and kind not in OF_ANSWERS:
        yield ("train", "metrics"), f"train.metrics: for a language model, not with task.kind {kind}; remove it"
    if choices and "accuracy" not in (metrics if isinstance(metrics, list | str) else ()):
        yield ("train", "metrics_choices"), "train.metrics_choices: write accuracy in train.metrics, or remove this"


def _held_out(value: _Value) -> _Found:
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


def _streaming(value: _Value) -> _Found:
    if value("data", "streaming") is not True:
        return
    needs = {
        "data.order: as-is": value("data", "order") == "as-is",
        "train.max_steps": value("train", "max_steps") is not None,
    }
    if missing := " and ".join(setting for setting, is_there in needs.items() if not is_there):
        yield ("data", "streaming"), f"data.streaming = true: a stream has no order or end of its own; write {missing}"


def _update_in_backward(value: _Value) -> _Found:
    if value("memory", "optimizer_in_backward") is not True:
        return
    needs, given = WITH_UPDATES_IN_BACKWARD, Recipe.model_fields["train"].default.model_dump()
    given |= {name: own for name in needs if (own := value("train", name)) is not None}
    if missing := " and ".join(f"train.{key}: {only}" for key, only in needs.items() if given[key] != only):
        message = "memory.optimizer_in_backward = true: the gradients of a whole step never exist at the same time"
        yield ("memory", "optimizer_in_backward"), f"{message}; write {missing}"
    if value("model", "compute_dtype") == "float16":
        yield ("memory", "optimizer_in_backward"), f"memory.optimizer_in_backward = true: {UPDATES_IN_FLOAT16}"


def _compile(value: _Value) -> _Found:
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


def _head(value: _Value) -> _Found:
    if value("memory", "head") == "host" and value("model", "quant_head") is True:
        yield (
            ("memory", "head"),
            "memory.head = host: only for a 16-bit head; write model.quant_head: false, or device here",
        )


def _all_kept(value: _Value) -> _Found:
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


def _kept_and_streamed(value: _Value) -> _Found:
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


def _segments(value: _Value) -> _Found:
    every, resident = value("memory", "layers_per_checkpoint"), value("memory", "resident_layers")
    if every not in (None, "auto", 1) and resident not in (None, "auto", "all"):
        message = f"memory.layers_per_checkpoint = {written(every)}: only for weights that are not streamed"
        yield ("memory", "layers_per_checkpoint"), f"{message}; write 1 here, or memory.resident_layers: all"


def _folder(value: _Value) -> _Found:
    unused = {"offload_checkpoints": False, "checkpointing": "none"}
    if value("memory", "offload_folder") is None:
        return
    for name, without in unused.items():
        if (given := value("memory", name)) == without:
            message = f"memory.{name} = {written(given)}: leaves nothing to offload to memory.offload_folder"
            yield ("memory", name), f"{message}; remove one of the two"


def _stream_from(value: _Value) -> _Found:
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


def _other_methods(value: _Value) -> _Found:
    method, of_lora = value("adapter", "method") or "lora", ("lora", "dora")
    own = {name: Recipe.model_fields[name].default.model_dump() for name in ("lora", "bottleneck", "prompt", "adapter")}
    del own["adapter"]["method"], own["adapter"]["switch_every"]
    whose = {"lora": of_lora, "adapter": of_lora, "bottleneck": ("bottleneck",), "prompt": WITH_VIRTUAL_TOKENS}
    for section, methods in whose.items():
        if method in methods:
            continue
        for name, unset in own[section].items():
            if value(section, name) not in (None, unset, list(unset) if isinstance(unset, tuple) else unset):
                message = f"{section}.{name}: only with adapter.method {' or '.join(methods)}"
                yield (section, name), f"{message}; remove one of the two"


def _start(value: _Value) -> _Found:
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


def _merge_aware(value: _Value) -> _Found:
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


def _known_rate(value: _Value) -> _Found:
    method = value("adapter", "method")
    if isinstance(method, str) and method in RATES_TO_BEGIN_WITH and value("train", "learning_rate") in (None, "auto"):
        message = f"adapter.method = {method}: train.learning_rate auto is not known for virtual tokens"
        yield ("adapter", "method"), f"{message}; write a number there, such as {RATES_TO_BEGIN_WITH[method]}"


def _preferences(value: _Value) -> _Found:
    objective = value("train", "objective") or "sft"
    whose = {
        "beta": (*PREFERENCES["pairs"], *PREFERENCES["labels"]),
        "label_smoothing": ("dpo", "cpo", "simpo"),
        "gamma": ("simpo",),
        "sft_weight": PREFERENCES["pairs"],
        "desirable_weight": ("kto",),
        "undesirable_weight": ("kto",),
    }
    for name, unset in Objective().model_dump().items():
        given = value("objective", name)
        given = tuple(given) if isinstance(given, list) else given
        if objective not in whose.get(name, (GRPO,)) and given not in (None, unset):
            message = f"objective.{name}: only with train.objective {' or '.join(whose.get(name, (GRPO,)))}"
            yield ("objective", name), f"{message}; remove one of the two"
    parts = [part for part in (value("data", "train"), value("data", "eval")) if isinstance(part, list | tuple)]
    sources = [each for part in parts for each in part if isinstance(each, dict)]
    compares = objective in PREFERENCES["pairs"] or value("task", "kind") == "reward"
    if not compares and any(source.get("rejected") for source in sources):
        message = f"train.objective = {objective}: the template rejected is of rows with two answers"
        yield ("train", "objective"), f"{message}; write dpo here, or remove the template"
    if value("task", "kind") == "reward":
        objective = "reward"
    if objective == "sft":
        return
    if objective == GRPO:
        yield from _rewards(value)
        return
    of = "task.kind reward" if objective == "reward" else f"train.objective {objective}"
    why = "an example has two answers, or one that is judged"
    needs: dict[tuple[str, str], tuple[object, ...]] = {
        ("data", "streaming"): (False,),
        ("data", "overflow"): ("error", "drop"),
        ("data", "train_on"): ("assistant", "completion", "last"),
    }
    for location, allowed in needs.items():
        if (given := value(*location)) is not None and given not in allowed:
            message = f"{'.'.join(location)} = {written(given)}: not possible with {of}: {why}"
            yield location, f"{message}; write {' or '.join(map(written, allowed))} here"


def _rewards(value: _Value) -> _Found:
    if not value("objective", "rewards"):
        yield (
            ("train", "objective"),
            "train.objective = grpo: there is nothing to judge answers by; write objective.rewards: FILE.py:FUNCTION",
        )
    needs: dict[tuple[str, str], tuple[object, ...]] = {
        ("data", "streaming"): (False,),
        ("data", "overflow"): ("error", "drop"),
        ("data", "train_on"): ("assistant", "completion", "last"),
        ("task", "kind"): ("language-model",),
        ("adapter", "method"): ("lora", "dora", "full"),
        ("lora", "dropout"): (0,),
        ("train", "merge_aware"): ("off",),
        ("memory", "stream_from"): ("auto", "host", "disk"),
    }
    for location, allowed in needs.items():
        if (given := value(*location)) is not None and given not in allowed:
            message = f"{'.'.join(location)} = {written(given)}: not possible with train.objective grpo"
            yield location, f"{message}; write {' or '.join(map(written, allowed))} here"
    measured = value("train", "metrics") or ()
    measured = (measured,) if isinstance(measured, str) else measured
    if isinstance(measured, list | tuple) and (wrong := {"accuracy", "answer_loss"}.intersection(measured)):
        message = f"train.metrics = {', '.join(sorted(wrong))}: not measured with train.objective grpo"
        yield ("train", "metrics"), f"{message}; remove it, and measure with qlora-lite evaluate"


def _full(value: _Value) -> _Found:
    switches = value("adapter", "switch_every") not in (None, 0)
    if value("adapter", "method") != "full":
        if switches:
            yield (
                ("adapter", "switch_every"),
                "adapter.switch_every: only with adapter.method full; remove one of the two",
            )
        return
    if switches and value("train", "compile") is True:
        message = "adapter.switch_every: not possible with train.compile, which would compile every block once a turn"
        yield ("adapter", "switch_every"), f"{message}; remove one of the two"
    quant = value("model", "quant")
    if quant != "none":
        said = f"model.quant = {written(quant)}" if quant else "adapter.method = full"
        yield (
            ("model", "quant") if quant else ("adapter", "method"),
            f"{said}: full fine-tuning trains 16-bit weights; write model.quant: none",
        )
    resident, optimizer = value("memory", "resident_layers"), value("train", "optimizer")
    if switches and isinstance(resident, int) and resident > 0:
        message = f"memory.resident_layers = {resident}: with adapter.switch_every all blocks are streamed, or none"
        yield ("memory", "resident_layers"), f"{message}; write 0 or all"
    if switches and isinstance(optimizer, str) and optimizer.startswith("paged_"):
        message = (
            f"train.optimizer = {optimizer}: paged memory is never given back, and each block has states of its own"
        )
        yield ("train", "optimizer"), f"{message} (adapter.switch_every); write {optimizer.removeprefix('paged_')}"
    for (section, name), only in WITH_FULL.items():
        if (given := value(section, name)) not in (None, "auto", only):
            message = f"{section}.{name} = {written(given)}: not possible with adapter.method full"
            yield (section, name), f"{message}; write {written(only)}, or remove it"
    yield from _full_and_streamed(value, resident)
    if value("model", "compute_dtype") == "float16":
        message = "model.compute_dtype = float16: full fine-tuning has no updates of float16 weights"
        yield ("model", "compute_dtype"), f"{message}; write bfloat16 or float32"


def _full_and_streamed(value: _Value, resident: object) -> _Found:
    in_backward = value("memory", "optimizer_in_backward") is True
    if value("memory", "stream_from") == "ranks":
        if value("adapter", "switch_every") not in (None, 0):
            message = "adapter.switch_every: not possible with memory.stream_from ranks, where each rank has a part of"
            yield ("adapter", "switch_every"), f"{message} every block; remove one of the two"
        if resident not in (None, "auto", "all", 0):
            message = f"memory.resident_layers = {resident}: with adapter.method full ranks divide all blocks, or none"
            yield ("memory", "resident_layers"), f"{message}; write 0 or all"
    elif resident not in (None, "auto", "all") and not in_backward:
        message = f"memory.resident_layers: {STREAMED_TRAINED}"
        yield ("memory", "resident_layers"), f"{message}; write memory.optimizer_in_backward: true, or all here"
