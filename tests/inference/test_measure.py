"""What is measured by likelihood against plain transformers, example by example, and what few-shot prompts hold."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import build_tiny
from tiny_files import VOCABULARY, byte_tokenizer, write_recipe

from qlora_lite.data.chat.template import NAMED_TEMPLATES
from qlora_lite.data.checks.metrics import Measures
from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens.examples import build_examples
from qlora_lite.errors import DataError
from qlora_lite.inference.evaluate import losses_by, measure
from qlora_lite.inference.few_shot import with_shots
from qlora_lite.inference.generate import Answer
from qlora_lite.models.load import use_row_attention
from qlora_lite.prepare.datasets import build_data
from qlora_lite.prepare.settings import train_settings
from qlora_lite.recipe.load import load_recipe, recipe_of
from qlora_lite.train.causal_lm import causal_lm

CHOICES = ("may", "not", "yes")  # of as many tokens, or the shortest would always be the likeliest
END = 4  # <|im_end|>
ROWS = [("is it?", "yes"), ("it is a longer question?", "not"), ("hm", "may"), ("is it?!", "not"), ("?", "yes")]


def examples_of(tokenizer, rows=ROWS, **options):
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in rows]
    return build_examples([Source("rows", rows=rows)], tokenizer, **options)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_tiny("llama", vocab_size=VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():  # so that likelihoods differ by more than rounding
            parameter.mul_(3)
    use_row_attention(model)
    return model


@pytest.fixture(scope="module")
def losses(model):
    said = {"model": {"path": "x"}, "data": {"train": "x", "max_tokens": 96}, "train": {"learning_rate": 1e-3}}
    settings = train_settings(recipe_of(said, (), "x"))
    return losses_by(causal_lm(), model, settings)


def plain_loss(model, ids: list[int], targets: int) -> list[float]:
    """Return the losses of the last tokens, of plain transformers and one sequence alone."""
    plain = build_tiny("llama", vocab_size=VOCABULARY).double()
    plain.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    found = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    return found[-targets:].tolist()


def test_the_losses_of_examples_in_one_pack_are_those_of_each_alone(model, losses):
    data = examples_of(byte_tokenizer(), train_on="all")
    found = losses(data.examples)
    assert [len(each) for each in found] == [len(example.token_ids) - 1 for example in data.examples]
    for example, own in zip(data.examples, found, strict=True):
        assert own == pytest.approx(plain_loss(model, example.token_ids.tolist(), len(own)), rel=1e-4)


@pytest.mark.parametrize("train_on_end", [True, False])
def test_accuracy_and_answer_loss_are_those_of_plain_transformers(model, losses, train_on_end):
    tokenizer = byte_tokenizer()
    data = examples_of(tokenizer, train_on_end=train_on_end)
    measures = Measures(("answer_loss", "accuracy", "exact_match"))
    found = measure(model, tokenizer, data.examples, {END}, losses, measures=measures, new_tokens=4)
    likeliest, own_loss = [], []
    for example in data.examples:
        sums = {}
        for choice in CHOICES:
            ids = tokenizer(f"{example.prompt}{choice}", add_special_tokens=False).input_ids
            each = plain_loss(model, [*ids, END] if train_on_end else ids, len(choice) + train_on_end)
            sums[choice] = sum(each)
            own_loss += [np.mean(each)] if choice == example.answer else []
        likeliest.append(min(sums, key=sums.get))
    assert [record["likeliest"] for record in found.records] == likeliest and len(set(likeliest)) > 1
    assert [record["answer_loss"] for record in found.records] == pytest.approx(own_loss, rel=2e-5)
    right = [a == b for a, (_, b) in zip(likeliest, ROWS, strict=True)]
    assert found.scores["accuracy_likelihood"].value == np.mean(right)
    assert list(found.scores) == ["answer_loss", "accuracy_likelihood", "accuracy_generated", "exact_match"]


def test_all_answers_of_a_closed_set_end_with_the_white_space_that_the_row_ends_with(model):
    """Else the one whose rows end so would be told by its end."""
    tokenizer, seen = byte_tokenizer(), []

    def losses(examples):
        seen.extend(tokenizer.decode(example.token_ids).rpartition("assistant\n")[2] for example in examples)
        return [[0.0] for _ in examples]

    data = examples_of(tokenizer, [("is it?", "yes\n"), ("and now?", " no \n")])
    measure(model, tokenizer, data.examples, {END}, losses, measures=Measures(("accuracy",)), new_tokens=1)
    ends = "<|im_end|>"
    assert sorted(seen) == sorted([f"yes\n{ends}", f"no\n{ends}", f" yes \n{ends}", f" no \n{ends}"])


def test_of_a_conversation_the_last_answer_counts_and_is_replaced(model, losses):
    tokenizer = byte_tokenizer()
    turns = [("user", "a?"), ("assistant", "no"), ("user", "b?")]
    rows = [
        {"messages": [{"role": r, "content": c} for r, c in (*turns, ("assistant", last))]} for last in ("yes", "no")
    ]
    data = build_examples([Source("rows", rows=rows)], tokenizer)
    found = measure(model, tokenizer, data.examples, {END}, losses, measures=Measures(("answer_loss", "accuracy")))
    for record, example in zip(found.records, data.examples, strict=True):
        ids = tokenizer(f"{example.prompt}{example.answer}<|im_end|>", add_special_tokens=False).input_ids
        assert record["answer_loss"] == pytest.approx(
            np.mean(plain_loss(model, ids, len(example.answer) + 1)), rel=2e-5
        )


def test_a_choice_stands_where_the_answer_stood_behind_reasoning(model):
    asked, tokenizer = [], byte_tokenizer()
    rows = [("a", "<think>\n\n</think>\n\nyes"), ("b", "<think>\nwell\n</think>\nno")]

    def losses(examples):
        asked.extend(tokenizer.decode(e.token_ids) for e in examples)
        return [[0.0] for _ in examples]

    measure(
        model,
        tokenizer,
        examples_of(tokenizer, rows).examples,
        {END},
        losses,
        measures=Measures(("accuracy",)),
        new_tokens=1,
    )
    answers = [text.partition("assistant\n")[2] for text in asked]
    assert answers == [
        "<think>\n\n</think>\n\nno<|im_end|>",
        "<think>\n\n</think>\n\nyes<|im_end|>",
        "<think>\nwell\n</think>\nno<|im_end|>",
        "<think>\nwell\n</think>\nyes<|im_end|>",
    ]


def test_equal_prompts_are_answered_once_and_scored_against_all_their_references(model, monkeypatch):
    asked = []

    def answers(_model, _tokenizer, prompts, *_, **_options):
        asked.append(prompts)
        return [Answer("not", "stop", (1,))] * len(prompts)

    monkeypatch.setattr("qlora_lite.inference.evaluate.answers", answers)
    tokenizer = byte_tokenizer()
    data = examples_of(tokenizer, [("is it?", "yes"), ("hm", "may"), ("is it?", "not")])
    found = measure(model, tokenizer, data.examples, data.end_token_ids, measures=Measures(("exact_match", "bleu")))
    assert asked == [[data.examples[0].prompt, data.examples[1].prompt]]
    assert found.answers == ("not",) * 3 and found.matches == (False, False, True)
    assert found.scores["exact_match"][::2] == (0.5, 2) and found.scores["bleu"].examples == 2
    assert found.figures()["metrics_prompts"] == 2 and found.compared == "2 prompts with 3 examples"


def test_metrics_of_likelihood_alone_generate_nothing(model, losses, monkeypatch):
    monkeypatch.setattr(model, "generate", None)
    data = examples_of(byte_tokenizer())
    found = measure(model, byte_tokenizer(), data.examples, {END}, losses, measures=Measures(("answer_loss",)))
    assert found.answers == () and found.scores["answer_loss"].examples == 5 and len(found.records) == 5


def test_a_choice_that_changes_the_tokens_of_the_prompt_is_an_error(model, losses):
    tokenizer = byte_tokenizer(merges=(("t", "h"), ("th", "e")))
    tokenizer.chat_template = NAMED_TEMPLATES["joined"]
    measures = Measures(("accuracy",), choices=("a", "he"))
    with pytest.raises(DataError, match="before the answer 'he' of the closed set, the prompt has other tokens"):
        measure(model, tokenizer, examples_of(tokenizer, [("t", "a")]).examples, {2}, losses, measures=measures)


# --- few-shot


@pytest.fixture
def recipe(tmp_path):
    def load(**sections):
        (tmp_path / "model").mkdir(exist_ok=True)
        return load_recipe(write_recipe(tmp_path, tmp_path / "model", **sections), check_files=False)

    return load


def test_few_shot_prompts_begin_with_the_same_training_examples_and_keep_place_and_answer(recipe, tmp_path):
    tokenizer, r = byte_tokenizer(), recipe()
    data = build_data(r, tokenizer, "eval")
    found = with_shots(r, tokenizer, data, 2)
    assert [(e.where, e.answer) for e in found.examples] == [(e.where, e.answer) for e in data.examples]
    heads = {e.prompt.removesuffix(own.prompt) for e, own in zip(found.examples, data.examples, strict=True)}
    (head,) = heads
    train = {json.loads(line)["messages"][0]["content"] for line in Path(r.data.train[0].path).read_text().splitlines()}
    assert head.count("<|im_start|>user\n") == head.count("<|im_start|>assistant\n") == 2
    assert all(turn.partition("<")[0] in train for turn in head.split("<|im_start|>user\n")[1:])
    assert all(e.is_target.sum() == own.is_target.sum() for e, own in zip(found.examples, data.examples, strict=True))
    other = with_shots(recipe(train={"seed": 1}), tokenizer, data, 2)
    assert other.examples[0].prompt != found.examples[0].prompt
    (tmp_path / "eval.jsonl").write_text('{"text": "one two"}\n')
    with pytest.raises(DataError, match=r"--shots 2: the evaluation data has no prompts with answers"):
        with_shots(r, tokenizer, build_data(r, tokenizer, "eval"), 2)


def test_few_shot_examples_are_not_those_that_are_measured_and_come_behind_the_system_turn(recipe, tmp_path):
    tokenizer = byte_tokenizer()
    r = recipe(data={"eval": None, "eval_share": 0.5}, rows=8)
    data = build_data(r, tokenizer, "eval")
    held = {example.answer for example in data.examples}
    shown = with_shots(r, tokenizer, data, 8 - len(data.examples)).examples[0].prompt
    assert not any(f"assistant\n{answer}<" in shown for answer in held)
    with pytest.raises(DataError, match=r"--shots 8: data\.train has"):
        with_shots(r, tokenizer, data, 8)
    r = recipe()
    rows = [
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
            ]
        }
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (example,) = with_shots(r, tokenizer, build_data(r, tokenizer, "eval"), 1).examples
    assert example.prompt.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n") and example.answer == "a"
