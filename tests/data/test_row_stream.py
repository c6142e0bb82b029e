"""A stream gives the rows and batches that the same rows give in memory, and names what is wrong when it comes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens.batch import collate, pack_in_order, plan_epoch, stream_batches
from qlora_lite.data.tokens.examples import RowStream, build_examples, largest_rows
from qlora_lite.data.tokens.statistics import ReadSettings
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import DataError

PAIRS = [{"prompt": f"question {i}", "completion": f"answer {i} " * (1 + i % 4)} for i in range(2300)]


@pytest.fixture
def stream(tokenizer):
    def make(*sources, overflow="error", max_tokens=100, max_bad_rows=0):
        settings = ReadSettings(None, "assistant", max_tokens, overflow)
        return RowStream(sources, tokenizer, settings, max_bad_rows=max_bad_rows)

    return make


def plain(examples):
    return [(e.token_ids.tolist(), e.is_target.tolist(), e.prompt, e.answer, e.where) for e in examples]


@given(st.lists(st.integers(1, 20), max_size=60), st.booleans(), st.integers(1, 4))
def test_batches_are_those_of_a_plan_in_the_order_of_the_files(lengths, packing, micro_batch_size):
    rows = [Example(np.full(n, i, np.int32), np.ones(n, bool), "", "", f"f:{i}") for i, n in enumerate(lengths)]
    batches = stream_batches(iter(rows), 20, packing, micro_batch_size)
    expected = plan_epoch(lengths, 20, packing, micro_batch_size, "as-is")
    assert [[int(row.token_ids[0]) for row in rows] for rows in batches] == expected

    def with_virtual(examples):
        return [len(example.token_ids) + 7 for example in examples]

    batches = stream_batches(iter(rows), 30, packing, micro_batch_size, with_virtual)
    expected = plan_epoch(with_virtual(rows), 30, packing, micro_batch_size, "as-is")
    assert [[int(row.token_ids[0]) for row in rows] for rows in batches] == expected


@pytest.mark.parametrize("overflow", ["drop", "truncate", "split"])
def test_every_epoch_gives_the_examples_that_memory_holds(stream, write, tokenizer, overflow):
    talk = {"messages": [{"role": r, "content": "four " * 9} for r in ("user", "assistant", "user", "assistant")]}
    sources = [
        Source(write("a.jsonl", PAIRS), weight=1.5),
        Source(write("b.jsonl", [talk] * 3)),
        Source(write("c.txt", "what is the question " * 30 + "\n\nfour"), weight=0.5),
    ]
    data = build_examples(sources, tokenizer, max_tokens=100, overflow=overflow)
    rows = stream(*sources, overflow=overflow)
    assert plain(rows) == plain(data.examples)
    assert sum(1 for _ in rows) == len(data.examples)


def test_a_bad_row_ends_the_stream_where_it_stands(stream, write):
    rows = [*PAIRS, {"prompt": "x"}, *PAIRS[:10]]
    given_before, path = [], write("a.jsonl", rows)
    with pytest.raises(DataError, match=r"a.jsonl:2301: 'completion' is missing"):
        given_before.extend(stream(Source(path)))
    assert 0 < len(given_before) <= 2300
    assert len(list(stream(Source(path), max_bad_rows=1))) == 2310
    with pytest.raises(DataError, match=r"b.jsonl:1: 'completion' is missing"):
        list(stream(Source(write("b.jsonl", [{"prompt": "x", "completion": None}]))))


def test_a_row_that_is_too_long_ends_the_stream(stream, write):
    path = write("a.jsonl", [*PAIRS, {"prompt": "x", "completion": "four " * 99}])
    with pytest.raises(DataError, match=r"longer than data.max_tokens 100; the longest: .*a.jsonl:2301"):
        list(stream(Source(path)))


def test_the_largest_rows_have_as_many_tokens_as_any_and_all_are_learned():
    row = Example(np.arange(7, dtype=np.int32), np.zeros(7, bool), "", "", "f:1")
    batch = collate(largest_rows([row], 20, False, 3))
    assert batch.row_lengths == (20, 20, 20)
    assert batch.input_ids[0, :9].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert (batch.labels != -100).sum() == 57
    packed = largest_rows([row], 20, True, 3)
    assert pack_in_order([len(each.token_ids) for each in packed], 20, range(6)) == [[0, 1], [2, 3], [4, 5]]
    assert collate(packed[:2]).row_lengths == (19, 1)


def test_a_kind_of_row_that_is_left_out_whole_ends_the_epoch(stream, write):
    bad = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}], "system": "s"}
    rows = [
        *({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]} for _ in "abc"),
        bad,
    ]
    assert len(list(stream(Source(write("a.jsonl", rows)), max_bad_rows=9))) == 3
    with pytest.raises(DataError, match="none of the 2 rows with a system turn is kept"):
        list(stream(Source(write("b.jsonl", [*rows, bad])), max_bad_rows=9))
