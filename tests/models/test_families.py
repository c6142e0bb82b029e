"""The shipped configurations: every one builds, and has as many parameters as were published."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from qlora_lite.models.families import known_config, known_models, nearest

FILE = Path(__file__).parent.parent.parent / "qlora_lite/models/families.json"
ENTRIES = {name: entry for name, entry in json.loads(FILE.read_text()).items() if isinstance(entry, dict)}


@pytest.mark.parametrize("hub_id", ENTRIES)
def test_a_model_built_from_its_configuration_has_the_published_number_of_parameters(hub_id):
    with torch.device("meta"):
        config = AutoConfig.for_model(**known_config(hub_id))
        auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        model = auto.from_config(config)
    published = ENTRIES[hub_id]["parameters"]
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(published, rel=0.01)
    assert published > 1e8 and ENTRIES[hub_id]["source"]
    assert model.config.dtype in (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("hub_id", known_models())
def test_every_id_leads_to_a_configuration(hub_id):
    config = known_config(hub_id)
    assert config["model_type"] and config.get("text_config", config)["hidden_size"] > 0


def test_no_configuration_runs_code_from_the_hub():
    assert not [hub_id for hub_id in known_models() if "auto_map" in known_config(hub_id)]


def test_a_variant_has_the_shape_of_its_base():
    assert known_config("meta-llama/Llama-3.1-8B-Instruct") == known_config("meta-llama/Llama-3.1-8B")
    assert known_config("META-LLAMA/llama-3.1-8b") == known_config("meta-llama/Llama-3.1-8B")


def test_a_changed_copy_leaves_the_table_as_it_is():
    config = known_config("meta-llama/Llama-3.2-1B")
    config["hidden_size"] = config["rope_scaling"]["factor"] = 1
    again = known_config("meta-llama/Llama-3.2-1B")
    assert again["hidden_size"] == 2048 and again["rope_scaling"]["factor"] == 32.0


@pytest.mark.parametrize("hub_id", ["", "Llama-3.1-8B", "someone/else", "../../etc/passwd", "meta-llama/"])
def test_an_unknown_model_has_no_configuration(hub_id):
    assert known_config(hub_id) is None


@pytest.mark.parametrize(
    ("hub_id", "near"),
    [
        ("unsloth/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("Qwen/Qwen3-8", "Qwen/Qwen3-8B"),
        ("mistral-7b-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("a-long-owner-of-many-copies/phi-4", "microsoft/phi-4"),
    ],
)
def test_the_nearest_known_models_are_named(hub_id, near):
    assert nearest(hub_id)[0] == near
    assert len(nearest(hub_id)) <= 3


def test_nothing_is_near_to_nonsense():
    assert nearest("x/%%%%") == []


def test_the_table_is_read_without_torch():
    code = (
        "import sys; from qlora_lite.models.families import known_config; known_config('microsoft/phi-4'); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=FILE.parent.parent.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_wheel_ships_the_table():
    project = tomllib.loads((FILE.parent.parent.parent / "pyproject.toml").read_text())
    assert FILE.name in project["tool"]["setuptools"]["package-data"]["qlora_lite.models"]
