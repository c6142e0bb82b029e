"""Flat arrays hold the same examples as objects do, in memory and in files."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qlora_lite.data.tokens.storage import Example, ExampleWriter, load_arrays, row_lengths, stored

texts = st.text(max_size=5)
places = st.builds("{}:{}".format, st.sampled_from(["a.jsonl", "b:c.jsonl"]), st.integers(1, 2**40))
rows = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=5), texts, texts, places
    ),
    max_size=12,
)


def examples_of(rows):
    return [
        Example(np.array([t for t, _ in tokens], np.int32), np.array([m for _, m in tokens]), prompt, answer, where)
        for tokens, prompt, answer, where in rows
    ]


def plain(examples):
    return [(e.token_ids.tolist(), e.is_target.tolist(), e.prompt, e.answer, e.where) for e in examples]


@given(rows, st.data())
def test_stored_examples_are_those_that_went_in(rows, data):
    given_ones = examples_of(rows)
    kept = stored(given_ones)
    assert plain(kept) == plain(given_ones) and len(kept) == len(given_ones)
    assert row_lengths(kept) == row_lengths(given_ones) == [len(tokens) for tokens, *_ in rows]
    if rows:
        part = slice(data.draw(st.integers(0, len(rows))), data.draw(st.integers(0, len(rows))))
        assert plain(kept[part]) == plain(given_ones[part])
        ids, is_target = kept[part].joined()
        assert ids.tolist() == [t for e in given_ones[part] for t in e.token_ids]
        assert is_target.tolist() == [m for e in given_ones[part] for m in e.is_target]
        assert plain([kept[-1]]) == plain(given_ones[-1:])


@given(rows, st.lists(st.integers(0, 11), max_size=20))
@example([([(i, True)], "", "", "f:1") for i in range(3)], [0, 0, 2])
def test_an_order_repeats_rows_and_leaves_rows_out(rows, order):
    order = [row for row in order if row < len(rows)]
    writer = ExampleWriter()
    given_ones = examples_of(rows)
    writer.add_all(given_ones)
    kept = writer.finish(np.array(order, np.int64))
    assert plain(kept) == plain([given_ones[row] for row in order])
    assert kept.lengths.tolist() == [len(given_ones[row].token_ids) for row in order]
    assert kept.target_counts.tolist() == [int(given_ones[row].is_target.sum()) for row in order]
    assert kept.joined()[0].tolist() == [t for row in order for t in given_ones[row].token_ids]


@pytest.mark.parametrize("count", [0, 1, 2500])
def test_files_hold_what_memory_holds_whatever_the_batches(tmp_path, count):
    given_ones = examples_of([([(i, True), (i + 1, False)], "é" * (i % 3), "a", f"f:{i}") for i in range(count)])
    writer = ExampleWriter(tmp_path)
    for first in range(0, count, 999):
        writer.add_all(given_ones[first : first + 999])
    kept = writer.finish(np.arange(count))
    again = load_arrays(tmp_path, writer.files, np.arange(count))
    assert plain(kept) == plain(again) == plain(given_ones)
    if count:
        with pytest.raises(ValueError, match="read-only"):
            kept[0].token_ids[0] = 1
