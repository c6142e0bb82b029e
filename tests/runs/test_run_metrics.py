"""``train.metrics`` before, during and after training, and what of them the run folder says."""

import json

import pytest
from tiny_files import write_recipe
from tiny_runs import summary_of

import qlora_lite
from qlora_lite.cli.train import _result
from qlora_lite.errors import DataError, DoesNotFitError, RecipeError
from qlora_lite.inference.generate import Answer
from qlora_lite.recipe.load import load_recipe

ALL = ["exact_match", "accuracy", "bleu", "chrf", "rouge", "answer_loss"]
SCORES = [
    "exact_match",
    "accuracy_likelihood",
    "accuracy_generated",
    "bleu",
    "chrf",
    "rouge1",
    "rouge2",
    "rougeL",
    "answer_loss",
]


@pytest.fixture
def run(model_folder, tmp_path):
    def call(folder="out", **train):
        output = {"dir": str(tmp_path / folder)}
        recipe = write_recipe(tmp_path, model_folder, train={"max_steps": 2} | train, output=output)
        return qlora_lite.run_recipe(load_recipe(recipe))

    return call


@pytest.fixture(scope="module")
def measured(model_folder, tmp_path_factory):
    """A run that measures all metrics before and after five steps and every two."""
    folder = tmp_path_factory.mktemp("measured")
    train = {"metrics": ALL, "metrics_examples": 3, "metrics_every_steps": 2, "max_steps": 5}
    recipe = write_recipe(folder, model_folder, train=train)
    return qlora_lite.run_recipe(load_recipe(recipe))


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_stand_in_the_summary_with_their_errors_and_in_between_in_the_lines(measured):
    summary, lines = summary_of(measured), [line for line in lines_of(measured) if "exact_match" in line]
    for when in ("before", "after"):
        found = summary["metrics"][when]
        assert list(found) == SCORES and all(score["examples"] == 3 for score in found.values())
        assert all(score["standard_error"] >= 0 for score in found.values())
        assert found["exact_match"]["value"] == summary[f"exact_match_{when}"]
        assert "|version:" in found["bleu"]["signature"] and "|version:" in found["chrf"]["signature"]
    assert summary["exact_match_rows"] == 3 and len(summary["samples"]) == 3
    assert [line["step"] for line in lines] == [2, 4] and all(list(line) == ["step", *SCORES] for line in lines)
    assert summary["metrics"]["after"]["answer_loss"]["value"] < summary["metrics"]["before"]["answer_loss"]["value"]


def test_the_report_and_the_command_show_metrics(measured):
    page, printed = (measured / "report.html").read_text(), _result(measured, summary_of(measured))
    assert "<h2>Scores</h2>" in page and "accuracy likelihood" in page and "nrefs:1|case:" in page
    assert "(step 2)" in page and "(step 4)" in page
    for name in SCORES:
        assert f"{name.replace('_', ' ')} of 3" in printed
    assert printed.count("  nrefs:1|case:") == 2
    log = (measured / "log.txt").read_text()
    assert (
        "metrics before training, 3 examples of 6 (train.metrics_examples): exact match " in log
        and ", answer loss " in log
    )
    assert "metrics after step 4, 3 examples of 6 (train.metrics_examples): " in log


def test_what_is_measured_in_training_changes_nothing_of_the_training(run):
    plain, watched = run("a"), run("b", metrics_every_steps=1)
    assert (plain / "adapter-last" / "adapter_model.safetensors").read_bytes() == (
        watched / "adapter-last" / "adapter_model.safetensors"
    ).read_bytes()
    assert [line for line in lines_of(plain) if "exact_match" in line] == []
    assert [line["step"] for line in lines_of(watched) if "exact_match" in line] == [1]


def test_likelihood_alone_is_measured_without_answers(run):
    summary = summary_of(run(metrics="answer_loss"))
    assert list(summary["metrics"]["after"]) == ["answer_loss"] and summary["samples"] == []
    assert not any(key.startswith("exact_match") for key in summary)


