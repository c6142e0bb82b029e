"""Rows of texts with labels: what is recognised, how texts become tokens, what labels are called, and scores."""

import json

import numpy as np
import pytest
from tiny_files import byte_tokenizer
from tiny_heads import encoder_tokenizer, write_jsonl

from qlora_lite.data.labelled_rows import LabelReader, encode_texts, read_labelled, shortened
from qlora_lite.data.labels import LABELS, NUMBER, ONE_LABEL, balance, label_names, label_text, target_of
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens.examples import read_examples
from qlora_lite.data.tokens.statistics import ReadSettings
from qlora_lite.errors import DataError
from qlora_lite.ext.heads.metrics import confusion, correlation, f1, matthews, probabilities, ranks, scores_of


def read(rows, problem=ONE_LABEL, tokenizer=None, **how):
    source = {name: how.pop(name) for name in ("prompt", "completion", "format") if name in how}
    tokenizer = tokenizer or encoder_tokenizer()
    return read_examples([Source("mine", rows=rows, **source)], tokenizer, ReadSettings(**how), LabelReader(problem))


@pytest.mark.parametrize(
    ("row", "text", "label"),
    [
        ({"sentence": "hi", "label": 1, "idx": 3}, "hi", "1"),
        ({"text": "hi", "label": "good"}, "hi", "good"),
        ({"premise": "a", "hypothesis": "b", "label": 0}, "a\nb", "0"),
        ({"sentence1": "a", "sentence2": "b", "label": 2.0}, "a\nb", "2"),
        ({"question": "a", "sentence": "b", "label": True}, "a\nb", "true"),
        ({"question1": "a", "question2": "b", "label": "x "}, "a\nb", "x"),
        ({"review": "hi", "stars": 4}, "hi", "4"),
    ],
)
def test_the_rows_of_common_sets_are_taken_as_they_are(row, text, label):
    (example,) = read([row]).examples
    assert (example.prompt, example.answer) == (text, label)
    assert example.is_target.tolist() == [False] * (len(example.token_ids) - 1) + [True]


def test_columns_are_named_by_templates():
    rows = [{"subject": "s", "body": "b", "topic": "news"}]
    (example,) = read(rows, prompt="{subject}: {body}", completion="{topic}").examples
    assert (example.prompt, example.answer) == ("s: b", "news")


def test_a_csv_and_a_tsv_are_read_with_their_labels(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"a, b",good\nc,bad\n')
    (tmp_path / "b.tsv").write_text("sentence\tlabel\nd\t1\n")
    sources = [Source(str(tmp_path / "a.csv")), Source(str(tmp_path / "b.tsv"))]
    found = read_examples(sources, encoder_tokenizer(), reader=LabelReader(ONE_LABEL))
    assert [(e.prompt, e.answer) for e in found.examples] == [("a, b", "good"), ("c", "bad"), ("d", "1")]
    assert found.examples_of == (2, 1) and found.problems.count == 0


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"text": "a", "label": None}, "the label is missing or null"),
        ({"text": "a", "label": -1}, "the label -1 marks a row without one"),
        ({"text": "a", "label": ""}, "the label is empty"),
        ({"text": "a", "label": [1]}, "the label is a list, not a name or number"),
        ({"text": "a", "label": float("nan")}, "the label is nan, not a name or a finite number"),
        ({"text": "a", "label": float("-inf")}, "the label is -inf, not a name or a finite number"),
        ({"text": "", "label": 1}, "'text' is empty"),
        ({"text": None, "label": 1}, "'text' is missing or null"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row, fault):
    found = read([{"text": "good", "label": 1}, row])
    assert len(found.examples) == 1
    assert f"{found.problems.found[0].where}: {found.problems.found[0].message}".startswith(f"mine:2: {fault}")


def test_columns_that_nobody_knows_are_asked_for():
    with pytest.raises(DataError, match=r"no text is recognised among the columns 'x', 'label'; name them with prompt"):
        list(read_labelled(Source("mine", rows=[{"x": "a", "label": 1}]), Problems(), ONE_LABEL))
    with pytest.raises(DataError, match="no label is recognised among the columns 'text'"):
        list(read_labelled(Source("mine", rows=[{"text": "a"}]), Problems(), ONE_LABEL))
    with pytest.raises(DataError, match="format messages is of rows for a language model"):
        list(read_labelled(Source("mine", "messages", rows=[{"text": "a", "label": 1}]), Problems(), ONE_LABEL))
    rows = list(read_labelled(Source("mine", rows=[{"text": "a"}]), Problems(), ONE_LABEL, needs_label=False))
    assert rows[0].label is None


