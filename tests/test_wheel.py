"""The wheel, built and installed without a network into an empty folder, works far from the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lite import __version__
from qlora_lite.recipe.catalog import list_recipes

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "qlora_lite", "recipes")
NO_NETWORK = {
    "PIP_NO_INDEX": "1",
    "PIP_CONFIG_FILE": os.devnull,
    "https_proxy": "http://127.0.0.1:9",
    "http_proxy": "http://127.0.0.1:9",
    "HF_HUB_OFFLINE": "1",
}
LOAD_EACH_RECIPE = """
import sys, qlora_lite
from qlora_lite.recipe.catalog import list_recipes, recipes_folder
for name, _ in list_recipes():
    recipe = qlora_lite.load_recipe(recipes_folder() / f"{name}.yaml", check_files=False)
    print(name, len(recipe.data.train))
assert qlora_lite.__file__.startswith(sys.argv[1]) and "torch" not in sys.modules
"""
LOAD_A_COPY_OF_EACH_RECIPE = """
import qlora_lite
from qlora_lite.errors import RecipeError
from qlora_lite.recipe.catalog import copy_recipe, list_recipes
for name, _ in list_recipes():
    try:
        qlora_lite.load_recipe(copy_recipe(name, name), ["model.path=gpt2"])
    except RecipeError as error:
        print(name, error)
"""


def run(*arguments, cwd, **environment):
    environment = os.environ | NO_NETWORK | environment
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of(folder):
    """Return the content of each file below a folder, compiled Python apart, by its path."""
    found = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which the wheel was installed, nothing else beside it."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    for name in SOURCES:  # a copy: the build leaves folders beside what it builds
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, source / name)
    pip = "-m", "pip", "--disable-pip-version-check"
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source, cwd=wheels)
    (wheel,) = wheels.iterdir()
    run(*pip, "install", "--no-deps", "--no-compile", "--target", target, wheel, cwd=wheels)
    return target


def test_every_file_of_the_package_and_of_the_recipes_is_installed(installed):
    package = files_of(installed / "qlora_lite")
    recipes = {name: content for name, content in files_of(ROOT / "recipes").items() if not name.endswith(".ipynb")}
    assert package == files_of(ROOT / "qlora_lite") | {f"recipes/{name}": text for name, text in recipes.items()}
    assert {"py.typed", "models/families.json", "recipes/data/orders-train.jsonl"} <= package.keys()
    assert {path.name for path in installed.iterdir()} <= {"qlora_lite", f"qlora_lite-{__version__}.dist-info", "bin"}


def test_the_index_is_told_the_version_the_readme_and_the_licence(installed):
    folder = installed / f"qlora_lite-{__version__}.dist-info"
    metadata = (folder / "METADATA").read_text(encoding="utf-8")
    head, text = metadata.split("\n\n", 1)
    assert f"\nVersion: {__version__}\n" in head and "\nLicense-Expression: Apache-2.0\n" in head
    assert "\nDescription-Content-Type: text/markdown" in head and text.startswith("# qlora_lite\n")
    assert (folder / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_installed_commands_and_recipes_work_outside_the_repository(installed, tmp_path):
    here = {"cwd": tmp_path, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    assert run("-m", "qlora_lite", "--version", **here) == f"qlora-lite, version {__version__}\n"
    assert "Fine-tune a model as a recipe says." in run("-m", "qlora_lite", "--help", **here)
    names = [name for name, _ in list_recipes()]
    assert re.findall(r"^(\S+)  ", run("-m", "qlora_lite", "recipes", "list", **here), re.MULTILINE) == names
    run("-m", "qlora_lite", "recipes", "copy", "quickstart", **here)
    assert files_of(tmp_path).keys() == {"quickstart.yaml", "data/orders-train.jsonl", "data/orders-eval.jsonl"}
    loaded = run("-c", LOAD_EACH_RECIPE, str(installed), **here)
    assert [line.split()[0] for line in loaded.splitlines()] == names


def test_a_copied_recipe_lacks_only_the_user_s_examples_and_what_its_script_makes(installed, tmp_path):
    here = {"cwd": tmp_path, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    for problem in run("-c", LOAD_A_COPY_OF_EACH_RECIPE, **here).splitlines():
        brought = "data.train = train.jsonl: no such file" in problem
        made = "data/digits/" in problem and (tmp_path / "digits" / "data" / "make_digits.py").is_file()
        assert brought or made, problem


def test_a_container_is_built_from_what_the_wheel_is_built_from():
    copies = re.findall(r"^COPY (.*) /source/(.*)$", (ROOT / "tools" / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert {name for names, _ in copies for name in names.split()} == set(SOURCES)
    assert all(folder == names for names, folder in copies if folder)  # a folder's content is copied, not the folder
