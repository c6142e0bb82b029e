"""Scores of answers: by hand where that can be done, by sacrebleu and rouge-score where those are the definition."""

import json
import logging
import math
import random
from decimal import Decimal

import numpy as np
import pytest

from qlora_lite.data.checks.matching import Matching
from qlora_lite.data.checks.metrics import (
    Measures,
    Score,
    check_packages,
    check_references,
    last_number,
    marked_number,
    mean,
    number_of,
    score_texts,
)
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import RecipeError


def example(answer: str, where: str = "f:1", prompt: str = "p") -> Example:
    return Example(np.zeros(4, np.int32), np.ones(4, bool), prompt, answer, where)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("####72", "72"),
        ("so it is 5.\n####  -3", "-3"),
        ("#### \N{MINUS SIGN}3", "-3"),
        ("#### +3", "3"),
        ("#### 1,200", "1200"),
        ("#### 1,200,000.50", "1200000.5"),
        ("#### 12,00,000", "1200000"),
        ("#### $18", "18"),
        ("#### -$18", "-18"),
        ("#### $-18", "-18"),
        ("#### $ 18.00", "18"),
        ("#### €7", "7"),
        ("#### 72.", "72"),
        ("#### 72. It is", "72"),
        ("#### .5", "0.5"),
        ("#### 0.50", "0.5"),
        ("#### 50%", "50"),
        ("#### 5km", "5"),
        ("#### 72\n#### 80", "72"),
        ("#### 3-5", "3"),
        ("#### 1/2", "1"),
        ("72", None),
        ("", None),
        ("####", None),
        ("#### many, 72", None),
        ("### 72", None),
        ("#### x72", None),
    ],
)
def test_the_number_behind_the_mark(text, number):
    assert marked_number(text) == (number and Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", "72"),
        ("She has 3 + 4 = 7.", "7"),
        ("The answer is 1,200.", "1200"),
        ("it costs $1,234.50!", "1234.5"),
        ("-5", "-5"),
        ("(-5)", "-5"),
        ("x = -5", "-5"),
        ("x - 5", "5"),
        ("3-5", "5"),
        ("from $3-$5", "5"),
        ("\N{MINUS SIGN}5 degrees", "-5"),
        ("+5", "5"),
        ("US$5", "5"),
        ("-$5", "-5"),
        ("5 €", "5"),
        ("£ 5", "5"),
        ("**72**", "72"),
        (r"\boxed{72}", "72"),
        ("72 dollars and no cents", "72"),
        ("is...5", "5"),
        ("pi is 3.14", "3.14"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("in 2020, 300 people", "300"),
        ("10:30", "30"),
        ("1/2", "2"),
        ("5th", "5"),
        ("version 1.5.2", "1.5"),
        ("GPT4 has 7", "7"),
        ("7 of GPT4", "7"),
        ("12,34", "34"),
        ("1,000 of 1,00,000", "100000"),
        ("0.30", "0.3"),
        ("007", "7"),
        ("no number", None),
        ("", None),
        ("x2", None),
        ("-", None),
        (".", None),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == (number and Decimal(number))


def test_a_reference_without_the_mark_states_its_last_number():
    assert number_of("4 + 3 = 7\n#### 7,000") == 7000 and number_of("it is 4, or 5") == 5
    assert number_of("5 #### none") is None  # the mark says that the number is behind it


def test_numbers_match_by_value_strictly_and_flexibly():
    references = ["2 + 3 = 5\n#### 5", "#### 1,200", "7", "#### -2"]
    answers = ["#### 5.0", "it is $1200.00, I think", "#### 8, or 7", "nothing"]
    found = score_texts("number_match", references, answers)
    assert {name: score.value for name, score in found.items()} == {
        "number_match_strict": 1 / 4,
        "number_match_flexible": 3 / 4,
    }
    assert {score.value for score in score_texts("number_match", ["none"], ["none"]).values()} == {0}
    assert found["number_match_strict"].standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 3))


def test_a_mean_has_the_sample_standard_error_and_one_value_has_none():
    values = [random.Random(0).random() for _ in range(50)]
    score = mean(values)
    assert score.value == pytest.approx(np.mean(values))
    assert score.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(50)) and score.examples == 50
    assert mean([0.5]) == Score(0.5, None, 1) and mean([True, True]).standard_error == 0