@pytest.mark.parametrize(
    ("problem", "value", "label"),
    [
        (ONE_LABEL, -1, None),
        (ONE_LABEL, "-1", None),
        (ONE_LABEL, " ", None),
        (ONE_LABEL, 0, "0"),
        (NUMBER, -1, "-1.0"),
        (NUMBER, "", None),
        (LABELS, "", "[]"),
        (ONE_LABEL, float("nan"), None),
        (NUMBER, float("nan"), None),
        (LABELS, float("nan"), None),
    ],
)
def test_rows_that_need_no_label_may_have_what_test_sets_have_in_its_place(problem, value, label):
    rows, problems = [{"text": "a", "label": value}, {"text": "b", "label": None}], Problems()
    found = list(read_labelled(Source("mine", rows=rows), problems, problem, needs_label=False))
    assert [each.label for each in found] == [label, None] and not problems.count


def test_labels_of_several_and_numbers_are_text_too():
    assert label_text(["b", "a"], LABELS) == '["a", "b"]' == label_text("b, a", LABELS)
    assert label_text([], LABELS) == label_text("", LABELS) == "[]"
    assert label_text(3, NUMBER) == label_text("3.0", NUMBER) == "3.0"
    for value in ("three", float("nan"), True, [1]):
        with pytest.raises(DataError, match="not a finite number"):
            label_text(value, NUMBER)


@pytest.mark.parametrize(
    "text",
    [
        "['joy', 'anger']",
        '["joy", "anger"]',
        " [\"joy\", 'anger'] ",
        "['anger',\n 'joy']",
        "joy, anger",
    ],
)
def test_a_list_written_out_in_a_cell_is_a_list(text):
    assert label_text(text, LABELS) == '["anger", "joy"]'
    assert label_text("[]", LABELS) == label_text(" [] ", LABELS) == "[]"
    assert label_text("['it, too']", LABELS) == '["it, too"]' and label_text("[3]", LABELS) == '["3"]'


@pytest.mark.parametrize(
    "text",
    [
        "[joy]",
        "[joy, anger]",
        "['joy' 'anger']",
        "[a], [b]",
        "['a'], ['b']",
        "[1, NaN]",
        "[" * 9999 + "]" * 9999,
    ],
)
def test_a_list_that_cannot_be_read_is_an_error_and_no_name(text):
    with pytest.raises(DataError, match="the labels"):
        label_text(text, LABELS)


def test_a_csv_of_lists_as_pandas_writes_it_has_their_names(tmp_path):
    (tmp_path / "a.csv").write_text("text,labels\na,\"['joy', 'anger']\"\nb,['joy']\nc,[]\nd,[joy]\n")
    found = read_examples([Source(str(tmp_path / "a.csv"))], encoder_tokenizer(), reader=LabelReader(LABELS))
    assert label_names(found.examples, LABELS) == ("anger", "joy")
    assert [example.answer for example in found.examples] == ['["anger", "joy"]', '["joy"]', "[]"]
    (problem,) = found.problems.found
    assert problem.where.endswith("a.csv:5") and "'[joy]'" in problem.message


@pytest.mark.parametrize("value", [[1.0, 0.0, 1.0], [0, 0], [True, True], "0,1,0", "[0, 1, 0]", ["b", "a", "b"]])
def test_a_name_that_stands_twice_is_an_error_since_zeros_and_ones_are_no_names(value):
    with pytest.raises(DataError, match=r"stands twice; write the names of the row's classes, .* zeros and ones"):
        label_text(value, LABELS)


def test_names_stand_in_order_numbers_first_by_size():
    found = read([{"text": "a", "label": label} for label in ("10", "9", "b", "a", 9)]).examples
    assert label_names(found, ONE_LABEL) == ("9", "10", "a", "b")
    others = read([{"text": "a", "label": label} for label in ("3", "nan", "inf", "1", "2")]).examples
    assert label_names(others, ONE_LABEL) == ("1", "2", "3", "inf", "nan"), "whatever the order of a set is"
    numbers = {"9": 0, "10": 1, "a": 2, "b": 3}
    assert [target_of(example, ONE_LABEL, numbers) for example in found] == [1, 0, 3, 2, 0]
    several = read([{"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": []}], LABELS).examples
    assert [target_of(e, LABELS, {"x": 0, "y": 1, "z": 2}) for e in several] == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_tokens_are_those_of_transformers_own_call():
    tokenizer = encoder_tokenizer()
    pair = read([{"premise": "ab", "hypothesis": "c", "label": 0}]).examples[0]
    assert pair.token_ids.tolist() == tokenizer("ab", "c").input_ids
    alone = read([{"text": "ab", "label": 0}]).examples[0]
    assert alone.token_ids.tolist() == tokenizer("ab").input_ids
    plain = byte_tokenizer(None)  # without a separator a pair is one text
    joined = read([{"premise": "ab", "hypothesis": "c", "label": 0}], tokenizer=plain).examples[0]
    assert joined.token_ids.tolist() == plain("ab\nc").input_ids


