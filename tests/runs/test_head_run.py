"""Runs of heads as a user has them: trained, resumed, used by commands and by peft, and refused where they make no
sense."""

import json
import re
import shutil

import click
import peft
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_heads import head_recipe, labelled_rows, save_headless, write_jsonl
from tiny_runs import make_run, stop_at, summary_of
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from qlora_lite.artifacts.trained_run import open_model, open_trained
from qlora_lite.cli.main import cli
from qlora_lite.errors import CheckpointError, DataError, Interrupted, ModelError, OutputError, RecipeError
from qlora_lite.export.merge import MergeSettings, merge_run
from qlora_lite.ext.heads.predict import read_texts
from qlora_lite.inference.chat import open_session
from qlora_lite.inference.damage import measure_damage
from qlora_lite.inference.evaluate import evaluate_recipe
from qlora_lite.inference.label import label_rows
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.prepare.preflight import preflight
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs.profile import profile_recipe
from qlora_lite.runs.run import run_recipe

LEARNS = {"max_steps": 40, "learning_rate": 0.003, "lr_scheduler": "constant", "micro_batch_size": 2}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_headless(tmp_path_factory.mktemp("headless") / "bert", "bert")


@pytest.fixture(scope="module")
def run(bert, tmp_path_factory):
    """A finished run on NF4 weights, and its recipe."""
    folder = tmp_path_factory.mktemp("head")
    train = LEARNS | {"eval_every_steps": 10, "save_every_steps": 10}
    recipe = head_recipe(
        folder, bert, train=train, rows=named(labelled_rows(48)), eval_rows=named(labelled_rows(12, "e"))
    )
    return run_recipe(load_recipe(recipe)), recipe


def named(rows):
    return [row | {"label": ("bad", "good")[row["label"]]} for row in rows]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_learns_and_writes_down_scores_labels_and_confusion(run):
    folder, _ = run
    summary = summary_of(folder)
    before, after = (summary["metrics"][when] for when in ("before", "after"))
    assert after["accuracy"]["value"] == 1.0 > before["accuracy"]["value"]
    assert before.keys() == after.keys() == {"accuracy", "f1_macro", "f1_binary", "matthews"}
    assert summary["labels"] == ["bad", "good"] and summary["confusion"]["after"] == [[6, 0], [0, 6]]
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    steps = [line for line in lines(folder / "metrics.jsonl") if "loss" in line]
    assert not any("eval_perplexity" in line for line in lines(folder / "metrics.jsonl"))
    assert all("accuracy" in step for step in steps) and all(0 < step["target_tokens"] < 49 for step in steps)
    page = (folder / "report.html").read_text()
    assert "is \\ given" in page and page.count('class="confusion"') == 2 and "Accuracy" in page
    assert json.loads((folder / "data.json").read_text())["labels"]["train"]["baseline_accuracy"] == 0.5


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
def test_real_peft_loads_it_and_gives_the_probabilities_that_predict_wrote(bert, run, tmp_path):
    folder, _ = run
    recipe = tmp_path / "plain"  # of a base that peft has too, which is in 16 bit
    folder = run_recipe(load_recipe(head_recipe(recipe, bert, model={"quant": "none"}, train=LEARNS)))
    done = label_rows(folder, recipe / "eval.jsonl", tmp_path / "out.jsonl")
    assert (done.rows, done.cut) == (8, 0)
    adapter = folder / "adapter"
    base = AutoModelForSequenceClassification.from_pretrained(bert, config=AutoConfig.from_pretrained(adapter))
    model, tokenizer = peft.PeftModel.from_pretrained(base, adapter).eval(), AutoTokenizer.from_pretrained(adapter)
    assert model.config.id2label == {0: "0", 1: "1"}
    for row, found in zip(lines(recipe / "eval.jsonl"), lines(tmp_path / "out.jsonl"), strict=True):
        with torch.no_grad():
            shares = model(**tokenizer(row["sentence"], return_tensors="pt")).logits.softmax(-1)[0]
        assert list(found["probabilities"].values()) == pytest.approx(shares.tolist(), abs=1e-5)
        assert found["label"] == str(int(shares.argmax())) and found["reference"] == str(row["label"])


