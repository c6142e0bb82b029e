"""Several processes train one run; other commands say that one process is enough, and all end at once."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from tiny_diffusion import diffusion_recipe, save_sd_pipeline
from tiny_files import write_recipe
from torch.testing import assert_close

from qlora_lite import explain
from qlora_lite.cli import main
from qlora_lite.cli.main import COMMANDS
from qlora_lite.errors import LaunchError, RecipeError
from qlora_lite.prepare.ranks import share_of
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs import launch, run
from qlora_lite.runs.run import run_recipe
from qlora_lite.runs.signals import Stop
from qlora_lite.train.processes import FirstRankLostError, Processes, RankLostError

VARIABLES = [("WORLD_SIZE", "RANK"), ("PMI_SIZE", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")]
ASKS_NOTHING = {"plan", "data", "report", "recipes", "explain", "doctor", "train"}
SECONDS = 240  # for a run of several processes, on a busy machine too
TRAIN = {"gradient_accumulation_steps": 4, "max_steps": 8, "eval_every_steps": 4, "save_every_steps": 2}


@pytest.fixture(autouse=True)
def slept(monkeypatch):
    seconds = []
    monkeypatch.setattr(launch.time, "sleep", seconds.append)
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
        for name in sorted(COMMANDS.keys() - ASKS_NOTHING):
            code, out, err = command(name, recipe)
            assert (code, out) == (2, "") and err.count("\n") == (number == "0"), (name, err)
            assert ("only train shares its work" in err) is (number == "0")
        with pytest.raises(LaunchError, match="nothing says where they meet" if number == "0" else "^$"):
            run_recipe(load_recipe(recipe, ["train.trackers=[tensorboard]"]))
    assert sorted(tmp_path.iterdir()) == before and set(slept) == {launch.HEARD_SECONDS}


def test_processes_that_a_launcher_started_start_no_others(model_folder, tmp_path, command, monkeypatch):
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (meeting | {"WORLD_SIZE": "2", "RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    code, _, err = command("train", write_recipe(tmp_path, model_folder), "--gpus", "4")
    assert code == 2 and "2 were started already: leave it out" in err


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("RANK", "", "nothing says where they meet (RANK)"),
        ("LOCAL_WORLD_SIZE", "", "nothing says where they meet (LOCAL_WORLD_SIZE)"),
        ("RANK", "2", "RANK is '2': it must be a number below 2"),
        ("LOCAL_RANK", "-1", "LOCAL_RANK is '-1': it must be a number below 2"),
        ("LOCAL_WORLD_SIZE", "3", "LOCAL_WORLD_SIZE is '3': it must be a number below 3"),
        ("MASTER_PORT", "http", "MASTER_PORT is 'http': it must be a number below 65536"),
    ],
)
def test_what_a_launcher_leaves_out_or_has_wrong_is_named_at_once(name, value, says, monkeypatch):
    given = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for each, number in (given | {"WORLD_SIZE": "2", "RANK": "0"} | {name: value}).items():
        monkeypatch.setenv(each, number)
    with pytest.raises(LaunchError, match=re.escape(says)):
        launch.launched()


@pytest.mark.parametrize("size", ["1", "", "x"])
def test_one_process_of_a_launcher_works_as_ever(size, model_folder, tmp_path, command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", "0")
    code, out, _ = command("quantize", model_folder, "--out", tmp_path / "out")
    assert code == 0 and "wrote" in out


@pytest.mark.parametrize(("rank", "says"), [("0", "interrupted\n"), ("1", "")])
def test_that_several_processes_were_interrupted_before_they_met_is_said_once(rank, says, command, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(main.cli, "main", interrupted)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert command("train", "recipe.yaml") == (130, "", says)


def test_what_runs_no_model_asks_nothing_of_the_launcher(model_folder, tmp_path, command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command("data", write_recipe(tmp_path, model_folder))[0] == 0


@pytest.mark.parametrize(
    ("given", "processes", "expected"), [((1, 8), 2, (1, 4)), ((3, 2), 3, (2, 1)), ((4, 1), 2, (2, 1))]
)
def test_a_rank_has_its_share_of_a_step(given, processes, expected, model_folder, tmp_path):
    size, steps = given
    file = write_recipe(tmp_path, model_folder, train={"micro_batch_size": size, "gradient_accumulation_steps": steps})
    train = share_of(load_recipe(file), processes).train
    assert (train.micro_batch_size, train.gradient_accumulation_steps) == expected
    with pytest.raises(RecipeError, match=rf"7 processes cannot share the {size * steps} packs .* to 7 with|to 14"):
        share_of(load_recipe(file), 7)


def start(recipe, *arguments, module=("-m", "qlora_lite", "train"), ranks=("--gpus", "2"), cwd=None, **variables):
    """Begin a run of several processes, of one core each."""
    command = [sys.executable, *module, str(recipe), *map(str, arguments), *ranks]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
    )


def ended(process, code=0):
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()  # one that takes too long is not to go on beside other tests
        process.wait()
    assert process.returncode == code and "Traceback" not in err, err
    return out, err


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_two_processes_train_what_one_does_and_one_of_them_writes_and_speaks(model_folder, tmp_path, command):
    recipe = write_recipe(tmp_path, model_folder, train=TRAIN)
    out, err = ended(start(recipe, f"output.dir={tmp_path / 'two'}"))
    assert out.count("evaluation loss") == 1 and err.count("step 8/8") == 1 and "rank 1" not in err
    assert command("train", recipe, f"output.dir={tmp_path / 'one'}")[0] == 0
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert two["eval_loss_after"] == pytest.approx(one["eval_loss_after"], rel=1e-3)
    for key in ("steps", "tokens", "target_tokens", "trainable_parameters", "eval_loss_before"):
        assert two[key] == pytest.approx(one[key], rel=1e-6), key
    assert len(two["ranks"]) == 2 and two["ranks"][0]["peak_bytes"] <= two["peak_bytes"] and "ranks" not in one
    assert all(rank["computing_seconds"] > 0 < rank["waiting_seconds"] for rank in two["ranks"])
    of_a_step = sum(two["ranks"][0][f"{what}_seconds"] for what in ("computing", "waiting"))
    assert of_a_step == pytest.approx(two["seconds"] / 8)
    assert two["plan"]["chosen"]["train.gradient_accumulation_steps"] == 4
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    expected, found = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    for name, tensor in found.items():
        assert_close(tensor, expected[name], rtol=0.05, atol=0.02)  # bfloat16, updated eight times


@pytest.mark.slow
def test_what_a_recipe_has_wrong_for_several_processes_is_said_once(model_folder, tmp_path):
    recipe = write_recipe(tmp_path, model_folder, train=TRAIN)
    out, err = ended(start(recipe, ranks=("--gpus", "3")), code=2)
    assert (out, err.count("\n")) == ("", 1) and "3 processes cannot share the 4 packs of a step" in err, err


def stop_when(process, what, how):
    """Read what a run says until a line has some words; then do something."""
    for line in process.stderr:
        if what in line:
            how()
            return
    raise AssertionError(f"it never said {what}")


def rank_of(rank, *agents):
    """Return the process id of a rank that one of torchrun's agents has started, as soon as it has."""
    for _ in range(10 * SECONDS):
        for agent in agents:
            with open(f"/proc/{agent.pid}/task/{agent.pid}/children", encoding="ascii") as file:
                children = list(map(int, file.read().split()))
            for child in children:
                with suppress(FileNotFoundError), open(f"/proc/{child}/environ", "rb") as variables:
                    if f"RANK={rank}".encode() in variables.read().split(b"\0"):
                        return child
        threading.Event().wait(0.1)  # the fixture has taken time.sleep
    raise AssertionError("no such rank")


