"""Scores of lm-evaluation-harness against its own HFLM over plain transformers, and tasks of one's own."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny import build_tiny, quantized_pair
from tiny_files import VOCABULARY, byte_tokenizer, save_tiny
from tiny_runs import make_run, prompt_tuned

from qlora_lite.artifacts.trained_run import open_trained
from qlora_lite.errors import DataError, RecipeError
from qlora_lite.kernels.loss import Head, head_logits, likeliest_tokens
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.prepare import model as base_model

pytest.importorskip("lm_eval", reason="the eval extra has it")
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from qlora_lite.inference.harness import HarnessLM, _StopStrings, evaluate_tasks

PAIRS = [
    ("is it?", " yes"),
    ("is it?", " no"),
    ("is it?", "y"),
    ("is it?", "n"),
    ("is it so? ", "may be"),
    ("", "no prompt"),
    ("<s>twice", "?"),
    ("long " * 40, "what is left of it"),
]
TEXTS = [("one",), ("a text of more tokens than the model has positions. " * 6,)]
PROMPTS = "0?", "a longer one?", "2?", "long " * 40


def asked(pairs):
    return [SimpleNamespace(args=args, task_name="x") for args in pairs]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run in 16 bit and one in 4 bit."""
    folder = tmp_path_factory.mktemp("runs")
    save_tiny(folder / "model", num_hidden_layers=4)
    return {q: make_run(folder / q, folder / "model", [f"model.quant={q}"]) for q in ("none", "nf4")}


def oracle(run, quant, with_adapter):
    """HFLM over plain transformers, with the adapter's update added to the weights."""
    size = {"vocab_size": VOCABULARY, "num_hidden_layers": 4}
    plain = build_tiny("llama", **size) if quant == "none" else quantized_pair("llama", **size)[1]
    trained = open_trained(run)
    for path, each in trained.read_adapter(trained.skeleton()).layers.items() if with_adapter else ():
        plain.get_submodule(path).weight.data += each.scale * each.lora_B.float() @ each.lora_A.float()
    return HFLM(pretrained=plain, tokenizer=byte_tokenizer(), batch_size=3)


def harness(run, with_adapter=True):
    from dataclasses import replace

    from qlora_lite.inference.multi_adapter import load_switched
    from qlora_lite.prepare.settings import train_settings

    trained = open_trained(run)
    model, switch = load_switched({"run": trained})[:2]
    lm = HarnessLM(trained, "run" if with_adapter else None)
    lm.use(model, switch, replace(train_settings(trained.recipe), max_tokens=128))
    return lm


def inner_letter(text):
    """A letter that a text has behind its first."""
    return next(letter for letter in text[2:] if letter.isascii() and letter != text[0])


def assert_same(ours, theirs):
    assert [each[0] for each in ours] == pytest.approx([each[0] for each in theirs], abs=1e-4)
    assert [each[1] for each in ours] == [each[1] for each in theirs]


@pytest.mark.parametrize(
    ("quant", "placed", "with_adapter"), [("none", "here", True), ("nf4", "here", False), ("nf4", "streamed", True)]
)
def test_likelihoods_greedy_flags_and_answers_are_those_of_hflm(runs, monkeypatch, quant, placed, with_adapter):
    if placed == "streamed":
        options = MemoryOptions(resident_layers=1, host_embeddings=True)
        monkeypatch.setattr(base_model, "memory_to_use", lambda *_: 0)
        monkeypatch.setattr(base_model, "placement", lambda *_: options)
    lm, theirs = harness(runs[quant], with_adapter), oracle(runs[quant], quant, with_adapter)
    whole = asked([(prompt, {"until": [], "max_gen_toks": 24}) for prompt in PROMPTS])
    answers = theirs.generate_until(whole, disable_tqdm=True)
    assert lm.generate_until(whole) == answers
    cut = {"until": [inner_letter(answers[0]), "\n\n"], "max_gen_toks": 24, "do_sample": False}
    cut = asked([(prompt, cut) for prompt in PROMPTS])
    stopped = lm.generate_until(cut)
    assert stopped == theirs.generate_until(cut, disable_tqdm=True)
    assert 0 < len(stopped[0]) < len(answers[0])
    found = [each.loglikelihood(asked(PAIRS), True) for each in (lm, theirs)]
    assert_same(*found)
    context = lm.tok_encode("is it?")
    every = [(None, context, [token]) for token in range(VOCABULARY)]
    found = [each._loglikelihood_tokens(every, disable_tqdm=True) for each in (lm, theirs)]
    assert_same(*found)
    [likeliest] = [token for token, (_, is_greedy) in enumerate(found[0]) if is_greedy]
    every = [(None, context, [likeliest, token]) for token in range(VOCABULARY)]
    found = [each._loglikelihood_tokens(every, disable_tqdm=True) for each in (lm, theirs)]
    assert_same(*found)
    assert sum(is_greedy for _, is_greedy in found[0]) == 1
    rolled = lm.loglikelihood_rolling(asked(TEXTS))
    assert rolled == pytest.approx(theirs.loglikelihood_rolling(asked(TEXTS), True), abs=1e-3)