def test_labels_that_summary_and_adapter_name_otherwise_are_refused(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"labels": ["good", "bad"]}))
    with pytest.raises(ModelError, match=r"names the labels \['good', 'bad'\], and .*config\.json \['bad', 'good'\]"):
        label_rows(folder, run[1].parent / "eval.jsonl", tmp_path / "out.jsonl")


def test_predict_takes_rows_without_labels_and_an_adapter_alone(run, bert, tmp_path):
    folder, _ = run
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"sentence": row["sentence"]} for row in labelled_rows(6)])
    result = CliRunner().invoke(
        cli, ["predict", str(folder), "--rows", str(rows), "--out", str(tmp_path / "a.jsonl")], catch_exceptions=False
    )
    assert result.exit_code == 0 and "6 rows labelled" in result.output
    found = lines(tmp_path / "a.jsonl")
    assert [row["label"] for row in found] == ["bad", "good"] * 3 and "reference" not in found[0]
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in (folder / "adapter").iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    label_rows(alone, rows, tmp_path / "b.jsonl")
    for one, other in zip(found, lines(tmp_path / "b.jsonl"), strict=True):
        assert one["label"] == other["label"]  # the base is loaded in NF4 and bfloat16, as a recipe's defaults say
    (alone / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json beside it says its labels"):
        label_rows(alone, rows, tmp_path / "c.jsonl")


def test_rows_to_predict_are_read_with_the_templates_of_the_run_that_fit_without_the_label(tmp_path):
    source = {"path": "rows.csv", "prompt": "Subject {subject}: {text}", "completion": "{topic}"}
    said = {"model": {"path": "none"}, "task": {"kind": "classification"}, "data": {"train": [source]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(said))
    recipe = load_recipe(tmp_path / "recipe.yaml", check_files=False)
    for name, text in (("new.csv", "subject,text\nS1,hello\n"), ("blank.csv", "subject,text,topic\nS1,hello,\n")):
        (tmp_path / name).write_text(text)
        (row,) = read_texts(recipe, tmp_path / name, "single_label_classification")
        assert (row.texts, row.label) == (("Subject S1: hello",), None)


def test_what_is_read_is_never_written(run, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", labelled_rows(2))
    before = rows.read_bytes()
    with pytest.raises(OutputError, match=r"rows\.jsonl holds what is read; choose another --out"):
        label_rows(run[0], rows, rows)
    assert rows.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--side-by-side",), "models that write text: use `qlora-lite predict` or `evaluate`"),
        (("--shots", "2"), "models that write text"),
        (("--out", "a.jsonl"), "is written by `qlora-lite predict`"),
    ],
)
def test_evaluate_says_what_a_run_with_a_head_cannot(run, options, said):
    with pytest.raises((RecipeError, click.UsageError), match=said):
        CliRunner().invoke(cli, ["evaluate", str(run[0]), *options], catch_exceptions=False, standalone_mode=False)


def test_a_long_text_is_cut_and_counted_and_a_bad_row_named(run, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"sentence": "long " * 60}, {"sentence": "it is good"}])
    assert label_rows(run[0], rows, tmp_path / "out.jsonl").cut == 1
    write_jsonl(rows, [{"sentence": "it is good"}, {"sentence": None}])
    with pytest.raises(DataError, match=r"rows.jsonl:2: 'sentence' is missing or null"):
        label_rows(run[0], rows, tmp_path / "out.jsonl")