def parent_of(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def lost(kind, was_told=None):
    error = kind("lost")
    error.stop = was_told
    return error


TOLD, UNTOLD = Stop(), Stop()
TOLD.note("SIGTERM")


@pytest.mark.parametrize(
    ("rank", "error", "is_signalled", "says"),
    [
        (0, lost(RankLostError), False, "lost"),
        (0, lost(RankLostError, UNTOLD), False, "lost"),
        (0, lost(RankLostError), True, ""),
        (0, lost(RankLostError, TOLD), False, ""),
        (1, lost(RankLostError), False, ""),
        (1, lost(FirstRankLostError), False, "lost"),
        (1, lost(FirstRankLostError), True, ""),
    ],
)
def test_that_a_rank_is_lost_is_said_once_and_not_where_a_launcher_says_it(
    rank, error, is_signalled, says, monkeypatch
):
    def sleep(_seconds):
        if is_signalled:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.time, "sleep", sleep)
    with pytest.raises(LaunchError, match=f"^{says}$") as caught, run._speaking(Processes(rank, 2)):
        raise error
    assert caught.value.exit_code == 2


def test_a_rank_that_a_launcher_ends_says_nothing_of_one_that_is_lost(model_folder, tmp_path, monkeypatch):
    def trained(_proven):
        raise RankLostError("lost")

    def left(folder, _error):  # a signal comes as a report is written
        folder.summary["status"] = "interrupted"
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run, "train", trained)
    monkeypatch.setattr(run, "_leave", left)
    with pytest.raises(RankLostError) as caught:
        run_recipe(load_recipe(write_recipe(tmp_path, model_folder)))
    assert caught.value.stop.has_come


