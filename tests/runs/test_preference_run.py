"""A run on preferences knows its reference, resumes to the bit and leaves an adapter like any other."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_files import byte_tokenizer, save_tiny, write_recipe
from tiny_runs import lines, replace_adapter, stop_at, summary_of

from qlora_lite.artifacts.trained_run import open_trained
from qlora_lite.cli.main import cli
from qlora_lite.data.tokens.storage import sequences_of
from qlora_lite.errors import CheckpointError, DataError, Interrupted, RecipeError
from qlora_lite.files import cache_root, read_sealed, write_sealed
from qlora_lite.inference.evaluate import evaluate_recipe
from qlora_lite.prepare.datasets import build_data, held_out_digest, read_data
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs import references
from qlora_lite.runs.run import run_recipe

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TRAIN = {"objective": "dpo", "max_steps": 4, "save_every_steps": 2, "learning_rate": 0.003, "metrics_examples": 0}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preference") / "model"
    save_tiny(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))


def write_pairs(path, mark, labels=False):
    """Write rows whose chosen answer is the digit's name, and the rejected one a longer text."""
    rows = [
        {"prompt": f"{n}{mark}", "chosen": name, "rejected": f"I think that it is {name}"}
        for n, name in enumerate(NAMES)
    ]
    if labels:
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in ("chosen", "rejected")
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def recipe(folder, model, objective="dpo", **sections):
    folder.mkdir(exist_ok=True)
    labels = objective == "kto"
    train, evaluation = (write_pairs(folder / f"{mark}.jsonl", mark, labels) for mark in "?!")
    data = {"train": train, "eval": evaluation, "max_tokens": 192} | sections.pop("data", {})
    train = TRAIN | {"objective": objective} | sections.pop("train", {})
    lora = sections.pop("lora", {"rank": 8, "alpha": 16})
    return load_recipe(write_recipe(folder, model, data=data, train=train, lora=lora, **sections))