def test_choices_of_one_token_behind_a_prompt_are_one_sequence(runs, monkeypatch):
    lm, lengths = harness(runs["none"]), []
    monkeypatch.setattr("qlora_lite.inference.harness.hidden_states", _noted(lengths))
    lm.loglikelihood(asked([("is it?", letter) for letter in "abcd"]), True)
    assert lengths == [(6,)]


def _noted(lengths):
    from qlora_lite.train.forward import hidden_states

    return lambda model, inputs: lengths.append(inputs.row_lengths) or hidden_states(model, inputs)


def test_the_likeliest_tokens_are_those_of_all_logits():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 24, generator=generator) for size in (11, 5000))
    head = Head(weight, softcap=3.0, scale=0.5)
    assert torch.equal(likeliest_tokens(hidden, head, 4), head_logits(hidden, head).argmax(-1))


def test_drawn_answers_are_the_same_again_and_other_settings_are_refused(runs):
    lm = harness(runs["none"])
    drawn = {"until": [], "max_gen_toks": 9, "do_sample": True, "temperature": 2.0, "top_k": 50}
    said = [lm.generate_until(asked([("0?", drawn), ("0?", drawn)])) for _ in range(2)]
    assert said[0] == said[1] and said[0][0] != said[0][1]
    for settings, words in (({"num_beams": 4}, "num_beams"), ({"max_gen_toks": 128}, "128 new tokens")):
        with pytest.raises(DataError, match=words):
            lm.generate_until(asked([("0?", settings)]))


def task_folder(folder, **changes):
    """Two tasks with data of their own, one of choices and one of answers, in a group."""
    folder.mkdir()
    rows = [
        {
            "question": f"{number}{mark}",
            "choices": [f"{number * 7 % 8}", f"{number * 3 % 5}"],
            "label": number % 2,
            "answer": "e",
        }
        for number in range(8)
        for mark in "?!"
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "test_split": "train",
        "fewshot_split": "train",
        "doc_to_text": "{{question}}",
        "dataset_kwargs": {"data_files": str(data), "cache_dir": str(folder / "cache")},
    }
    choice = {
        "task": "own_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    }
    answer = {
        "task": "own_answer",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choice, answer):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(shared | task | changes))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return task_folder(tmp_path_factory.mktemp("tasks") / "own")


@pytest.mark.parametrize("chat", [False, True])
def test_a_folder_of_tasks_is_scored_as_hflm_scores_it(runs, tasks, monkeypatch, chat):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _results: None)  # which takes seconds
    result = evaluate_tasks(runs["nf4"], [str(tasks)], fewshot=2, with_base=True, chat=chat)
    assert [model["name"] for model in result["models"]] == ["base", "run"]
    assert result["fewshot"] == {"own_answer": 2, "own_choice": 2}
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    for model in result["models"]:
        theirs = simple_evaluate(
            oracle(runs["nf4"], "nf4", model["name"] == "run"),
            tasks=["own_choice", "own_answer"],
            num_fewshot=2,
            task_manager=manager,
            bootstrap_iters=1000,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )["results"]
        for task, metric in (("own_choice", "acc"), ("own_answer", "exact_match")):
            score = model["scores"][task][metric]
            assert score["value"] == pytest.approx(theirs[task][f"{metric},none"])
            assert score["standard_error"] == pytest.approx(theirs[task][f"{metric}_stderr,none"])
            assert score["examples"] == 16
    assert chat or result["models"][0]["scores"] != result["models"][1]["scores"]


def test_evaluate_prints_and_writes_the_scores_beside_those_of_the_base(runs, tasks, tmp_path, command):
    out = tmp_path / "new" / "scores.json"
    code, printed, err = command(
        "evaluate",
        runs["nf4"],
        "--tasks",
        tasks,
        "--rows",
        6,
        "--fewshot",
        1,
        "--side-by-side",
        "--out",
        out,
        "--chat-template",
    )
    assert code == 0, err
    result = json.loads(out.read_text())
    for task, metric in (("own_choice", "acc"), ("own_answer", "exact_match")):
        scores = [model["scores"][task][metric] for model in result["models"]]
        cells = [f"{each['value']:.4f} ± {each['standard_error']:.4f}" for each in scores]
        assert f"{task}, 1-shot: {metric}" in printed and all(cell in printed for cell in cells)
        assert scores[0]["examples"] == 6
    assert printed.splitlines()[0].split() == ["base", "run"]


