"""What is wrong with a recipe on this machine is found before torch is imported, and no good recipe is refused."""

import json
import subprocess
import sys

import pytest
from tiny import ARCHITECTURES
from tiny_files import save_nested, save_tiny, write_recipe
from tiny_gguf import write_tiny_gguf

from qlora_lite.adapters.lora.inject import linear_layers
from qlora_lite.models.locate import layer_names

NAMES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
PROBLEMS = {
    "lora.targets=[q_prj, experts]": "lora.targets: 'q_prj', 'experts' matches no linear layer of this model; did",
    "model.keep_16bit=[down_prj]": "model.keep_16bit: 'down_prj' matches no linear layer of this model; did you mean",
    "train.trackers=[dvclive]": "train.trackers: dvclive is not installed; pip install it, or leave it out",
    "output.dir=/dev/null/x": "cannot write /dev/null/x",
}
ASKED = """
import json, sys
from qlora_lite.cli.main import main
for command in json.loads(sys.argv[1]):
    try:
        main(command)
    except SystemExit as end:
        print("code", end.code, file=sys.stderr)
print("torch" in sys.modules)
"""


def test_what_this_machine_lacks_is_named_before_torch_is_imported(model_folder, tmp_path):
    recipe = str(write_recipe(tmp_path, model_folder))
    before = sorted(tmp_path.iterdir())
    asked = [[*command, recipe, wrong] for command in (["train"], ["recipes", "check"], ["plan"]) for wrong in PROBLEMS]
    here = [*zip(asked, [*PROBLEMS.values()] * 3, strict=True)]
    here = [(command, text) for command, text in here if command[0] != "plan" or "matches" in text]  # of any machine
    here.append((["train", recipe, "--gpus", "2"], "2 processes cannot share the 1 packs of a step: set"))
    script = [sys.executable, "-c", ASKED, json.dumps([command for command, _ in here])]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "False\n", done.stderr
    said = done.stderr.split("code 2\n")
    assert said.pop() == "" and len(said) == len(here)
    for (command, text), lines in zip(here, said, strict=True):
        assert lines.startswith(f"error: {text}") and lines.count("\n") == 1, command
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_layers_are_known_from_files_where_they_are_those_of_llama(family, tmp_path):
    model = save_tiny(tmp_path, family)
    there = {path.rpartition(".")[2] for path in linear_layers(model)}
    known = {*layer_names(str(tmp_path))}
    assert known == (there if there == NAMES else set())
    assert ("llama" in family) <= (known == NAMES)


def test_layers_of_gguf_files_and_of_parts_beside_a_language_model(tmp_path):
    assert {*layer_names(str(write_tiny_gguf(tmp_path / "model.gguf")))} == NAMES
    assert layer_names(str(write_tiny_gguf(tmp_path / "fused.gguf", "phi3"))) == ()
    save_nested(tmp_path / "nested")
    assert layer_names(str(tmp_path / "nested")) == layer_names("nobody/has-it") == layer_names("nowhere") == ()


def test_processes_without_a_gpu_that_cannot_share_a_step_are_not_started(model_folder, tmp_path, command, monkeypatch):
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", None)
    recipe = write_recipe(tmp_path, model_folder, train={"gradient_accumulation_steps": 4})
    code, _, err = command("train", recipe, "--gpus", "3")
    assert code == 2 and err.startswith("error: --gpus 3, without a GPU in use: 3 processes cannot share the 4 packs")