def adapter_bytes(folder):
    return (folder / "out" / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_a_stopped_run_resumes_to_the_bit_with_or_without_the_cache(objective, model_folder, tmp_path):
    run_recipe(recipe(tmp_path / "whole", model_folder, objective))
    for name in ("cached", "computed again"):
        with pytest.raises(Interrupted):
            run_recipe(recipe(tmp_path / name, model_folder, objective), stop_at(3))
        if name != "cached":
            for path in cache_root().glob("references/*"):
                path.unlink()
        run_recipe(recipe(tmp_path / name, model_folder, objective), resume="")
        assert adapter_bytes(tmp_path / name) == adapter_bytes(tmp_path / "whole")
        assert lines(tmp_path / name) == lines(tmp_path / "whole")


def test_the_first_loss_is_that_of_no_preference_and_the_summary_tells_what_was_learned(model_folder, tmp_path):
    run_recipe(recipe(tmp_path / "run", model_folder, train={"max_steps": 8, "metrics_examples": 2}))
    first = next(line for line in lines(tmp_path / "run") if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    summary = summary_of(tmp_path / "run" / "out")
    before, after = summary["eval_metrics"]["before"], summary["eval_metrics"]["after"]
    assert summary["eval_loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert after["rewards/margins"] > 0.1 and after["rewards/accuracies"] > 0.9
    assert after["tokens/chosen"] < after["tokens/rejected"]
    assert "eval_perplexity" not in lines(tmp_path / "run")[0]
    report = (tmp_path / "run" / "out" / "report.html").read_text()
    assert "rewards/accuracies" in report


def test_what_the_reference_gives_is_computed_once_and_what_is_there_is_gone_on_with(
    model_folder, tmp_path, caplog, monkeypatch
):
    caplog.set_level("INFO", "qlora_lite")
    computed, all_examples = [], {"max_steps": 5}
    whole = references.Trainer.reference_log_probabilities

    def counted(self, examples):
        computed.append(len(examples))
        return whole(self, examples)

    monkeypatch.setattr(references.Trainer, "reference_log_probabilities", counted)
    monkeypatch.setattr(references, "EXAMPLES_AT_ONCE", 4)
    run_recipe(recipe(tmp_path / "first", model_folder, train=all_examples))
    assert computed == [4, 4, 2, 4, 4, 2]
    run_recipe(recipe(tmp_path / "second", model_folder, train=all_examples))
    assert len(computed) == 6 and sum("from the cache" in message for message in caplog.messages) == 2
    assert adapter_bytes(tmp_path / "first") == adapter_bytes(tmp_path / "second")
    for path in cache_root().glob("references/*"):  # as a run that was killed meanwhile leaves them
        write_sealed(path, json.dumps(json.loads(read_sealed(path))[:4]))
    run_recipe(recipe(tmp_path / "third", model_folder, train=all_examples))
    assert computed[6:] == [4, 2, 4, 2]
    assert adapter_bytes(tmp_path / "first") == adapter_bytes(tmp_path / "third")
    for path in cache_root().glob("references/*"):
        path.write_text(path.read_text().replace("[[-", "[[", 1))  # a number that is as good as any
    run_recipe(recipe(tmp_path / "fourth", model_folder, train=all_examples))
    assert adapter_bytes(tmp_path / "first") == adapter_bytes(tmp_path / "fourth")


def test_only_examples_of_the_steps_to_come_are_computed_and_more_steps_compute_the_others(
    model_folder, tmp_path, monkeypatch
):
    computed = []
    whole = references.Trainer.reference_log_probabilities

    def counted(self, examples):
        computed.append([example.where for example in examples if "?" in example.where])
        return whole(self, examples)

    monkeypatch.setattr(references.Trainer, "reference_log_probabilities", counted)
    train = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "lr_scheduler": "constant", "warmup_ratio": 0}
    sections = {"data": {"packing": False}, "train": train}

    def of_steps(name, count):
        return recipe(tmp_path / name, model_folder, **sections | {"train": train | {"max_steps": count}})

    run_recipe(of_steps("short", 3))
    assert [len(each) for each in computed] == [3, 0]
    run_recipe(of_steps("short", 5), resume=tmp_path / "short" / "out", force=True)
    assert [len(each) for each in computed[2:]] == [2]
    assert not {*computed[0]} & {*computed[2]}
    for path in cache_root().glob("references/*"):
        path.unlink()
    run_recipe(of_steps("alone", 5))
    assert [len(each) for each in computed[3:]] == [5, 0]
    assert adapter_bytes(tmp_path / "short") == adapter_bytes(tmp_path / "alone")


def rotate_otherwise(folder):
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 50.0
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change", ["model configuration", "merge_aware", "versions", "kernels"])
def test_another_forward_pass_has_a_reference_of_its_own(change, model_folder, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "qlora_lite")
    shutil.copytree(model_folder, tmp_path / "model")
    train = {"max_steps": 1}
    run_recipe(recipe(tmp_path / "before", tmp_path / "model", train=train))
    train |= {"merge_aware": "q4_0"} if change == "merge_aware" else {}
    if change == "model configuration":
        rotate_otherwise(tmp_path / "model")
    elif change == "versions":
        monkeypatch.setattr(references, "package_versions", lambda: {"torch": "0.1"})
    elif change == "kernels":
        monkeypatch.setattr(references, "kernels_of", lambda model: frozenset({"norms"}))
    run_recipe(recipe(tmp_path / "after", tmp_path / "model", train=train))
    assert not any("from the cache" in message for message in caplog.messages)
    first = next(line for line in lines(tmp_path / "after") if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_model_that_is_elsewhere_has_the_same_reference(model_folder, tmp_path, caplog):
    caplog.set_level("INFO", "qlora_lite")
    for name in ("one", "other"):
        shutil.copytree(model_folder, tmp_path / name / "model")
        run_recipe(recipe(tmp_path / name, tmp_path / name / "model", train={"max_steps": 1}))
    assert sum("from the cache" in message for message in caplog.messages) == 2


def test_an_adapter_to_begin_with_is_the_reference_also_when_the_run_resumes(model_folder, tmp_path):
    begun = recipe(tmp_path / "sft", model_folder, "orpo")
    run_recipe(begun)
    lora = {"init_from": str(tmp_path / "sft" / "out")}
    folder = tmp_path / "dpo"

    def again():
        made = recipe(folder, model_folder)
        return made.model_copy(update={"lora": made.lora.model_copy(update=lora)})

    with pytest.raises(Interrupted):
        run_recipe(again(), stop_at(2))
    first = next(line for line in lines(folder) if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for path in cache_root().glob("references/*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"lora\.init_from: "):
        run_recipe(recipe(folder, model_folder), resume="")
    tensors = load_file(tmp_path / "sft" / "out" / "adapter" / "adapter_model.safetensors")
    replace_adapter(tmp_path / "sft" / "out", {name: tensor * 1.5 for name, tensor in tensors.items()})
    copied = shutil.copytree(folder / "out", folder / "copied")
    with pytest.raises(CheckpointError, match=r"lora\.init_from is not the adapter that the run began with"):
        run_recipe(again(), resume="")
    run_recipe(again(), resume=copied, force=True)
    (forced,) = summary_of(copied)["resumed"][0]["forced_changes"]
    assert "other values of the reference model" in forced
    replace_adapter(tmp_path / "sft" / "out", tensors)
    run_recipe(again(), resume="")
    margins = [line["eval_rewards/margins"] for line in lines(folder) if "eval_rewards/margins" in line]
    assert margins[0] == pytest.approx(0, abs=1e-6) and margins[-1] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"overflow": "split"}}, "data.overflow = split: not possible with train.objective dpo"),
        ({"data": {"train_on": "all"}}, "data.train_on = all: not possible with train.objective dpo"),
        ({"objective": {"gamma": 2.0}}, "objective.gamma: only with train.objective simpo"),
        ({"objective": {"desirable_weight": 2.0}}, "objective.desirable_weight: only with train.objective kto"),
        ({"train": {"objective": "sft"}, "objective": {"beta": 0.2}}, "objective.beta: only with train.objective cpo"),
    ],
)
def test_settings_of_another_objective_are_refused(changes, said, model_folder, tmp_path):
    sections = {"train": TRAIN} | changes
    sections["train"] = TRAIN | sections["train"]
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path, model_folder, **sections))
    assert said in str(caught.value)