def test_a_special_token_in_a_text_stays_letters_and_the_tokenizer_as_it_was():
    tokenizer = encoder_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(7)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    before = tokenizer.backend_tokenizer.to_str()
    (example,) = read([{"text": "a[SEP]b and more", "label": 0}], tokenizer=tokenizer).examples
    assert (example.token_ids == 2).sum() == 1 and len(example.token_ids) == 2 + len("a[SEP]b and more")
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize(("first", "second"), [("a" * 20, "b" * 4), ("a" * 12, "b" * 11), ("a" * 3, "b" * 30)])
def test_long_pairs_are_cut_as_transformers_cuts_them(first, second):
    tokenizer = encoder_tokenizer()
    for most in (8, 9, 16):
        (encoding,) = encode_texts([(first, second)], tokenizer)
        expected = tokenizer(first, second, truncation="longest_first", max_length=most).input_ids
        assert shortened(encoding, most) == expected, most
    rows = [{"sentence1": first, "sentence2": second, "label": 1}]
    cut = read(rows, max_tokens=16, overflow="truncate")
    assert cut.truncated == 1 and len(cut.examples[0].token_ids) == 16
    assert read(rows, max_tokens=16, overflow="drop").dropped["longer than max_tokens"] == 1
    assert "mine:1" in read(rows, max_tokens=16).problems.found[0].message


def test_rows_are_cached_by_what_their_labels_are_for(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": 1}])
    sources, cache = [Source(str(path))], tmp_path / "cache"
    one = read_examples(sources, encoder_tokenizer(), reader=LabelReader(ONE_LABEL), cache=cache).examples[0].answer
    number = read_examples(sources, encoder_tokenizer(), reader=LabelReader(NUMBER), cache=cache).examples[0].answer
    assert (one, number) == ("1", "1.0")
    again = read_examples(sources, encoder_tokenizer(), reader=LabelReader(ONE_LABEL), cache=cache).examples[0]
    assert (again.answer, again.prompt) == ("1", "a")


def test_balance_says_what_the_commonest_label_alone_reaches():
    rows = [{"text": "a", "label": label} for label in ("x", "x", "x", "y")]
    assert balance(read(rows).examples, ONE_LABEL) == {"counts": {"x": 3, "y": 1}, "baseline_accuracy": 0.75}
    found = balance(read([{"text": "a", "label": value} for value in (1, 3)], NUMBER).examples, NUMBER)
    assert found == {"mean": 2.0, "standard_deviation": 1.0, "smallest": 1.0, "largest": 3.0}


def test_scores_of_one_label_are_those_of_their_definitions():
    """By hand: F1 of 2/3, 2/3 and 3/4; Matthews' (7 * 10 - 34) / (100 - 34)."""
    there = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 1])
    given = np.array([0, 0, 1, 1, 2, 2, 2, 0, 2, 1])
    matrix = confusion(given, there, 3)
    assert matrix.tolist() == [[2, 1, 0], [0, 2, 1], [1, 0, 3]]
    outputs = np.eye(3)[given]
    scores = {name: score.value for name, score in scores_of(outputs, there, ONE_LABEL).items()}
    assert scores == pytest.approx({"accuracy": 0.7, "f1_macro": (2 / 3 + 2 / 3 + 3 / 4) / 3, "matthews": 36 / 66})
    binary = scores_of(np.array([[0.0, 1], [1, 0], [0, 1], [0, 1]]), np.array([1, 1, 0, 1]), ONE_LABEL)
    assert binary["f1_binary"].value == pytest.approx(2 / 3) and binary["matthews"].value == pytest.approx(-1 / 3)
    assert matthews(np.array([[4, 0], [4, 0]])) == 0.0 and f1(0, 0, 0) == 0.0


def test_correlations_are_those_of_numpy_and_of_ranks_with_ties():
    chance = np.random.default_rng(0)
    one, other = chance.normal(size=50), chance.normal(size=50)
    assert correlation(one, other) == pytest.approx(np.corrcoef(one, other)[0, 1])
    assert ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert correlation(np.ones(3), np.arange(3.0)) == 0.0
    scores = scores_of(np.array([[1.0], [2.0], [4.0], [4.0]]), np.array([1.0, 3.0, 3.0, 9.0]), NUMBER)
    assert scores["spearman"].value == pytest.approx(0.8333333333333334)
    assert scores["rmse"].value == pytest.approx(np.sqrt((0 + 1 + 1 + 25) / 4))


def test_several_labels_are_scored_by_each_and_all():
    outputs, there = np.array([[1.0, -1, 1], [1, 1, -1]]), np.array([[1.0, 0, 0], [1, 1, 0]])
    scores = {name: score.value for name, score in scores_of(outputs, there, LABELS).items()}
    assert scores == pytest.approx({"accuracy": 0.5, "f1_macro": 2 / 3, "f1_micro": 6 / 7})


def test_probabilities_are_softmax_or_logistic_and_never_overflow():
    outputs = np.array([[1000.0, 999.0], [-1000.0, 0.0]])
    assert probabilities(outputs, ONE_LABEL) == pytest.approx(np.array([[0.7310586, 0.2689414], [0.0, 1.0]]))
    assert probabilities(outputs, LABELS) == pytest.approx(np.array([[1.0, 1.0], [0.0, 0.5]]))
    assert json.dumps(probabilities(outputs, LABELS).tolist())