def test_another_run_begins_with_its_head_for_the_same_labels_alone(run, bert, tmp_path):
    folder, _ = run
    begun = {"lora": {"init_from": str(folder)}, "train": {"max_steps": 1, "learning_rate": 1e-6, "seed": 3}}
    rows = {"rows": named(labelled_rows(24)), "eval_rows": named(labelled_rows(12, "e"))}
    first, second = (
        summary_of(folder),
        summary_of(run_recipe(load_recipe(head_recipe(tmp_path / "second", bert, **begun, **rows)))),
    )
    assert second["metrics"]["before"] == first["metrics"]["after"] and second["labels"] == ["bad", "good"]
    assert second["eval_loss_before"] == pytest.approx(first["eval_loss_after"], rel=1e-4)
    other = {k: [r | {"label": r["label"].replace("good", "fair")} for r in found] for k, found in rows.items()}
    with pytest.raises(ModelError, match=r"labels '\[bad, good\]', and this run's are '\[bad, fair\]': write task.lab"):
        run_recipe(load_recipe(head_recipe(tmp_path / "other", bert, **begun, **other)))
    numbers = {k: [r | {"label": 0.5} for r in found] for k, found in rows.items()}
    with pytest.raises(ModelError, match=r"is of task\.kind classification, this recipe's is regression"):
        recipe = head_recipe(tmp_path / "number", bert, "regression", **begun, **numbers)
        run_recipe(load_recipe(recipe))
    with pytest.raises(ModelError, match=r"write task.labels: \[bad, good\]"):
        named_ones = begun | {"task": {"labels": ["good", "bad"]}}
        run_recipe(load_recipe(head_recipe(tmp_path / "turned", bert, **named_ones, **rows)))


def test_evaluate_measures_it_again(run):
    trained = open_trained(run[0], has_head=True)
    found, summary = evaluate_recipe(trained.recipe, trained.adapter, 0), summary_of(run[0])
    assert found["eval_loss"] == pytest.approx(summary["eval_loss_after"], rel=1e-5)
    assert found["metrics"] == summary["metrics"]["after"]
    assert found["confusion"]["matrix"] == summary["confusion"]["after"]
    result = CliRunner().invoke(cli, ["evaluate", str(run[0])], catch_exceptions=False)
    assert "100.0%" in result.output and "label, given:" in result.output


def test_commands_of_language_models_say_what_to_use_instead(run, tmp_path):
    folder, recipe = run
    for call in (
        lambda: open_session(folder),
        lambda: open_model(str(recipe)),
        lambda: open_trained(folder),
        lambda: merge_run(folder, tmp_path / "merged", MergeSettings()),
    ):
        with pytest.raises(RecipeError, match=r"labels texts \(task.kind classification\).*qlora-lite predict"):
            call()


def test_a_language_model_s_run_has_no_labels_to_predict(model_folder, tmp_path):
    run = make_run(tmp_path, model_folder)
    with pytest.raises(RecipeError, match=r"a language model without a head.*qlora-lite generate"):
        label_rows(run, tmp_path / "eval.jsonl", tmp_path / "out.jsonl")


