"""One recipe to its end: what the run folder holds, and what a run that stops early leaves."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_files import byte_tokenizer, save_tiny, write_recipe
from tiny_runs import summary_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_lite
from qlora_lite.artifacts.run_folder import open_run
from qlora_lite.cli.train import _result
from qlora_lite.data.chat.render import render_prompt
from qlora_lite.data.chat.template import NAMED_TEMPLATES
from qlora_lite.errors import (
    CheckpointError,
    DataError,
    DoesNotFitError,
    ModelError,
    OutputError,
    RecipeError,
    TrainingError,
)
from qlora_lite.inference.compare import compare_runs
from qlora_lite.inference.evaluate import SPARE_TOKENS, answered_at_once, evaluate_recipe, measure
from qlora_lite.inference.generate import Answer
from qlora_lite.memory.meter import held_bytes
from qlora_lite.models.packing import runs_unpacked
from qlora_lite.planning.answering import UNPLANNED, prompt_bytes
from qlora_lite.planning.predict import Prediction
from qlora_lite.prepare.datasets import build_data
from qlora_lite.prepare.model import build_model, build_skeleton
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs import stages
from qlora_lite.train.loop import Trainer
from qlora_lite.train.out_of_memory import another_plan_may_help, free_cached_memory
from qlora_lite.train.workload import Workload

CPU = torch.device("cpu")

METRICS = {
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "target_tokens",
    "tokens_per_second",
    "peak_bytes",
    "seconds",
}
SUMMARY = {
    "status",
    "steps",
    "seconds",
    "tokens",
    "tokens_per_second",
    "peak_bytes",
    "trainable_parameters",
    "eval_loss_before",
    "eval_loss_after",
    "exact_match_before",
    "exact_match_after",
    "adapter_sha256",
    "versions",
    "samples",
    "memory_table",
    "data",
    "other_results",
}


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """A finished run and its recipe file."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder, model_folder, train={"eval_every_steps": 2, "save_every_steps": 3})
    return qlora_lite.run_recipe(load_recipe(recipe)), recipe


@pytest.fixture
def run(model_folder, tmp_path):
    """Train with changed sections, measuring no answers if they do not say so; ``run.folder`` is where it writes."""

    def call(**sections):
        sections["train"] = {"metrics_examples": 0} | sections.get("train", {})
        return qlora_lite.run_recipe(load_recipe(write_recipe(tmp_path, model_folder, **sections)))

    call.folder = tmp_path / "out"
    return call


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_finished_run_has_every_file(finished):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml",
        "metrics.jsonl",
        "summary.json",
        "adapter",
        "adapter-last",
        "report.html",
        "log.txt",
        "data.html",
        "data.json",
        "template.jinja",
        "checkpoints",
    }
    for name in ("adapter", "adapter-last"):
        assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= {
            path.name for path in (folder / name).iterdir()
        }


def test_every_step_has_its_line_of_metrics(finished):
    lines = lines_of(finished[0])
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line.keys() == METRICS for line in steps)
    assert [line["step"] for line in lines if "eval_loss" in line][:3] == [0, 2, 4]
    assert all(line["eval_perplexity"] > 1 and line["eval_target_tokens"] > 0 for line in lines if "eval_loss" in line)


def test_the_summary_has_what_is_promised_and_its_sums_are_those_of_the_steps(finished):
    summary, steps = summary_of(finished[0]), [line for line in lines_of(finished[0]) if "loss" in line]
    assert summary.keys() >= SUMMARY
    assert (summary["status"], summary["steps"]) == ("complete", 6)
    assert summary["tokens"] == sum(line["tokens"] for line in steps)
    assert summary["target_tokens"] == sum(line["target_tokens"] for line in steps)
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["trainable_parameters"] == sum(
        tensor.numel() for tensor in load_file(finished[0] / "adapter" / "adapter_model.safetensors").values()
    )
    assert all(entry.keys() == {"group", "dtype", "device", "bytes", "why"} for entry in summary["memory_table"])
    shown = {"prompt", "question", "reference", "before", "before_matches", "after", "after_matches"}
    assert all(sample.keys() == shown for sample in summary["samples"])
    assert [sample["question"] for sample in summary["samples"]] == ["0!", "1!"]
    assert summary["versions"]["torch"] == torch.__version__


def test_the_summary_and_the_report_say_which_memory_options_change_results(finished, model_folder, tmp_path):
    assert summary_of(finished[0])["other_results"] == []
    recipe = write_recipe(tmp_path, model_folder, train={"max_steps": 1, "metrics_examples": 0})
    folder = qlora_lite.run_recipe(load_recipe(recipe, ["model.quant_head=true"]))
    (said,) = summary_of(folder)["other_results"]
    assert said.startswith("model.quant_head: the head is in 4 bit, which is another model")
    assert said in (folder / "report.html").read_text()


