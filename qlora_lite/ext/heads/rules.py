"""Settings that are for a language model, and not for one that labels or draws."""

from collections.abc import Collection

from qlora_lite.recipe.part import Found, Value
from qlora_lite.recipe.reference import either, written

# What settings have to be, where they are given at all.
ONLY_TEXT: dict[tuple[str, str], object] = {
    ("model", "quant_head"): False,
    ("adapter", "train_also"): [],
    ("adapter", "train_tokens"): [],
    ("adapter", "switch_every"): 0,
    ("lora", "start"): "kaiming",
    ("data", "template"): None,
    ("data", "train_on"): "assistant",
    ("data", "train_on_end"): True,
    ("train", "merge_aware"): "off",
    ("train", "compile"): False,
    ("train", "metrics_every_steps"): 0,
    ("train", "metrics_examples"): 0,
    ("train", "metrics_choices"): None,
    ("memory", "loss_chunk_tokens"): "auto",
    ("memory", "head"): "auto",
    ("train", "objective"): "sft",
}
OF_CHATS = ("data", "template"), ("data", "train_on"), ("data", "train_on_end")  # of those, what rewards have a use for


def no_text(
    value: Value,
    methods: tuple[str, ...] = ("lora", "dora", "full"),
    what: str = "a head",
    but: Collection[tuple[str, str]] = (),
) -> Found:
    """Yield settings that have no meaning where no text is written.

    Args:
        methods: that train models of the kind.
        what: they train.
        but: settings that have a meaning all the same.
    """
    kind, method = value("task", "kind"), value("adapter", "method") or "lora"
    if method not in methods:
        message = f"adapter.method = {written(method)}: {what} (task.kind {kind}) is trained with {either(methods)}"
        yield ("adapter", "method"), f"{message}; write one of these"
    if value("data", "overflow") == "split":
        yield ("data", "overflow"), f"data.overflow = split: a text of task.kind {kind} has one label; write truncate"
    if value("train", "metrics") is not None and value("train", "metrics_examples") != 0:
        yield ("train", "metrics"), f"train.metrics: for a language model, not with task.kind {kind}; remove it"
    for (section, name), only in ONLY_TEXT.items():
        if (section, name) not in but and (given := value(section, name)) not in (None, only):
            message = f"{section}.{name} = {written(given)}: for a language model, not with task.kind {kind}"
            yield (section, name), f"{message}; remove it"


def labels(value: Value, are_exclusive: bool) -> Found:
    """Yield names of labels that are of no use, or missing.

    Args:
        are_exclusive: an example has one label of several.
    """
    given = value("task", "labels")
    if value("data", "streaming") is True and given is None:
        yield ("task", "labels"), "task.labels: a stream is not read for its labels beforehand; write their names"
    if are_exclusive and isinstance(given, list) and len(given) == 1:
        yield ("task", "labels"), "task.labels: one label is nothing to choose from; write at least two"