DIVIDED = {"stream_from": "ranks", "resident_layers": 0}
LONG = TRAIN | {"max_steps": 60, "eval_every_steps": 0, "save_every_steps": 5}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize(("rank", "memory"), [(0, {}), (1, {}), (0, DIVIDED), (1, DIVIDED)])
def test_a_run_one_of_whose_ranks_is_killed_resumes_to_the_bit(rank, memory, model_folder, tmp_path):
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1}
    recipe = write_recipe(tmp_path, model_folder, train=LONG, lora=lora, memory=memory)
    ended(start(recipe, f"output.dir={tmp_path / 'whole'}"))
    process = start(recipe, f"output.dir={tmp_path / 'cut'}")
    stop_when(process, "checkpoint written", lambda: os.kill(rank_of(rank, process), signal.SIGKILL))
    began = time.monotonic()
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode and time.monotonic() - began < 60 and "Traceback" not in err
    assert f"error: rank {rank} was killed by SIGKILL" in err and err.count("error: ") == 1, err
    _, err = ended(start(recipe, f"output.dir={tmp_path / 'cut'}", "--resume"))
    assert "rank 1" not in err
    expected, found = adapter(tmp_path / "whole"), adapter(tmp_path / "cut")
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named_and_ends_the_run(rank, model_folder, tmp_path):
    recipe = write_recipe(tmp_path, model_folder, train=LONG)
    process = start(recipe)
    stop_when(process, "checkpoint written", lambda: os.kill(rank_of(rank, process), signal.SIGSTOP))
    began = time.monotonic()
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 2 and err.count("error: ") == 1, err
    assert f"error: rank {rank} has not answered for" in err and time.monotonic() - began < 90, err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_one_interrupt_ends_and_saves_a_run_one_of_whose_ranks_is_stopped(rank, model_folder, tmp_path):
    process = start(write_recipe(tmp_path, model_folder, train=LONG))
    stop_when(process, "checkpoint written", lambda: os.kill(rank_of(rank, process), signal.SIGSTOP))
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130 and time.monotonic() - began < 15, err
    assert "all of it is saved" in err and "error: " not in err, err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_ranks_end_and_save_when_their_launcher_is_killed(model_folder, tmp_path):
    process = start(write_recipe(tmp_path, model_folder, train=LONG | {"max_steps": 2000}))
    ranks = []

    def kill():
        ranks.extend(rank_of(rank, process) for rank in (0, 1))
        process.kill()

    stop_when(process, "checkpoint written", kill)
    _, err = process.communicate(timeout=30)  # their standard error is this process's pipe until the last has ended
    assert not any(psutil.pid_exists(rank) and psutil.Process(rank).status() != "zombie" for rank in ranks)
    log_text = (tmp_path / "out" / "log.txt").read_text()
    assert "the launcher of these processes has ended" in log_text + err  # the rank that sees it first says it
    assert "all of it is saved" in err, err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_saves_after_the_same_step_everywhere_and_goes_on(number, model_folder, tmp_path):
    recipe = write_recipe(tmp_path, model_folder, train=LONG, lora={"rank": 4, "alpha": 8, "dropout": 0.1})
    ended(start(recipe, f"output.dir={tmp_path / 'whole'}"))
    process = start(recipe, f"output.dir={tmp_path / 'cut'}")
    stop_when(process, "checkpoint written", lambda: process.send_signal(number))
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130 and "all of it is saved" in err and "Traceback" not in err, err
    _, err = ended(start(recipe, f"output.dir={tmp_path / 'cut'}", "--resume"))
    assert "rank 1" not in err
    expected, found = adapter(tmp_path / "whole"), adapter(tmp_path / "cut")
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())


