"""The tools that measure memory options and GPUs: sections end as they should, tables show what was measured."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from common import results
from common.memory_options import (
    measure,
    memory_option_cases,
    merged,
    resident_cases,
    saving_options,
)
from gpu import caps, numbers, peers, sections
from gpu.process import LIMIT_SECONDS, run_section
from gpu.ranks import NOTICED_SECONDS, killed_row, losses_row, run_ranks
from gpu.sections import CARD, REHEARSAL, SECTIONS, option_problem
from gpu.summary import summary
from qlora_lite import files
from qlora_lite.errors import DoesNotFitError, OutputError
from qlora_lite.models.memory_options import MemoryOptions
from simulated_gpu.runtime import card_environment

TOOLS = Path(__file__).parent.parent / "tools"
MIB = 2**20
FIRST_ROW = "from gpu.process import report; report({'kind': 'first'}); "


def section(code, limit_seconds=60):
    return run_section([sys.executable, "-c", FIRST_ROW + code], limit_seconds, {"PYTHONPATH": str(TOOLS)})


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", "passed"),
        ("report({'problem': 'wrong'})", "failed"),
        ("raise ValueError('broken')", "failed"),
        ("report({'skipped': 'nothing to do it with'})", "passed"),
        ("import os; os.kill(os.getpid(), 9)", "failed"),
    ],
)
def test_a_section_fails_if_it_says_so_or_does_not_end_well_and_its_findings_stay(code, status):
    found = section(code)
    assert found["status"] == status
    assert found["rows"][0] == {"kind": "first"}
    assert ("ValueError: broken" in found.get("output", ())) == ("ValueError" in code)


def test_a_section_that_takes_too_long_is_stopped_with_its_children_and_its_findings_stay(tmp_path):
    lasting = tmp_path / "child-lived-on"
    child = f"import time; time.sleep(2); open({str(lasting)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    found = section(code, limit_seconds=1)
    assert found["status"] == "timed out" and found["rows"] == [{"kind": "first"}]
    subprocess.run([sys.executable, "-c", "import time; time.sleep(2)"], check=True)
    assert not lasting.exists()


def test_results_name_the_versions_of_what_is_installed_and_are_replaced_at_once(tmp_path, monkeypatch):
    installed = {name: "1.0" for name in (*results.PACKAGES, "peft")}
    monkeypatch.setattr(results, "version", lambda name: installed[name] if name in installed else not_there(name))
    path = results.write_result("kit", {"sections": {}}, tmp_path / "a" / "b")
    versions = json.loads(path.read_text("utf-8"))["versions"]
    assert list(versions) == ["python", "torch", "transformers", "bitsandbytes", "accelerate", "numpy", "peft"]
    before = path.read_bytes()
    with pytest.raises(OutputError), monkeypatch.context() as patch:
        patch.setattr(files, "flush_to_disk", full_disk)
        results.write_result("kit", {"sections": {"tests": 1}}, path.parent)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_result_has_a_row_on_each_line_the_spread_of_many_numbers_and_no_raw_rows(tmp_path):
    rows = [{"step": step, "seconds": 0.1 * step, "shapes": [1, 2], "why": "x" * 300} for step in range(3)]
    found = {"date": "2030-01-02", "losses": [*range(11)], "steps": 3, "rows": rows, "few": [3, 1, 2]}
    path = results.write_result("a", found, tmp_path, raw={"shapes"})
    text = path.read_text("utf-8")
    read = json.loads(text)
    assert read["date"] == "2030-01-02" and read["few"] == [3, 1, 2]
    assert read["losses"] == {"n": 11, "lowest": 0, "median": 5, "highest": 10}
    assert [row["seconds"] for row in read["rows"]] == [0.0, 0.1, 0.2] and "shapes" not in text
    assert [line.count('"step"') for line in text.splitlines()].count(1) == 3
    results.write_result("a", read, tmp_path)
    assert path.read_text("utf-8") == text, "written again it is the same"
    spreads = results.spread_of([{"side": "ours", "speed": speed} for speed in (2.0, 1.0)])
    assert spreads == {"speed": {"n": 2, "lowest": 1.0, "median": 1.5, "highest": 2.0}}


SUMMARIES = [path for path in sorted(results.RESULTS.glob("*.json")) if path.stem != "gpu_check"]  # whose rows stay


@pytest.mark.parametrize("path", SUMMARIES, ids=lambda path: path.stem)
def test_each_result_is_a_short_summary_with_its_date_and_machine(path):
    text = path.read_text("utf-8")
    found = json.loads(text)
    assert len(text.splitlines()) <= 60
    assert found["date"][:2] == "20" and found["machine"]["cpu"] and found["versions"]["torch"]


def not_there(name):
    raise PackageNotFoundError(name)


def full_disk(_path):
    raise OSError(28, "No space left on device")


def test_all_sections_of_one_gpu_end_within_eight_minutes():
    assert sum(LIMIT_SECONDS.values()) - LIMIT_SECONDS["ranks"] <= 8 * 60 and list(LIMIT_SECONDS) == list(SECTIONS)
    assert set(CARD.caps_bytes) == {n * 2**30 for n in (6, 8, 12, 16, 24)}


@pytest.mark.parametrize(("other", "problem"), [(5.004, False), (5.006, True), (float("nan"), True)])
def test_other_losses_of_several_gpus_are_a_problem(other, problem):
    row = losses_row([4.0, 5.0], [4.0, other])
    assert ("problem" in row) is problem and row["steps"] == 2


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ({"lost": "rank 1", "seconds": 1.0}, None),
        ({"lost": "rank 1", "seconds": NOTICED_SECONDS + 1.0}, "noticed after 61 s"),
        ({"losses": [1.0], "tokens_per_second": 1.0}, "nobody noticed that a rank was killed"),
        ({"problem": "it did not end"}, "it did not end"),
    ],
)
def test_a_killed_rank_that_nobody_or_late_notices_is_a_problem(found, problem):
    assert killed_row(found).get("problem") == problem


@pytest.mark.slow
def test_processes_that_train_together_learn_what_one_does_and_notice_one_that_is_killed():
    case = {"model": "tiny", "tokens": 64, "checkpointing": "block", "accumulation": 2}
    alone, both = (run_ranks(case, ranks, 3, 120) for ranks in (1, 2))
    assert "problem" not in losses_row(alone["losses"], both["losses"]) and len(both["losses"]) == 3
    found = killed_row(run_ranks(case, 2, 4, 120, killed_after=2))
    assert "problem" not in found and "has ended or does not answer" in found["message"]
    assert run_ranks(case, 2, 4, 0.1) == {"problem": "2 processes did not end within 0 s"}


def test_problems_are_in_the_summary():
    rows = [
        {"kind": "with room", "optimizer": "adamw_32bit", "seconds": 0.5},
        {"kind": "filled GPU", "optimizer": "adamw_32bit", "problem": "wrong"},
    ]
    text = summary({"paged": {"status": "failed", "seconds": 1.0, "rows": rows, "output": ["last line"]}})
    assert "paged      failed" in text and "PROBLEM: wrong" in text and "0.500 s a step" in text and "last line" in text


@pytest.mark.slow
def test_a_cap_under_which_every_length_fits_is_a_problem_since_none_was_seen_to_fail(monkeypatch):
    capped = caps.CappedDevice()
    monkeypatch.setattr(capped, "run", lambda *_, **__: {"fits": True})
    *rows, last = caps.length_rows(capped, "tiny", 256, 96 * MIB)
    assert last["problem"] == f"no failing length up to {last['tokens']:,} tokens"
    assert rows and not any("problem" in row for row in rows)
    longest = last["planned_longest_tokens"]
    monkeypatch.setattr(capped, "run", lambda name, tokens, *_, **__: {"fits": tokens == longest})
    assert [row.get("problem") for row in caps.length_rows(capped, "tiny", 256, 96 * MIB)] == [None, None]


@pytest.mark.parametrize("fits", [True, False])
def test_the_planner_s_choice_that_runs_out_of_memory_is_a_problem_if_it_was_planned_to_fit(fits, monkeypatch):
    def ours(*_):
        raise DoesNotFitError("too large. More words")

    monkeypatch.setattr(peers, "_ours", ours)
    monkeypatch.setattr(peers, "_missing", lambda side, _: "left out" if side.startswith("peers") else "")
    plan = SimpleNamespace(fits=fits, chosen=SimpleNamespace(options=MemoryOptions()))
    sides = peers.Comparison("tiny", 1, 64, plan, torch.device("cpu"))
    rows = [*sides.plain(), *sides.compiled()]
    assert [row["side"] for row in rows if "problem" in row] == ["ours, as planned"] * fits
    assert sum(row.get("out_of_memory") == "too large" for row in rows) == 3


@pytest.mark.parametrize("error", [ImportError, KeyError])
def test_a_side_that_a_foreign_package_ends_is_a_problem_and_the_others_go_on(error, monkeypatch):
    def broken(*_):
        raise error("no such name\nmore lines")

    monkeypatch.setattr(peers, "peers_side", broken)
    monkeypatch.setattr(peers, "_missing", lambda *_: "")
    monkeypatch.setattr(peers, "_ours", lambda *_: {"first_loss": 2.0})
    plan = SimpleNamespace(fits=True, chosen=SimpleNamespace(options=MemoryOptions()))
    sides = peers.Comparison("tiny", 1, 64, plan, torch.device("cpu"))
    problems = [row.get("problem") for row in (*sides.plain(), *sides.compiled())]
    words = f"{error.__name__}: " + ("'no such name\\nmore lines'" if error is KeyError else "no such name")
    assert problems == [None, None, words, words, None]


def test_gradients_that_are_not_those_of_float64_are_a_problem(monkeypatch):
    cpu, types = torch.device("cpu"), (torch.bfloat16, torch.float16)
    rows = list(numbers.gradient_rows("tiny", 64, cpu, types))
    assert not any("problem" in row for row in rows)
    unscaled = [row["A_error"] for row in rows if row["dtype"] == "float16" and row["loss_scale"] == 1]
    assert len(rows) == 6 and min(unscaled) > 10 * max(row["A_error"] for row in rows[:4])
    gradients = numbers._gradients
    monkeypatch.setattr(
        numbers, "_gradients", lambda *given: {key: 1.1 * found for key, found in gradients(*given).items()}
    )
    rows = list(numbers.gradient_rows("tiny", 64, cpu, types))
    assert [row["problem"] for row in rows if "problem" in row] == [
        "gradients in bfloat16 are off",
        "gradients in float16 are off",
    ]


@pytest.mark.parametrize(
    ("tensors", "process", "on_cpu", "on_gpu"),
    [
        (104, 100, "tensors", "tensors"),
        (102, 100, "", ""),
        (102, 107, "", "allocated memory"),
        (100, 95, "", "allocated memory"),
        (104, 95, "tensors", "tensors and allocated memory"),
    ],
)
def test_a_memory_option_row_whose_memory_was_predicted_wrong_is_a_problem(tensors, process, on_cpu, on_gpu):
    row = {
        "predicted_bytes": tensors,
        "measured_bytes": 100,
        "predicted_process_bytes": process,
        "measured_process_bytes": 100,
    }
    for device_type, wrong in (("cpu", on_cpu), ("cuda", on_gpu)):
        problem = option_problem(row, SimpleNamespace(memory_bytes=100, device_type=device_type))
        assert problem == (f"prediction of {wrong} is off" if wrong else "")


def test_a_test_that_fails_on_the_gpu_is_a_problem_with_its_name(tmp_path, monkeypatch):
    text = "import pytest\npytestmark = pytest.mark.gpu\ndef test_a(): pass\ndef test_b(): assert False\n"
    (tmp_path / "test_some.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sections, "gpu_tests", lambda: [tmp_path / "test_some.py"])
    monkeypatch.setattr(sections, "ORDER", ("test",))
    first, last = sections.tests(REHEARSAL)
    assert first["test"].endswith("::test_b") and first["problem"] == "failed"
    assert "1 failed, 1 passed" in last["summary"] and "problem" in last


def gpu_check(*arguments):
    command = [sys.executable, TOOLS / "gpu_check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=TOOLS.parent)


def test_a_memory_probe_is_never_written_among_the_results():
    done = gpu_check("--dry-run", "--out", str(TOOLS / "results" / "rehearsal.json"))
    assert done.returncode == 2 and "another --out" in done.stderr
    assert not (TOOLS / "results" / "rehearsal.json").exists()


@pytest.mark.slow
def test_a_check_that_is_stopped_ends_its_section_and_writes_what_it_found(tmp_path):
    out, command = tmp_path / "a" / "new" / "kit.txt", [sys.executable, TOOLS / "gpu_check", "--dry-run"]
    whole = [*command, "--only", "paged", "tests", "options", "--out", out]
    process = subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=TOOLS.parent)
    written = out.with_suffix(".json")
    while not written.exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(2)  # the next section has begun
    inside = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    words, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and f"wrote {written}" in words and "stopped" in words
    found = json.loads(written.read_text("utf-8"))["sections"]
    assert [(name, section["status"]) for name, section in found.items()] == [("paged", "passed"), ("tests", "stopped")]
    assert inside and not any(child.is_running() for child in inside)
    assert [path.name for path in written.parent.iterdir()] == ["kit.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_check():
    done = gpu_check("--only", "paged")
    assert done.returncode == 2 and "no CUDA device" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_section_can_be_rehearsed_without_a_gpu(tmp_path):
    before = sorted((TOOLS / "results").iterdir())
    done = gpu_check("--dry-run", "--out", str(tmp_path / "kit.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "kit.json").read_text("utf-8"))
    assert list(found["sections"]) == list(SECTIONS)
    assert all(section["status"] == "passed" and section["rows"] for section in found["sections"].values())
    lengths = [row["fits"] for row in found["sections"]["caps"]["rows"] if row["kind"] == "length"]
    assert lengths[0] and not lengths[-1]
    equal = [row for row in found["sections"]["streamed"]["rows"] if row["kind"] == "equal"]
    assert len(equal) == 7 and all(row["tensors"] > 10 and row["different"] == 0 for row in equal)
    losses = [row["first_loss"] for row in found["sections"]["peers"]["rows"] if "first_loss" in row]
    assert len(losses) >= 3 and max(losses) == pytest.approx(min(losses), rel=2e-4)
    kinds = [row["kind"] for row in found["sections"]["ranks"]["rows"]]
    assert kinds == ["task", "speed", "speed", "losses", "killed"]
    assert sorted((TOOLS / "results").iterdir()) == before


def test_each_row_of_the_memory_option_table_adds_one_memory_option_to_the_row_before():
    for rows in (memory_option_cases("tiny", 256, list(saving_options(256))), resident_cases("tiny", 256)):
        for before, after in pairwise(rows):
            changed = {key for key in after if key != "option" and after[key] != before.get(key)}
            assert len(changed) == 1 or changed in (
                {"host_embeddings", "host_head"},
                {"host_head", "offload_folder", "quant_head", "stream_from"},
            )
            assert set(before) <= set(after)
    assert {"uncheckpointed_layers", "compile"} <= set(rows[-1])


@pytest.mark.slow
def test_a_row_of_the_memory_option_table_is_measured_as_it_is_planned():
    by_name = {case["option"]: case for case in memory_option_cases("tiny", 64, list(saving_options(64)))}
    resident, on_host = by_name["blocks recomputed"], by_name["attention's results kept on a GPU"]
    assert on_host["optimizer_in_backward"]
    stretched, _, kept, _ = resident_cases("tiny", 64)
    found = [measure(case, warmup=1, steps=1) for case in (resident, on_host, stretched, kept)]
    for row in found:
        assert row["predicted_bytes"] == pytest.approx(row["measured_bytes"], rel=0.05)
        assert row["tokens_per_second"] > 0 and row["loss"] > 0
    assert found[1]["measured_bytes"] < found[0]["measured_bytes"]
    assert found[1]["measured_host_bytes"] > found[0]["measured_host_bytes"] == 0


def test_speeds_of_several_processes_are_kept_and_their_median_is_the_rows():
    rows = [{"tokens_per_second": speed, "measured_process_bytes": speed} for speed in (5, 1, 2)]
    assert merged(rows) == {"tokens_per_second": 2, "each_tokens_per_second": [5, 1, 2], "measured_process_bytes": 5}


def test_the_least_memory_in_which_a_plan_runs_is_found_within_8_mib():
    needed, tried = 1100 * MIB, []

    def run(model, tokens, options, cap_bytes, steps, overhead_bytes, train, **case):
        assert (model, tokens, overhead_bytes, case) == ("tiny", 256, 0, {"optimizer": "adamw_8bit"})
        tried.append(cap_bytes)
        return {"fits": cap_bytes >= needed, "measured_bytes": 500 * MIB, "reserved_bytes": 900 * MIB, "step": {}}

    machine = SimpleNamespace(memory_bytes=80 * 2**30)
    row = runpy.run_path(str(TOOLS / "check" / "card"))["check"](
        SimpleNamespace(machine=machine, run=run), "tiny", 256, 4
    )
    assert needed <= row["least_bytes"] < needed + 8 * MIB
    assert tried[0] == machine.memory_bytes and len(tried) < 10
    assert row["planned_bytes"] > row["predicted_bytes"] > 0 and row["allocated_bytes"] == 500 * MIB


OVER_A_CARD = pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available() or shutil.which("cc") is None,
    reason="needs a torch for CUDA, a C compiler and no GPU",
)


@OVER_A_CARD
def test_over_a_gpu_that_computes_nothing_a_plan_runs_in_what_was_planned(tmp_path):
    code = (
        "import json, runpy; from gpu.caps import CappedDevice; "
        f"check = runpy.run_path({str(TOOLS / 'check' / 'card')!r})['check']; "
        "print(json.dumps(check(CappedDevice(), 'tiny', 256, 4)))"
    )
    environment = os.environ | card_environment(tmp_path, gib=8) | {"PYTHONPATH": f"{TOOLS}:{TOOLS.parent}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["allocated_bytes"] <= 1.05 * row["predicted_bytes"]
    assert row["least_bytes"] <= row["planned_bytes"] and row["step"]["launches"] > 100


MISTAKES = """
import torch
from simulated_gpu.computing import ORDERS, ComputingCard