def test_steps_that_changed_nothing_are_told_in_the_summary_and_at_the_end(run, finished, monkeypatch):
    from qlora_lite.train.objective import LossSum

    plain, calls = Workload.loss, []

    def broken_once(workload, model, inputs):
        calls.append(torch.is_grad_enabled() and not inputs.input_ids.is_meta)  # else an evaluation, or a plan
        return LossSum(plain(workload, model, inputs).sum * (float("nan") if calls[-1] and sum(calls) == 2 else 1.0))

    monkeypatch.setattr(Workload, "loss", broken_once)
    folder = run(train={"max_steps": 3, "gradient_accumulation_steps": 1, "on_not_finite": "skip"})
    summary = summary_of(folder)
    assert summary["skipped_steps"] == 1 and "for 3 steps, of which 1 were skipped" in _result(folder, summary)
    summary = summary_of(finished[0])
    assert summary["skipped_steps"] == 0 and "skipped" not in _result(finished[0], summary)


@pytest.fixture
def plans_of(tmp_path, monkeypatch):
    """Train one step of a tiny model of a family; return the plans that were made, and the summary."""

    def call(model_type):
        made, plan_run = [], stages.plan_run
        monkeypatch.setattr(stages, "plan_run", lambda *given: made.append(plan_run(*given)) or made[-1])
        save_tiny(tmp_path / "model", model_type)
        train = {"max_steps": 1, "metrics_examples": 0, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
        recipe = write_recipe(tmp_path, tmp_path / "model", data={"max_tokens": 512}, train=train)
        summary = summary_of(qlora_lite.run_recipe(load_recipe(recipe)))
        return [plan for plan, _ in made], summary

    return call


@pytest.mark.parametrize("model_type", ["bloom", "nemotron", "lfm2"])
@pytest.mark.slow
def test_a_model_whose_sequences_cannot_be_packed_is_planned_so_before_it_is_loaded(model_type, plans_of, caplog):
    made, summary = plans_of(model_type)
    (plan,) = made
    job = plan.chosen.prediction.job
    assert runs_unpacked(
        job.workload.spec.planned_model(job.workload.method, torch.device("meta"), job.options, job.shape)
    )
    assert sum("each row is run by itself" in message for message in caplog.messages) == 1
    assert not any("the plan is one of packed sequences" in message for message in caplog.messages)
    assert summary["plan"]["predicted_peak_bytes"] <= plan.peak_bytes


def test_a_plan_of_packed_sequences_is_proved_where_only_the_loaded_model_shows_that_it_cannot_have_them(
    plans_of, simulations, monkeypatch, caplog
):
    for user in ("train.causal_lm", "train.text_guards", "runs.stages"):
        monkeypatch.setattr(f"qlora_lite.{user}.why_unpacked", lambda *_: "")
    simulations.clear()  # of steps of rows one by one
    made, summary = plans_of("bloom")
    simulations.clear()
    assert len(made) == 1 and summary["status"] == "complete"
    assert sum("is of packed sequences, but the loaded model shows" in message for message in caplog.messages) == 1


def test_the_best_adapter_is_kept_and_its_loss_is_the_one_reported(finished):
    folder, _ = finished
    losses = [line["eval_loss"] for line in lines_of(folder) if "eval_loss" in line]
    assert summary_of(folder)["eval_loss_after"] == pytest.approx(min(losses[1:]), rel=1e-5)


@pytest.mark.parametrize(
    ("report", "quant", "warned"),
    [({"quantized": None}, "nf4", True), ({}, "none", False), ({"quantized": "nf4"}, "nf4", False)],
)
def test_training_on_a_merged_model_in_4_bit_is_warned_of(model_folder, tmp_path, caplog, report, quant, warned):
    merged = shutil.copytree(model_folder, tmp_path / "merged")
    (merged / "merge_report.json").write_text(json.dumps(report))
    recipe = write_recipe(tmp_path, merged, train={"max_steps": 1})
    qlora_lite.run_recipe(load_recipe(recipe, [f"model.quant={quant}"]))
    assert any("on its base with lora.init_from" in message for message in caplog.messages) is warned


def test_a_run_that_gets_worse_goes_back_to_its_best_adapter(run, monkeypatch):
    from qlora_lite.train.step import Evaluation

    constant = {"lr_scheduler": "constant", "metrics_examples": 0}
    two_steps = load_file(run(train=constant | {"max_steps": 2}) / "adapter-last" / "adapter_model.safetensors")
    shutil.rmtree(run.folder)
    losses = iter([3.0, 1.0, 2.0, 2.5, 1.0])  # before, after steps 2 and 4, at the end, of the best again
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: Evaluation(next(losses), 2.0, 10))
    folder = run(train=constant | {"eval_every_steps": 2})
    best, last = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", "adapter-last"))
    assert all(torch.equal(best[name], two_steps[name]) for name in best)
    assert not all(torch.equal(best[name], last[name]) for name in best)
    summary = summary_of(folder)
    assert summary["adapter_step"] == 2 and f"{folder / 'adapter'} (step 2, the best by" in _result(folder, summary)
    worse = ": worse than the model before training"
    assert worse not in _result(folder, summary) and worse in _result(folder, summary | {"eval_loss_before": 0.5})


