"""Several runs over one base: answered in one batch, in a conversation, and compared, as each would be alone."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny_files import save_tiny
from tiny_runs import make_run, replace_adapter, tiny_run

from qlora_lite.artifacts.run_folder import open_run
from qlora_lite.data.chat.conversation import Turn
from qlora_lite.errors import DataError, ModelError, RecipeError
from qlora_lite.inference.chat import Session, open_session
from qlora_lite.inference.compare import compare_runs, write_comparison
from qlora_lite.inference.evaluate import evaluate_recipe
from qlora_lite.inference.multi_adapter import open_tasks

TALKS = [[Turn("user", text)] for text in ("3?", "what is the longest of these questions?", "", "9!", "abc")]
TALKS[2] = [Turn("system", "Be brief."), Turn("user", "5?"), Turn("assistant", "five"), Turn("user", "6?")]
MIXED = ["french", None, "german", "french", "latin"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs of one model, with adapters of different layers and ranks."""
    folder = tmp_path_factory.mktemp("runs")
    save_tiny(folder / "model")
    loras = {
        "french": {"rank": 4, "alpha": 16},
        "german": {"rank": 2, "targets": ["v_proj", "down_proj"]},
        "latin": {"rank": 3, "rslora": True},
    }
    made = []
    for seed, (name, lora) in enumerate(loras.items()):
        run = make_run(folder / f"{name}-work", folder / "model", seed=seed, lora=lora)
        made.append(run.rename(folder / name))
    return made


def test_a_batch_of_many_adapters_answers_as_each_alone(runs):
    tasks = open_tasks(runs)
    assert tasks.names == ("french", "german", "latin")
    together = tasks.answer(MIXED, TALKS, 12)
    alone = [tasks.answer([name], [talk], 12)[0] for name, talk in zip(MIXED, TALKS, strict=True)]
    assert together == alone == tasks.answer(MIXED, TALKS, 12, batch_size=2)
    assert tasks.answer([None] * 5, TALKS, 12) != together
    for name, talk, said in zip(MIXED, TALKS, together, strict=True):
        if name:
            session = open_session(next(run for run in runs if run.name == name), max_new_tokens=12)
            session.turns = list(talk)
            assert session.reply() == said


@pytest.mark.parametrize("use", ["tasks", "evaluation"])
def test_weights_are_arranged_for_few_rows_where_models_answer(runs, monkeypatch, use):
    arranged, opened = [], open_run(runs[0])
    module = "multi_adapter" if use == "tasks" else "evaluate"
    monkeypatch.setattr(f"qlora_lite.inference.{module}.arrange_weights", arranged.append)
    if use == "tasks":
        tasks = open_tasks(runs)
        assert arranged[0] is tasks.model
    else:
        evaluate_recipe(opened.recipe, opened.adapter, 0)
        assert not arranged  # a loss has many rows
        evaluate_recipe(opened.recipe, opened.adapter, 2)
    assert len(arranged) == 1


def test_a_swap_takes_less_than_a_millisecond(runs):
    switch = open_tasks(runs).switch
    started = time.perf_counter()
    for name in ("french", "german", "latin", None) * 250:
        switch.use(name)
    assert (time.perf_counter() - started) / 1000 < 1e-3


def test_a_conversation_goes_on_with_another_adapter(runs):
    session = open_session(runs, max_new_tokens=6)
    session.say("3?")
    first = session.reply()
    session.use("latin")
    session.say("4?")
    second = session.reply()
    assert [turn.role for turn in session.turns] == ["user", "assistant", "user", "assistant"]
    other = open_session([runs[2]], max_new_tokens=6)
    other.turns = [Turn("user", "3?"), Turn("assistant", first), Turn("user", "4?")]
    assert other.reply() == second
    with pytest.raises(ModelError, match="no adapter 'greek'; there are french, german, latin"):
        session.use("greek")