ONES = torch.ones(64, pin_memory=True)

def arrives(side, wait):  # a copy to the GPU, and what is computed from it
    there = torch.zeros(64, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there.copy_(ONES, non_blocking=True)
    if wait:
        torch.cuda.current_stream().wait_stream(side)
    return (there * 1).cpu()

def leaves(side, wait):  # what is computed, and a copy of it to the host
    here, there = torch.zeros(64, pin_memory=True), torch.zeros(64, device="cuda") + 1
    if wait:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        here.copy_(there, non_blocking=True)
    side.synchronize()
    return here

def is_used_again(side, wait):  # memory that is given back before the copy from it has ended
    here, there = torch.zeros(64, pin_memory=True), torch.ones(64, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        here.copy_(there, non_blocking=True)
    if wait:
        torch.cuda.current_stream().wait_stream(side)
    del there
    other = torch.zeros(64, device="cuda")
    torch.cuda.current_stream().synchronize()
    side.synchronize()
    return here

for memory in (arrives, leaves, is_used_again):
    for wait in (False, True):
        wrong = []
        for order in ORDERS:
            with ComputingCard(order):
                torch.zeros(64, device="cuda").sum().item()
                if not torch.equal(memory(torch.cuda.Stream(), wait), torch.ones(64)):
                    wrong.append(order)
        print(memory.__name__, wait, ", ".join(wrong))
"""


@OVER_A_CARD
def test_a_gpu_that_computes_shows_every_wait_that_is_missing_and_no_other(tmp_path):
    environment = os.environ | card_environment(tmp_path, gib=8) | {"PYTHONPATH": f"{TOOLS}:{TOOLS.parent}"}
    done = subprocess.run([sys.executable, "-c", MISTAKES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = [line.strip() for line in done.stdout.splitlines()]
    assert [line for line in found if " True" in line] == ["arrives True", "leaves True", "is_used_again True"]
    late, early = "late, computing first", "late, copies first"
    for line, orders in zip(found[::2], (late, early, late), strict=True):
        assert line.partition(" False ")[2].startswith(orders)  # and, it may be, at random


SECOND_GPU = """
import sys
import torch
from torch import nn
from simulated_gpu.computing import ComputingCard
from tiny_files import save_tiny
from tiny_trainer import trainer

from qlora_lite.models.load import load_model
from qlora_lite.offload.checkpoint import Checkpoint
from qlora_lite.train.step import _begin_reading

SECOND = torch.device("cuda:1")
with ComputingCard("late"):
    block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).to(SECOND)
    out = Checkpoint()(block, torch.ones(64, 8, device=SECOND, requires_grad=True))
    out.sum().backward()
    assert torch.equal(block[0].bias.grad, 2 * (out != 0).sum(0)), "another mask in the recomputation"
    assert _begin_reading(torch.full((2,), 3.0, device=SECOND))() == [3.0, 3.0]
    assert torch.cuda.current_device() == 0
    training = trainer(device=SECOND)
    steps = []
    for metrics in training:
        steps.append((torch.cuda.current_device(), metrics.loss > 0))
        torch.cuda.set_device(0)
    assert steps == [(1, True)] * 4, steps
save_tiny(sys.argv[1])
assert load_model(sys.argv[1], "none", device="cuda:1").device == SECOND and torch.cuda.current_device() == 1
"""


@OVER_A_CARD
def test_on_a_second_gpu_masks_are_drawn_again_numbers_are_waited_for_and_kernels_start_there(tmp_path):
    paths = TOOLS, TOOLS.parent, TOOLS.parent / "tests"
    environment = os.environ | card_environment(tmp_path, gib=8) | {"PYTHONPATH": ":".join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", SECOND_GPU, tmp_path / "model"],
        capture_output=True,
        text=True,
        env=environment | {"CARD_COUNT": "2"},
    )
    assert done.returncode == 0, done.stderr


NOT_PINNED = """
import torch
from qlora_lite.offload.offload import host_memory

def next_kernel_runs():
    try:
        return torch.zeros(8, device=gpu) is not None
    except RuntimeError:
        return False

gpu = torch.device("cuda")
assert host_memory(1 << 16, gpu).is_pinned() and not host_memory(1 << 20, gpu).is_pinned()
assert next_kernel_runs()
try:
    torch.empty(1 << 20, pin_memory=True)
except RuntimeError:
    assert not next_kernel_runs() and next_kernel_runs()
"""


@OVER_A_CARD
def test_after_memory_that_cannot_be_pinned_the_next_kernel_runs(tmp_path):
    environment = os.environ | card_environment(tmp_path, gib=8) | {"PYTHONPATH": str(TOOLS.parent)}
    done = subprocess.run(
        [sys.executable, "-c", NOT_PINNED],
        capture_output=True,
        text=True,
        env=environment | {"CARD_PINNED_BYTES": "100000"},
    )
    assert done.returncode == 0, done.stderr


WAITS = """
import torch
from simulated_gpu.runtime import counts
from torch import nn

from qlora_lite.kernels import encoder_attention, flex_attention
from qlora_lite.kernels.token_rows import HeadWithRows, RowsOver

gpu = torch.device("cuda")
query, table = torch.zeros(2, 1, 8, 4, device=gpu), torch.zeros(9, 4, device=gpu)
ids = torch.zeros(6, dtype=torch.long, device=gpu)
head = HeadWithRows(nn.Linear(4, 9, device=gpu), (2, 7, 8), nn.Parameter(torch.zeros(3, 4, device=gpu)))
before = counts()
flex_attention._tables((300, 60), None, gpu)
encoder_attention._mask((8, 5), 8, None, query)
rows = RowsOver(table, head.tokens, head.token_rows, head.token_ids)
rows[0:8], rows[8:9], rows.places(ids)
print(counts().waits - before.waits, counts().launches > before.launches)
"""


@OVER_A_CARD
def test_tables_of_attention_and_rows_of_tokens_reach_the_gpu_without_a_wait(tmp_path):
    environment = os.environ | card_environment(tmp_path, gib=8) | {"PYTHONPATH": f"{TOOLS}:{TOOLS.parent}"}
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, env=environment)
    assert done.stdout == "0 True\n", done.stdout + done.stderr