def test_the_digest_is_that_of_the_adapter_s_file(finished):
    import hashlib

    content = (finished[0] / "adapter" / "adapter_model.safetensors").read_bytes()
    assert summary_of(finished[0])["adapter_sha256"] == hashlib.sha256(content).hexdigest()


def test_the_written_recipe_is_whole_and_loads_as_the_same_recipe(finished):
    folder, recipe = finished
    assert load_recipe(folder / "recipe.yaml").recipe_hash == load_recipe(recipe).recipe_hash
    assert "warmup_ratio" in (folder / "recipe.yaml").read_text()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers
def test_peft_loads_the_adapter_with_its_tokenizer(finished, model_folder):
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), finished[0] / "adapter")
    assert (
        sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)
        == summary_of(finished[0])["trainable_parameters"]
    )
    assert AutoTokenizer.from_pretrained(finished[0] / "adapter").chat_template


def test_the_report_and_the_log_tell_of_the_run(finished):
    report, log = ((finished[0] / name).read_text() for name in ("report.html", "log.txt"))
    assert "<svg" in report and "http://" not in report.replace("http://www.w3.org", "")
    assert "memory: " in log and "data: 24 of 24 rows" in log and "done: 6 steps" in log


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(run):
    digests = []
    for seed in (0, 0, 1):
        digests.append(summary_of(run(train={"seed": seed}, lora={"dropout": 0.1}))["adapter_sha256"])
        shutil.rmtree(run.folder)
    assert digests[0] == digests[1] != digests[2]


def test_the_memory_options_of_a_recipe_are_pulled_and_change_no_bit_of_the_adapter(run):
    plain = summary_of(run(memory={"checkpointing": "none"}, train={"metrics_examples": 2}))
    shutil.rmtree(run.folder)
    options = {"embeddings": "host", "offload_checkpoints": True, "resident_layers": 0}
    pulled = summary_of(run(memory=options, train={"metrics_examples": 2}))
    assert pulled["adapter_sha256"] == plain["adapter_sha256"]
    assert pulled["exact_match_after"] == plain["exact_match_after"]
    groups = {entry["group"] for entry in pulled["memory_table"]}
    assert "offloaded" in groups and not {"embeddings", "quantisation constants"} & groups
    assert {f"memory.{name}": value for name, value in options.items()}.items() <= pulled["plan"]["chosen"].items()


def test_weights_that_are_read_from_the_disk_change_no_bit_of_the_adapter(run):
    plain = summary_of(run(train={"metrics_examples": 2}))
    shutil.rmtree(run.folder)
    pulled = summary_of(run(memory={"resident_layers": 0, "stream_from": "disk"}, train={"metrics_examples": 2}))
    assert pulled["adapter_sha256"] == plain["adapter_sha256"]
    assert pulled["exact_match_after"] == plain["exact_match_after"]
    groups = {entry["group"] for entry in pulled["memory_table"]}
    assert "offloaded" in groups, "the buffers that they pass through"
    assert pulled["plan"]["chosen"]["memory.stream_from"] == "disk"


def test_block_inputs_on_a_disk_change_no_bit_of_the_adapter_and_have_to_have_room(run, tmp_path, monkeypatch):
    plain = summary_of(run(memory={"checkpointing": "block"}))
    shutil.rmtree(run.folder)
    (tmp_path / "fast").mkdir()
    on_disk = {"offload_checkpoints": True, "offload_folder": str(tmp_path / "fast")}
    assert summary_of(run(memory=on_disk))["adapter_sha256"] == plain["adapter_sha256"]
    shutil.rmtree(run.folder)
    monkeypatch.setattr("qlora_lite.prepare.ranks.disk_usage", lambda folder: SimpleNamespace(free=1023))
    with pytest.raises(OutputError, match=r"memory.offload_folder: needs .* and has 1023 B free; make room"):
        run(memory=on_disk)


def test_evaluation_more_often_does_not_change_the_training(run):
    losses = []
    for every in (0, 1):
        folder = run(train={"eval_every_steps": every}, lora={"dropout": 0.1})
        losses.append([line["loss"] for line in lines_of(folder) if "loss" in line])
        shutil.rmtree(folder)
    assert losses[0] == losses[1]


def test_a_run_without_evaluation_rows_keeps_the_last_adapter(run):
    folder = run(data={"eval": None}, train={"metrics_examples": 0})
    summary = summary_of(folder)
    assert summary["status"] == "complete" and summary["samples"] == []
    last, best = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapter-last", "adapter"))
    assert all(torch.equal(last[name], best[name]) for name in last)