def test_a_conversation_without_the_system_message_that_the_training_rows_share_is_told(tmp_path, caplog):
    run = tiny_run(tmp_path)
    row = (
        '{"messages": [{"role": "system", "content": "Be %s."}, {"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "b"}]}\n'
    )
    for rows, system, told in (
        (row % "brief" * 3, None, "'Be brief.'"),
        (row % "brief" * 3, "Be long.", ""),
        (row % "brief" + row % "long", None, ""),
        (row % ("brief" * 99), None, f"'Be {'brief' * 39}br'..."),
    ):
        caplog.clear()
        (tmp_path / "train.jsonl").write_text(rows)
        open_session(run, system)
        said = [message.partition("--system ")[2] for message in caplog.messages if "--system" in message]
        assert said == [told] * bool(told)
    (tmp_path / "train.jsonl").unlink()
    caplog.clear()
    open_session(run)
    assert not any("--system" in message for message in caplog.messages)


def test_a_prompt_that_is_longer_than_the_model_was_made_for_is_told(runs, caplog):
    session = open_session(runs[:1], max_new_tokens=1)
    session.say("3?")
    session.reply()
    assert not caplog.messages
    session.tasks.model.config.max_position_embeddings = 32
    session.say("4?" * 16)
    session.reply()
    assert ["the model supports 32" in message for message in caplog.messages] == [True]


