"""What a recipe names in task.kind, adapter.method and train.objective, as far as its checks ask for it.

Each of the three is found by its name (``registry``). Here is what their common base says of a recipe: settings of
their own, what others mean beside them, and which do not go with them. Nothing here needs torch.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from qlora_lite.registry import find, names

from .schema import Section

Location = tuple[str | int, ...]
Found = Iterator[tuple[Location, str]]
Value = Callable[..., object]  # from a setting's place to its value as written, None where it is not
Needs = Mapping[tuple[str, str], tuple[object, ...]]  # what settings may be
# The settings that name a part of a recipe, and the group in which that is registered.
NAMING = {("task", "kind"): "tasks", ("adapter", "method"): "methods", ("train", "objective"): "objectives"}
USUAL = {"tasks": "language-model", "methods": "lora", "objectives": "sft"}


class Part:
    """A task, a method or an objective.

    Args:
        section: of the recipe, under the part's own name; None of one without.
        settings: names of other settings, or of whole sections, that have a meaning with this part alone, or with some.
        implied: what settings are where a recipe leaves them out.
    """

    section: type[Section] | None = None
    settings: tuple[str, ...] = ()
    implied: Mapping[tuple[str, str], object] = MappingProxyType({})

    def conflicts(self, value: Value) -> Found:
        """Yield place and message of every setting that does not go with the part."""
        return iter(())


def find_part(group: str, value: object) -> Part | None:
    """Return a task, method or objective by its name; None where nothing has that name."""
    return find(group, value, Part) if isinstance(value, str) and value in names(group) else None


def find_section(name: str) -> tuple[str, type[Section]] | None:
    """Return the section that a task, method or objective of that name brings, and its group; None without one."""
    for group in USUAL:
        if (part := find_part(group, name)) and part.section:
            return group, part.section
    return None


def parts(value: Value) -> dict[str, Part]:
    """Return what a recipe names, by group, as far as it is known."""
    found = {group: find_part(group, value(*place) or USUAL[group]) for place, group in NAMING.items()}
    return {group: part for group, part in found.items() if part is not None}


def implied_settings(value: Value) -> dict[tuple[str, str], object]:
    """Return what settings are that a recipe leaves out, as far as that follows from what it names."""
    found: dict[tuple[str, str], object] = {}
    for part in parts(value).values():
        found |= part.implied
    return found