def test_a_run_on_one_file_of_rows_is_measured_on_those_that_it_did_not_learn(run):
    folder = run(data={"eval": None, "eval_share": 0.25}, train={"eval_every_steps": 3, "metrics_examples": 2})
    summary, recipe = summary_of(folder), open_run(folder).recipe
    assert summary["eval_loss_after"] < summary["eval_loss_before"] and summary["exact_match_rows"] == 2
    training, evaluation = (build_data(recipe, byte_tokenizer(), which) for which in ("train", "eval"))
    assert (summary["data"]["rows_kept"], len(evaluation.examples)) == (len(training.examples), 5) == (19, 5)
    result = evaluate_recipe(recipe, folder / "adapter", 2)
    assert result["eval_loss"] == pytest.approx(summary["eval_loss_after"], rel=1e-4) and result["rows"] == 5
    (model,) = compare_runs([folder], answers=0)["models"]
    assert model["eval_loss"] == pytest.approx(result["eval_loss"], rel=1e-4) and model["rows"] == 5


def test_a_run_whose_rows_have_changed_since_is_measured_with_a_warning(run, command, tmp_path):
    folder = run(data={"eval": None, "eval_share": 0.25}, train={"max_steps": 1})
    rows, words = tmp_path / "train.jsonl", "it may have learned some of the rows that data.eval_share holds out now"

    def warned(name, *options):
        out = ["--out", tmp_path / "merged"] if name == "merge" else []
        code, _, err = command(name, folder, *out, *options)
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)
        assert code == 0 and err.count("\n") >= err.count(words), err
        return err.count(words)

    uses = ("evaluate",), ("compare",), ("evaluate", "--side-by-side"), ("merge", "--rows", 2)
    assert [warned(*use) for use in uses] == [0] * 4
    before = rows.read_text()
    rows.write_text("".join(before.splitlines(keepends=True)[0].replace("0?", f"new {n}?") for n in range(5)) + before)
    assert [warned(*use) for use in uses] == [1] * 4
    assert not warned("evaluate", "--base") and not warned("evaluate", f"data.eval={rows}")
    summary = summary_of(folder)
    assert len(summary["data"].pop("held_out_sha256")) == 64
    (folder / "summary.json").write_text(json.dumps(summary))  # as an earlier version wrote it
    assert [warned(*use) for use in uses] == [0] * 4


def test_a_run_of_the_same_recipe_on_fewer_rows_may_have_learned_those_held_out_now(model_folder, command, tmp_path):
    path = write_recipe(tmp_path, model_folder, data={"eval": None, "eval_share": 0.25})
    rows = tmp_path / "train.jsonl"

    def run(name):
        rules = [f"output.dir={tmp_path / name}", "train.max_steps=1", "train.metrics_examples=0"]
        return qlora_lite.run_recipe(load_recipe(path, rules))

    def is_said(*folders):
        code, _, err = command("compare", *folders)
        assert code == 0, err
        return "may have seen those" in err

    before = run("before")
    assert not is_said(before, run("same"))
    first, *others = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([*(first.replace("0?", f"new {n}?") for n in range(5)), first, *others]))
    assert is_said(run("after"), before)


@pytest.mark.parametrize(
    ("method", "uses"),
    [
        ("lora", "(or generate, evaluate, merge, export, serve)"),
        ("prompt", "(or generate, evaluate, serve)"),
        ("prefix", "(or generate, evaluate, serve)"),
        ("bottleneck", "(or generate, evaluate, serve)"),
    ],
)
def test_train_names_the_commands_that_take_what_its_method_trains(finished, command, monkeypatch, method, uses):
    folder, recipe = finished
    monkeypatch.setattr("qlora_lite.runs.run.run_recipe", lambda *_: folder)
    code, out, err = command("train", recipe, f"adapter.method={method}", "lora.rank=16", "lora.alpha=32")
    assert code == 0 and out.endswith(f"qlora-lite chat {folder} {uses}\n"), err


def test_the_chat_template_of_a_run_is_its_own_from_then_on(run, tmp_path):
    from qlora_lite.inference.chat import open_session

    file = tmp_path / "shouting.jinja"
    file.write_text(NAMED_TEMPLATES["chatml"].replace("m.role", "m.role|upper").replace("assistant", "ASSISTANT"))
    folder = run(data={"template": str(file)}, train={"max_steps": 1, "metrics_examples": 0})
    source = file.read_text()
    file.unlink()
    assert (folder / "adapter" / "chat_template.jinja").read_text() == source
    session = open_session(folder)
    session.say("hello")
    assert render_prompt(session.template, session.turns).startswith("<|im_start|>USER\nhello")
    opened = open_run(folder)
    result = evaluate_recipe(opened.recipe, opened.adapter, 0)
    assert result["eval_loss"] == pytest.approx(summary_of(folder)["eval_loss_after"], rel=1e-4)


