"""Put the schema into words: the rule of a setting for messages, and the README's table of all settings."""

from __future__ import annotations

import types
from typing import Annotated, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .schema import Recipe, Rule, Source, Target

_ITEM_TITLES = {"Items of `data.train` and `data.eval`": Source, "Items of `lora.targets`": Target}
_ITEMS = {"targets": Target, "train": Source, "eval": Source}


def field_at(location: tuple[str | int, ...]) -> FieldInfo | None:
    """Return the schema's field at a place such as ("data", "train", 0, "path"), or None where there is none.

    The field of a list stands for an item that is no mapping.
    """
    names = [part for part in location if isinstance(part, str)]
    model, field = Recipe, None
    for depth, name in enumerate(names):
        if model is None or name not in model.model_fields:
            return None
        field = model.model_fields[name]
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        model = field.annotation if is_section else (_ITEMS.get(name) if depth == 1 else None)
    return field


def known_keys() -> list[str]:
    """Return every section and every dotted setting, in the order of the schema."""
    keys = []
    for section, field in Recipe.model_fields.items():
        keys += [section, *(f"{section}.{name}" for name in field.annotation.model_fields)]
    return keys


def item_keys(location: tuple[str | int, ...]) -> list[str]:
    """Return the dotted settings of the list item at a place such as ("data", "train", 0)."""
    prefix = ".".join(str(part) for part in location)
    return [f"{prefix}.{name}" for name in _ITEMS[location[1]].model_fields]


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """Return the words that a field accepts, where it accepts a few words only."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def choices_of_items(field: FieldInfo) -> tuple[str, ...]:
    """Return the words that the items of a field's tuple may be."""
    return get_args(get_args(field.annotation)[0])


def rule_of(field: FieldInfo) -> str:
    """Return what a field accepts, such as "a whole number of at least 1"."""
    return _rule(field.annotation, field.metadata)


def _rule(annotation: object, metadata: list) -> str:
    for item in metadata:
        if isinstance(item, Rule):
            return item.text
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *outer = get_args(annotation)
        flat = [part for item in outer for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return _rule(inner, [*flat, *metadata])
    if origin in (Union, types.UnionType):
        options = get_args(annotation)
        rules = ["null" if option is type(None) else _rule(option, metadata) for option in options]
        return ", or ".join(rules)
    if origin is Literal:
        choices = [str(choice) for choice in get_args(annotation)]
        return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        return ("a whole number" if annotation is int else "a number") + _range(metadata)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a mapping of settings"
    return "text"


def _range(metadata: list) -> str:
    low = next((m for m in metadata if isinstance(m, Ge | Gt)), None)
    high = next((m for m in metadata if isinstance(m, Le | Lt)), None)
    if isinstance(low, Ge) and isinstance(high, Le):
        return f" from {low.ge} to {high.le}"
    words = []
    if low is not None:
        words.append(f" of at least {low.ge}" if isinstance(low, Ge) else f" above {low.gt}")
    if high is not None:
        words.append(f" of at most {high.le}" if isinstance(high, Le) else f" below {high.lt}")
    return " and".join(words)


def default_of(section: str, name: str) -> str | None:
    """Return a setting's default as a recipe would write it, or None where the setting is required."""
    model = Recipe.model_fields[section].annotation
    field = model.model_fields[name]
    if field.is_required():
        return None
    if name == "targets":
        return field.default[0].pattern
    return written(field.default)


def written(value: object) -> str:
    """Return a value as a recipe would write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def reference_markdown() -> str:
    """Return the table of all settings for the README, made from the schema."""
    parts = []
    for section, field in Recipe.model_fields.items():
        parts.append(f"### `{section}`\n\n{field.annotation.__doc__}\n")
        parts.append("| setting | accepts | default | what it does |\n|---|---|---|---|")
        for name, setting in field.annotation.model_fields.items():
            default = default_of(section, name)
            shown = "required" if default is None else f"`{default}`"
            parts.append(_row(f"{section}.{name}", setting, shown))
        parts.append("")
    for title, model in _ITEM_TITLES.items():
        parts.append(f"### {title}\n\n{model.__doc__}\n")
        parts.append("| setting | accepts | default | what it does |\n|---|---|---|---|")
        for name, setting in model.model_fields.items():
            shown = "required" if setting.is_required() else f"`{written(setting.default)}`"
            parts.append(_row(name, setting, shown))
        parts.append("")
    return "\n".join(parts)


def _row(key: str, field: FieldInfo, default: str) -> str:
    description = " ".join(field.description.split()).replace("|", "\\|")
    return f"| `{key}` | {rule_of(field)} | {default} | {description} |"
