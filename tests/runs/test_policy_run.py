"""A run of GRPO answers, is judged by the user's functions, resumes to the bit, and says what is wrong before it
begins."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from tiny_files import byte_tokenizer, save_tiny, write_recipe
from tiny_runs import lines, stop_at, summary_of

from qlora_lite.cli.main import cli
from qlora_lite.data.tokens.storage import prompt_tokens
from qlora_lite.errors import CheckpointError, DataError, Interrupted, RecipeError, TrainingError
from qlora_lite.ext.grpo.rewards import digest_of, judges_of
from qlora_lite.files import sha256
from qlora_lite.memory.gpus import find_gpu
from qlora_lite.planning.machine import machine_of_gpu
from qlora_lite.planning.shared_step import Cluster
from qlora_lite.prepare import ranks
from qlora_lite.prepare.datasets import build_data
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs.profile import profile_recipe
from qlora_lite.runs.resume import RUN, Continuation
from qlora_lite.runs.run import run_recipe

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
JUDGE = """
import json
import sys

import torch


def letters(completions):
    return [float(len({*text})) for text in completions]


def other(completions, references, prompts):
    assert len(completions) == len(references) == len(prompts)
    return [float(reference in prompt) for reference, prompt in zip(references, prompts)]


def few(completions):
    return [1.0]


def words(completions):
    return ["good" for _ in completions]


def unknown(completions, solutions):
    return [0.0 for _ in completions]


def divided(completions):
    return [1 / 0 for _ in completions]


def parsed(completions):
    return [json.loads(text)["score"] for text in completions]


def silent(completions):
    raise ValueError("one line\\nand another")


def full(completions):
    raise MemoryError


def single(completions):
    return torch.tensor(1.0)


def pairs(completions):
    return torch.zeros(len(completions), 2)


def huge(completions):
    return [1e39 for _ in completions]


def whole(completions):
    return [10**400 for _ in completions]


def ended(completions):
    sys.exit("usage")


def ungraded(completions):
    torch.set_grad_enabled(False)
    return [float(len({*text})) for text in completions]


def vast(completions):
    return [3e38 for _ in completions]


taken = max


NUMBER = 3
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "model"
    save_tiny(folder)
    return folder


def recipe(folder, model, overrides=(), rewards="judge.py:letters", **sections):
    folder.mkdir(exist_ok=True)
    (folder / "judge.py").write_text(JUDGE)
    for part, mark in (("train", "?"), ("eval", "!")):
        rows = [{"prompt": f"{n}{mark}", "completion": name} for n, name in enumerate(NAMES)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "max_tokens": 200}
    train = {
        "objective": "grpo",
        "max_steps": 4,
        "save_every_steps": 2,
        "learning_rate": 0.003,
        "metrics_examples": 3,
        "eval_every_steps": 2,
    } | sections.pop("train", {})
    objective = {"rewards": rewards, "group_size": 4, "max_completion_tokens": 8} | sections.pop("objective", {})
    path = write_recipe(
        folder,
        model,
        data=data | sections.pop("data", {}),
        train=train,
        objective=objective,
        lora={"rank": 8, "alpha": 16},
        **sections,
    )
    return load_recipe(path, list(overrides))


def test_a_stopped_run_answers_and_learns_the_same_to_the_bit(tmp_path, model_folder):
    run_recipe(recipe(tmp_path / "whole", model_folder))
    settings = recipe(tmp_path / "stopped", model_folder)
    with pytest.raises(Interrupted):
        run_recipe(settings, stop_at(3))
    run_recipe(settings, resume=tmp_path / "stopped" / "out")
    one, other = tmp_path / "whole", tmp_path / "stopped"
    assert lines(one) == lines(other)
    files = [path / "out" / "adapter" / "adapter_model.safetensors" for path in (one, other)]
    assert files[0].read_bytes() == files[1].read_bytes()

    summary = summary_of(one / "out")
    before, after = (summary["eval_metrics"][when]["reward"] for when in ("before", "after"))
    assert any(line.get("frac_reward_zero_std", 1.0) < 1 for line in lines(one))  # answers of a group differ
    assert summary["eval_loss_before"] == -before and summary["eval_loss_after"] == -after and after >= before
    assert summary["metrics"]["before"]["exact_match"]["examples"] == 3
    page = (one / "out" / "report.html").read_text()
    assert "<h2>Reward</h2>" in page and "<h2>Loss</h2>" not in page and "completions/mean_length" in page


def test_a_changed_function_is_another_run(tmp_path, model_folder):
    settings = recipe(tmp_path / "run", model_folder)
    with pytest.raises(Interrupted):
        run_recipe(settings, stop_at(3))
    changed = JUDGE.replace("len({*text})", "len(text)") + "\nraise RuntimeError('executed')\n"
    (tmp_path / "run" / "judge.py").write_text(changed)
    with pytest.raises(CheckpointError, match="other rewards than before"):
        run_recipe(settings, resume=tmp_path / "run" / "out")


