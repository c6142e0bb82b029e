"""The benchmarks: what they record is the step, statistics are those of pairs, each side has a process of its own."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import torch
import yaml
from counted import counted
from memory_option_cases import build, gradients, rotary_flops
from tiny import build_tiny, random_batch
from tiny_files import save_tiny
from torch import nn

from bench import harness, products, scaling
from bench.products import BASE, LOW_RANK, PLACES, StepClock
from bench.tables import TABLES, limit_sentence, scaling_table, study_tables
from bench.texts import text_windows
from common.cases import method_of
from qlora_lite.data.batch import collate
from qlora_lite.data.storage import Example
from qlora_lite.memory.marks import phase
from qlora_lite.models.load import use_row_attention
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.quant.linear import QuantLinear, frozen_weight
from qlora_lite.quant.product import materialize
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


class Letters:
    """A tokenizer whose tokens are the letters, with or without a token that begins each text."""

    def __init__(self, begin):
        self.begin = begin

    def __call__(self, text, add_special_tokens=True):
        ids = [*(self.begin if add_special_tokens else []), *map(ord, text)]
        return type("Encoding", (), {"input_ids": ids})


@pytest.mark.parametrize("begin", [[], [1]])
def test_windows_hold_the_text_in_order_each_begun_as_texts_begin(begin):
    windows = text_windows("abcdefg", 4, 5, Letters(begin))
    assert [len(window) for window in windows] == [5] * 4
    assert all(window[: len(begin)] == begin for window in windows)
    joined = "".join(chr(token) for window in windows for token in window[len(begin) :])
    assert joined == ("abcdefg" * 4)[: len(joined)]


def windows_of(lengths, vocabulary=160):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, vocabulary, (n,), generator=generator).numpy().astype("int32") for n in lengths]
    return [Example(row, torch.arange(len(row)).numpy() > 0, "", "", "row") for row in ids]


@pytest.mark.parametrize("tied", [False, True])
def test_the_two_heads_are_the_model_s_own_and_what_its_nf4_copy_unpacks_to(tied):
    model = build_tiny("llama", tie_word_embeddings=tied)
    use_row_attention(model)
    table = model.get_input_embeddings().weight.clone()
    weight = model.get_output_embeddings().weight.detach().double()
    layer = QuantLinear.from_weight(weight.float(), None, "nf4", True)
    dequantized = materialize(*frozen_weight(layer), torch.float32).double()
    windows, head = windows_of((9, 14)), tool("head")
    found = head.with_both_heads(model, windows)
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert isinstance(model.get_output_embeddings(), QuantLinear)
    for window, (own, other) in zip(windows, found, strict=True):
        ids = collate([window]).input_ids
        with torch.no_grad():
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1].double()
        compared = head.compare_window(own, other)
        losses = [nn.functional.cross_entropy(hidden @ w.t(), ids[0, 1:]).item() for w in (weight, dequantized)]
        assert compared["loss_16_bit"] == pytest.approx(losses[0], rel=1e-5)
        assert compared["loss_nf4"] == pytest.approx(losses[1], rel=1e-5)
        assert compared["loss_16_bit"] != compared["loss_nf4"] and compared["kl"] > 0


def test_means_are_over_tokens_and_their_error_is_that_of_independent_windows():
    def window(tokens, own, other):
        return {"tokens": tokens, "loss_16_bit": own, "loss_nf4": other, "kl": other - own, "agreement": 0.5}

    pooled = tool("head").pooled
    found = pooled([window(10, 1.0, 1.1), window(30, 2.0, 2.3)])
    assert found["loss_16_bit"] == pytest.approx(1.75) and found["loss_nf4"] == pytest.approx(2.0)
    assert found["loss_difference"] == pytest.approx(0.25) and found["tokens"] == 40
    assert found["perplexity_nf4"] == pytest.approx(math.exp(2.0))
    assert found["standard_error"] == pytest.approx(math.sqrt((10 * 0.15) ** 2 + (30 * 0.05) ** 2) / 40)
    assert pooled([window(10, 1.0, 1.5)] * 3)["standard_error"] == pytest.approx(0.0)


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


def test_what_the_optimizer_calls_is_the_optimizer_s():
    with StepClock(CPU) as clock, phase("optimizer"):
        torch.ones(3).add_(1)
    assert list(clock.seconds) == [products.OPTIMIZER] and not clock.products


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3, 4),
        torch.ones(5, 3).t(),
        torch.ones(2, 8, 6)[:, 2:5, ::2],
        torch.ones(4, dtype=torch.bfloat16).expand(3, 4),
    ],
)
def test_a_product_is_timed_on_tensors_laid_out_as_the_step_s(tensor):
    made = products.layout_of(tensor).tensor(CPU)
    assert (made.shape, made.stride(), made.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)


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


def test_the_distance_to_the_target_is_that_of_the_better_way_to_run_blocks():
    cases = [
        {"model": model, "checkpointing": kind, "share": share, "compiled_share": compiled}
        for model, kind, share, compiled in [
            ("a", "block", 0.5, 0.7),
            ("a", "none", 0.6, 0.65),
            ("b", "block", 0.7, 0.9),
            ("b", "none", 0.8, 0.85),
        ]
    ]
    assert limit_sentence(cases).endswith(
        "a plain 60.0% (kept; 20.0 points short), compiled 70.0% (recomputed; 10.0 points short); "
        "b plain 80.0% (kept; the target is met), compiled 90.0% (recomputed; the target is met)."
    )
    assert "compiled" not in limit_sentence([{"model": "a", "checkpointing": "none", "share": 0.5}])


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


def test_the_study_goes_on_with_the_best_learning_rate_of_each_choice():
    losses = {"LoRA, norms too, 0.1": 2.0, "LoRA, norms too, 0.2": 1.0, "full, 0.1": 0.5, "full, 0.2": 3.0}
    points = [
        {"status": "complete", "choice": {"method": name}, "mean": {"eval_loss_after": loss}}
        for name, loss in losses.items()
    ]
    points.append({"status": "does not fit", "choice": {"method": "prefix tuning, 0.1"}, "mean": {}})
    assert tool("study").best_rates(points, "method") == {"LoRA, norms too, 0.2", "full, 0.1"}


def test_the_study_goes_on_from_a_result_of_its_shape_alone_and_adds_each_sweep_to_it(tmp_path, monkeypatch):
    study, row = tool("study"), {"choice": {"lora.rank": "1"}, "status": "does not fit"}
    ran = []

    def run(part, model, task, axes, runs):
        ran.append((part, model, task))
        return {"rows": [row], "processor": "a CPU", "date": "2026-01-02"}

    for name, value in {
        "study": run,
        "write_rows": lambda *_: None,
        "earlier": partial(study.earlier, folder=tmp_path),
        "write_result": partial(study.write_result, folder=tmp_path),
    }.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(sys, "argv", ["study", str(tmp_path), "--runs", str(tmp_path), "--part", "bits"])
    for _ in range(2):
        study.main()
    assert len(ran) == len({*ran}) == 4 and {part for part, *_ in ran} == {"bits"}
    table = "\n".join(study_tables(json.loads((tmp_path / "study.json").read_text())))
    assert "**Bits of the base.** SmolLM2-135M, sst2 (a CPU, 2026-01-02):" in table
    found = {"rows": [row], "processor": "a CPU", "date": "2026-01-02"}
    ranks = {f"rank {rank}, smollm2-135m, e2e": found for rank in (1, 4)}
    lines = study_tables({"cases": ranks})
    assert lines[0] == "**Rank and layers.** SmolLM2-135M, e2e (a CPU, 2026-01-02):" and lines[-1].count(";") == 1
    monkeypatch.setattr(study, "STEPS", 41)
    study.main()
    assert len(ran) == 8
    monkeypatch.setattr(study, "STEPS", 42)
    row["status"] = "failed"
    study.main()
    study.main()
    assert len(ran) == 16, "nothing is written of runs that failed"


@pytest.mark.parametrize("way", ["merged LoRA", "unmerged LoRA", "pfeiffer", "houlsby"])
def test_the_ways_of_bottleneck_adapters_are_measured_with_what_they_add(way, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.start", lambda _main, _measure: None)  # the tool's own name for it
    bench = tool("bottleneck")
    model = build_tiny("llama")
    adapter = bench.adapter_of(model, way, 4, 8)
    assert (
        len(adapter.layers if "LoRA" in way else adapter.tensors)
        == {"merged LoRA": 0, "unmerged LoRA": 14, "pfeiffer": 8, "houlsby": 16}[way]
    )
    save_tiny(tmp_path / "model")
    case = {
        "model": str(tmp_path / "model"),
        "quant": "none",
        "way": way,
        "rank": 4,
        "width": 8,
        "prompts": 2,
        "prompt_tokens": 9,
        "new_tokens": 4,
    }
    found = bench.measure(case)
    assert found.keys() == {"prefill_seconds", "token_seconds"} and found["prefill_seconds"] > 0


def test_longer_runs_of_a_start_have_its_best_rate_and_the_next_lower_one(monkeypatch, tmp_path):
    starts, asked, written = tool("starts"), [], {}
    best = {
        "plain": 1.2e-3,
        "LoftQ": 6e-4,
        "PiSSA": 1.5e-4,
        "OLoRA": 7.5e-5,
        "16 bit": 2.4e-3,
        "QERA": 3e-4,
        "EVA": 6e-4,
    }

    def sweep(_runs, name, model, task, train, axes):
        asked.append((model, train["max_steps"], axes["start"], axes["train.seed"]))
        for choice, settings in axes["start"].items():
            rate = settings["train.learning_rate"]
            loss = 1 + abs(rate - best[choice.partition(", ")[0]])
            yield {
                "choice": {"start": choice},
                "status": "complete",
                "runs": [{}] * len(axes["train.seed"]),
                "mean": {"eval_loss_before": 1.5, "eval_loss_after": loss},
                "standard_deviation": {"eval_loss_after": 0.01},
            }

    monkeypatch.setattr(starts, "sweep", lambda *given: list(sweep(*given)))
    monkeypatch.setattr(starts, "write_rows", lambda *_: None)
    monkeypatch.setattr(starts, "earlier", lambda *_: written.get("starts", {}).get("models", {}))
    monkeypatch.setattr(starts, "write_result", lambda name, result: written.update({name: result}))
    monkeypatch.setattr(sys, "argv", ["starts", str(tmp_path), "--runs", str(tmp_path), "--model", "smollm2-135m"])
    starts.main()
    assert [(each[:2], each[3]) for each in asked] == [
        (("smollm2-135m", steps), seeds) for steps in (40, 200, 1000) for seeds in ([0], [0, 1, 2])
    ]
    first, at_best, longer = (each[2] for each in asked[:3])
    assert len(first) == 31 and set(at_best) == {f"{name}, {rate:g}" for name, rate in best.items()}
    assert asked[4][2] == longer and longer["LoftQ, 0.0006"]["lora.start"] == "loftq"
    assert set(longer) == {
        "plain, 0.0006",
        "plain, 0.0012",
        "LoftQ, 0.0003",
        "LoftQ, 0.0006",
        "PiSSA, 7.5e-05",
        "PiSSA, 0.00015",
        "QERA, 0.0003",
        "EVA, 0.0003",
        "EVA, 0.0006",
        "OLoRA, 7.5e-05",
        "16 bit, 0.0012",
        "16 bit, 0.0024",
    }
    lines = TABLES["starts"][1](written["starts"])
    assert len(lines) == 2 + 21
    assert "| SmolLM2-135M | 1,000 | LoftQ | 1.5000 | 1.0000 ± 0.0100 | 0.0006 |" in lines
    rows = written["starts"]["models"]["smollm2-135m"]["200"]
    rows[:], _ = [row for row in rows if row["start"] != "LoftQ"], asked.clear()
    starts.main()  # what is in the result is not run again
    assert [[*each[2]] for each in asked] == [["LoftQ, 0.0003", "LoftQ, 0.0006"], ["LoftQ, 0.0006"]]


def test_learning_rates_of_one_model_and_task_are_put_beside_those_of_others(monkeypatch, tmp_path):
    rates, written = tool("learning_rates"), {"models": {"smollm2-135m, e2e": "kept"}}

    def points(_runs, model, task):
        for rate, loss in (("0.0003", 2.0), ("0.0006", 1.0), (rates.AUTO, 1.25)):
            yield {
                "choice": {"train.learning_rate": rate},
                "standard_deviation": {},
                "mean": {"eval_loss_before": 3.0, "eval_loss_after": loss, "learning_rate": 5.5e-4},
            }

    monkeypatch.setattr(rates, "points", lambda *given: list(points(*given)))
    monkeypatch.setattr(rates, "write_rows", lambda *_: None)
    monkeypatch.setattr(rates, "earlier", lambda *_: written["models"])
    monkeypatch.setattr(rates, "write_result", lambda _, result: written.update(result))
    chosen = ["--task", "gsm8k", "--model", "gemma3-270m"]
    monkeypatch.setattr(sys, "argv", ["learning_rates", str(tmp_path), "--runs", str(tmp_path), *chosen])
    rates.main()
    assert list(written["models"]) == ["smollm2-135m, e2e", "gemma3-270m, gsm8k"]
    found = written["models"]["gemma3-270m, gsm8k"]
    assert (found["auto"], found["best_of_sweep"], found["auto_over_best"]) == (5.5e-4, 6e-4, 0.25)


def test_merges_that_are_there_are_not_made_again_and_each_is_a_line_of_the_table(tmp_path, monkeypatch):
    bench, called = tool("merged"), []
    monkeypatch.setattr(bench, "command", lambda *arguments: called.append(arguments))
    measured = {"trained": {"loss": 1.0}, "merged, then nf4": {"loss": 1.25, "kl": 0.5, "agreement": 0.75}}
    for aware in bench.RUNS:
        run = tmp_path / f"smollm2-135m-e2e-{aware}"
        run.mkdir()
        (run / "recipe.yaml").write_text("{}")
        (run / "summary.json").write_text(json.dumps({"status": "complete", "seconds": 8.0, "steps": 4}))
        for number in range(len(bench.WAYS)):
            out = tmp_path / f"{run.name}-merged-{number}"
            out.mkdir()
            (out / "merge_report.json").write_text(json.dumps({"models": measured}))
    found = bench.figures("smollm2-135m", "e2e", tmp_path)
    assert not called and found["seconds_per_step"] == {"off": 2.0, "nf4": 2.0}
    lines = TABLES["merged"][1]({"models": {"smollm2-135m": {"e2e": found}}})[2:]
    assert [line.split(" | ")[2] for line in lines] == list(bench.WAYS)
    assert all(line.endswith("| 1.0000 | 1.2500 | 5.0e-01 | 75.0% |") for line in lines)


def test_q4_0_files_are_of_a_run_with_its_training_rows_and_of_one_without(tmp_path, monkeypatch):
    bench, exported = tool("q4_0"), []

    def export(*arguments):
        run, out = Path(arguments[1]), Path(arguments[arguments.index("--out") + 1])
        rows = yaml.safe_load((run / "recipe.yaml").read_text())["data"]["train"]
        exported.append(rows)
        found = {"loss": 1.25, "kl": 0.5 if rows == "nowhere.jsonl" else 0.25, "agreement": 0.75}
        notes = ["each weight was rounded by itself instead"] * (rows == "nowhere.jsonl")
        out.mkdir()
        (out / "model.gguf").write_text("")
        models = {"base": found, "trained": {"loss": 1.0, "kl": 0.0, "agreement": 1.0}, "q4_0": found}
        (out / "export_report.json").write_text(json.dumps({"models": models, "notes": notes}))

    monkeypatch.setattr(bench, "command", export)
    run = tmp_path / "smollm2-135m-e2e-off"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump({"data": {"train": "rows.jsonl"}}))
    (run / "summary.json").write_text(json.dumps({"status": "complete"}))
    found = [bench.figures("smollm2-135m", "e2e", tmp_path) for _ in range(2)]
    assert found[0] == found[1] and exported == ["nowhere.jsonl", "rows.jsonl"]
    lines = TABLES["q4_0"][1]({"models": {"smollm2-135m": {"e2e": found[0]}}})[2:]
    assert [line.split(" | ")[2:] for line in lines] == [
        [way, "1.0000", "1.2500", kl, "75.0% |"] for way, kl in (("rounded", "5.0e-01"), ("chosen", "2.5e-01"))
    ]


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


@pytest.mark.parametrize("way", ["lora", "dora", "merge-aware"])
def test_the_steps_whose_times_are_compared_are_of_the_method_that_is_named(way, monkeypatch):
    monkeypatch.setattr("harness.start", lambda _main, _measure: None)
    bench = tool("step_times")
    case = {"model": "tiny", "tokens": 64, "checkpointing": "block", "method": way}
    method = method_of(case)
    assert (method.dora, method.merge_aware) == (way == "dora", "nf4" if way == "merge-aware" else "off")
    assert next(bench.measure(case | {"steps": 1})) > 0