def test_rows_of_answers_alone_are_refused_with_the_way_to_name_columns(model_folder, tmp_path):
    with pytest.raises(DataError) as caught:
        run_recipe(load_recipe(write_recipe(tmp_path, model_folder, train=TRAIN)))
    assert "name no chosen and rejected answer" in str(caught.value)


def test_the_commands_after_training_take_such_a_run(model_folder, tmp_path):
    run_recipe(recipe(tmp_path / "run", model_folder))
    out, own_recipe = str(tmp_path / "run" / "out"), str(tmp_path / "run" / "recipe.yaml")
    ask, on_gpu = ["generate", out, "--prompt", "3?"], ["plan", own_recipe, "--gpu", "rtx-3060", "memory.budget=8GiB"]
    for command in (
        ["evaluate", out],
        ask,
        ["data", own_recipe],
        on_gpu,
        ["compare", out],
        ["profile", own_recipe, "--out", str(tmp_path / "profile")],
    ):
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 0, (command, result.output)
    assert "mean tokens: chosen" in CliRunner().invoke(cli, ["data", own_recipe]).output


@pytest.mark.parametrize("objective", ["dpo", "kto", "simpo"])
@pytest.mark.slow
def test_a_finished_run_is_judged_again_as_training_judged_it(objective, model_folder, tmp_path):
    run_recipe(recipe(tmp_path / "first", model_folder, objective))
    begun = {"lora": {"rank": 8, "alpha": 16, "init_from": str(tmp_path / "first" / "out")}}
    run_recipe(recipe(tmp_path / "second", model_folder, objective, **begun))
    for name in ("first", "second"):
        trained, summary = open_trained(tmp_path / name / "out"), summary_of(tmp_path / name / "out")
        found = evaluate_recipe(trained.recipe, trained.adapter, 0)["eval_metrics"]
        assert found.pop("loss") == pytest.approx(summary["eval_loss_after"], rel=1e-3)
        assert found == pytest.approx(summary["eval_metrics"]["after"], rel=1e-3, abs=1e-4)
        assert len({summary["eval_loss_before"], summary["eval_loss_after"]}) == 2
    shown = CliRunner().invoke(cli, ["evaluate", str(tmp_path / "second" / "out")], catch_exceptions=False).output
    assert "preference loss" in shown and "rewards/accuracies" in shown
    (tmp_path / "first").rename(tmp_path / "elsewhere")  # what a reference was begun with
    trained = open_trained(tmp_path / "second" / "out")
    found = evaluate_recipe(trained.recipe, trained.adapter, 0)
    assert found["eval_loss"] > 0 and ("eval_metrics" in found) == (objective == "simpo")


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_what_is_measured_later_are_answers_to_imitate_of_the_rows_held_out(objective, model_folder, tmp_path):
    made = recipe(tmp_path / "run", model_folder, objective)
    made = made.model_copy(update={"data": made.data.model_copy(update={"eval": None, "eval_share": 0.3})})
    tokenizer = byte_tokenizer("chatml")
    held_out = read_data(made, tokenizer)["eval"].examples
    measured = build_data(made, tokenizer, "eval").examples
    assert held_out_digest(read_data(made, tokenizer)["eval"]) == held_out_digest(build_data(made, tokenizer, "eval"))
    expected = [sequences_of(row)[0] for row in held_out if row.desirable]
    assert [row.where for row in measured] == [row.where for row in expected]
    assert [row.answer for row in measured] == [row.answer for row in expected]
    assert {row.answer for row in measured} <= {*NAMES}
    assert all(
        row.first == 0 and row.token_ids.tolist() == other.token_ids.tolist()
        for row, other in zip(measured, expected, strict=True)
    )