def test_chat_swaps_adapters_by_name(runs):
    command = [sys.executable, "-c", "from qlora_lite.cli.main import main; main()"]
    typed = "3?\n/use latin\n/use greek\n/new\n4?\n\n"
    done = subprocess.run(
        [*command, "chat", *runs, "--max-new-tokens", "4"], input=typed, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "adapters: french, german, latin" in done.stderr and "latin: 0.0 MiB, in " in done.stderr
    assert done.stderr.count("error: there is no adapter 'greek'") == 1 and "Traceback" not in done.stderr


def test_runs_with_the_same_folder_name_go_by_their_paths(runs, tmp_path):
    twin = shutil.copytree(runs[0], tmp_path / "french")
    assert open_tasks([runs[0], twin, runs[1]]).names == (str(runs[0]), str(twin), "german")
    with pytest.raises(ModelError, match="the same run is given twice"):
        open_tasks([runs[0], runs[0]])


def test_runs_of_different_bases_are_refused_with_both_named(runs, tmp_path):
    other = tiny_run(tmp_path, seed=9)
    with pytest.raises(ModelError, match=r"cannot share one: french on .*, model\.quant .*; run on "):
        open_tasks([runs[0], other])
    plain = make_run(tmp_path / "plain", runs[0].parent / "model", ["model.quant=none"])
    with pytest.raises(ModelError, match="different bases"):
        open_tasks([runs[0], plain])


def test_an_empty_turn_is_refused_by_name_and_not_answered(runs):
    tasks = open_tasks(runs)
    with pytest.raises((DataError, ModelError)):
        tasks.answer(["french"], [[Turn("user", "<|im_end|>")]], 4)
    assert tasks.switch.rows is None


def test_a_comparison_has_each_run_s_own_figures(runs, tmp_path):
    result = compare_runs(runs[:2], with_base=True, answers=3)
    assert [model["name"] for model in result["models"]] == ["base", "french", "german"]
    for model, run in zip(result["models"], (None, *runs[:2]), strict=True):
        opened = open_run(run or runs[0])
        alone = evaluate_recipe(opened.recipe, opened.adapter if run else None, 3)
        assert model["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)
        assert model["exact_match"] == alone["exact_match"] and model["rows"] == alone["rows"] == 6
    assert len(result["answers"]) == 3
    for row in result["answers"]:
        assert (
            row["answers"].keys() == {"base", "french", "german"}
            and row["reference"] in row["prompt"] + row["reference"]
        )
    write_comparison(result, tmp_path / "new" / "page")
    assert json.loads((tmp_path / "new" / "page" / "compare.json").read_text()) == result
    page = (tmp_path / "new" / "page" / "compare.html").read_text()
    assert page.count('class="card sample"') == 3 and "french" in page and "<script>alert" not in page


@pytest.mark.parametrize(
    "trained",
    [
        {"train_also": ["head"]},
        {"train_tokens": ["o"]},
        {"train_tokens": ["o", *(f"<|{n}|>" for n in range(4))]},
    ],
)
def test_a_comparison_measures_a_head_with_weights_of_its_own(tmp_path, trained):
    save_tiny(tmp_path / "model")
    run = make_run(tmp_path, tmp_path / "model", adapter=trained)
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    chance = torch.Generator().manual_seed(0)
    beside = {name: 0.5 * torch.randn(t.shape, generator=chance) for name, t in tensors.items() if "lora" not in name}
    replace_adapter(run, tensors | {name: tensors[name] + noise for name, noise in beside.items()})
    opened, models = open_run(run), compare_runs([run], with_base=True, answers=0)["models"]
    assert beside and [model["name"] for model in models] == ["base", "run"]
    for model, adapter, tolerance in zip(models, (None, opened.adapter), (1e-3, 1e-5), strict=True):
        alone = evaluate_recipe(opened.recipe, adapter, 0)  # whose base has no row for a token behind its table
        assert model["eval_loss"] == pytest.approx(alone["eval_loss"], rel=tolerance)


def test_as_many_examples_are_compared_as_the_first_run_s_recipe_says_and_few_are_shown(runs, tmp_path, command):
    rule = ["train.metrics_examples=5", "train.exact_match_pattern=(?s)."]
    first = make_run(tmp_path, runs[0].parent / "model", rule, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_lite.reporting.compare_page.SHOWN_ANSWERS", 3)
        code, out, _ = command("compare", first, runs[1], "--out", tmp_path / "page")
    result = json.loads((tmp_path / "page" / "compare.json").read_text())
    assert code == 0 and out.count("% of 5") == 2 and [m["exact_match_rows"] for m in result["models"]] == [5, 5]
    page = (tmp_path / "page" / "compare.html").read_text()
    assert page.count('class="card sample"') == 3 and "The first 3 of 5" in page
    opened = open_run(first)
    assert result["models"][0]["exact_match"] == evaluate_recipe(opened.recipe, opened.adapter, 5)["exact_match"]
    for row in result["answers"]:
        assert row["matches"].keys() == row["answers"].keys() == {"run", "german"}
        assert row["matches"] == {name: said[:1] == row["reference"][:1] for name, said in row["answers"].items()}
    none = make_run(tmp_path / "none", runs[0].parent / "model", ["train.metrics_examples=0"])
    assert "no answers are compared, following the first run's train.metrics_examples" in command("compare", none)[1]


def test_a_run_that_would_drop_rows_is_compared_on_all_of_the_first_run_s(runs, tmp_path):
    short = make_run(tmp_path, runs[0].parent / "model", ["data.max_tokens=26", "data.overflow=drop"])
    result = compare_runs([runs[0], short], answers=0)
    assert result["same_tokens"] and [model["rows"] for model in result["models"]] == [6, 6]


def test_runs_are_compared_on_the_rows_that_the_first_one_held_out(runs, tmp_path, caplog):
    held = make_run(tmp_path, runs[0].parent / "model", ["data.eval=null", "data.eval_share=0.25"])
    other = make_run(tmp_path / "other", runs[0].parent / "model", data={"train": str(tmp_path / "eval.jsonl")})
    result = compare_runs([held, other], answers=0)
    assert result["same_tokens"] and [model["rows"] for model in result["models"]] == [5, 5]
    assert not any("may have seen those" in message for message in caplog.messages)
    all_of_them = make_run(tmp_path / "third", runs[0].parent / "model", data={"train": str(tmp_path / "train.jsonl")})
    compare_runs([all_of_them, held], answers=0)  # on rows of a file of their own
    assert not any("may have seen those" in message for message in caplog.messages)
    compare_runs([held, all_of_them], answers=0)
    assert any("may have seen those" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("changes", "others", "is_said"),
    [
        ({}, "{other}", False),
        ({"max_tokens": 60}, "{prompt} {other}", False),  # as many prompts: the same rows are held out
        ({}, "{prompt}", True),  # one for each pair of rows
        ({"train": "more files"}, "{other}", True),
        ({"train": "a missing file"}, "{other}", True),
    ],
)
def test_a_run_that_held_other_rows_of_the_file_out_may_have_learned_those_measured(
    runs, tmp_path, caplog, changes, others, is_said
):
    """Rows are held out by their places and prompts, of which the template in the recipe makes others."""
    rows = [{"prompt": f"{i % 20}", "other": f"q{i}", "completion": "x"} for i in range(40)]
    for name in ("rows", "a", "gone"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name, template, before=(), **data):
        paths = [str(tmp_path / f"{each}.jsonl") for each in (*before, "rows")]
        train = [{"path": path, "prompt": template, "completion": "{completion}"} for path in paths]
        return make_run(
            tmp_path / name, runs[0].parent / "model", data={"train": train, "eval": None, "eval_share": 0.3} | data
        )

    before = {"more files": ["a"], "a missing file": ["gone"]}.get(changes.pop("train", None), [])
    held, other = run("one", "{other}"), run("two", others, before, **changes)
    (tmp_path / "gone.jsonl").unlink()
    compare_runs([held, other], answers=0)
    assert any("may have seen those" in message for message in caplog.messages) == is_said


def test_losses_of_different_tokens_are_not_ranked(runs, command, tmp_path):
    other = make_run(tmp_path, runs[0].parent / "model", ["data.train_on=all"])
    code, out, _ = command("compare", runs[0], runs[1], other, "--rows", 0, "--out", tmp_path / "page")
    rows, tokens = (line.split()[-3:] for line in out.splitlines()[3:5])
    assert code == 0 and rows == ["6"] * 3 and tokens[0] == tokens[1] != tokens[2]
    page = (tmp_path / "page" / "compare.html").read_text()
    assert "cannot be ranked" in out and "cannot be ranked" in page and "(lowest loss)" not in page
    command("compare", *runs[:2], "--rows", 0, "--out", tmp_path / "page")
    page = (tmp_path / "page" / "compare.html").read_text()
    assert "cannot be ranked" not in page and page.count("(lowest loss)") == 1


def test_answers_are_escaped_on_the_page():
    from qlora_lite.reporting.compare_page import render_comparison

    evil = "<script>alert(1)</script>"
    model = {
        "name": evil,
        "rows": 2,
        "target_tokens": 9,
        "eval_loss": 1.0,
        "perplexity": 2.7,
        "adapter_bytes": 3,
        "metrics": {"exact_match": {"value": 0.5, "standard_error": 0.5, "examples": 2}},
    }
    row = {
        "where": "a:1",
        "prompt": evil,
        "reference": "x",
        "answers": {evil: evil, "good": " x"},
        "matches": {evil: False, "good": True},
    }
    result = {"models": [model], "same_tokens": True, "rows_of": evil, "base_model": evil, "answers": [row]}
    page = render_comparison(result)
    assert "<script>alert" not in page and page.count("&lt;script&gt;") >= 6
    assert "good ✓" in page and "50.0% ± 50.0% of 2" in page


def test_a_comparison_needs_evaluation_rows(tmp_path):
    run = tiny_run(tmp_path, overrides=["data.eval=null", "train.metrics_examples=0"])
    with pytest.raises(RecipeError, match=r"run has no data\.eval"):
        compare_runs([run])


def test_a_message_that_is_taken_back_takes_its_pictures_with_it_and_no_others():
    session = Session(None, None, 1, None)
    for text, pictures in (("first", ["a.png"]), ("second", ["b.png", "c.png"])):
        session.attached = list(pictures)
        session.say(text)
    session.take_back()
    assert [turn.content[1:] for turn in session.turns] == ["first"]
    assert session.pictures == ["a.png"] and session.attached == []
    session.begin_again()
    assert session.turns == session.pictures == []