def test_a_stopped_run_is_resumed_to_the_bit(run, bert, tmp_path):
    folder, recipe = run

    settings = load_recipe(recipe, [f"output.dir={tmp_path / 'out'}"])
    with pytest.raises(Interrupted):
        run_recipe(settings, stop_at(23))
    assert run_recipe(settings, resume=tmp_path / "out") == tmp_path / "out"
    for name in ("adapter", "adapter-last"):
        one, other = (load_file(path / name / "adapter_model.safetensors") for path in (folder, tmp_path / "out"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert summary_of(tmp_path / "out")["metrics"]["after"] == summary_of(folder)["metrics"]["after"]


def test_other_labels_of_the_same_texts_are_another_run(run, bert, tmp_path):
    folder = tmp_path / "head"
    recipe = head_recipe(folder, bert, train={"save_every_steps": 2})

    with pytest.raises(Interrupted):
        run_recipe(load_recipe(recipe), stop_at(3))
    rows = lines(folder / "train.jsonl")
    rows[3]["label"] = 0
    write_jsonl(folder / "train.jsonl", rows)
    with pytest.raises(CheckpointError, match="other labels than before"):
        run_recipe(load_recipe(recipe), resume=folder / "out")


def test_a_budget_and_streamed_blocks_change_no_number(run, tmp_path):
    _, recipe = run
    short = ["train.max_steps=6", "train.eval_every_steps=0"]
    losses = []
    for name, overrides in (
        ("plain", []),
        ("streamed", ["memory.resident_layers=1"]),
        ("budget", ["memory.micro_batches=auto", "memory.checkpointing=auto"]),
    ):
        out = run_recipe(load_recipe(recipe, [*short, *overrides, f"output.dir={tmp_path / name}"]))
        losses.append([line["loss"] for line in lines(out / "metrics.jsonl") if "loss" in line])
    assert losses[0] == losses[1] and losses[0] == pytest.approx(losses[2], rel=1e-5)


def test_full_fine_tuning_leaves_a_classifier_that_transformers_loads(bert, tmp_path):
    path = head_recipe(
        tmp_path,
        bert,
        adapter={"method": "full"},
        model={"quant": "none"},
        train={"max_steps": 20, "learning_rate": 0.003},
    )
    settings = yaml.safe_load(path.read_text())
    del settings["lora"]
    path.write_text(yaml.safe_dump(settings))
    folder = run_recipe(load_recipe(path))
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    label_rows(folder, tmp_path / "eval.jsonl", tmp_path / "out.jsonl")
    for row, found in zip(lines(tmp_path / "eval.jsonl"), lines(tmp_path / "out.jsonl"), strict=True):
        with torch.no_grad():
            shares = model(**tokenizer(row["sentence"], return_tensors="pt")).logits.softmax(-1)[0]
        assert list(found["probabilities"].values()) == pytest.approx(shares.tolist(), abs=1e-5)


def test_numbers_and_several_labels_are_learned_too(bert, tmp_path):
    train, held_out = labelled_rows(48), labelled_rows(8, "e")
    rows = [[{"text": row["sentence"], "label": 2.0 * row["label"] - 1} for row in part] for part in (train, held_out)]
    recipe = head_recipe(tmp_path / "number", bert, "regression", *rows, train=LEARNS)
    folder = run_recipe(load_recipe(recipe))
    after = summary_of(folder)["metrics"]["after"]
    assert after["pearson"]["value"] > 0.9 and after["rmse"]["value"] < 0.5 and "confusion" not in summary_of(folder)
    label_rows(folder, tmp_path / "number" / "eval.jsonl", tmp_path / "n.jsonl")
    assert all(abs(row["value"] - float(row["reference"])) < 1 for row in lines(tmp_path / "n.jsonl"))

    names = ["x"], ["x", "y"]
    rows = [[{"text": row["sentence"], "labels": names[row["label"]]} for row in part] for part in (train, held_out)]
    recipe = head_recipe(tmp_path / "several", bert, "multi-label", *rows, train=LEARNS)
    folder = run_recipe(load_recipe(recipe))
    assert summary_of(folder)["metrics"]["after"]["accuracy"]["value"] == 1.0
    label_rows(folder, tmp_path / "several" / "eval.jsonl", tmp_path / "s.jsonl")
    assert [row["labels"] for row in lines(tmp_path / "s.jsonl")] == [["x"], ["x", "y"]] * 4


def test_data_shows_how_labels_are_spread_and_the_baseline(run):
    result = CliRunner().invoke(cli, ["data", str(run[1])], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "counts: bad 24, good 24" in result.output and "baseline accuracy: 50.0%" in result.output
    assert "(labelled)" in result.output and "text: sentence; label: label" in result.output
    assert re.search(r"jsonl:1: \d+ tokens -> (bad|good)\n", result.output) and "«" not in result.output


@pytest.mark.parametrize(
    ("rows", "eval_rows", "fault"),
    [
        ([{"text": f"a{i}", "label": "x"} for i in range(8)], None, "all rows have the label 'x'"),
        ([{"text": f"a{i}", "label": i / 7} for i in range(60)], None, "for numbers write task.kind: regression"),
        (None, [{"sentence": "new", "label": 5}], "the label '5' is none of those that are trained: 0, 1"),
    ],
)
def test_labels_that_cannot_be_learned_are_found_before_training(bert, tmp_path, rows, eval_rows, fault):
    recipe = load_recipe(head_recipe(tmp_path, bert, rows=rows, eval_rows=eval_rows or (rows and rows[:2])))
    found = preflight(recipe, load_tokenizer(str(bert)))
    with pytest.raises(DataError, match=re.escape(fault)):
        found.raise_if_unusable()


@pytest.mark.parametrize(("sets", "is_wrong"), [([[1.0, 0.0], [0.0, 1.0]], True), ([[0, 1], [1]], False)])
def test_zeros_and_ones_for_two_classes_are_no_names_of_them(bert, tmp_path, sets, is_wrong):
    rows = [{"text": f"a{i}", "labels": sets[i % 2]} for i in range(8)]
    recipe = load_recipe(head_recipe(tmp_path, bert, "multi-label", rows, rows[:2]))
    said = [problem["message"] for problem in preflight(recipe, load_tokenizer(str(bert))).report["problems"]]
    assert any("write the names of the row's classes" in message for message in said) == is_wrong


def test_a_plan_is_made_before_any_row_is_read(bert, tmp_path):
    recipe = head_recipe(tmp_path, bert)
    result = CliRunner().invoke(cli, ["plan", str(recipe), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_held_out_rows_and_streamed_ones_are_labelled_too(bert, tmp_path):
    path = head_recipe(
        tmp_path, bert, rows=named(labelled_rows(40)), data={"eval_share": 0.25}, train={"save_every_minutes": 0}
    )
    settings = yaml.safe_load(path.read_text())
    del settings["data"]["eval"]
    path.write_text(yaml.safe_dump(settings))
    folder = run_recipe(load_recipe(path))
    assert summary_of(folder)["metrics"]["after"]["accuracy"]["examples"] == 10
    streamed = ["data.streaming=true", "data.order=as-is", "data.eval_share=0", "task.labels=[bad,good]"]
    folder = run_recipe(load_recipe(path, [*streamed, f"output.dir={tmp_path / 'streamed'}"]))
    assert summary_of(folder)["steps"] == 6 and summary_of(folder)["labels"] == ["bad", "good"]


def test_a_recipe_is_evaluated_profiled_and_not_measured_for_damage(bert, tmp_path):
    recipe = load_recipe(
        head_recipe(tmp_path, bert, rows=named(labelled_rows(24)), eval_rows=named(labelled_rows(8, "e")))
    )
    assert evaluate_recipe(recipe, None, 0)["confusion"]["labels"] == ["bad", "good"]
    found = profile_recipe(recipe, tmp_path / "profile", 2)
    assert found.page.is_file()
    with pytest.raises(RecipeError, match="labels texts"):
        measure_damage(recipe, 4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
def test_the_texts_of_a_pair_have_the_types_that_transformers_gives_them(bert, tmp_path):
    rows, held_out = (
        [{"premise": row["sentence"], "hypothesis": f"{row['label']} or so", "label": row["label"]} for row in part]
        for part in (labelled_rows(24), labelled_rows(6, "e"))
    )
    folder = run_recipe(
        load_recipe(head_recipe(tmp_path, bert, rows=rows, eval_rows=held_out, model={"quant": "none"}))
    )
    label_rows(folder, tmp_path / "eval.jsonl", tmp_path / "out.jsonl")
    adapter = folder / "adapter"
    base = AutoModelForSequenceClassification.from_pretrained(bert, config=AutoConfig.from_pretrained(adapter))
    model, tokenizer = peft.PeftModel.from_pretrained(base, adapter).eval(), AutoTokenizer.from_pretrained(adapter)
    for row, found in zip(held_out, lines(tmp_path / "out.jsonl"), strict=True):
        with torch.no_grad():
            inputs = tokenizer(row["premise"], row["hypothesis"], return_tensors="pt", return_token_type_ids=True)
            shares = model(**inputs).logits.softmax(-1)[0]
        assert inputs["token_type_ids"].any()
        assert list(found["probabilities"].values()) == pytest.approx(shares.tolist(), abs=1e-5)