def test_metrics_of_likelihood_and_answers_are_of_good_answers(model_folder, tmp_path):
    metrics = {"metrics": ["exact_match", "answer_loss"], "metrics_examples": 20, "max_steps": 1}
    run_recipe(recipe(tmp_path / "run", model_folder, "kto", train=metrics))
    scores = summary_of(tmp_path / "run" / "out")["metrics"]["after"]
    assert scores["answer_loss"]["examples"] == scores["exact_match"]["examples"] == 10
    samples = summary_of(tmp_path / "run" / "out")["samples"]
    assert [(each["question"], each["reference"]) for each in samples] == [
        (f"{n}!", name) for n, name in enumerate(NAMES[: len(samples)])
    ], "answers stand beside the rows that were answered"


def test_runs_of_other_objectives_are_compared_in_either_order(model_folder, tmp_path):
    run_recipe(recipe(tmp_path / "dpo", model_folder))
    plain = write_recipe(
        tmp_path / "dpo",
        model_folder,
        lora={"rank": 8, "alpha": 16},
        train={"max_steps": 1},
        output={"dir": str(tmp_path / "dpo" / "sft")},
    )
    run_recipe(load_recipe(plain))
    runs = [str(tmp_path / "dpo" / name) for name in ("out", "sft")]
    for order in (runs, runs[::-1]):
        result = CliRunner().invoke(cli, ["compare", *order])
        assert result.exit_code == 0, result.output


def test_a_prompt_that_is_learned_has_a_reference_too(model_folder, tmp_path):
    made = recipe(tmp_path / "run", model_folder, train={"learning_rate": 0.01})
    changed = made.model_copy(
        update={"adapter": made.adapter.model_copy(update={"method": "prompt"}), "lora": type(made.lora)()}
    )
    torch.manual_seed(0)
    run_recipe(changed)
    first = next(line for line in lines(Path(tmp_path / "run")) if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