def test_metrics_that_cannot_be_measured_in_between_are_a_warning(run, monkeypatch, caplog):
    calls = []

    def answers(_model, _tokenizer, prompts, *_, **_options):
        calls.append(1)
        if len(calls) == 2:
            raise DoesNotFitError("memory ran out over a prompt of 9 tokens")
        return [Answer("x", "stop", (1,))] * len(prompts)

    monkeypatch.setattr("qlora_lite.inference.evaluate.answers", answers)
    folder = run(metrics_every_steps=1)
    assert len(calls) == 3 and list(summary_of(folder)["metrics"]) == ["before", "after"]
    assert "train.metrics after step 1 are not measured: memory ran out over a prompt of 9 tokens" in caplog.messages


def test_what_is_wrong_is_said_before_the_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr("qlora_lite.runs.stages.load", None)
    for train, error, said in (
        ({"metrics": "number_match"}, DataError, r"eval\.jsonl:1: the answers of 2 of 2 examples, .* hold no number"),
        (
            {"metrics": ["accuracy"], "metrics_choices": ["zero", "two"]},
            DataError,
            "'one' of .*eval.jsonl:2 is not in",
        ),
    ):
        with pytest.raises(error, match=said):
            run(**train)
    monkeypatch.setattr("qlora_lite.data.checks.metrics.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"bleu needs sacrebleu, .* pip install 'sacrebleu"):
        run(metrics=["bleu"])


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"metrics": "blue"}, "train.metrics.0 = blue: must be one or a list of exact_match, number_match, accuracy"),
        ({"metrics": []}, "train.metrics = []: must be"),
        (
            {"metrics": ["bleu"], "metrics_examples": 0},
            "train.metrics: nothing is measured; write train.metrics_examples",
        ),
        ({"metrics_every_steps": 2, "metrics_examples": 0}, "train.metrics_every_steps: nothing is measured"),
        ({"metrics_choices": ["a", "b"]}, "train.metrics_choices: write accuracy in train.metrics, or remove this"),
        ({"metrics": ["accuracy"], "metrics_choices": ["a"]}, "must be null, or a list of at least two texts"),
    ],
)
def test_settings_that_are_wrong_or_measure_nothing_are_named(tmp_path, train, said):
    recipe = write_recipe(tmp_path, tmp_path, train=train)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, check_files=False)
    assert said in str(caught.value)


def test_metrics_alone_are_measured_on_a_hundred_examples(tmp_path):
    def examples(**train):
        path = write_recipe(tmp_path, tmp_path, train={"metrics_examples": None} | train)
        text = path.read_text().replace("  metrics_examples: null\n", "")
        path.write_text(text)
        return load_recipe(path, check_files=False).train.metrics_examples

    assert examples() == 0
    assert examples(metrics="bleu") == examples(metrics=["exact_match"]) == examples(metrics_every_steps=5) == 100
    assert examples(metrics="bleu", metrics_examples=7) == 7


def test_metrics_alone_need_evaluation_rows_and_a_model_that_answers(tmp_path):
    for other, said in (
        ({"data": {"eval": None}}, "train.metrics: needs evaluation data; write data.eval or data.eval_share"),
        ({"task": {"kind": "classification"}}, "train.metrics: for a language model, not with task.kind class"),
    ):
        path = write_recipe(tmp_path, tmp_path, train={"metrics": ["bleu"], "metrics_examples": None}, **other)
        path.write_text(path.read_text().replace("  metrics_examples: null\n", ""))
        with pytest.raises(RecipeError, match=said):
            load_recipe(path, check_files=False)


def test_a_recipe_with_every_default_written_out_loads(tmp_path):
    from qlora_lite.recipe.load import resolve_to_yaml

    recipe = load_recipe(write_recipe(tmp_path, tmp_path, train={"metrics_examples": 0}), check_files=False)
    (tmp_path / "again.yaml").write_text(resolve_to_yaml(recipe))
    assert load_recipe(tmp_path / "again.yaml", check_files=False).recipe_hash == recipe.recipe_hash
