"""Rows that compare or judge answers become examples of two sequences, and what cannot be compared is named."""

import json

import numpy as np
import pytest
from tiny_tokenizer import make_tokenizer

from qlora_lite.data.chat.conversation import Conversation, Turn
from qlora_lite.data.chat.row_formats import LABELS, PAIRS
from qlora_lite.data.checks.held_out import hold_out
from qlora_lite.data.checks.overlap import check_overlap, check_prompts
from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens import encode
from qlora_lite.data.tokens.encode import TextReader
from qlora_lite.data.tokens.examples import read_examples
from qlora_lite.data.tokens.mask import Marked
from qlora_lite.data.tokens.preferences import (
    ONE_END,
    ONE_LABEL,
    OTHER_PROMPT,
    SAME_ANSWERS,
    answer_tokens,
    check_labels,
    paired,
)
from qlora_lite.data.tokens.statistics import ReadSettings, Statistics
from qlora_lite.data.tokens.storage import Example, sequences_of
from qlora_lite.errors import DataError

TOKENIZER = make_tokenizer()


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.fixture
def read(tmp_path):
    def reading(rows, preference=PAIRS, cache=None, max_tokens=512, overflow="error", **source):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = ReadSettings(max_tokens=max_tokens, overflow=overflow)
        return read_examples([Source(str(path), **source)], TOKENIZER, settings, TextReader(preference), cache)

    return reading


def texts(example):
    return [TOKENIZER.decode(sequence.token_ids) for sequence in sequences_of(example)]


def targets(example):
    return [TOKENIZER.decode(sequence.token_ids[sequence.is_target]) for sequence in sequences_of(example)]


PROMPT = "<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n"
YES_NO = ["yes<|im_end|>", "no, four<|im_end|>"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "what", "chosen": "yes", "rejected": "no, four"},
        {"prompt": [user("what")], "chosen": [assistant("yes")], "rejected": [assistant("no, four")]},
        {"chosen": [user("what"), assistant("yes")], "rejected": [user("what"), assistant("no, four")]},
        {"prompt": "p", "chosen": [user("what"), assistant("yes")], "rejected": [user("what"), assistant("no, four")]},
        {"instruction": "what", "input": "", "chosen": "yes", "rejected": "no, four"},
        {
            "conversations": [{"from": "human", "value": "what"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no, four"},
        },
        {"chosen": "\n\nHuman: what\n\nAssistant: yes", "rejected": "\n\nHuman: what\n\nAssistant: no, four"},
        {
            "prompt": "what",
            "messages": [user("what"), assistant("yes")],
            "chosen": [user("what"), assistant("yes")],
            "rejected": [user("what"), assistant("no, four")],
        },
    ],
)
def test_every_common_shape_becomes_the_prompt_with_either_answer(read, row):
    (example,) = read([row]).examples
    assert [text.rstrip("\n") for text in texts(example)] == [PROMPT + answer for answer in YES_NO]
    assert targets(example) == YES_NO
    assert example.answer == "yes"


def test_columns_are_named_by_templates(read):
    row = {"q": "what", "good": "yes", "bad": "no, four"}
    (example,) = read([row], prompt="{q}", completion="{good}", rejected="{bad}").examples
    assert targets(example) == YES_NO
    problems = read([row]).problems.found
    assert len(problems) == 1 and 'rejected: "{...}"' in problems[0].message
    missing = read([row], prompt="{q}", completion="{good}").problems.found
    assert "needs rejected too" in missing[0].message


def test_a_row_whose_answers_are_both_bad_is_one_problem(read):
    rows = [
        {"prompt": "what<|im_end|>", "chosen": "yes", "rejected": "no"},
        {"prompt": "is", "chosen": "a", "rejected": "b"},
    ]
    data = read(rows)
    assert data.problems.count == 1 and len(data.examples) == 1


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("yes<|im_end|>", "no<|im_start|>"),
        ("yes<|im_end|>", "no"),
        ("yes", "no<|im_start|>"),
    ],
)
def test_two_faults_of_one_row_are_one_bad_row(read, chosen, rejected):
    good = {"prompt": "is", "chosen": "a", "rejected": "b"}
    data = read([good, {"prompt": "what", "chosen": chosen, "rejected": rejected}, good | {"prompt": "what"}])
    assert data.problems.count == 1 and data.dropped == {"control token in text": 1} and len(data.examples) == 2
    assert data.problems.found[0].where.endswith("rows.jsonl:2")


