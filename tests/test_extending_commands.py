"""A task, a method, an objective and an export form of another distribution go through the real command line.

Their code is that of `qlora-lite explain extending`; no file of the package is touched.
"""

import json
import re
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file
from tiny_files import save_tiny, write_recipe

from qlora_lite.explain import explain

(PAGE,) = re.findall(r"```python\n(.*?)```", explain("extending"), re.DOTALL)
ENTRIES = {"methods": "norms", "objectives": "focal", "tasks": "brief", "forms": "sums"}
COMMAND = "import sys; sys.path.insert(0, sys.argv.pop(1)); from qlora_lite.cli.main import main; main()"
OWN = {"task": {"kind": "brief"}, "adapter": {"method": "norms"}, "focal": {"gamma": 1.5}, "lora": None}
TRAIN = {"objective": "focal", "max_steps": 40, "save_every_steps": 4, "metrics_examples": 2, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the distribution of the page, as an installer leaves it, and a model."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "mine-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    lines = [f"[qlora_lite.{group}]\n{name} = mine:{name.upper()}" for group, name in ENTRIES.items()]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (folder / "mine.py").write_text(PAGE)
    save_tiny(folder / "model", "llama")
    return folder


def command(site, *arguments):
    return [sys.executable, "-c", COMMAND, str(site), *map(str, arguments)]


def said(site, *arguments, code=0):
    found = subprocess.run(command(site, *arguments), capture_output=True, text=True)
    assert found.returncode == code, found.stderr
    return found.stdout + found.stderr


def killed(site, recipe, folder):
    """Train until a checkpoint is there, and kill the process."""
    process = subprocess.Popen(command(site, "train", recipe), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any((folder / "checkpoints").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()


def test_they_are_planned_trained_killed_resumed_measured_and_shown(site, tmp_path):
    whole, cut = (
        write_recipe(tmp_path / name, site / "model", train=TRAIN, **OWN)
        for name in ("whole", "cut")
        if (tmp_path / name).mkdir() is None
    )
    assert "peak" in said(site, "plan", whole)
    said(site, "train", whole)
    killed(site, cut, tmp_path / "cut" / "out")
    assert "going on after step" in said(site, "train", cut, "--resume", tmp_path / "cut" / "out")
    summaries = [json.loads((tmp_path / name / "out" / "summary.json").read_text()) for name in ("whole", "cut")]
    weights = [
        load_file(tmp_path / name / "out" / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut")
    ]
    assert weights[0].keys() == weights[1].keys() and all((weights[1][k] == v).all() for k, v in weights[0].items())
    assert summaries[0]["metrics"] == summaries[1]["metrics"]
    assert summaries[0]["metrics"]["after"]["brief"]["examples"] == 2
    assert summaries[0]["eval_loss_after"] < summaries[0]["eval_loss_before"]
    assert "brief" in (tmp_path / "whole" / "out" / "report.html").read_text()
    said(site, "report", tmp_path / "whole" / "out")
    measured = json.loads(said(site, "evaluate", tmp_path / "whole" / "out", "--json").splitlines()[-1])
    assert measured["rows"] == 6


def test_a_form_exports_what_an_objective_of_ones_own_trained(site, tmp_path):
    changes = {"train": TRAIN | {"max_steps": 2}, "focal": {"gamma": 2.0}}
    said(site, "train", write_recipe(tmp_path, site / "model", **changes))
    said(site, "export", tmp_path / "out", "--to", "sums", "--out", tmp_path / "sums")
    assert json.loads((tmp_path / "sums" / "export_report.json").read_text())["form"] == "sums"


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"train": TRAIN, "focal": {"gamma": "much"}}, r"focal.gamma = much: must be a number; the default is 2"),
        ({"train": TRAIN, "focal": {"gama": 1.0}}, r"focal.gama is not a setting"),
        ({"focal": {"gamma": 1.0}}, r"focal: only with train.objective focal; remove one of the two"),
        ({"fokal": {"gamma": 1.0}}, r"fokal is not a setting"),
        ({"train": TRAIN | {"objective": "fokal"}}, r"train.objective = fokal: must be cpo, .*; did you mean focal"),
    ],
)
def test_a_section_that_is_malformed_is_one_line_with_the_cure(site, tmp_path, sections, line):
    found = said(site, "recipes", "check", write_recipe(tmp_path, site / "model", **sections), code=2)
    assert re.search(line, found) and "Traceback" not in found


def test_the_setting_of_a_section_is_explained(site):
    assert "How much less easy tokens count" in said(site, "explain", "focal.gamma")
    assert "`focal.gamma`: a number; default `2`" in said(site, "explain", "focal")
