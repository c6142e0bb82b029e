"""The finished examples are looked at once more, against references that look at one row and token at a time."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.data.checks.overlap import IN_BOTH, check_overlap, check_prompts, signatures
from qlora_lite.data.tokens import example_checks
from qlora_lite.data.tokens.example_checks import check_examples, count_special_tokens, histogram
from qlora_lite.data.tokens.storage import Example

BEGIN, END = 1, 2

token_rows = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=12
)


def example(ids, is_target=None, where="f:1"):
    mask = [False] + [True] * (len(ids) - 1) if is_target is None else is_target
    return Example(np.array(ids, np.int32), np.array(mask, bool), "", "", where)


def examples_of(rows):
    return [example([t for t, _ in row], [m for _, m in row], f"f:{i}") for i, row in enumerate(rows)]


def faults(problems):
    return {(problem.rule, problem.where) for problem in problems}


def slow_faults(rows):
    found = set()
    for i, row in enumerate(rows):
        if not any(is_target for _, is_target in row):
            found.add((example_checks.NOTHING_TO_LEARN, f"f:{i}"))
        if any(row[t][0] == row[t + 1][0] == BEGIN for t in range(len(row) - 1)):
            found.add((example_checks.BEGIN_TWICE, f"f:{i}"))
    if not any(token == END and is_target for row in rows for token, is_target in row):
        found.add((example_checks.END_NOT_LEARNED, ""))
    return found


@given(token_rows, st.sampled_from([1, 3, 10_000]))
def test_the_faults_found_are_those_of_a_look_at_every_token(rows, rows_per_chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example_checks, "_ROWS_PER_CHUNK", rows_per_chunk)
        assert faults(check_examples(examples_of(rows), BEGIN, {END})) == slow_faults(rows)


def test_every_message_says_what_to_do():
    rows = [example([BEGIN, BEGIN, 3]), example([3, 4], [False, False])]
    for problem in check_examples(rows, BEGIN, {END}):
        assert any(verb in problem.message for verb in ("take it out", "raise data.max_tokens", "choose a")), problem


def test_an_end_token_that_is_not_to_be_learned_is_no_fault():
    assert check_examples([example([3, 4])], BEGIN, {END}, end_is_target=False) == []


def test_a_tokenizer_without_begin_of_text_has_none_twice():
    assert check_examples([example([3, 3, END])], None, {END}) == []


def test_one_bad_row_among_many_is_found_and_named():
    good = example([BEGIN, 3, END])
    bad = example([BEGIN, 3, END], [False, False, False], "rows.jsonl:23456")
    problems = check_examples([good] * 23_455 + [bad] + [good] * 20_000, BEGIN, {END})
    assert [problem.where for problem in problems] == ["rows.jsonl:23456"]


def overlap(train, evaluation):
    rows = [
        [example([BEGIN, *ids], where=f"{name}:{i}") for i, ids in enumerate(part)]
        for name, part in (("train", train), ("eval", evaluation))
    ]
    return check_overlap(*rows)


def test_evaluation_rows_that_are_training_rows_are_counted_and_named():
    problem, is_error = overlap([[5], [6], [7]], [[8], [6], [6]])
    assert is_error and (problem.rule, problem.where) == (IN_BOTH, "eval:1")
    assert "2 of 3 evaluation rows" in problem.message and "eval:1 is train:1, eval:2 is train:1" in problem.message


def test_under_one_percent_of_duplicates_is_no_error():
    assert overlap([[0]], [[i] for i in range(101)])[1] is False
    assert overlap([[0]], [[i] for i in range(100)])[1] is True


def test_no_duplicates_are_no_problem():
    assert overlap([[5]], [[5, 6]]) == (None, False)


@given(*[st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=3), min_size=1, max_size=8)] * 2)
def test_the_duplicates_are_those_of_comparing_every_row_with_every_other(train, evaluation):
    problem, _ = overlap(train, evaluation)
    count = sum(row in train for row in evaluation)
    assert (problem is None) == (count == 0)
    assert problem is None or problem.message.startswith(f"{count} of {len(evaluation)} ")


def asked(pairs, name):
    """Make rows of prompts and answers; a prompt of "" makes a document."""
    return [
        replace(example([*prompt.encode(), 7, *answer.encode()], where=f"{name}:{number}"), prompt=prompt)
        for number, (prompt, answer) in enumerate(pairs)
    ]


letters = st.tuples(st.sampled_from(["", "a", "b", "ab", "c"]), st.sampled_from(["x", "y", "z"]))


@given(*[st.lists(letters, min_size=1, max_size=8)] * 2)
def test_the_prompts_in_both_are_those_of_comparing_every_row_with_every_other(train, evaluation):
    problem = check_prompts(asked(train, "train"), asked(evaluation, "eval"))
    of_train, of_both = {prompt for prompt, _ in train}, [row for row in evaluation if row[0] and row not in train]
    found = [prompt for prompt, _ in of_both if prompt in of_train]
    assert (problem is None) == (not found)
    if found:
        count = (
            f"{len(set(found))} of {len({prompt for prompt, _ in evaluation if prompt})} evaluation prompts are also"
        )
        first = next(i for i, row in enumerate(evaluation) if row in of_both and row[0] in of_train)
        twin = next(i for i, (prompt, _) in enumerate(train) if prompt == evaluation[first][0])
        assert problem.message.startswith(count) and problem.where == f"eval:{first}"
        assert f"(this row has that of train:{twin})" in problem.message


@given(token_rows)
def test_special_tokens_are_counted_and_so_are_the_learned_ones(rows):
    flat = [pair for row in rows for pair in row]
    found = {t.token_id: (t.count, t.targets) for t in count_special_tokens(examples_of(rows), {BEGIN, END})}
    assert found == {
        special: (sum(t == special for t, _ in flat), sum(t == special and is_target for t, is_target in flat))
        for special in (BEGIN, END)
        if any(t == special for t, _ in flat)
    }


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=50), st.integers(1, 20))
def test_the_histogram_counts_every_length_once_in_equal_ranges(lengths, bars):
    ranges = histogram(lengths, bars)
    assert len(ranges) <= bars and ranges[0][2] and ranges[-1][2]
    assert len({last - first for first, last, _ in ranges}) == 1
    for first, last, count in ranges:
        assert count == sum(first <= length <= last for length in lengths)
    assert sum(count for _, _, count in ranges) == len(lengths)


def test_no_rows_have_no_histogram_and_no_problems():
    assert histogram([]) == [] and check_examples([], BEGIN, {END}) == [] and count_special_tokens([], set()) == []


def test_only_equal_rows_share_a_signature_wherever_they_stand():
    rows = [[1, 2, 3], [3, 2, 1], [1, 2], [1, 2, 0], [2, 1], [0], [0, 0], [1, 2, 3]]
    found = signatures([example(ids) for ids in rows] * 2_000).tolist()
    assert found[:8] * 2_000 == found and len(set(found[:7])) == 7 and found[7] == found[0]