@pytest.mark.slow
def test_time_that_is_over_ends_all_and_a_tracker_ends_none(model_folder, tmp_path):
    pytest.importorskip("tensorboard")
    recipe = write_recipe(tmp_path, model_folder, train=TRAIN | {"trackers": ["tensorboard"]})
    _, err = ended(start(recipe, "train.max_hours=0.0000001"), code=130)
    assert "stopped by train.max_hours after step 1; all of it is saved" in err, err
    out, _ = ended(start(recipe, "train.max_hours=1", "--resume"))
    assert "adapter" in out and list((tmp_path / "out").rglob("events.out*"))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(model_folder, tmp_path, command):
    recipe = write_recipe(tmp_path, model_folder, train=TRAIN | {"gradient_accumulation_steps": 6})
    path = f"output.dir={tmp_path / 'run'}"
    ended(start(recipe, path, "train.max_steps=8", module=torchrun("--standalone", "--nproc-per-node", 2), ranks=()))
    assert command("train", recipe, f"output.dir={tmp_path / 'one'}")[0] == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 8


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def equal(expected, found):
    expected, found = adapter(expected), adapter(found)
    return expected.keys() == found.keys() and all(tensor.equal(found[name]) for name, tensor in expected.items())


def torchrun(*options):
    return "-m", "torch.distributed.run", *map(str, options), "-m", "qlora_lite", "train"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize(("rank", "machines"), [(0, 1), (1, 1), (1, 2)])