def test_an_answer_that_cannot_be_written_and_one_that_cannot_be_marked_are_one_bad_row(read, monkeypatch):
    monkeypatch.setattr(encode, "mark_rows", lambda rows, *_: ([DataError("no")] * len(rows), set()))
    rows = [{"prompt": "what", "chosen": "yes<|im_end|>", "rejected": "no"}]
    assert read(rows).problems.count == 1
    rows = [{"prompt": "what", "chosen": "yes", "rejected": "no"}] * 2
    assert read(rows).problems.count == 2


def test_what_a_conversation_shares_is_its_prompt(read):
    talk = [user("what"), assistant("four"), user("is")]
    row = {"chosen": [*talk, assistant("yes")], "rejected": [*talk, assistant("no, four")]}
    (example,) = read([row]).examples
    assert targets(example) == YES_NO
    assert all("four<|im_end|>\n<|im_start|>user" in text for text in texts(example))


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "what", "chosen": "yes", "rejected": "yes"}, SAME_ANSWERS),
        ({"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]}, OTHER_PROMPT),
        ({"prompt": "what", "chosen": "yes"}, None),
        ({"prompt": "what", "chosen": "yes", "rejected": ""}, None),
    ],
)
def test_what_cannot_be_compared_is_a_problem_of_its_row(read, row, fault):
    good = {"prompt": "what", "chosen": "yes", "rejected": "no"}
    data = read([good, row, good | {"prompt": "is"}])
    assert len(data.examples) == 2 and data.rows_read == 3
    (problem,) = data.problems.found
    assert problem.where.endswith("rows.jsonl:2")
    assert problem.rule == fault if fault else "'rejected' is missing or empty" in problem.message


def test_an_end_token_in_one_answer_alone_is_a_problem():
    statistics = Statistics(end_token_ids={9})
    made = []
    for answer in ([7, 9], [8]):
        is_target = np.array([False] + [True] * len(answer))
        conversation = Conversation((Turn("user", "q"), Turn("assistant", "a")), "rows.jsonl:1")
        made.append((conversation, Marked(Example(np.array([5, *answer], np.int32), is_target, "", "", ""), 0)))
    assert not list(paired(iter(made), statistics))
    assert [problem.rule for problem in statistics.problems.found] == [ONE_END]
    statistics.end_token_ids.clear()
    assert len(list(paired(iter(made), statistics))) == 1


def test_rows_of_another_kind_say_which_columns_to_name(read):
    for row in ({"messages": [user("q"), assistant("a")]}, {"text": "a document"}, {"prompt": "q", "completion": "a"}):
        data = read([row])
        assert "name no chosen and rejected answer" in data.problems.found[0].message


def test_both_sequences_count_and_no_pair_is_ever_cut_or_parted(read, tmp_path):
    rows = [{"prompt": f"what {n}", "chosen": "yes " * n, "rejected": "no"} for n in range(1, 9)]
    data = read(rows, cache=tmp_path / "cache")
    lengths = [sum(len(each.token_ids) for each in sequences_of(example)) for example in data.examples]
    assert data.rows_read == 8 and data.examples.lengths.tolist() == lengths
    again = read(rows, cache=tmp_path / "cache")
    assert [targets(one) for one in again.examples] == [targets(one) for one in data.examples]
    assert again.examples.digest() == data.examples.digest()
    assert read(rows, max_tokens=max(lengths) - 1).problems.count
    dropped = read(rows, max_tokens=max(lengths) - 1, overflow="drop")
    assert len(dropped.examples) == 7
    train, held = hold_out(data, 0.25)
    assert sorted(targets(e) for part in (train, held) for e in part.examples) == sorted(map(targets, data.examples))


