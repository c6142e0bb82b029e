"""The README and the pages of figures tell the truth of today's code, and `explain` has a text for everything."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
from tiny_files import save_tiny

from qlora_lite.cli.main import cli as group
from qlora_lite.data.chat.row_formats import Source, check_first_row
from qlora_lite.explain import explain
from qlora_lite.recipe.load import load_recipe
from qlora_lite.recipe.reference import known_keys
from qlora_lite.recipe.schema import Recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_LINES = 300
RESULTS = ROOT / "tools" / "results"
EXPLAIN = ROOT / "qlora_lite" / "explain"
TEXTS = {
    path: path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted(EXPLAIN.glob("*.md")), *sorted(RESULTS.glob("*.md"))]
}
WRITTEN = "\n".join(TEXTS.values())
DEVELOPMENT = ("all", "dev", "docs")  # extras that users do not install one by one
NO_SETTINGS = {"data.examples", "data.batch", "adapters.lora.inject", "adapters.files", "train.step"}  # modules


def render_results():
    loader = SourceFileLoader("render_results", str(ROOT / "tools" / "render_results"))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def test_the_generated_blocks_and_pages_are_what_render_results_writes():
    module = render_results()
    assert module.render(README) == README
    assert module.pages() == {path.stem: TEXTS[path] for path in RESULTS.glob("*.md")}


def test_a_package_to_install_has_the_bounds_of_its_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    known = {line for name, lines in extras.items() if name not in DEVELOPMENT for line in lines}
    recipes = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    named = {line for text in (WRITTEN, *recipes) for line in re.findall(r"'([\w-]+[<>=]=[^']+)'", text)}
    assert named >= {"pillow>=10", "diffusers>=0.42,<1", "lm-eval>=0.4.13,<0.5"} and named <= known
    assert extras["all"] == [f"qlora-lite[{','.join(name for name in extras if name not in DEVELOPMENT)}]"]
    assert "qlora-lite[" not in WRITTEN, "an index has no such package yet"


def test_the_readme_is_short():
    assert README.count("\n") <= MAX_LINES
    assert README.count(":begin -->") <= 3


def test_the_figures_of_the_quickstart_are_those_that_were_measured():
    r = json.loads((RESULTS / "quickstart.json").read_text("utf-8"))
    said = " ".join(README.split())
    module = render_results()
    assert f"that took {module.format_seconds(r['whole_seconds'])}: exact match on {r['exact_match_rows']}" in said
    assert f"from {r['exact_match_before']:.1%} to {r['exact_match_after']:.1%}" in said
    assert f"in {module.format_bytes(r['peak_bytes'])} of memory" in said
    assert f"| `{r['samples'][0]['after']}` |" in README and r["samples"][0]["prompt"].split("\n")[-2] in README


def test_the_command_below_the_table_of_memory_options_is_the_one_that_gives_it(tmp_path):
    module = render_results()
    tool = "tools/bench/memory_options"
    default = re.search(r'"--repeats", type=int, default=(\d+)', (ROOT / tool).read_text("utf-8"))
    assert int(default[1]) == module.OPTION_REPEATS
    result = json.loads((module.RESULTS / "memory_options.json").read_text("utf-8"))
    module.RESULTS = tmp_path
    for repeats, command in ((2, f"(`{tool} --repeats 2`; "), (3, f"(`{tool}`; ")):
        result["settings"]["repeats"] = repeats
        (tmp_path / "memory_options.json").write_text(json.dumps(result), encoding="utf-8")
        assert command in module.options()


def check_of_a_card(status):
    rows = [{"kind": "equal", "options": "resident", "different": 0}]
    peers = [{"side": "peers", "rows": 1, "length": 64, "tokens_per_second": 1234.0}]
    sections = {
        "streamed": {"status": status, "seconds": 12.5, "rows": rows},
        "peers": {"status": "passed", "seconds": 3.0, "rows": peers},
    }
    machine = {"gpu": "A Made-up GPU", "gpu_memory_bytes": 24 * 2**30, "cpu": "a CPU", "cores": 2}
    versions = {"torch": "2.99", "peft": "0.99"}
    return {"date": "2030-01-02 03:04 UTC", "machine": machine, "versions": versions, "sections": sections}


@pytest.mark.parametrize("status", ["passed", "failed"])
def test_what_was_found_on_a_gpu_is_written_as_soon_as_it_is_there(status, tmp_path):
    module = render_results()
    shutil.copytree(module.RESULTS, tmp_path, dirs_exist_ok=True)
    module.RESULTS = tmp_path
    (tmp_path / "gpu_check.json").unlink(missing_ok=True)
    without, page = module.render(README), module.pages()["gpu"]
    (tmp_path / "gpu_check.json").write_text(json.dumps(check_of_a_card(status)), encoding="utf-8")
    found, found_page = module.render(README), module.pages()["gpu"]
    assert "no GPU has run this code yet" in without and "(tools/results/gpu.md)" not in without
    assert "no GPU has run this code yet" not in found and "(tools/results/gpu.md)" in found
    assert "No GPU has run this code yet" in page and "No GPU has run this code yet" not in found_page
    assert "A Made-up GPU, 24.0 GiB, 2030-01-02 03:04 UTC, torch 2.99, peft 0.99" in found_page
    assert "```\nsection    status" in found_page and "    1 x 64: 1,234 tokens/s: peers\n" in found_page
    assert f"streamed   {status}" in found_page
    (tmp_path / "gpu_check.json").unlink()
    assert module.render(found) == without


def test_every_command_has_a_row():
    for name in group.list_commands(None):
        assert re.search(rf"^\| `qlora-lite {name}\b", README, re.MULTILINE), name


def test_every_command_is_in_the_explanation_of_commands():
    page = TEXTS[EXPLAIN / "commands.md"]
    assert all(re.search(rf"^- `{name}\b", page, re.MULTILINE) for name in group.list_commands(None))


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"`((?:tools|tests|recipes|\.github)/[\w./-]+)`", WRITTEN))
    assert len(named) >= 20 and [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_no_relative_link_is_broken(path):
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", TEXTS[path]) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []
    assert EXPLAIN not in path.parents or not links, "a terminal follows none"


def test_every_explanation_that_is_named_exists():
    named = set(re.findall(r"(?:qlora-lite |`)explain ([a-z][\w.-]+)", WRITTEN))
    assert len(named) >= 10
    for name in named - {"lora_r"}:  # another trainer's, as an example
        assert explain(name), name


def test_every_setting_that_is_named_exists():
    sections = "|".join(Recipe.model_fields)
    named = set(re.findall(rf"`((?:{sections})\.(?!html|json)[a-z_]+)(?:[:=][^`]*)?`", WRITTEN)) - NO_SETTINGS
    assert len(named) >= 30 and [key for key in sorted(named) if key not in known_keys()] == []


def test_every_recipe_that_a_command_is_given_exists():
    named = re.findall(r"qlora-lite (?:train|data) ([\w./-]+\.yaml)", README)
    named += [f"{name}.yaml" for name in re.findall(r"qlora-lite (?:plan|recipes copy) ([a-z][\w.-]+)", README)]
    assert len(named) >= 4 and all((ROOT / "recipes" / path).is_file() for path in named), named


def test_the_examples_of_data_have_the_formats_that_they_should_have(tmp_path):
    lines = [line for block in re.findall(r"```json\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    found = []
    for number, line in enumerate(lines):
        (tmp_path / f"{number}.jsonl").write_text(line + "\n", encoding="utf-8")
        found.append(check_first_row(Source(str(tmp_path / f"{number}.jsonl"))))
    assert found == ["messages"] * 3 + ["prompt-completion", "alpaca", "text"]


def test_the_recipe_of_the_readme_is_valid(tmp_path):
    text = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1]
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
    recipe = load_recipe(tmp_path / "my.yaml", check_files=False)
    assert (recipe.lora.rank, recipe.data.max_tokens) == (32, 2048)


def test_the_python_example_runs(tmp_path):
    """The demo model's place is taken by a tiny one: it would take half a minute."""
    save_tiny(tmp_path / "model", max_position_embeddings=512)
    settings = ["train.max_steps=1", f"model.path={tmp_path / 'model'}"]
    code = re.search(r"```python\n(import qlora_lite\n.*?)```", README, re.DOTALL)[1]
    code = code.replace('"recipes/', f'"{ROOT}/recipes/').replace('["lora.rank=8"]', str(settings))
    code = code.replace("metrics.step == 3", "metrics.step == 1").replace("qlora_lite.run_recipe(recipe)", "None")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
