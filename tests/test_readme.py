"""The README tells the truth of today's code: its generated parts are up to date, its commands exist."""

import ast
import json
import re
import shutil
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


def test_the_command_below_the_lever_table_is_the_one_that_gives_it(tmp_path):
    module = update_readme()
    default = re.search(r'"--repeats", type=int, default=(\d+)', (ROOT / "tools" / "bench_levers").read_text("utf-8"))
    assert int(default[1]) == module.LEVER_REPEATS
    result = json.loads((module.RESULTS / "levers.json").read_text("utf-8"))
    module.RESULTS = tmp_path
    for repeats, command in ((2, "(`tools/bench_levers --repeats 2`; "), (3, "(`tools/bench_levers`; ")):
        result["settings"]["repeats"] = repeats
        (tmp_path / "levers.json").write_text(json.dumps(result), encoding="utf-8")
        assert command in module.levers()


def check_of_a_card(status):
    rows = [{"kind": "equal", "levers": "resident", "different": 0}]
    peers = [{"side": "peers", "rows": 1, "length": 64, "tokens_per_second": 1234.0}]
    sections = {"streamed": {"status": status, "seconds": 12.5, "rows": rows},
                "peers": {"status": "passed", "seconds": 3.0, "rows": peers}}  # fmt: skip
    machine = {"gpu": "A Made-up Card", "gpu_memory_bytes": 24 * 2**30, "cpu": "a CPU", "cores": 2}
    versions = {"torch": "2.99", "peft": "0.99"}
    return {"date": "2030-01-02 03:04 UTC", "machine": machine, "versions": versions, "sections": sections}


@pytest.mark.parametrize("status", ["passed", "failed"])
def test_what_a_card_was_found_to_do_is_in_the_readme_as_soon_as_it_is_there(status, tmp_path):
    module = update_readme()
    shutil.copytree(module.RESULTS, tmp_path, dirs_exist_ok=True)
    module.RESULTS = tmp_path
    (tmp_path / "gpu_check.json").unlink(missing_ok=True)
    without = module.render(README)
    (tmp_path / "gpu_check.json").write_text(json.dumps(check_of_a_card(status)), encoding="utf-8")
    found = module.render(README)
    none = "No GPU has run this code yet"
    assert none in without and none not in found
    assert "A Made-up Card, 24.0 GiB, 2030-01-02 03:04 UTC, torch 2.99, peft 0.99" in found
    assert "```\nsection    status" in found and "    1 x 64: 1,234 tokens/s: peers\n" in found
    assert f"streamed   {status}" in found
    (tmp_path / "gpu_check.json").unlink()
    assert module.render(found) == without


def test_every_command_has_a_row():
    for name in COMMANDS:
        assert f"| `qlora-lite {name} " in README, name


def test_every_file_that_is_named_exists():
    for path in re.findall(r"`((?:tools|tests|recipes)/[\w./-]+)`", README) + re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


def test_every_recipe_that_a_command_is_given_exists():
    named = re.findall(r"qlora-lite \w+ ([\w./-]+\.yaml)", README)
    assert named and all((ROOT / path).is_file() or (ROOT / "recipes" / path).is_file() for path in named), named


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