def test_a_recipe_and_a_run_without_a_chat_template_are_scored(runs, tasks, tmp_path, command):
    save_tiny(tmp_path / "model", template=None)
    plain = make_run(tmp_path, tmp_path / "model", template=None)
    for arguments in ((plain, "--base"), (tmp_path / "recipe.yaml", "model.quant=none")):
        code, printed, err = command("evaluate", *arguments, "--tasks", f"{tasks}/own_choice.yaml", "--json")
        assert code == 0, err
        [model] = json.loads(printed)["models"]
        assert model["adapter"] is None and model["scores"]["own_choice"]["acc"]["examples"] == 16
    code, _, err = command("evaluate", plain, "--tasks", tasks, "--chat-template")
    assert code == 2 and "no chat template" in err


def test_virtual_tokens_take_their_places_of_the_model_s_length(tasks, tmp_path, command):
    """Of a table of positions, with prompts that are cut to it and are longer than ``data.max_tokens``."""
    run = prompt_tuned(tmp_path, n_positions=128, virtual_tokens=40)
    code, printed, err = command("evaluate", run, "--tasks", tasks, "--fewshot", 15, "--json")
    assert code == 0, err
    [model] = json.loads(printed)["models"]
    assert {name: len(scores) for name, scores in model["scores"].items()} == {"own_choice": 1, "own_answer": 1}


def test_what_cannot_be_scored_is_one_line_before_a_model_is_loaded(runs, tasks, tmp_path, command, monkeypatch):
    monkeypatch.setattr("qlora_lite.inference.harness.load_switched", None)
    hub = task_folder(tmp_path / "hub", dataset_path="owner/name", dataset_kwargs={})
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, words in (
        (hub, "the hub cannot be reached"),
        (empty, "has no task"),
        (tasks / "nosuch", "no such folder"),
        (task_folder(tmp_path / "text", doc_to_text="{{quesion}}"), "UndefinedError 'quesion' is undefined"),
        (task_folder(tmp_path / "target", doc_to_target="{{anser}}"), "UndefinedError 'anser' is undefined"),
        (task_folder(tmp_path / "split", test_split="test"), "KeyError 'test'"),
    ):
        code, out, err = command("evaluate", runs["nf4"], "--tasks", name)
        progress = "Generating train split"  # of the rows that a task has
        assert (code, out) == (2, "") and words in err
        assert len([line for line in err.splitlines() if line and progress not in line]) == 1
    for options in (("--fewshot", 1), ("--tasks", tasks, "--shots", 1), ("--tasks", tasks, "data.max_tokens=9")):
        code, out, err = command("evaluate", runs["nf4"], *options)
        assert (code, out) == (2, "") and "Usage:" in err


def test_an_unknown_task_is_answered_with_the_nearest(runs, tasks, command, monkeypatch):
    few = TaskManager(include_path=str(tasks), include_defaults=False)  # all that the harness has take seconds
    monkeypatch.setattr("qlora_lite.inference.harness.TaskManager", lambda **_: few)
    code, out, err = command("evaluate", runs["nf4"], "--tasks", "own_answer,own_choise")
    assert (code, out) == (2, "") and "did you mean own_choice" in err and len(err.splitlines()) == 1


def test_a_missing_package_is_one_line(runs, tasks, command, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    monkeypatch.delitem(__import__("sys").modules, "qlora_lite.inference.harness")
    code, out, err = command("evaluate", runs["nf4"], "--tasks", tasks)
    assert (code, out) == (2, "") and "pip install 'lm-eval" in err and len(err.splitlines()) == 1
    with pytest.raises(RecipeError, match="needs lm-evaluation-harness"):
        __import__("qlora_lite.inference.harness")


def test_an_answer_ends_with_its_stop_string_in_any_batch(runs, monkeypatch):
    lm, steps = harness(runs["none"]), []
    monkeypatch.setattr("qlora_lite.inference.harness.answered_at_once", lambda *_: 1)
    called = _StopStrings.__call__
    monkeypatch.setattr(_StopStrings, "__call__", lambda *args, **o: steps.append(1) or called(*args, **o))
    free = {"until": [], "max_gen_toks": 24}
    [first] = lm.generate_until(asked([("0?", free)]))
    end = inner_letter(first)
    seconds = [f"a longer one, {letter}, that ends with {end}" for letter in "abcdefgh"]  # no part of the answer
    others = dict(zip(seconds, lm.generate_until(asked([(second, free) for second in seconds])), strict=True))
    second, other = max(others.items(), key=lambda pair: len(pair[1].split(end)[0]))
    assert len(other.split(end)[0]) > 3
    steps.clear()
    cut = lm.generate_until(asked([("0?", free | {"until": [end]}), (second, free | {"until": [end]})]))
    assert cut == [first.split(end)[0], other.split(end)[0]] and cut[0] != first
    assert 0 < len(steps) < 48
