"""Runs whose ranks divide the blocks' weights among them: the same adapter, resumed on any number of ranks."""

import json
import os
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from tiny_files import write_recipe
from torch.testing import assert_close

from qlora_lite.memory.meter import mapped_bytes
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.offload.stream import Division
from qlora_lite.prepare.model import build_model
from qlora_lite.recipe.load import load_recipe
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.inventory import categorised
from qlora_lite.train.processes import Shards

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


UNEQUAL = """
import os, sys
from dataclasses import replace
from qlora_lite.cli.main import main
from qlora_lite.prepare import ranks
from qlora_lite.runs import stages
rank, measured = int(os.environ["RANK"]), ranks.this_machine
def of_unequal_memory(*arguments):
    machine = measured(*arguments)
    return replace(machine, memory_bytes=2 * (machine.base_bytes + (2 - rank) * 2**29))
ranks.this_machine = of_unequal_memory
def planned(*arguments):
    plan, settings = ranks.plan_run(*arguments)
    if not rank:
        shares = [(share.micro_batches * settings.micro_batch_size, share.runs) for share in settings.shares]
        print("trained in", shares, settings.micro_batch_size * settings.gradient_accumulation_steps, file=sys.stderr)
    return plan, settings
stages.plan_run = planned
ranks._known_speed = lambda device: [3.0, 1.0][rank]
main(["train", *sys.argv[1:]])
"""


def train_unequal(folder, recipe, *arguments, code=0):
    """Train in two processes, of which the first is three times as fast and has twice the memory; return what they
    said."""
    (folder / "unequal.py").write_text(UNEQUAL)
    start = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", folder / "unequal.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, (*start, recipe, *arguments))],
        capture_output=True,
        text=True,
        env=environment,
        timeout=SECONDS,
    )
    assert done.returncode == code, done.stderr
    return done.stderr


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def recipe(model_folder, tmp_path):
    return write_recipe(tmp_path, model_folder, train=TRAIN, lora={"rank": 4, "alpha": 8, "dropout": 0.1})


@pytest.mark.slow
def test_a_divided_run_is_that_of_whole_models_to_the_byte(recipe, tmp_path):
    """With answers, evaluations and checkpoints, all of which the ranks have to come to together."""
    whole, divided = tmp_path / "whole", tmp_path / "divided"
    train(2, recipe, f"output.dir={whole}")
    said = train(2, recipe, f"output.dir={divided}", *DIVIDED)
    assert "weights sharded over 2 ranks except for 1 layer" in said and "this rank's part of a block" in said
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


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_weights_that_were_converted_are_in_host_memory_and_others_are_pages_of_a_file(compute_dtype, recipe):
    """Of a model in float32: as the plan counts them, before any layer has been put together."""
    options = MemoryOptions(resident_layers=0, stream_from="ranks", shards=Division((1, 1)))
    loaded = load_recipe(recipe, ["model.quant=none", f"model.compute_dtype={compute_dtype}"])
    model = build_model(loaded, options, ranks=Shards(0, 2))
    streamed = [tensor for layer in model.model.layers for tensor in layer.parameters() if not tensor.requires_grad]
    where = {tensor: group for tensor, group, _ in categorised(causal_lm(), model)}
    is_mapped = compute_dtype == "float32"
    assert {where[tensor] for tensor in streamed} == {"on disk" if is_mapped else "offloaded"}
    if sys.platform == "linux":
        assert (mapped_bytes(streamed) > 0) == is_mapped


ALL_OF_THEM = *DIVIDED, "train.lr_scheduler=constant", "memory.micro_batches=auto"
SHARE = re.compile(r"rank \d has (\d) sequences of a step \((\d) x \d\) and [\d.]+ KiB of the layers \((\d+)%\)")


@pytest.mark.slow
def test_ranks_of_unequal_gpus_divide_steps_and_model_unequally(recipe, tmp_path):
    """One has most sequences of a step, in as many micro-batches as the other, and the larger part of the model."""
    said = train_unequal(tmp_path, recipe, *ALL_OF_THEM, "train.max_steps=3")
    (first, runs, part), (second, other_runs, other_part) = (map(int, found) for found in SHARE.findall(said))
    assert first + second == 6 and first > second and runs == other_runs
    assert part > 60 and other_part < 40, said
    assert f"trained in [({first}, {runs}), ({second}, {runs})] 6" in said, said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert 0 < summary["plan"]["measured_peak_bytes"] <= summary["plan"]["predicted_peak_bytes"] * 1.01
    assert summary["eval_loss_after"] < summary["eval_loss_before"] and len(summary["ranks"]) == 2


@pytest.mark.slow
def test_unequal_ranks_with_whole_models_learn_what_one_process_learns(recipe, tmp_path):
    """To within the order of sums: 5 and 1 of the 6 sequences of a step."""
    whole, unequal = tmp_path / "whole", tmp_path / "unequal"
    settings = "train.lr_scheduler=constant", "lora.dropout=0", "memory.micro_batches=auto"
    said = train_unequal(tmp_path, recipe, f"output.dir={unequal}", *settings)
    assert re.search(r"rank 0 has 5 sequences .* the whole model; rank 1 has 1 sequences .* the whole model", said), (
        said
    )
    assert re.search(r"trained in \[\(5, \d\), \(1, 1\)\] 6", said), said
    train(1, recipe, f"output.dir={whole}", *settings)
    expected = adapter(whole)
    for name, tensor in adapter(unequal).items():
        assert_close(tensor, expected[name], rtol=0.05, atol=0.02)  # bfloat16, updated six times


@pytest.mark.slow
def test_a_run_of_unequal_gpus_resumes_to_the_bit(recipe, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    train_unequal(tmp_path, recipe, f"output.dir={whole}", *ALL_OF_THEM)
    train_unequal(tmp_path, recipe, f"output.dir={again}", *ALL_OF_THEM, "train.max_steps=4")
    train_unequal(tmp_path, recipe, f"output.dir={again}", *ALL_OF_THEM, "--resume")
    assert all(tensor.equal(adapter(again)[name]) for name, tensor in adapter(whole).items())


def test_one_process_says_that_it_divides_nothing(recipe, tmp_path, command):
    code, _, said = command("train", recipe, *DIVIDED, f"output.dir={tmp_path / 'one'}")
    assert (
        code == 2
        and "memory.stream_from ranks divides the weights of layers among several processes, and this is one" in said
    )
