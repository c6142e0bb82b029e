"""The README tells the truth of today's code: its generated parts are up to date, its commands exist."""

import ast
import re
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

from qlora_lite.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def update_readme():
    loader = SourceFileLoader("update_readme", str(ROOT / "tools" / "update_readme"))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def test_the_generated_parts_are_what_update_readme_writes():
    assert update_readme().render(README) == README


def test_every_command_has_a_row():
    for name in COMMANDS:
        assert f"| `qlora-lite {name} " in README, name


def test_every_file_that_is_named_exists():
    for path in re.findall(r"`((?:tools|tests|recipes)/[\w./-]+)`", README) + re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


def test_every_recipe_that_a_command_is_given_exists():
    named = re.findall(r"qlora-lite \w+ ([\w./-]+\.yaml)", README)
    assert named and all((ROOT / path).is_file() for path in named), named


def test_every_test_that_is_named_as_proof_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", README)
    assert len(named) >= 20
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"


@pytest.mark.model
def test_the_python_example_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    code = code.replace('"recipes/', f'"{ROOT}/recipes/').replace('["lora.rank=8"]', '["train.max_steps=1"]')
    code = code.replace("metrics.step == 3", "metrics.step == 1").replace("qlora_lite.run_recipe(recipe)", "None")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