def test_functions_are_the_same_where_their_file_has_moved(tmp_path, model_folder):
    one, other = (recipe(tmp_path / name, model_folder) for name in ("one", "other"))
    continuation = Continuation(SimpleNamespace(documents={RUN: {"recipe": one.model_dump(mode="json")}}))
    continuation.compare_settings(other)
    assert digest_of(one.objective.rewards) == digest_of(other.objective.rewards) and not continuation.forced


def test_a_changed_module_is_another_function(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for text in (JUDGE, JUDGE, JUDGE.replace("len({*text})", "len(text)")):
        (tmp_path / "judging_module.py").write_text(text)
        found.append(digest_of(["judging_module:letters"]))
    assert found[0] == found[1] != found[2]


def test_two_functions_are_added_and_each_is_reported(tmp_path, model_folder):
    settings = recipe(tmp_path / "run", model_folder, rewards=["judge.py:letters", "judge.py:other"])
    run_recipe(settings)
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    for step in steps:
        assert step["reward"] == pytest.approx(step["rewards/letters"] + step["rewards/other"])
    assert any(step["rewards/letters"] for step in steps)


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ("judge.py:absent", "judge.py:absent is no function; of functions there are letters, other, few, words"),
        ("judge.py:NUMBER", "judge.py:NUMBER is no function"),
        ("judge.py:unknown", "wants 'solutions'; there are completions, references, prompts"),
        ("no_such_module:letters", "No module named 'no_such_module'"),
        ("judge.py:taken", "judge.py:taken does not say what it takes"),
        (["judge.py:letters", "json:letters"], "two functions are called letters"),
    ],
)
def test_what_is_no_function_is_said_before_anything_loads(tmp_path, model_folder, rewards, said):
    settings = recipe(tmp_path / "run", model_folder, rewards=rewards)
    with pytest.raises(RecipeError, match=said):
        run_recipe(settings)
    assert not (tmp_path / "run" / "out" / "summary.json").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("few", "returned 1 numbers for 4 completions"),
        ("words", "returned 'good' for the completion"),
        ("single", "returned float for 4 completions"),
        ("pairs", r"returned tensor\(\[0., 0.\]\) for the completion"),
        ("huge", r"returned 1e\+39 for the completion"),
        ("whole", "returned 1000.* a reward is a finite number"),
        ("vast", r"returned 3e\+38 for the completion 'a'; a reward is a finite number, of at most 1e\+30"),
        ("ended", r"ended Python \(usage\); let it return numbers"),
    ],
)
def test_what_a_function_returns_wrongly_is_named(tmp_path, name, said):
    (tmp_path / "judge.py").write_text(JUDGE)
    with pytest.raises(TrainingError, match=said):
        judges_of([f"{tmp_path / 'judge.py'}:{name}"])([_Row()] * 4, ["a"] * 4)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("divided", "ZeroDivisionError: division by zero"),
        ("parsed", "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),  # raised in a library
        ("silent", "ValueError: one line and another"),
    ],
)
def test_what_a_function_raises_is_one_line_with_its_place(tmp_path, name, said):
    path = tmp_path / "judge.py"
    path.write_text(JUDGE)
    line = JUDGE[: JUDGE.index("\n", JUDGE.index(f"def {name}(")) + 1].count("\n") + 1
    with pytest.raises(TrainingError) as caught:
        judges_of([f"{path}:{name}"])([_Row()], ["no json"])
    assert str(caught.value) == f"{path}:{name} raised {said} ({path}:{line}); correct the function"
    assert caught.value.__cause__ is not None


