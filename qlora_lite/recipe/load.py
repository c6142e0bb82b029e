"""Load a recipe: read, override, check everything, and say all that is wrong at once.

A problem reads `file:line: key = value: rule; cure`. Combinations and files are checked on the values as
written, not on the validated recipe, so that a typo in one setting does not hide a missing file elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from qlora_lite.errors import Problem, RecipeError

from . import foreign_names, paths, reference
from .catalog import closest_recipe, recipe_for_every_gpu
from .combinations import conflicts, table_columns, without_evaluation
from .overrides import apply_overrides, override_number
from .part import NAMING, USUAL, Location, find_section, implied_settings
from .schema import FORMER_NAMES, Recipe, Rule, fault_of_pattern
from .strict_yaml import MAX_BYTES, Document, Node, dump, parse, plain, scalar_value, shown

MAX_PROBLEMS = 100
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+")
_MAIN_KEY = {"model": "path", "data": "train", "output": "dir"}
_HEADER = "# Every setting of this run, defaults included.\n"
_Finder = Callable[[str, paths.Bases], str]


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> Recipe:
    """Load a recipe file and check it.

    Args:
        path: the YAML file.
        overrides: settings such as "lora.rank=32", applied in order.
        check_files: whether data, template and model must be there; False where only settings are needed.

    Returns:
        The recipe with every default filled in, local paths absolute, and `output.name` set.

    Raises:
        RecipeError: every problem of the file and the overrides, in the order of the file.
    """
    if not isinstance(path, str | os.PathLike):
        raise RecipeError(f"a recipe is given as the path of a YAML file, not as {type(path).__name__}")
    if isinstance(overrides, str) or not all(isinstance(text, str) for text in overrides):
        raise RecipeError(f'overrides must be a list of strings, such as ["lora.rank=32"], not {overrides!r}')
    return _checked(_read(path), str(path), overrides, check_files)


def recipe_of(settings: Mapping[str, object], overrides: Sequence[str], name: str) -> Recipe:
    """Check settings that stand in no file; none of the files that they name is looked for.

    Args:
        settings: sections with settings, such as {"model": {"path": "owner/name"}}.
        overrides: as for `load_recipe`.
        name: what messages call the settings.

    Raises:
        RecipeError: every problem of the settings and the overrides.
    """
    return _checked(dump(settings).encode(), name, overrides, check_files=False)


def _checked(content: bytes, name: str, overrides: Sequence[str], check_files: bool) -> Recipe:
    document = parse(content, name)
    root = _root(document, name)
    _take_former_names(root, document)  # before, so that an override of either name counts
    apply_overrides(root, overrides, document)
    _take_former_names(root, document)  # of overridden sections
    checker = _Checker(root, document, name)
    recipe = checker.settings()
    checker.combinations()
    if check_files:
        checker.files()
    if recipe is None or checker.problems:
        problems = _ordered(checker.problems, name)
        if trainer := foreign_names.trainer_of(root):
            message = f"this looks like a file of {trainer}: `qlora-lite recipes convert {name}` turns it into a recipe"
            problems.append(Problem(message, name))
        raise RecipeError(problems)
    stem = Path(name).stem if name.endswith((".yaml", ".yml")) else Path(name).name
    return paths.resolved(recipe, checker.bases, stem)


def require_recipe(value: object) -> None:
    """Check that a function was given a recipe.

    Raises:
        RecipeError: it is something else, such as the path of one.
    """
    if not isinstance(value, Recipe):
        raise RecipeError(f"expected a recipe, not {type(value).__name__}; qlora_lite.load_recipe(PATH) loads one")


def resolve_to_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML with every setting; loading it gives an equal recipe with the same hash."""
    return settings_to_yaml(recipe.model_dump(mode="json"))


def settings_to_yaml(settings: dict) -> str:
    """Return a recipe's settings by section, as ``model_dump`` gives them, as YAML."""
    return _HEADER + dump(settings)