def test_an_answer_of_a_closed_set_may_differ_in_case_and_end_with_a_dot_and_stands_in_the_last_line():
    references = ["positive", "positive", "<think>\n\n</think>\n\nnegative", "neutral", "positive"]
    answers = [" Positive.", "negative", "it is bad\nNegative", "positive, or neutral", "positive\nbecause"]
    (score,) = score_texts("accuracy", references, answers).values()
    assert score.value == 2 / 5


WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "with", "and", "happy", "quickly"]


def texts(count: int, seed: int) -> tuple[list[str], list[str]]:
    chance = random.Random(seed)
    references = [" ".join(chance.choices(WORDS, k=12)) + "." for _ in range(count)]
    answers = [" ".join(w if chance.random() < 0.7 else chance.choice(WORDS) for w in r.split()) for r in references]
    return references, answers


@pytest.mark.parametrize(("name", "of"), [("bleu", "BLEU"), ("chrf", "CHRF")])
def test_scores_of_a_corpus_are_sacrebleu_s_with_its_signature(name, of, monkeypatch):
    import sacrebleu

    references, answers = texts(40, 0)
    found = score_texts(name, references, answers)[name]
    assert found.value == getattr(sacrebleu, f"corpus_{name}")(answers, [references]).score and found.examples == 40
    assert found.signature.startswith("nrefs:1|case:") and f"version:{sacrebleu.__version__}" in found.signature
    assert score_texts(name, references, answers)[name] == found  # to the bit
    metric = getattr(sacrebleu.metrics, of)()
    draw, many = np.random.default_rng(0).integers, []
    monkeypatch.setattr("qlora_lite.data.checks.metrics._RESAMPLES", 20)
    for _ in range(20):
        drawn = draw(40, size=40)
        many.append(metric.corpus_score([answers[i] for i in drawn], [[references[i] for i in drawn]]).score)
    assert score_texts(name, references, answers)[name].standard_error == pytest.approx(np.std(many, ddof=1))


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_all_references_of_a_prompt_count_as_sacrebleu_counts_them(name):
    import sacrebleu

    (first, answers), (second, _), (third, _) = (texts(6, seed) for seed in range(3))
    one_prompt = [(first[i], answers[i], i) for i in range(6)] + [(second[i], answers[i], i) for i in range(3, 6)]
    one_prompt += [(third[5], answers[5], 5), (third[5], answers[5], 5)]  # the same reference twice is one
    random.Random(0).shuffle(one_prompt)
    order = list(dict.fromkeys(prompt for _, _, prompt in one_prompt))
    columns = [
        [each[i] if i >= known else None for i in order] for known, each in ((0, first), (3, second), (5, third))
    ]
    expected = getattr(sacrebleu, f"corpus_{name}")([answers[i] for i in order], columns)
    found = score_texts(name, *zip(*one_prompt, strict=True))[name]
    assert found.value == pytest.approx(expected.score) and found.examples == 6
    assert found.signature.startswith("nrefs:var|")
    assert found.value > score_texts(name, first, answers)[name].value


def test_the_best_reference_of_a_prompt_counts_for_rouge_and_numbers_and_each_for_accuracy():
    given = (["a cat sat", "the dog ran", "a bird"], ["the dog ran", "the dog ran", "a bird"], [0, 0, 1])
    assert {score.value for score in score_texts("rouge", *given).values()} == {1.0}
    assert {score.examples for score in score_texts("rouge", *given).values()} == {2}
    numbers = score_texts("number_match", ["#### 1", "#### 2"], ["#### 2", "#### 2"], [0, 0])
    assert numbers["number_match_strict"][::2] == (1.0, 1)
    assert score_texts("accuracy", ["yes", "no"], ["no", "no"], [0, 0])["accuracy_generated"].value == 0.5


@pytest.mark.parametrize("name", ["bleu", "chrf", "rouge"])
def test_equal_texts_have_the_best_score_foreign_ones_none_and_a_single_one_no_error(name):
    same = score_texts(name, ["the cat sat on the mat"] * 2, ["the cat sat on the mat"] * 2)
    assert all(score.value in (pytest.approx(100), 1.0) and score.standard_error == 0 for score in same.values())
    none = score_texts(name, ["abc"] * 2, ["xyz"] * 2)
    assert all(score.value == 0 and score.standard_error == 0 for score in none.values())
    assert all(score.standard_error is None for score in score_texts(name, ["a b"], ["a b"]).values())
    empty = score_texts(name, ["the cat sat", "a dog"], ["", "a dog"])
    assert all(math.isfinite(score.value) for score in empty.values())