def test_memory_that_runs_out_in_a_function_is_for_the_step_to_see(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    with pytest.raises(MemoryError):
        judges_of([f"{tmp_path / 'judge.py'}:full"])([_Row()], ["a"])


def test_code_that_is_run_is_named_with_its_sum_before(tmp_path, caplog):
    caplog.set_level("INFO", "qlora_lite")
    path = tmp_path / "broken.py"
    path.write_text("raise ValueError('run')\n")
    with pytest.raises(RecipeError, match="ValueError: run"):
        judges_of([f"{path}:good"])
    assert caplog.messages == [f"objective.rewards runs the code of {path} (SHA-256 {sha256(path)[:12]}...)"]


def test_gradients_are_recorded_after_a_function_or_its_file_has_switched_them_off(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(f"{JUDGE}\ntorch.set_grad_enabled(False)\n")
    judges_of([f"{path}:ungraded"])([_Row()], ["a"])
    assert torch.is_grad_enabled()


def test_an_edited_file_is_read_again_in_one_process_and_one_that_is_not_is_kept(tmp_path):
    path = tmp_path / "judge.py"
    found = []
    for code in ("[1.0]", "[1.0]", "[-1.00]"):
        path.write_text(f"def good(completions):\n    return {code}\n")
        judges = judges_of([f"{path}:good"])
        found.append((judges.functions[f"{path}:good"], judges([_Row()], ["a"])["good"].item()))
    assert found[0] == found[1] and [value for _, value in found] == [1, 1, -1]


def test_a_file_of_functions_may_have_dataclasses_and_its_errors_are_told(tmp_path):
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass A:\n    x: int\n"
    (tmp_path / "own.py").write_text(code + JUDGE)
    assert judges_of([f"{tmp_path / 'own.py'}:letters"])([_Row()], ["aab"]) is not None
    for code, said in (
        ("x = undefined", "NameError: name 'undefined' is not"),
        ("assert False, 'no key'", "AssertionError: no key"),
        ("import sys; sys.exit('usage')", "SystemExit: usage"),
    ):
        (tmp_path / "broken.py").write_text(code + "\n")
        with pytest.raises(RecipeError, match=rf"broken\.py:f cannot be imported: {said}"):
            judges_of([f"{tmp_path / 'broken.py'}:f"])


def test_a_recipe_is_profiled_answers_and_all(tmp_path, model_folder):
    figures = profile_recipe(recipe(tmp_path, model_folder), tmp_path / "profile", steps=2).figures
    assert figures["peak_bytes"] == pytest.approx(figures["predicted_peak_bytes"], rel=0.01)


class _Row:
    answer, prompt = "", ""


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.rewards=[]"], "nothing to judge answers by"),
        (["objective.rewards=judge.py"], "write FILE.py:FUNCTION"),
        (["objective.rewards=absent.py:letters"], "no such file"),
        (["objective.beta=0.2"], r"objective\.beta: only with train\.objective cpo"),
        (["train.objective=dpo"], r"objective\.rewards: only with train\.objective grpo"),
        (["train.metrics=answer_loss"], "not measured with train.objective grpo"),
        (["lora.dropout=0.1"], "not possible with train.objective grpo"),
        (["data.streaming=true"], "not possible with train.objective grpo"),
        (["memory.stream_from=ranks"], "not possible with train.objective grpo; write auto or host or disk"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, model_folder, overrides, said):
    with pytest.raises(RecipeError, match=said):
        recipe(tmp_path, model_folder, overrides)


def test_a_group_that_has_no_room_is_named_with_the_row(tmp_path, model_folder):
    recipe(tmp_path, model_folder)
    result = CliRunner().invoke(cli, ["data", str(tmp_path / "recipe.yaml"), "data.max_tokens=40"])
    assert isinstance(result.exception, DataError)
    assert re.search(
        r"train\.jsonl:1: .*group_size 4 answers of up to 8 tokens to a prompt of 21", str(result.exception)
    )


@pytest.mark.parametrize("train_on", ["assistant", "completion", "last"])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_a_last_answer_that_is_not_learned_is_refused_with_its_row(tmp_path, model_folder, train_on, mark):
    settings = recipe(tmp_path, model_folder, [f"data.train_on={train_on}"])
    turns = [{"role": role, "content": text} for role, text in (("user", "1+1?"), ("assistant", "2")) * 2]
    rows = [{"messages": [*turns[:3], turns[3] | mark]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"train\.jsonl:1: nothing to learn: every answer that counts has weight 0"):
        build_data(settings, byte_tokenizer(), "train")


def test_what_the_model_is_asked_is_what_the_functions_are_told(tmp_path, model_folder):
    settings = recipe(tmp_path, model_folder)
    turns = [{"role": role, "content": text} for role, text in (("user", "1+1?"), ("assistant", "2")) * 2]
    rows = [turns, [turns[0], turns[1] | {"weight": 0}, *turns[2:]]]
    text = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(text)
    tokenizer = byte_tokenizer()
    for example in build_data(settings, tokenizer, "train").examples:
        assert tokenizer.decode(example.token_ids[: prompt_tokens(example)]) == example.prompt
        assert example.answer == "2" and example.prompt.count("1+1?") == 2


def test_a_plan_needs_neither_rows_nor_functions(tmp_path, model_folder):
    recipe(tmp_path, model_folder)
    (tmp_path / "judge.py").unlink()
    command = ["plan", str(tmp_path / "recipe.yaml"), "--gpu", "rtx-3060"]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert re.search(r"assumed:\s+4\s+sequences\s+of\s+one\s+example,\s+of\s+50\s+tokens", result.output)
    assert "and before it the answers" in " ".join(result.output.split())


def test_ranks_each_of_which_answers_divide_no_model(tmp_path, model_folder):
    answers = recipe(tmp_path, model_folder)
    for objective, count in (("grpo", 1), ("sft", 2)):
        own = answers.model_copy(update={"train": answers.train.model_copy(update={"objective": objective})})
        part = Cluster(2, link="pcie4").part(machine_of_gpu(find_gpu("rtx-3090")))
        assert ranks.dividing(own, part, 2).shards.count == count