def test_the_summary_counts_the_rows_that_exact_match_compares(run, tmp_path):
    rows = [{"prompt": "x", "completion": "o" * 200}, {"prompt": "y", "completion": "z"}]
    (tmp_path / "cut.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"eval": str(tmp_path / "cut.jsonl"), "overflow": "truncate"}
    summary = summary_of(run(data=data, train={"max_steps": 1, "metrics_examples": 2}))
    assert summary["exact_match_rows"] == 1 and summary["exact_match_before"] in (0.0, 1.0)
    assert [sample["reference"] for sample in summary["samples"]] == ["z"]


def test_prompts_for_exact_matches_share_what_the_budget_leaves_beside_the_model(run, monkeypatch):
    at_once = []

    def answers(*arguments, batch_size, **_):
        at_once.append(batch_size)
        return [Answer("", "stop", (1,))] * len(arguments[2])

    monkeypatch.setattr("qlora_lite.inference.evaluate.answers", answers)
    run(train={"max_steps": 1, "metrics_examples": 2})
    assert at_once == [32, 32]
    held, recipe = held_bytes(CPU), open_run(run.folder).recipe
    pairs = [("x" * 60, "y"), ("z", "a" * 50)]  # a long prompt and a long answer run together
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    Path(recipe.data.eval[0].path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows, model = build_data(recipe, byte_tokenizer(), "eval").examples, build_model(recipe)
    ends = [len(row.token_ids) - len(byte_tokenizer()(row.prompt, add_special_tokens=False).input_ids) for row in rows]
    tokens = max(len(byte_tokenizer()(row.prompt, add_special_tokens=False).input_ids) for row in rows) + max(ends)
    needed = [int(UNPLANNED * prompt_bytes(build_skeleton(recipe), tokens + SPARE_TOKENS, n, "cpu")) for n in (8, 16)]
    monkeypatch.setattr("qlora_lite.inference.evaluate.held_bytes", lambda _: held)
    for budget, prompts in ((held + needed[1] + 1, 16), (held + needed[1] - 1, 8), (held + needed[0] + 1, 8), (0, 1)):
        measure(model, byte_tokenizer(), rows, (), at_once=partial(answered_at_once, recipe, model, budget))
        assert at_once.pop() == prompts


def test_prompts_and_answers_that_a_model_has_no_positions_for_are_told_before_training(tmp_path):
    save_tiny(tmp_path / "model", "gpt2", n_positions=128)

    def train(*pairs):
        recipe = write_recipe(tmp_path, tmp_path / "model", output={"dir": str(tmp_path / str(len(pairs[0][0])))})
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
        (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return qlora_lite.run_recipe(load_recipe(recipe))

    assert summary_of(train(("q" * 60, "a"), ("q", "a" * 45)))["exact_match_rows"] == 2
    with pytest.raises(ModelError, match=r"metrics_examples .* 128 position embeddings; set it to 0"):
        train(("q" * 70, "a"), ("q", "a" * 70))


@pytest.mark.parametrize(
    ("fault", "raised", "said"),
    [
        (
            DoesNotFitError("memory ran out over a prompt of 9 tokens: shorten it"),
            DoesNotFitError,
            r"train\.metrics_examples: memory ran out over .* 9 tokens; set it to 0",
        ),
        (ModelError("token 3 cannot be chosen"), ModelError, "token 3 cannot be chosen"),
    ],
)
@pytest.mark.parametrize("call", [1, 2])
def test_prompts_that_cannot_be_answered_end_the_run_before_training_and_not_after_it(
    run, monkeypatch, caplog, call, fault, raised, said
):
    calls = []

    def answers(_model, _tokenizer, prompts, *_, **_options):
        calls.append(1)
        if len(calls) == call:
            raise fault
        return [Answer("x", "stop", (1,))] * len(prompts)

    monkeypatch.setattr("qlora_lite.inference.evaluate.answers", answers)
    if call == 1:
        with pytest.raises(raised, match=said):
            run(train={"max_steps": 2, "metrics_examples": 2})
        return
    folder = run(train={"max_steps": 2, "metrics_examples": 2})
    summary = summary_of(folder)
    assert summary["status"] == "complete" and "exact_match_after" not in summary and summary["samples"] == []
    assert any(f"train.metrics after training are not measured: {fault}" in message for message in caplog.messages)
    assert "exact match" not in _result(folder, summary) and (folder / "report.html").exists()


@pytest.mark.parametrize("slow_seconds", [0.0, 1e9])
def test_a_run_tells_how_far_evaluations_exact_matches_and_slow_steps_are(
    model_folder, tmp_path, monkeypatch, slow_seconds
):
    monkeypatch.setattr("qlora_lite.runs.training.SLOW_SECONDS", slow_seconds)
    train = {"max_steps": 1, "gradient_accumulation_steps": 3, "micro_batch_size": 1}
    told, recipe = [], load_recipe(write_recipe(tmp_path, model_folder, train=train))
    qlora_lite.run_recipe(recipe, watch=lambda *step: told.append(step))
    once = [("evaluation", done, 6) for done in (0, 4, 6)] + [("answers", done, 2) for done in (0, 2)]
    step = [("micro-batches of step 1", done, 3) for done in (1, 2)]
    assert told == [*once, *(step if slow_seconds == 0 else []), *once]


def test_plain_text_rows_have_no_answers_to_match_and_say_so(run, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "one two three"}) + "\n")
    with pytest.raises(DataError, match=r"text.jsonl:1: has no answer to match; set train\.metrics_examples"):
        run(data={"eval": str(tmp_path / "text.jsonl")}, train={"metrics_examples": 1})
    assert not run.folder.exists()


def test_the_log_says_what_of_the_sources_is_not_used(run, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "one two three", "label": 1}) + "\n")
    folder = run(data={"train": str(tmp_path / "rows.jsonl")}, train={"max_steps": 1, "metrics_examples": 0})
    assert f"data: {tmp_path / 'rows.jsonl'}: columns not used: label" in (folder / "log.txt").read_text()