def test_processes_that_are_started_again_resume_the_run_that_was_begun(rank, machines, model_folder, tmp_path):
    """Of a recipe without output.dir, that has another run already, and without --resume."""
    recipe = write_recipe(
        tmp_path,
        model_folder,
        train=LONG,
        lora={"rank": 4, "alpha": 8, "dropout": 0.1},
        output={"dir": None, "name": "again"},
    )
    ended(start(recipe, f"output.dir={tmp_path / 'whole'}"))
    other = tmp_path / "runs" / "again-99990101-000000"  # newer than any, which --resume would take
    shutil.copytree(tmp_path / "whole", other)
    before = (other / "log.txt").read_text()
    meeting = "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--max-restarts", 1
    restarting = torchrun("--nnodes", machines, "--nproc-per-node", 2 // machines, *meeting)
    agents = [start(recipe, module=restarting, ranks=(), cwd=tmp_path) for _ in range(machines)]
    with ThreadPoolExecutor(machines) as pool:
        first = next(agent for agent in agents if parent_of(rank_of(0, *agents)) == agent.pid)
        others = [pool.submit(ended, agent) for agent in agents if agent is not first]
        killed = rank_of(rank, *agents)
        stop_when(first, "checkpoint written", lambda: os.kill(killed, signal.SIGKILL))
        out, err = ended(first)
        assert not any("evaluation loss" in other.result()[0] for other in others)
    (found,) = set((tmp_path / "runs").iterdir()) - {other}
    assert f"in the place of others, which began {found}" in err and out.count("evaluation loss") == 1, err
    summary = json.loads((found / "summary.json").read_text())
    assert summary["status"] == "complete" and summary["steps"] == 60 and len(summary["resumed"]) == 1
    assert summary["resumed"][0]["after_step"] >= 5 and equal(tmp_path / "whole", found)
    assert (other / "log.txt").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize(("each", "memory"), [(1, {}), (2, DIVIDED)])
def test_two_machines_that_share_the_run_folder_and_no_cache_train_what_one_machine_does(
    each, memory, model_folder, tmp_path
):
    """Also where the ranks of each machine divide the model, and one machine's all have it whole."""
    recipe = write_recipe(tmp_path, model_folder, train=TRAIN, memory=memory)
    whole = "memory.stream_from=auto", "memory.resident_layers=all"
    ended(start(recipe, f"output.dir={tmp_path / 'one'}", *whole, ranks=("--gpus", str(2 * each))))
    meeting = "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"
    agents = []
    for number in range(2):
        home = {"QLORA_LITE_CACHE": str(tmp_path / f"cache {number}"), "HF_HOME": str(tmp_path / f"hub {number}")}
        nodes = torchrun("--nnodes", 2, "--nproc-per-node", each, *meeting)
        agents.append(start(recipe, f"output.dir={tmp_path / 'two'}", module=nodes, ranks=(), **home))
    said = [ended(agent) for agent in agents]
    assert sorted(out.count("evaluation loss") for out, _ in said) == [0, 1]
    assert any("weights sharded over 2 ranks" in err for _, err in said) == (each == 2)
    assert equal(tmp_path / "one", tmp_path / "two")
    held = [{path.name for path in (tmp_path / f"cache {number}").iterdir()} for number in range(2)]
    assert held[0] == held[1] and held[0], held  # each prepared its own


PATCHED = """
import os, signal, sys, time
from datetime import timedelta
from qlora_lite.cli.main import main
from qlora_lite.models.memory_options import stream_of
from qlora_lite.runs import async_checkpoint, run, training
from qlora_lite.train import loop, process_group
written, proven, drawn = async_checkpoint.write_checkpoint, run.prove, training.draw
def slow_drawing(*arguments):
    time.sleep(20)
    return drawn(*arguments)
def slow_disk(*arguments):
    time.sleep(20)
    written(*arguments)
def stopped(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return proven(*arguments)
probe, probed = loop.probe_step, []
def no_room(workload, model, *arguments):
    probed.append(1)
    if len(probed) > 1:
        return probe(workload, model, *arguments)
    stream_of(model).enter(0)
    raise MemoryError("no room")
what = sys.argv.pop(1)
if what == "slow disk":
    process_group.FIRST_ANSWER = timedelta(seconds=10)
    async_checkpoint.write_checkpoint = slow_disk
elif what == "slow drawing":
    process_group.ANSWER_SECONDS, process_group.VERDICT_SECONDS = 4.0, 1.0
    training.draw = slow_drawing
elif what == "signal" and os.environ["RANK"] == "1":
    run.prove = stopped
elif os.environ["RANK"] in what:
    process_group.BLOCK_ANSWER = timedelta(seconds=10)
    loop.probe_step = no_room
main(["train", *sys.argv[1:]])
"""


def patched(tmp_path, what):
    (tmp_path / "patched.py").write_text(PATCHED)
    return "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "patched.py"), what


@pytest.mark.slow
def test_a_slow_disk_is_not_taken_for_a_rank_that_hangs(model_folder, tmp_path):
    recipe = write_recipe(tmp_path, model_folder, train=TRAIN | {"save_every_steps": 4})
    _, err = ended(start(recipe, module=patched(tmp_path, "slow disk"), ranks=()))
    assert err.count("checkpoint written") == 2, err


@pytest.mark.slow
def test_a_rank_that_draws_pictures_is_waited_for(tmp_path):
    train = {"max_steps": 3, "gradient_accumulation_steps": 2}
    recipe = diffusion_recipe(tmp_path, save_sd_pipeline(tmp_path / "sd"), data={"resolution": 16}, train=train)
    ended(start(recipe, module=patched(tmp_path, "slow drawing"), ranks=()))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["status"] == "complete" and len([*(tmp_path / "out" / "samples").glob("*.png")]) == 4


@pytest.mark.slow
def test_a_signal_to_one_rank_before_the_first_step_is_what_the_others_tell(model_folder, tmp_path):
    recipe = write_recipe(tmp_path, model_folder, train=TRAIN)
    process = start(recipe, module=patched(tmp_path, "signal"), ranks=())
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode and "stopped at once by SIGTERM; no checkpoint is there. To resume: " in err, err
    assert "does not answer" not in err, err
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_divided_models_are_planned_again_where_memory_runs_out_on_all_ranks(model_folder, tmp_path):
    """The plan of so small a model cannot be smaller; it is all ranks that say so. Where it was one alone, all end."""
    recipe = write_recipe(tmp_path, model_folder, train=TRAIN, memory=DIVIDED)
    process = start(recipe, module=patched(tmp_path, "memory of 0 and 1"), ranks=())
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode and err.count("planning again with") == 2 and "lower data.max_tokens" in err, err
    assert "does not answer" not in err, err
    process = start(recipe, f"output.dir={tmp_path / 'one'}", module=patched(tmp_path, "memory of 1"), ranks=())
    began = time.monotonic()
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode and "rank 1: memory ran out over the largest micro-batch" in err, err
    assert time.monotonic() - began < 90, err


def slurm_script():
    page = (Path(explain.__file__).parent / "cluster.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    return script


@pytest.mark.skipif(sys.platform != "linux", reason="needs bash")
def test_the_slurm_script_is_one_and_its_signal_leaves_time_to_save():
    subprocess.run(["bash", "-n"], input=slurm_script(), text=True, check=True)
    given = dict(re.findall(r"(?m)^(?:#SBATCH --|export )(\S+?)=(\S+)", slurm_script()))
    assert int(given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < int(given["signal"].removeprefix("B:TERM@"))
    assert int(given["OMP_NUM_THREADS"]) * int(given["gpus-per-node"]) == int(given["cpus-per-task"])


SLURM = {
    "scontrol": """if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$HERE/requeued"; fi""",
    "srun": """echo $$ > "$HERE/agent"; exec "$@" """,
    # to every process of the step, as Slurm does, and not only once: torchrun's agent passes it on once more
    "scancel": """agent=$(cat "$HERE/agent"); ranks=$(cat /proc/$agent/task/$agent/children)
        for again in 1 2 3 4 5 6; do kill -TERM $ranks; sleep 0.05; done
        kill -TERM $agent""",
    "torchrun": """exec "$PYTHON" -m torch.distributed.run "$@" """,
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_the_slurm_script_saves_at_its_signal_and_goes_on_when_it_is_queued_again(model_folder, tmp_path):
    recipe = write_recipe(tmp_path, model_folder, train=LONG, lora={"rank": 4, "alpha": 8, "dropout": 0.1})
    ended(start(recipe, f"output.dir={tmp_path / 'whole'}"))
    for name, text in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = (
        slurm_script().replace("=recipe.yaml", f"={recipe}").replace("=4\n", "=2\n").replace("THREADS=8", "THREADS=1")
    )
    (tmp_path / "job.sh").write_text(script.replace("/shared/runs/my-run", str(tmp_path / "job")))
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HERE": str(tmp_path),
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
    }

    def job():
        return subprocess.Popen(
            ["bash", tmp_path / "job.sh"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | variables,
        )

    process = job()
    stop_when(process, "checkpoint written", lambda: process.send_signal(signal.SIGTERM))
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode and "all of it is saved" in err, err
    assert (tmp_path / "requeued").read_text() == f"requeue {variables['SLURM_JOB_ID']}\n"
    out, _ = ended(job())
    assert "evaluation loss" in out and equal(tmp_path / "whole", tmp_path / "job")
    assert json.loads((tmp_path / "job" / "summary.json").read_text())["resumed"][0]["after_step"] < 60
