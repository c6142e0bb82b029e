"""Of several processes that a launcher started, one says that only one is supported, and all end at once."""

import subprocess
import sys

import pytest
from tiny_files import write_recipe

from qlora_lite.cli.main import COMMANDS
from qlora_lite.errors import LaunchError
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs import ranks
from qlora_lite.runs.run import run_recipe

VARIABLES = [("WORLD_SIZE", "RANK"), ("PMI_SIZE", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")]
WITHOUT_A_MODEL = {"plan", "data", "report", "recipes", "explain", "doctor"}


@pytest.fixture(autouse=True)
def slept(monkeypatch):
    seconds = []
    monkeypatch.setattr(ranks.time, "sleep", seconds.append)
    return seconds


@pytest.mark.parametrize(("size", "rank"), VARIABLES)
def test_rank_0_says_it_in_one_line_and_the_others_nothing_and_no_folder_is_left(
    size, rank, model_folder, tmp_path, command, monkeypatch, slept
):
    recipe = write_recipe(tmp_path, model_folder)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setenv(size, "2")
    for number in ("0", "1"):
        monkeypatch.setenv(rank, number)
        for name in sorted(COMMANDS.keys() - WITHOUT_A_MODEL):
            code, out, err = command(name, recipe)
            assert (code, out) == (2, "") and err.count("\n") == (number == "0"), (name, err)
            assert ("one process on one device is supported" in err) is (number == "0")
        with pytest.raises(LaunchError):  # as a Python program would start it
            run_recipe(load_recipe(recipe, ["train.trackers=[tensorboard]"]))
    assert sorted(tmp_path.iterdir()) == before and set(slept) == {ranks._HEARD_SECONDS}


@pytest.mark.parametrize("size", ["1", "", "x"])
def test_one_process_of_a_launcher_works_as_ever(size, model_folder, tmp_path, command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", "0")
    code, out, _ = command("quantize", model_folder, "--out", tmp_path / "out")
    assert code == 0 and "wrote" in out


def test_what_runs_no_model_asks_nothing_of_the_launcher(model_folder, tmp_path, command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command("data", write_recipe(tmp_path, model_folder))[0] == 0


@pytest.mark.slow
def test_torchrun_lets_rank_0_be_heard(model_folder, tmp_path):
    recipe = write_recipe(tmp_path, model_folder, train={"trackers": ["tensorboard"]})
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    done = subprocess.run([*launch, "-m", "qlora_lite", "train", recipe], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.count("error: 2 processes were started") == 1, done.stderr
    assert not (tmp_path / "out").exists()