def test_the_log_says_once_what_is_not_used_of_rows_that_are_held_out_too_and_how_many_those_are(run, tmp_path):
    rows = "".join(json.dumps({"text": f"one two {n}", "label": n}) + "\n" for n in range(4))
    (tmp_path / "rows.jsonl").write_text(rows)
    data = {"train": str(tmp_path / "rows.jsonl"), "eval_share": 0.5, "eval": None}
    said = (run(data=data, train={"max_steps": 1, "metrics_examples": 0}) / "log.txt").read_text()
    assert said.count("columns not used: label") == 1
    assert ", left out: 2 held out for evaluation (data.eval_share)" in said


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(run):
    run.folder.mkdir()
    (run.folder / "precious").write_text("x")
    with pytest.raises(OutputError, match=r"is not empty; choose another output\.dir"):
        run()
    assert [path.name for path in run.folder.iterdir()] == ["precious"]


def test_a_disk_that_fails_for_a_moment_before_the_first_step_ends_no_run(run, monkeypatch, caplog):
    from qlora_lite.artifacts import run_folder as runs

    write, calls = runs.write_text, []

    def failing(path, text):
        calls.append(path.name)
        if path.name == "summary.json" and calls.count("summary.json") in (2, 3, 4):
            raise OutputError(f"cannot write {path}: Stale file handle")
        return write(path, text)

    def failing_page(_report, path, _name):
        raise OutputError(f"cannot write {path}: Stale file handle")

    monkeypatch.setattr(runs, "write_text", failing)
    monkeypatch.setattr("qlora_lite.runs.stages.write_data_page", failing_page)
    folder = run(train={"max_steps": 1})
    assert {"status", "data", "plan", "eval_loss_before", "device"} <= summary_of(folder).keys()
    assert summary_of(folder)["status"] == "complete" and not (folder / "data.html").exists()
    said = "summary.json: Stale file handle. The run continues, and its summary waits until it can be written"
    assert sum(said in message for message in caplog.messages) == 3
    assert "data.html: Stale file handle. The run continues without it" in caplog.text


@pytest.mark.parametrize("was_there", [False, True])
def test_a_start_that_failed_leaves_a_named_folder_as_it_was(run, was_there):
    if was_there:
        run.folder.mkdir()
    with pytest.raises(ModelError):
        run(lora={"targets": ["no"]})
    assert run.folder.exists() == was_there
    assert not was_there or not list(run.folder.iterdir())


def test_a_start_that_failed_is_no_obstacle_to_the_next_but_a_run_with_steps_is(run):
    with pytest.raises(DoesNotFitError):
        run(memory={"budget": "1MiB"})
    run(train={"max_steps": 1})
    assert summary_of(run.folder)["status"] == "complete"
    (run.folder / "summary.json").write_text(json.dumps(summary_of(run.folder) | {"status": "running"}))
    with pytest.raises(OutputError, match=r"of step 1\. To resume: qlora-lite train \S+ --resume \S+ Or choose"):
        run(train={"max_steps": 1})
    shutil.rmtree(run.folder / "checkpoints")
    for status in ("complete", "failed"):
        (run.folder / "summary.json").write_text(json.dumps(summary_of(run.folder) | {"status": status}))
        with pytest.raises(OutputError, match=r"is not empty; choose another output\.dir"):
            run(train={"max_steps": 1})
    assert len(lines_of(run.folder)) >= 1


def test_a_start_that_failed_leaves_no_folder_that_no_recipe_names_but_a_run_that_trained_does(
    run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    nowhere = {"dir": None, "name": "night"}
    for failing, error in (
        ({"memory": {"budget": "1MiB"}}, DoesNotFitError),
        ({"lora": {"targets": ["no"]}}, ModelError),
    ):
        with pytest.raises(error):
            run(**failing, output=nowhere)
        assert not list((tmp_path / "runs").iterdir())

    def fail(*_arguments):
        raise TrainingError("on the way")

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="on the way"):
        patch.setattr(Trainer, "evaluate", fail)
        run(output=nowhere)
    assert not list((tmp_path / "runs").iterdir())

    monkeypatch.setattr(Trainer, "_train", fail)
    with pytest.raises(TrainingError, match="on the way"):
        run(output=nowhere)
    [left] = (tmp_path / "runs").iterdir()
    assert summary_of(left)["status"] == "failed"


