"""The notebook runs from its first cell to its last and shows a model that has learned."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lite.recipe.load import load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
NOTEBOOK = json.loads((RECIPES / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def as_script():
    """Return the code cells as one script.

    A line that begins with ``!qlora-lite`` becomes a call of the command; one with ``%pip`` is left out, for what is
    installed is what is tested.
    """
    lines = ["import subprocess, sys"]
    for line in "\n".join(CODE).splitlines():
        if line.startswith("!qlora-lite "):
            line = f"subprocess.run([sys.executable, '-m', 'qlora_lite', *{shlex.split(line)[1:]}], check=True)"
        if not line.startswith("%pip "):
            lines.append(line)
    return "\n".join(lines)


def test_the_notebook_holds_no_output_and_code_that_compiles():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 4)
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 5 and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    compile(as_script(), "quickstart.ipynb", "exec")


def test_its_settings_are_a_recipe_s():
    for command in ("plan", "train"):
        (line,) = re.findall(rf"^!qlora-lite {command} orders/quickstart\.yaml (.*)$", "\n".join(CODE), re.MULTILINE)
        recipe = load_recipe(RECIPES / "quickstart.yaml", shlex.split(line), check_files=False)
        assert recipe.train.max_steps == 25


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.model
def test_the_notebook_runs_and_the_model_learns(tmp_path):
    done = subprocess.run([sys.executable, "-u", "-c", as_script()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = map(float, re.search(r"^eval_loss: (\S+) before, (\S+) after$", done.stdout, re.MULTILINE).groups())
    assert after < before / 2
    assert (tmp_path / "orders" / "run" / "report.html").is_file()
    base, tuned = done.stdout.strip().splitlines()[-2:]
    assert tuned.startswith('{"name": "Mia"') and base != tuned
