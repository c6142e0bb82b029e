"""Describe the schema: what a setting accepts, for messages, and the settings reference of `qlora-lite explain`."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qlora_lite.registry import names

from .part import find_section
from .schema import Recipe, Registered, Rule, Source, Target

_LISTS = {"data": ("data.train", "data.eval"), "lora": ("lora.targets",)}  # by section: settings that hold mappings
_ITEMS: dict[str, type[BaseModel]] = {"targets": Target, "train": Source, "eval": Source}


def field_at(location: tuple[str | int, ...]) -> FieldInfo | None:
    """Return the schema's field at a place such as ("data", "train", 0, "path"), or None where there is none.

    The field of a list stands for an item that is no mapping.
    """
    keys = [part for part in location if isinstance(part, str)]
    model: type[BaseModel] | None = Recipe
    field: FieldInfo | None = None
    if keys and keys[0] not in Recipe.model_fields and (found := find_section(keys[0])):
        _, model = found
        field, keys = FieldInfo.from_annotation(model), keys[1:]
    for depth, name in enumerate(keys, start=0 if field is None else 1):
        if model is None or name not in model.model_fields:
            return None
        field = model.model_fields[name]
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
        else:
            model = _ITEMS.get(name) if depth == 1 else None
    return field


def setting(key: str) -> FieldInfo:
    """Return the schema's field of a dotted setting that there is."""
    field = field_at(tuple(key.split(".")))
    assert field is not None, key
    return field


def _section(name: str) -> type[BaseModel]:
    if name not in Recipe.model_fields and (found := find_section(name)):
        return found[1]
    model = Recipe.model_fields[name].annotation
    assert isinstance(model, type) and issubclass(model, BaseModel)
    return model


def known_keys() -> list[str]:
    """Return every section and every dotted setting, in the order of the schema."""
    keys = []
    for section in Recipe.model_fields:
        keys += [section, *(f"{section}.{name}" for name in _section(section).model_fields)]
    return keys


def item_keys(location: tuple[str | int, ...]) -> list[str]:
    """Return the dotted settings of the list item at a place such as ("data", "train", 0)."""
    prefix = ".".join(str(part) for part in location)
    return [f"{prefix}.{name}" for name in _ITEMS[str(location[1])].model_fields]


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """Return the words that a field accepts, where it accepts a few words only."""
    if named := _registered(field.metadata):
        return named
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def choices_of_items(field: FieldInfo) -> tuple[str, ...]:
    """Return the words that the items of a field's tuple may be, where they are a few words only."""
    item = next(iter(get_args(field.annotation)), None)
    return get_args(item) if get_origin(item) is Literal else ()


def rule_of(field: FieldInfo) -> str:
    """Return what a field accepts, such as "a whole number of at least 1"."""
    return _rule(field.annotation, field.metadata)


def _registered(metadata: list) -> tuple[str, ...]:
    return next((tuple(names(item.group)) for item in metadata if isinstance(item, Registered)), ())


def _rule(annotation: object, metadata: list) -> str:
    for item in metadata:
        if isinstance(item, Rule):
            return item.text
    if named := _registered(metadata):
        return either(named)
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
        return either([str(choice) for choice in get_args(annotation)])
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        return ("a whole number" if annotation is int else "a number") + _range(metadata)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a mapping of settings"
    return "text"


def either(choices: Sequence[str]) -> str:
    """Return choices as text: "a, b or c"."""
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))


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
    field = _section(section).model_fields[name]
    if field.is_required():
        return None
    if name == "targets":
        return field.default[0].pattern
    return written(field.default)


def default_value(section: str, name: str) -> object:
    """Return a setting's default as a recipe would have it; None of a required one."""
    model = _section(section)
    if any(field.is_required() for field in model.model_fields.values()):
        return model.model_fields[name].default
    return model().model_dump()[name]


def settings_in(name: str) -> list[str]:
    """Return the dotted settings of a section; a setting is its own."""
    return [name] if "." in name else [f"{name}.{each}" for each in _section(name).model_fields]


def written(value: object) -> str:
    """Return a value as a recipe would write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def section_markdown(section: str) -> str:
    """Return what a section of a recipe is for, and all its settings, as Markdown."""
    model = _section(section)
    parts = [f"## Settings of `{section}`", model.__doc__ or ""]
    parts += [setting_markdown(f"{section}.{name}") for name in model.model_fields]
    if lists := _LISTS.get(section):
        item = _ITEMS[lists[0].partition(".")[2]]
        parts += [f"### An item of {' or '.join(f'`{key}`' for key in lists)}", item.__doc__ or ""]
        parts += [setting_markdown(f"{lists[0]}.{name}") for name in item.model_fields]
    return "\n\n".join(parts)


def setting_markdown(key: str) -> str:
    """Return what a setting accepts, its default and what it does, as an item of a Markdown list.

    Args:
        key: the dotted setting, such as "lora.rank", or of a list's items, such as "data.train.format".
    """
    section, _, name = key.partition(".")
    field = setting(key)
    default = default_of(section, name) if "." not in name else None if field.is_required() else written(field.default)
    shown = "required" if default is None else f"default `{default}`"
    return f"- `{key}`: {rule_of(field)}; {shown}.  \n  {' '.join((field.description or '').split())}"
