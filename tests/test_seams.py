"""Modules of the core do not ask what kind of task, method or objective a run has; those that still do are listed.

What counts as a place is said in ``tools/check/source.py``. The list only shrinks: a new place is refused, and so is an
entry that is higher than what its module has left.
"""

import ast
import runpy
from pathlib import Path

import pytest

from check.source import named_kinds

PLACES = {
    "adapters/files.py": 2,
    "adapters/lora/inject.py": 1,
    "artifacts/trained_run.py": 8,
    "cli/plan.py": 1,
    "data/labels.py": 1,
    "export/merge.py": 3,
    "models/heads.py": 5,
    "prepare/first_weights.py": 5,
    "prepare/objective.py": 1,
    "prepare/plan.py": 1,
    "prepare/start.py": 1,
    "prepare/task.py": 3,
    "recipe/combinations.py": 1,
    "recipe/part.py": 2,
    "recipe/schema.py": 3,
    "recipe/strict_yaml.py": 1,
}


def test_no_module_names_a_kind_in_more_places_than_listed_nor_in_fewer():
    left = named_kinds()
    grown = {name: count for name, count in left.items() if count > PLACES.get(name, 0)}
    assert not grown, "ask the task, the method or the objective instead of naming it"
    sunk = {name: left.get(name, 0) for name, count in PLACES.items() if left.get(name, 0) < count}
    assert not sunk, "lower the list to these"


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("if recipe.generates_pictures or head.problem == 'x':", 2),
        ("if recipe.task.kind in KINDS and task.kind != kind.task:", 2),
        ("if r.adapter.method == 'dora':", 2),
        ("if recipe.train.objective in (given, 'grpo'):", 2),
        ("if recipe.lora.start or recipe.train.merge_aware:", 2),
        ("if isinstance(work, Base | Derived):", 1),
        ("if isinstance(work, train.Derived) and not issubclass(kind, (int, DenoiserModel)):", 2),
        ("if isinstance(work, Unrelated) or note.kind == lines.start:  # recipe.has_masks, 'dpo'", 0),
        ("if 'train.objective = dpo' in text:", 0),
    ],
)
def test_each_way_to_name_a_kind_is_counted(tmp_path, line, count):
    (tmp_path / "ext").mkdir()
    (tmp_path / "a.py").write_text("class Base(Batches): pass\nclass Derived(Base): pass\nclass Unrelated: pass\n")
    for name in ("b.py", "ext/b.py"):
        (tmp_path / name).write_text(f"{line}\n    pass\n")
    assert named_kinds(tmp_path) == ({"b.py": count} if count else {})


HOUSE = runpy.run_path(str(Path(__file__).parent.parent / "tools" / "check" / "house"))


def test_each_protocol_is_where_the_count_looks():
    counts = {name: HOUSE["members"](name, HOUSE["PACKAGE"] / file) for name, file in HOUSE["PROTOCOLS"].items()}
    assert min(counts.values()) > 1


def test_members_and_annotations_are_counted_as_written(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        "class A:\n"
        "    size: int = 0\n"
        "    other, _own = 1, 2\n"
        "    kind = ''\n"
        "    def __init__(self, a: int, *rest: int): pass\n"
        "    def __call__(self, a) -> int: pass\n"
        "    def use(self, *, a: int): pass\n"
        "    def _own(self) -> None: pass\n"
    )
    assert HOUSE["members"]("A", path) == 5  # size, other, kind, __call__, use
    functions = HOUSE["functions_of"](ast.parse(path.read_text()))
    assert [HOUSE["is_annotated"](each) for each in functions] == [True, False, False, True]
