"""Which tokens are learned, against references that decode or look at one token at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import SPECIAL_TOKENS, make_tokenizer

from qlora_lite.data.chat.conversation import Conversation, Turn
from qlora_lite.data.chat.template import choose_template
from qlora_lite.data.tokens.mask import render_row, seam_fault, target_mask, tokenise
from qlora_lite.errors import DataError

TOKENIZERS = {adds_begin: make_tokenizer(adds_begin=adds_begin) for adds_begin in (False, True)}
END = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "alpaca": "</s>",
    "plain": "</s>",
}


def is_usable(text):
    return text and not any(token in text for token in SPECIAL_TOKENS)


words = st.text(alphabet="ab \n4ä🙂<|>user", min_size=1, max_size=12).map(str.strip).filter(is_usable)


@st.composite
def conversations(draw):
    turns = [Turn("system", draw(words))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [Turn("user", draw(words)), Turn("assistant", draw(words), is_target=draw(st.booleans()))]
    return Conversation(tuple(turns), "f:1")


def learned_runs(ids, is_target):
    """Split the tokens into runs of learned ones."""
    runs, previous = [], False
    for token, is_one in zip(ids, is_target, strict=True):
        if is_one and not previous:
            runs.append([])
        if is_one:
            runs[-1].append(int(token))
        previous = is_one
    return runs


@given(conversations(), st.sampled_from(sorted(END)), st.sampled_from(["assistant", "last"]), st.booleans())
def test_learned_tokens_decode_to_the_answers_and_their_end_tokens(conversation, name, train_on, adds_begin):
    tokenizer = TOKENIZERS[adds_begin]
    answers = [turn for turn in conversation.turns if turn.role == "assistant"]
    wanted = answers[-1:] if train_on == "last" else answers
    expected = [turn.content + END[name] for turn in wanted if turn.is_target]
    template = choose_template(tokenizer, name)
    if not expected:
        with pytest.raises(DataError, match="weight 0"):
            render_row(conversation, template, train_on)
        return
    row = render_row(conversation, template, train_on)
    (tokens,) = tokenise([row.text], tokenizer)
    is_target = target_mask(tokens.starts, tokens.ends, row.targets, row.text)
    assert [tokenizer.decode(run) for run in learned_runs(tokens.ids, is_target)] == expected
    assert tokenizer.decode(tokens.ids) == row.text
    assert seam_fault(row, tokens, template) is None
    prompt_ids = tokenizer(row.text[: row.answers[-1][0]], add_special_tokens=False)["input_ids"]
    assert tokens.ids[: len(prompt_ids)].tolist() == prompt_ids


@st.composite
def cut_texts(draw):
    """Draw a text cut into tokens, and spans in it."""
    text = draw(st.text(alphabet="a ", min_size=1, max_size=20))
    cuts = sorted({0, len(text), *draw(st.lists(st.integers(0, len(text)), max_size=10))})
    borders = sorted(draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=6, unique=True)))
    spans = list(zip(borders[::2], borders[1::2], strict=False))
    return text, np.array(cuts[:-1]), np.array(cuts[1:]), spans


def slow_mask(text, starts, ends, spans):
    """Look at each token and each of its characters; None if a token is torn, or nothing is learned."""
    mask = []
    for start, end in zip(starts, ends, strict=True):
        inside = [any(first <= c < last for first, last in spans) for c in range(start, end)]
        if any(inside) and not all(inside):
            spaces_only = inside[0] and all(c.isspace() for c, i in zip(text[start:end], inside, strict=True) if not i)
            if not spaces_only or any(start < first < end for first, _ in spans):
                return None
        mask.append(any(inside))
    mask[0] = False
    return mask if any(mask) else None


@given(cut_texts())
def test_the_mask_is_that_of_a_look_at_every_character(cut):
    text, starts, ends, spans = cut
    expected = slow_mask(text, starts, ends, spans)
    if expected is None:
        with pytest.raises(DataError):
            target_mask(starts, ends, spans, text)
    else:
        assert target_mask(starts, ends, spans, text).tolist() == expected


def test_a_token_across_the_beginning_of_an_answer_is_an_error():
    with pytest.raises(DataError, match=r"the beginning of an answer and what stands before it: 'bc'"):
        target_mask(np.array([0, 1]), np.array([1, 3]), [(2, 3)], "abc")


def test_a_token_across_the_end_of_an_answer_is_an_error_unless_it_swallows_white_space_only():
    starts, ends = np.array([0, 1, 2]), np.array([1, 2, 4])
    with pytest.raises(DataError, match="holds the end of an answer"):
        target_mask(starts, ends, [(1, 3)], "abcd")
    assert target_mask(starts, ends, [(1, 3)], "abc\n").tolist() == [False, True, True]


def test_the_first_token_is_never_learned():
    assert target_mask(np.array([0, 1]), np.array([1, 2]), [(0, 2)], "ab").tolist() == [False, True]
    with pytest.raises(DataError, match="no token to learn"):
        target_mask(np.array([0]), np.array([1]), [(0, 1)], "a")


def test_tokens_before_an_answer_that_the_prompt_alone_would_not_give_are_named():
    """GPT-2's pattern keeps the last white space before a word apart, but not at the end of a text."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content + ('</s>' if m.role == 'assistant' else '\n ') }}{% endfor %}"
    )
    template = choose_template(tokenizer)
    row = render_row(Conversation((Turn("user", "q"), Turn("assistant", "b")), "f:1"), template, "assistant")
    (tokens,) = tokenise([row.text], tokenizer)
    fault = seam_fault(row, tokens, template)
    alone = tokenizer(row.text[: row.answers[0][0]], add_special_tokens=False)["input_ids"]
    before = tokens.ids[tokens.ends <= row.answers[0][0]].tolist()
    assert before != alone
    assert "are not those that the prompt alone gives" in fault


def test_completion_needs_rows_with_one_answer(tokenizer):
    turns = (Turn("user", "q"), Turn("assistant", "a"))
    template = choose_template(tokenizer)
    assert len(render_row(Conversation(turns, "f:1"), template, "completion").answers) == 1
    with pytest.raises(DataError, match="this has 2"):
        render_row(Conversation(turns * 2, "f:1"), template, "completion")


def test_all_learns_the_whole_text_and_still_knows_the_last_answer(tokenizer):
    turns = (Turn("user", "q"), Turn("assistant", "a", is_target=False))  # as one of a prompt
    row = render_row(Conversation(turns, "f:1"), choose_template(tokenizer), "all")
    assert row.targets == ((0, len(row.text)),)
    ((first, last),) = row.answers
    assert row.text[first:last] == "a<|im_end|>"
