"""The benchmarks: what they record is the step, statistics are those of pairs, each side has a process of its own."""

import os
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import torch
from counted import counted
from memory_option_cases import build, gradients, rotary_flops
from tiny import random_batch

from bench import harness, products, scaling
from bench.products import BASE, LOW_RANK, PLACES, StepClock
from bench.tables import TABLES, scaling_table
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.train.forward import prepare

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.insert(0, str(TOOLS / "bench"))  # where a tool finds its harness

CPU = torch.device("cpu")


def tool(name):
    loader = SourceFileLoader(name, str(TOOLS / "bench" / name))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


TASK = {"model": "tiny", "tokens": 64, "checkpointing": "block", "accumulation": 2}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel what sockets have sent")
def test_two_processes_compute_the_steps_of_one_and_each_sends_what_is_calculated(monkeypatch):
    ranks = tool("ranks")
    monkeypatch.setattr(sys, "argv", [str(TOOLS / "bench" / "ranks")])
    one, two = ranks.one_process(TASK), ranks.two_processes(TASK)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3) and len(two["losses"]) == 6
    wire = ranks.gradient_bytes(one["trained_numbers"], 2)
    assert wire == 4 * one["trained_numbers"] and two["given_bytes"] == wire + 4  # and the loss
    for sent in two["sent_bytes_of_ranks"]:
        assert wire < sent < 1.02 * wire + 4096


def test_on_paper_packs_are_divided_among_gpus_or_the_step_grows_with_them():
    cluster = scaling.Scaled("llama3.2-3b", "rtx-4090", "pcie4", "ethernet-10g")
    half, weak = scaling.scaling_rows([cluster], (2, 24))
    assert (half["packs_each"], half["packs"], half["weak"], half["link"]) == (4, 8, False, "pcie4")
    assert (weak["packs_each"], weak["packs"], weak["weak"], weak["link"]) == (1, 24, True, "ethernet-10g")
    numbers = half["wire_bytes"] // 4
    assert weak["wire_bytes"] == 4 * numbers * 2 * 23 // 24
    assert weak["wire_seconds"] == weak["wire_bytes"] / (0.8 * 1.25e9)
    for row, tokens in ((half, 8 * 2048), (weak, 24 * 2048)):
        assert row["tokens_per_second"] == pytest.approx(tokens / row["step_seconds"])
        assert row["of_linear"] == row["tokens_per_second"] / (row["ranks"] * row["alone_tokens_per_second"])
    plot = scaling.scaling_plot([half, weak])
    assert plot.count("<polyline") == 1 and plot.count("Calculated, not measured") == 3 and "24 GPUs" in plot
    lines = scaling_table([half, weak, half | {"between": "nvlink"}])
    assert len(lines) == 4 and "weak scaling" in lines[3] and "weak" not in lines[2]


def test_the_modules_that_operators_are_told_apart_by_are_there():
    assert all((TOOLS.parent / "qlora_lite" / module).is_file() for module in PLACES)


@pytest.mark.parametrize("options", [MemoryOptions("none"), MemoryOptions()])
def test_a_watched_step_has_the_flops_that_the_planner_counts(options):
    model = build(options=options)
    gradients(model, options)  # how blocks end is learned from the first
    with StepClock(CPU) as clock:
        gradients(model, options)
    with counted() as counter:
        gradients(model, options)
    watched = sum(count * product.flops for product, count in clock.products.items())
    tokens = prepare(random_batch(), CPU).input_ids.shape[1]
    assert watched == counter.work.flops - 2 * rotary_flops(model, tokens) > 0
    assert set(clock.seconds) >= {"dequantising 4-bit weights", "attention", "loss", products.ELSEWHERE}


