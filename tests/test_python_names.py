"""The names of the Python API: each is what ``dir`` and a type checker are told, and nothing else is."""

import ast
from importlib import import_module
from pathlib import Path

import qlora_lite


def test_a_type_checker_reads_the_names_that_are_imported_on_first_use():
    tree = ast.parse(Path(qlora_lite.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    read = {name.name: (name.asname, f"qlora_lite.{node.module}") for node in block.body for name in node.names}
    assert read == {name: (name, module) for name, module in qlora_lite._API.items()}


def test_every_name_is_there_and_nothing_but_names_is_listed():
    for name in qlora_lite.__all__:
        assert getattr(qlora_lite, name) is not None
    assert {name for name in dir(qlora_lite) if not name.startswith("__")} == {*qlora_lite._API}
    assert import_module("qlora_lite").Trainer is qlora_lite.Trainer