@pytest.mark.parametrize("steps", [0, 3])
def test_a_start_that_failed_leaves_a_folder_that_was_gone_on_with_as_it_was(
    model_folder, tmp_path, monkeypatch, steps
):
    monkeypatch.chdir(tmp_path)
    written = write_recipe(tmp_path, model_folder, train={"save_every_steps": 3}, output={"dir": None, "name": "night"})
    folder = qlora_lite.run_recipe(load_recipe(written))
    (folder / "notes.md").write_text("mine")
    if not steps:
        shutil.rmtree(folder / "checkpoints")
    summary = summary_of(folder) | {"status": "interrupted"}
    (folder / "summary.json").write_text(json.dumps(summary))
    failing = load_recipe(written, ["memory.budget=1MiB"])
    for resume in ("", folder):
        with pytest.raises((DoesNotFitError, CheckpointError)):
            qlora_lite.run_recipe(failing, resume=resume, force=True)
        assert (folder / "notes.md").read_text() == "mine"


def test_a_folder_under_a_file_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file/out: Not a directory"):
        run(output={"dir": str(tmp_path / "file" / "out")})


def test_a_budget_that_is_too_small_stops_before_the_first_step(run):
    with pytest.raises(DoesNotFitError, match=r"does not fit: .* of 1\.0 MiB .*: give it more memory") as caught:
        run(memory={"budget": "1MiB"})
    assert caught.value.exit_code == 3
    assert not run.folder.exists()


def test_a_run_that_fails_on_the_way_says_failed_and_has_no_best_adapter(run, monkeypatch):

    train = Trainer._train

    def spoil(trainer, batches):
        if trainer.step == 2:
            trainer.model.get_input_embeddings().weight[:] = float("nan")
        return train(trainer, batches)

    monkeypatch.setattr(Trainer, "_train", spoil)
    with pytest.raises(TrainingError, match=r"step 3: the output of model\.embed_tokens is not finite \(rows .*train"):
        run()
    assert summary_of(run.folder)["status"] == "failed"
    assert [line["step"] for line in lines_of(run.folder) if "loss" in line] == [1, 2]
    assert not (run.folder / "adapter").exists()
    with pytest.raises(RecipeError, match="has no adapter; the run ended before one was saved"):
        open_run(run.folder)


def test_an_error_that_nobody_foresaw_is_a_run_that_failed(run, monkeypatch):
    def fail(*_):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr("qlora_lite.train.loop.Trainer._train", fail)
    with pytest.raises(RuntimeError):
        run()
    summary = summary_of(run.folder)
    assert (summary["status"], summary["error"]) == ("failed", "RuntimeError('an illegal memory access')")
    assert (run.folder / "report.html").exists()


def test_what_loading_takes_for_a_moment_is_not_the_micro_batch_s(run, monkeypatch):
    def build(*args, **options):
        torch.ones(2**28)  # 1 GiB
        return build_model(*args, **options)

    monkeypatch.setattr("qlora_lite.runs.stages.build_model", build)
    run()
    summary = summary_of(run.folder)
    assert summary["peak_bytes"] - summary["plan"]["measured_peak_bytes"] > 2**29