def test_rouge_is_the_mean_of_rouge_score_s_f_measures():
    from rouge_score.rouge_scorer import RougeScorer

    references, answers = texts(20, 1)
    found = score_texts("rouge", references, answers)
    for kind in ("rouge1", "rouge2", "rougeL"):
        own = [RougeScorer([kind]).score(r, a)[kind].fmeasure for r, a in zip(references, answers, strict=True)]
        assert found[kind].value == pytest.approx(np.mean(own))
        assert found[kind].standard_error == pytest.approx(np.std(own, ddof=1) / math.sqrt(20))
    hand = score_texts("rouge", ["the cat sat"], ["the cat ran away"])  # 2 words of 3 and of 4; the pair "the cat"
    assert hand["rouge1"].value == hand["rougeL"].value == pytest.approx(2 / 3.5)
    assert hand["rouge2"].value == pytest.approx(2 * (1 / 2 * 1 / 3) / (1 / 2 + 1 / 3))


def test_sacrebleu_and_rouge_score_leave_the_log_and_its_handlers_alone():
    import rouge_score.rouge_scorer
    import sacrebleu

    assert rouge_score and sacrebleu and not any("sacrebleu" in str(h) for h in logging.getLogger().handlers)


def test_a_score_is_json_without_what_it_lacks():
    plain = json.loads(json.dumps(Score(0.5, None, 1).as_dict()))
    assert plain == {"value": 0.5, "standard_error": None, "examples": 1}
    assert Score(31.0, 2.0, 9, "nrefs:1").as_dict()["signature"] == "nrefs:1"


def test_a_metric_whose_package_is_missing_names_what_to_install(monkeypatch):
    check_packages(["exact_match", "bleu", "rouge"])
    monkeypatch.setattr("qlora_lite.data.checks.metrics.find_spec", lambda name: None)
    check_packages(["exact_match", "number_match", "accuracy", "answer_loss"])
    with pytest.raises(RecipeError) as caught:
        check_packages(["bleu", "rouge"])
    assert str(caught.value) == (
        "train.metrics: bleu, rouge needs rouge-score and sacrebleu, which is not installed; "
        "pip install 'sacrebleu<3,>=2.4' 'rouge-score<0.2,>=0.1.2'"
    )


def problems(measures: Measures, *answers: str) -> tuple[list[str], bool]:
    found, is_error = check_references([example(a, f"f:{n}") for n, a in enumerate(answers, 1)], measures)
    return [str(problem) for problem in found], is_error


def test_references_without_a_number_are_left_out_and_an_error_where_none_has_one():
    measures = Measures(("number_match",))
    (said,), is_error = problems(measures, "#### 5", "none")
    assert said.startswith("f:2: the answers of 1 of 2 examples, this one's ending 'none', hold no number")
    assert not is_error and [measures.can_compare(example(a)) for a in ("#### 5", "none", " ")] == [True, False, False]
    assert problems(measures, "none", "x")[1]
    pattern = Measures(("bleu",), Matching("#### (.*)"))  # which is of exact match alone
    assert problems(pattern, "text") == ([], False) and pattern.can_compare(example("text"))


@pytest.mark.parametrize(
    ("choices", "answers", "said"),
    [
        (None, [str(n) for n in range(33)], "33 compared answers are 33 different ones, not a closed set"),
        (None, ["yes", "yes"], "every compared answer is 'yes'"),
        (None, ["yes", "Yes."], "differ only in case or in a dot"),
        (("yes", "no"), ["yes", "maybe"], "'maybe' of f:2 is not in train.metrics_choices (yes, no)"),
        (("yes", "no"), ["yes", "yes"], None),
        (None, ["yes", "no", "<think>\nwell\n</think>\nno"], None),
    ],
)
def test_answers_that_are_of_no_closed_set_are_an_error(choices, answers, said):
    found, is_error = problems(Measures(("accuracy",), choices=choices), *answers)
    assert is_error == bool(said) and (said is None or said in found[-1])


def test_rouge_of_texts_without_a_letter_that_it_knows_is_an_error():
    found, is_error = problems(Measures(("rouge",)), "猫はマットの上", "犬")
    assert is_error and "use chrf" in found[0]
    assert problems(Measures(("chrf",)), "猫はマットの上") == ([], False)


def test_plain_text_has_no_reference():
    found, is_error = check_references([example("", prompt="")], Measures(("answer_loss",)))
    assert is_error and "has no answer to match" in str(found[0])