def test_the_parts_of_a_step_add_up_and_only_recomputed_products_tell_its_kinds_apart(monkeypatch):
    monkeypatch.setattr(products, "BATCH_SECONDS", 1e-4)
    limit = tool("limit")
    monkeypatch.setattr(limit, "STEPS", 1)
    cases = [limit.measure({"model": "tiny", "tokens": 64, "checkpointing": kind, "rounds": 1}) for kind in limit.KINDS]
    limit.add_needed_shares(cases)
    for case in cases:
        parts = case["limit_seconds"] + case["products_slower_seconds"] + case["rest_seconds"]
        assert parts + sum(case["others_seconds"].values()) == pytest.approx(case["step_seconds"])
        assert sum(shape["count"] * shape["alone_seconds"] for shape in case["shapes"]) == pytest.approx(
            case["share"] * case["step_seconds"]
        )
        assert sum(p["count"] for p in case["products"].values()) == sum(shape["count"] for shape in case["shapes"])
    again, kept = (case["products"] for case in cases)
    layers = 6
    assert again[BASE]["count"] - kept[BASE]["count"] == layers * 6  # all projections but the last, down_proj
    assert kept[BASE]["count"] == layers * 7 * 2 - 3  # the first block's input needs no gradient, from q, k nor v
    assert again[LOW_RANK]["count"] > kept[LOW_RANK]["count"] > 0
    assert again["attention"]["count"] == kept["attention"]["count"] > 0 and again["loss"] == kept["loss"] | {
        key: again["loss"][key] for key in ("alone_seconds", "in_step_seconds")
    }
    assert cases[1]["needed_share"] == cases[1]["share"]
    assert "**share of the limit of its own products**" in "\n".join(
        TABLES["limit"][1]({"large_product_flops_per_second": 1e11, "cases": cases})
    )


def test_a_ratio_is_of_the_same_round():
    ours, theirs = ([{"speed": speed} for speed in speeds] for speeds in ([2.0, 40.0, 6.0], [1.0, 4.0, 2.0]))
    assert harness.ratio(ours, theirs, "speed") == {"median": 3.0, "lowest": 2.0, "highest": 10.0}


def test_ways_take_turns():
    order = []
    ways = {way: lambda way=way: order.append(way) or {"number": len(order)} for way in "ab"}
    assert harness.in_turns(ways, 2) == {"a": [{"number": 1}, {"number": 3}], "b": [{"number": 2}, {"number": 4}]}


SCRIPT = """
import os
from harness import apart, start

def measure(case):
    return {"case": case, "process": os.getpid(), "variable": os.environ["OF_ONE"]}

def main():
    found = apart({"side": "ours"}, {"OF_ONE": "x"})
    assert found == {"case": {"side": "ours"}, "process": found["process"], "variable": "x"}
    assert found["process"] != os.getpid() and "OF_ONE" not in os.environ
    apart({"side": "theirs"})

start(main, measure)
"""


def test_a_side_is_measured_in_a_process_of_its_own_and_one_that_fails_ends_the_tool(tmp_path):
    (tmp_path / "tool").write_text(SCRIPT, encoding="utf-8")
    command, bench = [sys.executable, str(tmp_path / "tool")], os.environ | {"PYTHONPATH": str(TOOLS / "bench")}
    done = subprocess.run(command, capture_output=True, text=True, env=bench)
    assert done.returncode == 1 and "'theirs'} ended with 1" in done.stderr and "KeyError: 'OF_ONE'" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads anonymous memory from /proc")
def test_the_memory_of_a_merge_is_that_of_one_weight_and_that_of_an_export_of_a_block(tmp_path, monkeypatch):
    """A 2.3 GiB model in four files; its largest weight is the embedding, 0.5 GiB in 16 bit."""
    options = ["--like", "llama-1b", "--shard-gib", "0.7", "--out", str(tmp_path / "model")]
    subprocess.run([sys.executable, str(TOOLS / "make_checkpoint"), *options], check=True)
    bench, written = tool("merge"), {}
    monkeypatch.setattr(bench, "write_result", lambda _, result: written.update(result))
    path = str(TOOLS / "bench" / "merge")
    monkeypatch.setattr(sys, "argv", [path, "--model", str(tmp_path / "model"), "--folder", str(tmp_path)])
    bench.main()
    for kind in bench.KINDS:
        assert written[kind]["peak_bytes"] < written["largest_shard_bytes"] + 2**30
    above = max(written[kind]["peak_bytes_above_start"] for kind in ("nf4", "original"))
    assert above < 0.6 * written["largest_shard_bytes"]
    assert written["gguf"]["peak_bytes_above_start"] < 1.2 * 4 * 128256 * 2048, "the embedding in float32, once"
    assert written["gguf"]["share"] == pytest.approx(1, abs=0.05)
