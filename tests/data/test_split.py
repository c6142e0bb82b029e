"""Rows that are too long become parts that can each be learned from, and nothing is learned twice or lost unseen."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import make_tokenizer

from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens.encode import windows
from qlora_lite.data.tokens.examples import build_examples
from qlora_lite.data.tokens.storage import Example


@pytest.fixture
def build(write, tokenizer):
    def build_set(rows, max_tokens=1000, **settings):
        settings = {"tokenizer": tokenizer, "overflow": "split"} | settings
        return build_examples([Source(write("a.jsonl", rows))], max_tokens=max_tokens, **settings)

    return build_set


def talk(*answers, system=None, **more):
    turns = [{"role": "system", "content": system}] if system else []
    for number, answer in enumerate(answers):
        turns += [{"role": "user", "content": f"question {number}"}]
        turns += [answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def texts(data, tokenizer):
    return [tokenizer.decode(example.token_ids) for example in data.examples]


def learned_texts(data, tokenizer):
    return [tokenizer.decode(example.token_ids[example.is_target]) for example in data.examples]


@given(st.lists(st.booleans(), min_size=3, max_size=40), st.integers(2, 12))
def test_windows_learn_each_token_of_a_document_once_and_begin_with_one_of_context(is_target, max_tokens):
    is_target = np.array([False, *is_target[1:]])
    row = Example(np.arange(len(is_target), dtype=np.int32), is_target, "", "", "f:1")
    found = list(windows(row, max_tokens))
    assert [t for part in found for t in part.token_ids[part.is_target]] == np.flatnonzero(is_target).tolist()
    assert all(len(part.token_ids) <= max_tokens and not part.is_target[0] for part in found)
    assert all((np.diff(part.token_ids) == 1).all() for part in found)
    if is_target[1:].all():
        assert len(found) == -(-(len(is_target) - 1) // (max_tokens - 1))


def test_a_split_document_is_counted_and_learns_as_many_tokens_as_the_whole(build):
    rows = [{"text": "what is the question " * 20}, {"text": "four"}]
    whole, cut = build(rows), build(rows, max_tokens=16)
    assert (cut.rows_read, cut.split, cut.dropped, cut.truncated) == (2, 1, {}, 0)
    assert cut.rows_kept == len(cut.examples) > 5
    assert cut.target_tokens == whole.target_tokens
    assert {example.where.rpartition(":")[2] for example in cut.examples[:-1]} == {"1"}


def test_begin_of_text_and_the_end_token_stay_where_the_document_has_them(build):
    tokenizer = make_tokenizer(adds_begin=True)
    data = build([{"text": "what is the question " * 20}], max_tokens=16, tokenizer=tokenizer)
    ids = [example.token_ids.tolist() for example in data.examples]
    assert [tokenizer.bos_token_id in part for part in ids] == [True] + [False] * (len(ids) - 1)
    assert [tokenizer.eos_token_id in part for part in ids] == [False] * (len(ids) - 1) + [True]


def test_a_conversation_is_cut_between_exchanges_with_the_system_turn_in_each_part(build, tokenizer):
    answers = ["yes", "the answer is 42", "no", "four " * 6, "what"]
    row = talk(*answers, system="answer the question")
    whole = build([row])
    cut = build([row], max_tokens=len(whole.examples[0].token_ids) // 2)
    assert (cut.split, cut.rows_kept, cut.dropped) == (1, len(cut.examples), {}) and cut.rows_kept >= 2
    assert "".join(learned_texts(cut, tokenizer)) == learned_texts(whole, tokenizer)[0]
    opening = "<|im_start|>system\nanswer the question<|im_end|>\n<|im_start|>user\nquestion"
    assert all(text.startswith(opening) for text in texts(cut, tokenizer))
    assert all(len(example.token_ids) <= len(whole.examples[0].token_ids) // 2 for example in cut.examples)


def test_each_part_holds_as_many_exchanges_as_fit(build, tokenizer):
    row = talk("a", "a", "a", "a", "a")
    two = len(build([talk("a", "a")]).examples[0].token_ids)
    for room, exchanges in ((two, [2, 2, 1]), (two + 1, [2, 2, 1]), (two - 1, [1] * 5)):
        counts = [text.count("question") for text in texts(build([row], max_tokens=room), tokenizer)]
        assert counts == exchanges


def test_an_exchange_that_does_not_fit_alone_is_left_out_and_counted(build, tokenizer):
    data = build([talk("yes", "what " * 60, "no")], max_tokens=50)
    assert learned_texts(data, tokenizer) == ["yes<|im_end|>", "no<|im_end|>"]
    assert data.dropped == {"exchange longer than max_tokens in a split row": 1}
    assert data.split == 1


def test_parts_without_an_answer_to_learn_are_left_out_and_counted(build, tokenizer):
    silent = {"role": "assistant", "content": "four " * 6, "weight": 0}
    data = build([talk(silent, "yes " * 6, silent)], max_tokens=45)
    assert learned_texts(data, tokenizer) == ["yes " * 6 + "<|im_end|>"]
    assert data.dropped == {"part of a split row with nothing to learn": 2}


def test_train_on_last_learns_the_last_answer_of_the_row_and_not_of_every_part(build, tokenizer):
    data = build([talk("four " * 6, "yes " * 6, "no " * 6)], max_tokens=45, train_on="last")
    assert learned_texts(data, tokenizer) == ["no " * 6 + "<|im_end|>"]
    assert data.dropped == {"part of a split row with nothing to learn": 2}


def test_train_on_all_learns_every_part_but_for_answers_that_are_left_out(build, tokenizer):
    silent = {"role": "assistant", "content": "four " * 6, "weight": 0}
    data = build([talk(silent, "yes " * 6)], max_tokens=45, train_on="all")
    assert ["four" in text for text in texts(data, tokenizer)] == [True, False]
    assert ["question" in text for text in learned_texts(data, tokenizer)] == [True, True]
    assert ["four" in text for text in learned_texts(data, tokenizer)] == [False, False]
    assert data.examples[1].is_target[1:].all()


def test_a_call_and_its_result_stay_together(build, tokenizer):
    template = tokenizer.chat_template
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template.replace(
        "m.content +", "m.content + (m.tool_calls|string if m.tool_calls else '') +"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}
    row = talk("yes " * 6, call, "no " * 6)
    row["messages"].insert(4, {"role": "tool", "content": "42"})
    row["messages"].insert(5, {"role": "assistant", "content": "the answer is 42"})
    whole = build([row], tokenizer=tokenizer)
    length = len(whole.examples[0].token_ids)
    for max_tokens in range(length // 2, length, 8):
        data = build([row], max_tokens=max_tokens, tokenizer=tokenizer)
        assert data.split == 1 and len(data.examples) > 1
        assert all(("42<|im_end|>" in text) == ("'f'" in text) for text in texts(data, tokenizer))
    assert "".join(learned_texts(data, tokenizer)) == learned_texts(whole, tokenizer)[0]
