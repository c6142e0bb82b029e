"""Runs whose ranks divide the blocks' weights among them: the same adapter, resumed on any number of ranks."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from tiny_files import write_recipe
from torch.testing import assert_close

SECONDS = 100
TRAIN = {"gradient_accumulation_steps": 6, "max_steps": 6, "eval_every_steps": 3, "save_every_steps": 2}
DIVIDED = "memory.stream_from=ranks", "memory.resident_layers=1"


def train(ranks, recipe, *arguments, code=0):
    """Train in so many processes of one thread; return what they said."""
    command = [sys.executable, "-m", "qlora_lite", "train", str(recipe), *map(str, arguments)]
    several = ["--gpus", str(ranks)] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *several], capture_output=True, text=True, env=environment, timeout=SECONDS)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def recipe(model_folder, tmp_path):
    return write_recipe(tmp_path, model_folder, train=TRAIN, lora={"rank": 4, "alpha": 8, "dropout": 0.1})


def test_a_divided_run_is_that_of_whole_models_to_the_byte(recipe, tmp_path):
    """With answers, evaluations and checkpoints, all of which the ranks have to come to together."""
    whole, divided = tmp_path / "whole", tmp_path / "divided"
    train(2, recipe, f"output.dir={whole}")
    said = train(2, recipe, f"output.dir={divided}", *DIVIDED)
    assert "weights sharded over 2 ranks except for 1 layers" in said and "this rank's part of a block" in said
    assert all(tensor.equal(adapter(divided)[name]) for name, tensor in adapter(whole).items())
    for name in ("eval_loss_before", "eval_loss_after", "exact_match_after", "samples"):
        one, other = (json.loads((folder / "summary.json").read_text()).get(name) for folder in (whole, divided))
        assert one == other, name


@pytest.mark.slow
def test_a_divided_run_goes_on_with_another_number_of_ranks(recipe, tmp_path):
    """2 -> 3 -> 1: equal to within the order of sums, which the run says."""
    whole, folder = tmp_path / "whole", tmp_path / "divided"
    place = f"output.dir={folder}", "lora.dropout=0"
    train(2, recipe, *place, *DIVIDED, "train.max_steps=2", "train.lr_scheduler=constant")
    said = train(3, recipe, *place, *DIVIDED, "train.max_steps=4", "train.lr_scheduler=constant", "--resume")
    assert "resume: ranks 2 -> 3" in said and "sharded over 3 ranks" in said
    constant = "train.max_steps=6", "train.lr_scheduler=constant"
    said = train(1, recipe, *place, *constant, "--resume")
    assert "resume: ranks 3 -> 1" in said and "memory.stream_from: ranks -> auto" in said
    train(1, recipe, f"output.dir={whole}", "lora.dropout=0", *constant)
    expected = adapter(whole)
    for name, tensor in adapter(folder).items():
        assert_close(tensor, expected[name], rtol=0.05, atol=0.02)  # bfloat16, updated six times


def test_one_process_says_that_it_divides_nothing(recipe, tmp_path, command):
    code, _, said = command("train", recipe, *DIVIDED, f"output.dir={tmp_path / 'one'}")
    assert (
        code == 2
        and "memory.stream_from ranks divides the weights of layers among several processes, and this is one" in said
    )