def test_mean_lengths_tell_of_a_length_bias(read):
    rows = [
        {"prompt": "what", "chosen": "yes " * 4, "rejected": "no"},
        {"prompt": "is", "chosen": "a", "rejected": "the"},
    ]
    data = read(rows)
    expected = np.mean(
        [[int(each.is_target.sum()) for each in sequences_of(example)] for example in data.examples], axis=0
    )
    assert answer_tokens(data.examples) == pytest.approx(tuple(expected))


LABELLED = [("what", "yes", True), ("is", "no, four", False), ("the", "answer", True)]


def labelled(name="label", as_text=str):
    return [{"prompt": q, "completion": a, name: as_text(good) if as_text else good} for q, a, good in LABELLED]


@pytest.mark.parametrize("rows", [labelled(as_text=None), labelled("kto_tag", None), labelled(as_text=int), labelled()])
def test_judged_answers_get_the_answer_of_the_row_before_as_their_second_sequence(read, rows):
    found = list(read(rows, LABELS).examples)
    assert [example.desirable for example in found] == [True, False, True]
    own = [answer + "<|im_end|>" for _, answer, _ in LABELLED]
    assert [targets(example) for example in found] == [[own[0], own[2]], [own[1], own[0]], [own[2], own[1]]]
    for example in found:
        first, second = texts(example)
        assert first.partition("assistant\n")[0] == second.partition("assistant\n")[0]


def judged(count, labels=(True, False)):
    return [{"prompt": f"what {n}", "completion": f"{n} yes", "label": labels[n % 2]} for n in range(count)]


def test_a_judged_row_is_the_same_whichever_row_stands_before_it(read):
    train = read(judged(8), LABELS).examples
    problem, is_error = check_overlap(train, read(judged(8)[::-1][:4], LABELS).examples)
    assert is_error and problem.message.startswith("4 of 4 evaluation rows are training rows too")
    assert check_prompts(train, read(judged(8)[::-1][:4], LABELS).examples) is None
    assert check_overlap(train, read(judged(8, (False, True)), LABELS).examples) == (None, False)


def test_a_judged_row_that_stands_twice_is_on_one_side(read):
    rows = [row for n in range(20) for row in (judged(20)[n], judged(20)[(7 * n + 3) % 20])]
    train, held = hold_out(read(rows, LABELS), 0.1)
    own = [{targets(example)[0] for example in part.examples} for part in (train, held)]
    assert own[1] and not own[0] & own[1] and check_overlap(train.examples, held.examples) == (None, False)


def test_pairs_with_one_chosen_and_two_rejected_answers_are_other_rows(read):
    one, two = ({"prompt": "what", "chosen": "yes", "rejected": answer} for answer in ("no", "four"))
    assert check_overlap(read([one]).examples, read([two]).examples) == (None, False)
    assert check_overlap(read([one]).examples, read([one]).examples)[1]


def test_the_other_answer_is_cut_to_the_room_that_is_left(read):
    rows = [
        {"prompt": "what", "completion": answer, "label": good} for answer, good in (("yes", True), ("no " * 40, False))
    ]
    whole = read(rows, LABELS).examples
    room = int(whole.lengths.max()) - 30
    assert len(read(rows, LABELS, max_tokens=room).examples[0].token_ids) == room
    assert read(rows, LABELS, max_tokens=40, overflow="drop").rows_kept == 1


def test_labels_that_are_all_alike_or_missing_are_named(read):
    alike = check_labels(read([row | {"label": True} for row in labelled()], LABELS).examples)
    assert alike.rule == ONE_LABEL and "every label is true" in alike.message
    assert check_labels(read(labelled(), LABELS).examples) is None
    plain = read([{"text": "what", "label": True}], LABELS).problems.found
    assert "have no prompt" in plain[0].message
    missing = read([*labelled(as_text=None), {"prompt": "q", "completion": "a"}], LABELS)
    assert "'label' must be true for a good answer" in missing.problems.found[0].message


def test_without_a_comparison_good_and_chosen_answers_are_read_alone(read):
    rows = [{"prompt": "what", "chosen": "yes", "rejected": "no"}]
    (example,) = read(rows, None, format="chosen").examples
    assert example.first == 0 and targets(example) == ["yes<|im_end|>"]
    assert read(labelled(as_text=None), None).rows_kept == 2
