"""Runs of full fine-tuning whose ranks have divided the weights: a model like any other, on any number of ranks."""

import os
import signal
import sys

import pytest
import torch
import yaml
from runs.test_launch import SECONDS, ended, rank_of, start, stop_when
from safetensors.torch import load_file
from tiny_files import write_recipe
from tiny_runs import summary_of
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from qlora_lite.artifacts.trained_run import open_trained
from qlora_lite.errors import RecipeError
from qlora_lite.inference.evaluate import evaluate_recipe
from qlora_lite.prepare.ranks import share_of
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs.run import run_recipe

TRAIN = {
    "gradient_accumulation_steps": 2,
    "optimizer": "adamw_8bit",
    "learning_rate": 0.003,
    "save_every_steps": 2,
    "lr_scheduler": "constant",
    "eval_every_steps": 3,
}
DIVIDED = "memory.stream_from=ranks", "memory.resident_layers=0"
IN_BACKWARD = (
    "memory.optimizer_in_backward=true",
    "train.max_grad_norm=0",
    "train.micro_batch_size=2",
    "train.gradient_accumulation_steps=1",
)


@pytest.fixture
def recipe(model_folder, tmp_path):
    path = write_recipe(tmp_path, model_folder, adapter={"method": "full"}, train=TRAIN)
    settings = yaml.safe_load(path.read_text())
    del settings["lora"]
    settings["model"]["quant"] = "none"
    path.write_text(yaml.safe_dump(settings))
    return path


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_what_a_divided_run_leaves_is_a_model_and_one_process_goes_on_with_it(recipe, tmp_path):
    """With evaluations, answers, a better model kept meanwhile, and a checkpoint that holds whole tensors."""
    divided, whole = tmp_path / "divided", tmp_path / "whole"
    _, said = ended(start(recipe, f"output.dir={divided}", *DIVIDED, "train.max_steps=4"))
    assert "weights sharded over 2 ranks" in said and "this rank's part of a block" in said
    summary, trained = summary_of(divided), open_trained(divided)
    assert evaluate_recipe(trained.recipe, trained.adapter, 0)["eval_loss"] == pytest.approx(
        summary["eval_loss_after"], rel=1e-5
    )
    model = AutoModelForCausalLM.from_pretrained(divided / "model")
    assert summary["trainable_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights(divided).items())
    run_recipe(load_recipe(recipe, [f"output.dir={divided}", "train.max_steps=6"]), resume="")
    run_recipe(load_recipe(recipe, [f"output.dir={whole}", "train.max_steps=6"]))
    expected = weights(whole)
    for name, tensor in weights(divided).items():
        assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    assert "ranks 2 -> 1" in (divided / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("settings", [DIVIDED, IN_BACKWARD], ids=["", "in backward"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_divided_run_one_of_whose_ranks_is_killed_resumes_to_the_bit(rank, settings, recipe, tmp_path):
    long = *settings, "train.max_steps=40", "train.eval_every_steps=0", "train.metrics_examples=0"
    ended(start(recipe, f"output.dir={tmp_path / 'whole'}", *long))
    process = start(recipe, f"output.dir={tmp_path / 'cut'}", *long)
    stop_when(process, "checkpoint written", lambda: os.kill(rank_of(rank, process), signal.SIGKILL))
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode and "Traceback" not in err
    assert f"error: rank {rank} was killed by SIGKILL" in err and err.count("error: ") == 1, err
    ended(start(recipe, f"output.dir={tmp_path / 'cut'}", *long, "--resume"))
    expected = weights(tmp_path / "whole")
    assert all(tensor.equal(expected[name]) for name, tensor in weights(tmp_path / "cut").items())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ((*DIVIDED, "adapter.switch_every=2"), "where each rank has a part of every block; remove one of the two"),
        (("memory.stream_from=ranks", "memory.resident_layers=1"), "ranks divide all blocks, or none; write 0 or all"),
        ((*IN_BACKWARD, "memory.resident_layers=all"), "but for weights that they divide"),
        ((*IN_BACKWARD, "adapter.switch_every=2"), "but for weights that they divide"),
        ((*IN_BACKWARD[:2], "train.micro_batch_size=3", IN_BACKWARD[3]), "set train.micro_batch_size to 4"),
    ],
)
def test_what_divided_weights_cannot_have_is_refused_before_anything_is_loaded(settings, says, recipe):
    with pytest.raises(RecipeError, match=says):
        share_of(load_recipe(recipe, settings), 2)
