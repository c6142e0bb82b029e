"""Many rows marked at once have the marks, and the errors, of each one by the rules for one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenise import special, trimming_tokenizer, with_tokens, words_tokenizer
from tiny_tokenizer import make_tokenizer
from tokenizers import normalizers, pre_tokenizers

from qlora_lite.data.chat.template import choose_template
from qlora_lite.data.tokens.mask import Row, mark_row, mark_rows, tokenise
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import DataError

TOKENIZERS = {
    "byte level": make_tokenizer(),
    "offsets without spaces": trimming_tokenizer(),
    "white space after": with_tokens(special("<|x|>", rstrip=True)),
    "white space before": with_tokens(special("<|x|>", lstrip=True)),
    "a space before": words_tokenizer(pre_tokenizer=pre_tokenizers.Metaspace()),
    "pieces stripped": words_tokenizer(normalizers.Strip()),
}
letters = st.sampled_from(
    ["a", "user", " ", "\n", "ä", "<", "🙂", "</s>", "<|im_start|>", "<|im_end|>", "<|x|>", "answer"]
)


@st.composite
def rows(draw):
    """Draw a text and spans of it; mostly such that an answer follows a special token and ends with one."""
    words = draw(st.lists(letters, min_size=1, max_size=10))
    text, borders = "".join(words), np.cumsum([0, *map(len, words)]).tolist()
    cuts = st.sampled_from(borders) if draw(st.booleans()) else st.integers(0, len(text))
    places = sorted(draw(st.lists(cuts, min_size=2, max_size=6, unique=True) if len(text) > 1 else st.just([0, 1])))
    spans = tuple(zip(places[::2], places[1::2], strict=False))
    is_target = ((0, len(text)),) if draw(st.booleans()) else spans
    return Row(text, is_target, spans, f"f:{draw(st.integers(1, 9))}")


@st.composite
def good_rows(draw):
    """Draw a row as a chat template writes it."""
    text, spans = "", []
    for _ in range(draw(st.integers(1, 3))):
        text += "<|im_start|>" + "".join(draw(st.lists(st.sampled_from(["a", "user", "\n", "ä"]), max_size=3))) + "</s>"
        first, text = len(text), text + draw(st.sampled_from(["a", "user answer", "🙂"])) + "</s>"
        spans.append((first, len(text)))
        text += draw(st.sampled_from(["", "\n"]))
    is_target = draw(st.sampled_from([tuple(spans), tuple(spans[-1:]), ((0, len(text)),)]))
    return Row(text, is_target, tuple(spans), "f:1")


def one_by_one(given_rows, template, train_on_end):
    made, ends = [], set()
    for row, tokens in zip(given_rows, tokenise([row.text for row in given_rows], template.tokenizer), strict=True):
        try:
            is_target, of_row = mark_row(row, tokens, template, train_on_end)
        except DataError as error:
            made.append((str(error), error.rule))
            continue
        ends.update(tokens.ids[of_row].tolist())
        first = row.answers[-1][0]
        answer = template.special.sub("", row.text[first : tokens.starts[of_row[-1]]])
        made.append((as_lists(Example(tokens.ids, is_target, row.text[:first], answer, row.where)), of_row[-1] + 1))
    return made, ends


def as_lists(example):
    return example.token_ids.tolist(), example.is_target.tolist(), example.prompt, example.answer, example.where


def at_once(given_rows, template, train_on_end):
    made, ends = mark_rows(given_rows, template, train_on_end)
    return [
        (str(row), row.rule) if isinstance(row, DataError) else (as_lists(row.example), row.answered) for row in made
    ], ends


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(given_rows=st.lists(rows() | good_rows(), min_size=1, max_size=6), train_on_end=st.booleans())
def test_rows_at_once_are_those_one_by_one(name, given_rows, train_on_end):
    template = choose_template(TOKENIZERS[name])
    assert at_once(given_rows, template, train_on_end) == one_by_one(given_rows, template, train_on_end)


def test_good_rows_need_no_second_look(monkeypatch, tokenizer):
    template = choose_template(tokenizer)
    row = Row("<|im_start|>user\na</s>user answer</s>\n", ((22, 37),), ((22, 37),), "f:1")
    expected = one_by_one([row, row], template, True)

    def fail(*_):
        raise AssertionError("a row was looked at twice")

    monkeypatch.setattr("qlora_lite.data.tokens.mask.mark_row", fail)
    assert at_once([row, row], template, True) == expected
    with pytest.raises(AssertionError, match="looked at twice"):
        at_once([row, Row("<|im_start|>a b", ((13, 14),), ((13, 14),), "f:2")], template, True)


HEAD = "<|im_start|>user</s>a</s>"
LAST = ((20, 25),)


@pytest.mark.parametrize(
    ("name", "given_rows"),
    [
        ("byte level", [Row(HEAD, ((14, 20), *LAST), LAST, "f:1")]),  # begins within "user"
        ("byte level", [Row(HEAD, ((12, 14), *LAST), LAST, "f:1")]),  # ends within it
        ("offsets without spaces", [Row(HEAD + " ", ((0, 26),), LAST, f"f:{line}") for line in (1, 2)]),
    ],
)
def test_a_token_at_the_border_of_a_span_or_row_is_marked_as_by_the_rules_for_one(name, given_rows):
    template = choose_template(TOKENIZERS[name])
    assert at_once(given_rows, template, True) == one_by_one(given_rows, template, True)