def test_memory_that_runs_out_in_loading_is_not_blamed_on_the_rows(run, monkeypatch):
    def run_out(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("qlora_lite.runs.stages.build_model", run_out)
    with pytest.raises(
        DoesNotFitError,
        match=r"^memory ran out while the model was loaded \(CUDA out of memory\); close other programs.*smaller model",
    ):
        run()


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """A model whose blocks keep far more than their inputs."""
    folder = tmp_path_factory.mktemp("wide")
    save_tiny(folder, intermediate_size=8192, num_hidden_layers=4)
    return folder


@pytest.fixture
def wide_run(wide_folder, tmp_path, monkeypatch):
    """Train the wide model with a memory probe that takes what ``more`` says.

    ``wide_run.budget`` is for the process as it is, and as much as any plan of this model needs.
    """
    probe_memory, train = Trainer.probe_memory, {"max_steps": 2, "micro_batch_size": 4, "metrics_examples": 0}
    free_cached_memory(CPU)

    def call(more=lambda *_: None, **memory):
        def rehearse_with_more(trainer, *rows):
            beside = more(trainer.settings.options, call.budget)
            probe_memory(trainer, *rows)
            del beside

        monkeypatch.setattr(Trainer, "probe_memory", rehearse_with_more)
        memory = {"budget": f"{call.budget}B"} | memory
        file = write_recipe(tmp_path, wide_folder, train=train, memory=memory)
        return summary_of(qlora_lite.run_recipe(load_recipe(file)))

    call.folder, call.budget = tmp_path / "out", held_bytes(CPU) + 1100 * 2**20
    return call


def run_out(_options, _budget):
    raise MemoryError


def take_all(options, budget):
    """Take so much that step and later kernels (85 MiB) exceed the budget, in pieces that a C library keeps."""
    pieces = (budget - held_bytes(CPU)) // 2**20
    return [torch.ones(2**18) for _ in range(pieces - 235 if options.checkpointing == "none" else pieces + 50)]


WORDS = {run_out: "memory ran out over the largest micro-batch", take_all: "over the budget of"}


@pytest.mark.slow
def test_what_needs_more_than_was_planned_is_planned_again_and_proved(wide_run):
    planned = wide_run(checkpointing="auto")
    assert planned["plan"]["chosen"]["memory.checkpointing"] == "none"
    for more, words in WORDS.items():
        shutil.rmtree(wide_run.folder)
        again = wide_run(
            lambda options, budget, more=more: more(options, budget) if options.checkpointing == "none" else None,
            checkpointing="auto",
        )
        assert again["plan"]["chosen"]["memory.checkpointing"] == "block"
        assert again["plan"]["measured_peak_bytes"] <= again["plan"]["budget_bytes"] == wide_run.budget
        assert again["adapter_sha256"] == planned["adapter_sha256"] and again["peak_bytes"] <= wide_run.budget
        said = [line for line in (wide_run.folder / "log.txt").read_text().splitlines() if "planning again" in line]
        assert said and all(words in line for line in said)


@pytest.mark.parametrize(
    ("more", "memory"),
    [
        pytest.param(take_all, {"checkpointing": "auto"}, marks=pytest.mark.slow),
        (run_out, {"checkpointing": "block", "uncheckpointed_layers": 0}),
    ],
)
def test_a_run_that_no_memory_probe_proves_ends_before_its_first_step(wide_run, more, memory):
    tried = []

    def always(options, budget):
        tried.append(options)
        return more(options, budget)

    with pytest.raises(DoesNotFitError, match=f"{WORDS[more]}.*; lower data.max_tokens or"):
        wide_run(always, **memory)
    assert len(tried) == len(set(tried)) >= 1  # no plan twice; by what the process holds, none but the first may fit
    assert len(tried) == 1 or "uncheckpointed_layers" not in memory
    assert not wide_run.folder.exists()


def test_a_memory_probe_that_leaves_no_room_for_a_checkpoint_s_copy_proves_nothing(run, monkeypatch):
    monkeypatch.setattr(Prediction, "later_bytes", 2**40)
    with pytest.raises(DoesNotFitError, match=r"peaks at .* a checkpoint's copy and later kernels take .*, over"):
        run(train={"max_steps": 1})


def test_memory_of_the_host_that_runs_out_is_a_reason_to_plan_again_on_a_cpu_and_not_beside_a_gpu(wide_run):
    tried, error = [], RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes.")

    def run_out_of_host_memory(options, _budget):
        tried.append(options.checkpointing)
        if tried == ["none"]:
            raise error

    wide_run(run_out_of_host_memory, checkpointing="auto")
    assert tried == ["none", "block"]
    of_device = torch.OutOfMemoryError("CUDA out of memory.")
    assert all(another_plan_may_help(each, CPU) for each in (error, MemoryError(), of_device))
    assert [another_plan_may_help(each, torch.device("cuda")) for each in (error, MemoryError(), of_device)] == [
        False,
        False,
        True,
    ]


def test_a_target_that_matches_nothing_fails_with_its_name(run):
    with pytest.raises(ModelError, match="'q_porj' matches no linear layer"):
        run(lora={"targets": ["q_porj"]})
    assert not run.folder.exists()  # nothing was begun


@pytest.mark.parametrize("damage", ["recipe.yaml", "summary.json"])
def test_a_folder_that_is_no_run_is_refused(finished, tmp_path, damage):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    (folder / damage).unlink()
    with pytest.raises(RecipeError, match=damage):
        open_run(folder)


@pytest.mark.parametrize("inside", ["adapter", "adapter-last", "checkpoints/step-00000003"])
def test_a_folder_inside_a_run_is_refused_with_the_run_s_name(finished, inside):
    with pytest.raises(RecipeError, match=rf"has no recipe\.yaml; name the run, {finished[0]}$"):
        open_run(finished[0] / inside)


PROMPT = {"lora": None, "adapter": {"method": "prompt"}, "prompt": {"virtual_tokens": 20}}


@pytest.mark.parametrize(("packing", "sections"), [(True, {}), (False, {}), (True, PROMPT)])
def test_a_streamed_run_trains_the_adapter_that_rows_in_memory_train(run, packing, sections):
    data = {"order": "as-is", "packing": packing}
    train = {"max_steps": 7, "micro_batch_size": 2, "gradient_accumulation_steps": 2}
    adapters = []
    for streaming in (False, True):
        folder = run(data=data | {"streaming": streaming}, train=train, **sections)
        adapters.append((summary_of(folder)["adapter_sha256"], [line.get("loss") for line in lines_of(folder)]))
        shutil.rmtree(folder)
    assert adapters[0] == adapters[1]
