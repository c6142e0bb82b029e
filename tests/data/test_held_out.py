"""Rows held out for evaluation: the share asked for, no row on both sides, the same rows whatever else changes."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import make_tokenizer

from qlora_lite.data.checks.held_out import HELD_OUT, hold_out
from qlora_lite.data.checks.overlap import check_overlap, check_prompts
from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens.examples import read_examples
from qlora_lite.data.tokens.statistics import ReadSettings

PAIRS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(40)]


def read(rows, tokenizer=None, weight=1.0, others=(), **settings):
    sources = [Source("mine", rows=rows, weight=weight), *(Source(f"other {n}", rows=o) for n, o in enumerate(others))]
    return read_examples(sources, tokenizer or make_tokenizer(), ReadSettings(**settings))


def places(data):
    return [example.where for example in data.examples]


@pytest.mark.parametrize(("share", "count"), [(0.25, 10), (0.1, 4), (0.001, 1), (0.99, 39)])
def test_a_share_of_the_rows_is_held_out_and_every_row_is_on_one_side_and_counted(share, count):
    data = read(PAIRS)
    training, evaluation = hold_out(data, share)
    assert len(evaluation.examples) == evaluation.rows_read == evaluation.rows_kept == count
    assert sorted(places(training) + places(evaluation)) == sorted(places(data))
    assert training.rows_kept == 40 - count and training.dropped == {HELD_OUT: count} and evaluation.dropped == {}
    for part in (training, evaluation):
        assert part.tokens == sum(len(example.token_ids) for example in part.examples)
        assert part.target_tokens == sum(int(example.is_target.sum()) for example in part.examples)
        assert part.examples_of == (len(part.examples),)
    assert data.dropped == {} and data.rows_kept == 40


def test_rows_of_a_json_file_of_one_line_are_held_out_one_by_one_and_named_by_their_number(write):
    data = read_examples([Source(write("a.json", json.dumps(PAIRS)))], make_tokenizer())
    training, evaluation = hold_out(data, 0.25)
    assert len(evaluation.examples) == 10 and len(training.examples) == 30
    assert all(re.search(r"a\.json:1 \(row [0-9]+\)$", place) for place in places(evaluation))
    numbers = [int(place.rpartition(" ")[2].strip(")")) for place in places(evaluation)]
    assert len(set(np.diff(sorted(numbers)).tolist())) > 2


def test_the_rows_come_from_everywhere_and_not_from_one_end():
    _, evaluation = hold_out(read([{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(400)]), 0.25)
    lines = np.array([int(where.rpartition(":")[2]) for where in places(evaluation)])
    assert lines.tolist() == sorted(lines.tolist()) and len(lines) == 100
    assert all(15 <= ((lines > first) & (lines <= first + 100)).sum() <= 35 for first in range(0, 400, 100))
    assert len(set(np.diff(lines).tolist())) > 5


def test_the_same_rows_are_held_out_under_another_template_and_when_others_are_dropped():
    chatml, plain = (places(hold_out(read(PAIRS, template=name), 0.2)[1]) for name in ("chatml", "plain"))
    assert chatml == plain
    longer = [*PAIRS[:39], {"prompt": "long " * 300, "completion": "answer"}]
    cut = read(longer, max_tokens=200, overflow="drop")
    assert cut.rows_kept == 39 and len(set(places(hold_out(cut, 0.2)[1])) & set(chatml)) >= 7


def test_rows_that_are_alike_stay_together_and_no_evaluation_row_is_learned():
    rows = [PAIRS[i % 15] for i in range(60)]
    training, evaluation = hold_out(read(rows), 0.2)
    assert len(evaluation.examples) == 12 and check_overlap(training.examples, evaluation.examples) == (None, False)
    kinds = {int(where.rpartition(":")[2]) % 15 for where in places(evaluation)}
    assert len(kinds) == 3


def talk(*texts, system="be brief"):
    turns = [{"role": "system", "content": system}]
    turns += [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"messages": turns}


@pytest.mark.parametrize(
    "rows",
    [
        [pair | {"completion": f"answer {n}"} for n in range(3) for pair in PAIRS[:20]],
        [talk("hello", "hi", f"question {i}", f"answer {n}") for n in range(3) for i in range(20)],
    ],
)
def test_rows_with_the_same_prompt_and_other_answers_stay_together(rows):
    training, evaluation = hold_out(read(rows), 0.2)
    assert len(evaluation.examples) == 12 and check_prompts(training.examples, evaluation.examples) is None
    kinds = [(int(where.rpartition(":")[2]) - 1) % 20 for where in places(evaluation)]
    assert len(set(kinds)) == 4 and all(kinds.count(kind) == 3 for kind in kinds)


@pytest.mark.parametrize(
    "rows",
    [
        [talk(f"question {i}", f"answer {i}") for i in range(40)],
        [talk("hello", "hi", f"question {i}", f"answer {i}") for i in range(40)],
        [{"text": f"document {i}"} for i in range(40)],
    ],
)
def test_a_system_text_a_greeting_or_no_prompt_at_all_keeps_no_rows_together(rows):
    _, evaluation = hold_out(read(rows), 0.2)
    assert places(evaluation) == places(hold_out(read(PAIRS), 0.2)[1])


def test_documents_beside_rows_with_prompts_are_held_out_like_those():
    documents = [{"text": f"document {i}"} for i in range(40)]
    _, evaluation = hold_out(read(PAIRS, others=[documents]), 0.2)
    assert len(evaluation.examples) == 16 and 4 <= evaluation.examples_of[1] <= 12


@pytest.mark.parametrize(
    ("prompts", "count", "share"),
    [(1, 60, 0.1), (3, 60, 0.1), (1, 10, 0.2), (5, 10, 0.2), (3, 3000, 0.05), (3, 60, 0.9)],
)
def test_where_prompts_have_many_rows_the_share_is_kept_to_and_the_prompts_on_both_sides_are_counted(
    prompts, count, share
):
    rows = [PAIRS[i % prompts] | {"completion": f"answer {i}"} for i in range(count)]
    training, evaluation = hold_out(read(rows), share)
    assert len(evaluation.examples) == round(share * count) and training.problems.count == 0
    found = check_prompts(training.examples, evaluation.examples).message
    held = {(int(where.rpartition(":")[2]) - 1) % prompts for where in places(evaluation)}
    assert found.startswith(f"{len(held)} of {len(held)} evaluation prompts are also prompts of training rows")
    assert len(held) == min(prompts, round(share * count))


def test_the_rows_with_prompts_of_their_own_beside_one_that_most_share_are_held_out_no_more_often():
    rows = [{"prompt": "one for most", "completion": f"answer {i}"} for i in range(950)]
    rows += [{"prompt": f"question {i}", "completion": "yes"} for i in range(50)]
    _, evaluation = hold_out(read(rows), 0.05)
    own = sum(int(where.rpartition(":")[2]) > 950 for where in places(evaluation))
    assert len(evaluation.examples) == 50 and own <= 10


def test_the_prompts_of_a_few_answers_each_are_held_out_whole():
    rows = [{"prompt": f"question {i % 200}", "completion": f"answer {i}"} for i in range(1000)]
    training, evaluation = hold_out(read(rows), 0.05)
    assert len(evaluation.examples) == 50 and check_prompts(training.examples, evaluation.examples) is None


@pytest.mark.parametrize(("share", "count"), [(0.05, 1), (0.3, 3), (0.9, 9)])
def test_of_ten_rows_with_prompts_of_their_own_the_share_is_held_out(share, count):
    training, evaluation = hold_out(read(PAIRS[:10]), share)
    assert len(evaluation.examples) == count and check_prompts(training.examples, evaluation.examples) is None


def test_the_parts_of_a_split_document_stay_together_also_where_one_part_is_another_row_s():
    words = [" ".join(f"w{row}{i}" for i in range(120)) for row in range(12)]
    head = " ".join(f"x{i}" for i in range(400))
    rows = [{"text": text} for text in [*words, head + " one", head + " two"]]
    data = read(rows, max_tokens=64, overflow="split")
    assert data.split > 0 and check_overlap(data.examples[:-1], data.examples[-1:])[0] is None
    first_parts = {}
    for example in data.examples:
        first_parts.setdefault(example.token_ids.tobytes(), set()).add(example.where)
    assert {"mine:13", "mine:14"} in first_parts.values()  # the two share a part
    for share in (0.2, 0.4, 0.6):
        training, evaluation = hold_out(data, share)
        assert not set(places(training)) & set(places(evaluation))
        assert ("mine:13" in places(evaluation)) == ("mine:14" in places(evaluation))


@pytest.mark.parametrize(("share", "count"), [(0.25, 15), (0.9, 54)])
def test_a_row_that_a_weight_repeats_is_measured_once_and_learned_nowhere(share, count):
    training, evaluation = hold_out(read(PAIRS, weight=3.0, others=[PAIRS_OF_ANOTHER]), share)
    assert len(set(places(evaluation))) == len(places(evaluation)) == count
    assert not set(places(training)) & set(places(evaluation))
    held_of_first = sum(where.startswith("mine") for where in places(evaluation))
    assert evaluation.examples_of == (held_of_first, count - held_of_first)
    assert training.examples_of == (3 * (40 - held_of_first), 20 - (count - held_of_first))
    half, held = hold_out(read(PAIRS, weight=0.5), 0.25)
    assert len(half.examples) == 15 and len(held.examples) == 5


PAIRS_OF_ANOTHER = [{"prompt": f"other {i}", "completion": f"yes {i}"} for i in range(20)]


@pytest.mark.parametrize(("kinds", "share", "held"), [(3, 0.25, 10), (3, 0.01, 10), (2, 0.9, 15), (30, 0.01, 1)])
def test_where_rows_that_are_alike_are_more_than_the_share_the_fewest_of_them_are_held_out(kinds, share, held):
    training, evaluation = hold_out(read([PAIRS[i % kinds] for i in range(30)]), share)
    assert len(evaluation.examples) == held and len(training.examples) == 30 - held
    assert training.problems.count == 0


def test_a_split_row_counts_as_one_whatever_its_parts():
    rows = [{"text": " ".join(f"w{row}{i}" for i in range(120))} for row in range(3)]
    data = read(rows, max_tokens=64, overflow="split")
    training, evaluation = hold_out(data, 0.05)
    assert evaluation.rows_read == training.dropped[HELD_OUT] == 1 < len(evaluation.examples)
    assert len(set(places(evaluation))) == 1 and not set(places(training)) & set(places(evaluation))


@pytest.mark.parametrize("rows", [PAIRS[:1], [PAIRS[0]] * 30])
def test_where_no_row_can_be_spared_none_is_and_it_is_said(rows):
    training, evaluation = hold_out(read(rows), 0.5)
    assert len(training.examples) == len(rows) and len(evaluation.examples) == 0
    (problem,) = training.problems.found
    assert "no row can be held out for data.eval_share" in problem.message and training.problems.too_many(100)


def test_what_is_wrong_with_rows_is_told_once_and_with_the_training_rows():
    data = read([*PAIRS, {"prompt": "no answer", "completion": ""}])
    training, evaluation = hold_out(data, 0.1)
    alone = read([PAIRS[0], {"prompt": "no answer", "completion": ""}])
    assert "no row can be held out" in hold_out(alone, 0.1)[0].problems.found[-1].message
    assert training.problems.count == data.problems.count == 1 and evaluation.problems.count == 0
    nothing = read([{"prompt": "no answer", "completion": ""}])
    before = nothing.problems.count
    assert hold_out(nothing, 0.1)[0].problems.count == before > 0


@given(kinds=st.lists(st.integers(0, 6), min_size=1, max_size=40), share=st.floats(0.01, 0.99))
def test_no_row_is_on_both_sides_and_no_more_than_asked_for_is_taken(kinds, share):
    rows = [PAIRS[kind] for kind in kinds]
    data = DATA_OF_KINDS.setdefault(tuple(kinds), read(rows, TOKENIZER))
    training, evaluation = hold_out(replace(data, problems=type(data.problems)()), share)
    assert len(training.examples) + len(evaluation.examples) == len(rows) and len(training.examples) > 0
    assert len(evaluation.examples) <= max(round(share * len(rows)), min(map(kinds.count, kinds)))
    assert (len(evaluation.examples) > 0) == (len(set(kinds)) > 1)
    assert check_overlap(training.examples, evaluation.examples)[0] is None or not len(evaluation.examples)


TOKENIZER, DATA_OF_KINDS = make_tokenizer(), {}