def _read(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        message = "is a folder; name the .yaml file in it"
    except FileNotFoundError:
        near = closest_recipe(str(path))
        copying = (
            f"`qlora-lite recipes copy {near}` copies the built-in one of that name"
            if near
            else ("`qlora-lite recipes list` shows the built-in ones, `recipes copy` copies one")
        )
        message = f"no such file; {recipe_for_every_gpu(str(path)) or copying}"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        message = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    raise RecipeError(Problem(message, shown(str(path), 200)))


def _root(document: Document, name: str) -> Node:
    root = document.root
    if root is not None and isinstance(root.value, dict):
        return root
    if not document.problems:
        what = "the file is empty" if root is None or root.value is None else "this is not a recipe"
        where = name if root is None else root.where
        document.problems.append(
            Problem(f"{what}; write sections such as `model:` and `data:` with settings below them", where)
        )
    raise RecipeError(document.problems)


def _take_former_names(root: Node, document: Document) -> None:
    """Give settings that were renamed their present names, in place; one under both names is a problem."""
    for former, key in FORMER_NAMES.items():
        section, _, name = former.partition(".")
        values = getattr(root.value.get(section), "value", None)
        if not isinstance(values, dict) or name not in values:
            continue
        node = values.pop(name)
        if values.setdefault(key.partition(".")[2], node) is not node:
            document.problems.append(
                Problem(f"{former} is now called {key}, which is set too; remove this one", node.where)
            )


class _Checker:
    """Collect the problems of one recipe; every check looks at the values as written."""

    def __init__(self, root: Node, document: Document, name: str) -> None:
        self.problems = list(document.problems)
        self._root, self._name = root, name
        self._folder = os.path.dirname(os.path.abspath(name))
        self._known = reference.known_keys()
        self._explained = set(document.unreadable)  # keys whose absence another problem accounts for
        self._reported: set[str] = set()

    def _add(self, location: Location, message: str) -> None:
        self.problems.append(Problem(message, self._deepest(location).where, _key(location)))

    def _deepest(self, location: Location) -> Node:
        """Return the last value that exists on the way to a place."""
        node: Node | None = self._root
        reached = Node(None, self._name)
        for part in location:
            node = _child(node, part) if node is not None else None
            reached = node or reached
        return reached

    def _value(self, *location: str | int) -> object:
        """Return the plain value at a place, or None."""
        node: Node | None = self._root
        for part in location:
            node = _child(node, part) if node is not None else None
        return None if node is None else plain(node)

    def bases(self, *location: str | int) -> paths.Bases:
        """Return where a relative path is looked for: first where whoever wrote it sees it."""
        is_override = override_number(self._deepest(location).where) is not None
        return (os.curdir, self._folder) if is_override else (self._folder, os.curdir)

    def settings(self) -> Recipe | None:
        """Check every setting by itself; return the recipe if all are good."""
        values = plain(self._root)
        for section in Recipe.model_fields:
            if values.get(section) is None:
                values[section] = {}
        for (section, name), implied in implied_settings(self._value).items():
            if isinstance(values[section], dict):
                values[section].setdefault(name, implied)
        errors = self._take_sections(values)
        try:
            if not errors:
                return Recipe.model_validate(values)
        except ValidationError as error:
            errors = error.errors(include_url=False, include_input=False)
        # Missing ones last: an unknown key may be the missing one under another name.
        for details in sorted(errors, key=lambda details: details["type"] == "missing"):
            if details["type"] == "extra_forbidden":
                self._unknown(details["loc"])
            else:
                self._invalid(details["loc"], details["type"])
        return None

    def _take_sections(self, values: dict) -> list[ErrorDetails]:
        """Check sections that are not the schema's, in place: those that what the recipe names brings.

        Returns:
            What is wrong with them, as pydantic says it.
        """
        named = {self._value(*place) or USUAL[group]: place for place, group in NAMING.items()}
        errors: list[ErrorDetails] = []
        for name in {*values, *named} - Recipe.model_fields.keys():
            if (found := find_section(str(name))) is None:
                if name in values:
                    errors.append({"type": "extra_forbidden", "loc": (name,), "msg": "", "input": None})
                continue
            group, section = found
            if name not in named:
                key = next(".".join(place) for place, each in NAMING.items() if each == group)
                self._add((name,), f"{name}: only with {key} {name}; remove one of the two")
                values.pop(name)
                continue
            try:
                values[name] = section.model_validate(values.get(name) or {})
            except ValidationError as error:
                found_here = error.errors(include_url=False, include_input=False)
                errors += [{**details, "loc": (name, *details["loc"])} for details in found_here]
        return errors

    def _invalid(self, location: Location, kind: str) -> None:
        """Report a value that breaks its rule, or a missing one."""
        while (field := reference.field_at(location)) is None:  # the last parts name one type of a union
            location = location[:-1]
        key = _key(location)
        if key in self._reported:
            return
        self._reported.add(key)
        if kind == "missing":
            if key not in self._explained:
                what = " ".join((field.description or "").split()).rstrip(".")
                self._add(location, f"{key} is missing; write it: {what[:1].lower()}{what[1:]}")
            return
        node = self._deepest(location)
        value = shown(f'"{node.text}"' if node.quoted else node.text or "null" if node.value is None else plain(node))
        rule, cure = reference.rule_of(field), _cure(node, field, location)
        self._add(location, f"{key} = {value}: must be {rule}; {cure}")

    def _unknown(self, location: Location) -> None:
        """Report a key that is no setting, with what to write instead."""
        key = _key(location)
        message = f"{shown(key)} is not a setting"
        if len(self.problems) < MAX_PROBLEMS:  # looking for the names of thousands would take minutes
            known = self._known if len(location) < 3 else reference.item_keys(location[:-1])
            advice, proposal = foreign_names.cure(key, known)
            self._explained.add(proposal or "")
            message = f"{message}; {advice}"
        self._add(location, message)

    def combinations(self) -> None:
        """Report settings that do not go together."""
        if "data.eval" not in self._explained:
            self._add_all(without_evaluation(self._value))
        self._add_all(conflicts(self._value))
        self._add_all(
            (location, f"{_key(location)}: {message}")
            for location, source in self._sources()
            if (message := table_columns(source))
        )

    def _add_all(self, found: Iterable[tuple[Location, str]]) -> None:
        for location, message in found:
            self._add(location, message)

    def files(self) -> None:
        """Report files that are not there."""
        try:
            paths.check_folder(self._folder)
        except paths.PathProblem as error:
            self.problems.append(Problem(str(error), shown(self._name, 200)))
        model = self._find(("model", "path"), paths.find_model, self._value("model", "path"))
        revision = self._value("model", "revision")
        if model and revision and (os.path.isabs(model) or model.startswith("package:")):
            message = f"model.revision = {shown(revision)}: only for hub models; remove it"
            self._add(("model", "revision"), message)
        self._find(("data", "template"), paths.find_template, self._value("data", "template"))
        for place, find in (
            (("lora", "init_from"), paths.find_adapter),
            (("memory", "offload_folder"), paths.find_folder),
        ):
            self._find(place, find, self._value(*place))
        rewards = self._value("objective", "rewards")
        for name in rewards if isinstance(rewards, list) else [rewards]:
            self._find(("objective", "rewards"), paths.find_function, name)
        for location, source in self._sources():
            self._find(location, paths.find_data, source.get("path"))

    def _sources(self) -> Iterator[tuple[Location, dict]]:
        """Yield the place and values of each item of data.train and data.eval, as far as they make sense."""
        for part in ("train", "eval"):
            value = self._value("data", part)
            if isinstance(value, str):
                yield ("data", part), {"path": value}
            for index, item in enumerate(value if isinstance(value, list) else ()):
                if isinstance(item, str | dict):
                    yield ("data", part, index), {"path": item} if isinstance(item, str) else item

    def _find(self, location: Location, find: _Finder, path: object) -> str | None:
        """Look for a file; report it where it is not there."""
        if not isinstance(path, str) or not path:
            return None
        try:
            return find(path, self.bases(*location, "path"))  # "path": of an item of data.train, not the whole of it
        except paths.PathProblem as error:
            self._add(location, f"{_key(location)} = {shown(path, 200)}: {error}")
            return None


def _key(location: Location) -> str:
    return ".".join(str(part) for part in location)


def _child(node: Node, part: str | int) -> Node | None:
    if isinstance(node.value, dict):
        return node.value.get(part)
    if isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
        return node.value[part]
    return None


def _ordered(problems: list[Problem], name: str) -> list[Problem]:
    """Return the problems in the order of the file, at most MAX_PROBLEMS and a count of the rest."""
    ordered = sorted(problems, key=_position)
    rest = len(ordered) - MAX_PROBLEMS
    return [*ordered[:MAX_PROBLEMS], Problem(f"and {rest} more problems", name)] if rest > 0 else ordered


def _position(problem: Problem) -> tuple[int, int]:
    """Return the order of a problem: file lines first, then overrides, by number."""
    if (number := override_number(problem.where)) is not None:
        return 1, number
    line = problem.where.rpartition(":")[2]
    return 0, int(line) if line.isdecimal() else 0


def _meant_number(value: str, is_whole: bool) -> str | None:
    """Return a number as YAML takes it, None for what is not a number, or may be another one.

    Commas before groups of three part thousands where the number is whole; where it need not be, they may be anything.
    """
    grouped = _THOUSANDS.fullmatch(value) is not None
    if grouped and not is_whole:
        return None
    bare = re.sub(r"^0+(?=\d)", "", value.replace("_", "").replace(",", "" if grouped else "."))
    number = scalar_value(bare)
    return bare if bare != value and isinstance(number, int if is_whole else int | float) else None


def _several(node: Node, field: FieldInfo) -> str | None:
    """Return what to do about several values of a sweep, 8,16 or [8, 16], where one is wanted; else None."""
    rule, choices = reference.rule_of(field), reference.choices_of(field)
    is_list = isinstance(node.value, list)
    texts = [item.text for item in node.value] if is_list else [text.strip() for text in node.text.split(",")]
    values = [scalar_value(text) for text in texts]
    if len(texts) < 2 or not all(v in choices or ("number" in rule and isinstance(v, int | float)) for v in values):
        return None
    number = _meant_number(node.text, "whole number" in rule)
    first = f"write {number}, or one of" if number else "write one of"
    return (
        f"{first} {', '.join(texts[:9])}: a run takes one value, so start a run for each and `qlora-lite compare` them"
    )


def _cure_of_item(value: str, choices: Sequence[str]) -> str:
    """Return what to write instead of an item of a list of few words."""
    parts = [part.strip() for part in value.split(",")]
    if len(parts) > 1 and {*parts} <= {*choices}:
        return f"write [{', '.join(parts)}]"
    meant = foreign_names.meant_value(value, choices)
    return f"did you mean {meant}?" if meant else "take those of them that you want"


def _cure(node: Node, field: FieldInfo, location: Location) -> str:
    """Return what to do about a value that breaks the rule of its setting."""
    if len(location) == 1:
        main = _MAIN_KEY.get(str(location[0]), "setting")
        return f"write `{location[0]}:` and, indented below it, `{main}: ...`"
    rule, value = reference.rule_of(field), node.value
    worded = any(isinstance(item, Rule) for item in field.metadata)
    if several := _several(node, field):
        return several
    if isinstance(value, str):
        if rule.startswith("true or false") and value.lower() in ("yes", "on", "no", "off"):
            return f"write {'true' if value.lower() in ('yes', 'on') else 'false'}"
        if value and node.quoted and not isinstance(scalar_value(node.text), str):
            return "remove the quotes"
        if "number" in rule and (number := _meant_number(value, "whole number" in rule)):
            return f"write {number}"
        if rule.startswith("a regular expression") and value and (fault := fault_of_pattern(value)):
            return fault
        if advice := foreign_names.value_advice(_key(location), value):
            return advice
        if items := reference.choices_of_items(field):
            return _cure_of_item(value, items)
        if meant := foreign_names.meant_value(value, reference.choices_of(field)):
            return f"did you mean {meant}?"
    elif rule.startswith("text") and not worded and value is not None:
        return f'put it in quotes: "{node.text}"' if node.text else 'put text in quotes, such as "{question}"'
    if value == "":
        return "write something between the quotes, or remove the line"
    default = reference.default_of(str(location[0]), str(location[1])) if len(location) == 2 else None
    return f"the default is {default}" if default is not None else "correct it"
