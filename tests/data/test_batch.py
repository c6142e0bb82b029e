"""Every row is in exactly one micro-batch, no pack is overfull, and no label crosses into another row."""

import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.data.tokens.batch import (
    ORDERS,
    Extent,
    collate,
    enlarged,
    extent_of,
    pack_best_fit,
    pack_in_order,
    packing_efficiency,
    plan_epoch,
)
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import DataError

lengths_strategy = st.lists(st.integers(1, 20), max_size=60)
settings_strategy = st.fixed_dictionaries(
    {
        "packing": st.booleans(),
        "micro_batch_size": st.integers(1, 4),
        "order": st.sampled_from(ORDERS),
        "seed": st.integers(0, 5),
        "epoch": st.integers(0, 3),
    }
)


def example(length, is_target=None, where="f:1", start=0):
    mask = np.ones(length, bool) if is_target is None else np.array(is_target, bool)
    return Example(np.arange(start, start + length, dtype=np.int32), mask, "", "", where)


def rooms_by_slow_best_fit(lengths, max_tokens):
    """Best fit, decreasing, looking at every pack for every row."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else max_tokens) - length)
    return sorted(rooms)


@given(lengths_strategy, settings_strategy)
def test_each_row_stands_in_exactly_one_micro_batch(lengths, settings):
    plan = plan_epoch(lengths, 20, **settings)
    assert sorted(row for rows in plan for row in rows) == list(range(len(lengths)))
    assert all(plan)
    for rows in plan:
        assert sum(lengths[row] for row in rows) <= 20 * settings["micro_batch_size"]


@given(lengths_strategy, settings_strategy)
def test_equal_arguments_give_equal_plans(lengths, settings):
    assert plan_epoch(lengths, 20, **settings) == plan_epoch(list(lengths), 20, **settings)


@given(lengths_strategy, st.integers(20, 40))
def test_packs_are_those_of_a_slow_best_fit(lengths, max_tokens):
    packs = pack_best_fit(lengths, max_tokens, range(len(lengths)))
    rooms = [max_tokens - sum(lengths[row] for row in pack) for pack in packs]
    assert sorted(rooms) == rooms_by_slow_best_fit(lengths, max_tokens)


@given(lengths_strategy)
def test_packing_as_is_keeps_the_order_of_rows(lengths):
    packs = pack_in_order(lengths, 20, range(len(lengths)))
    assert [row for pack in packs for row in pack] == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in pack) <= 20 for pack in packs)
    for left, right in pairwise(packs):
        assert sum(lengths[row] for row in left) + lengths[right[0]] > 20


def test_epochs_and_seeds_have_their_own_order_of_packs():
    lengths = list(range(1, 101))
    plans = [plan_epoch(lengths, 128, True, 1, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    firsts = {tuple(tuple(rows) for rows in plan) for plan in plans}
    assert len(firsts) == 4
    sums = [sum(lengths[row] for row in rows) for rows in plans[0]]
    assert sums != sorted(sums, reverse=True)


def test_as_is_without_packing_is_the_order_of_the_file():
    assert plan_epoch([3, 1, 2], 5, False, 2, order="as-is") == [[0, 1], [2]]


@given(lengths_strategy, settings_strategy)
def test_longest_first_begins_with_the_longest_row_and_never_gets_longer(lengths, settings):
    plan = plan_epoch(lengths, 20, **(settings | {"order": "longest-first", "micro_batch_size": 1}))
    longest = [max(lengths[row] for row in rows) for rows in plan]
    assert longest == sorted(longest, reverse=True)
    assert plan == plan_epoch(lengths, 20, settings["packing"], 1, "longest-first", seed=9, epoch=9)


@given(lengths_strategy, settings_strategy)
def test_by_length_no_row_of_another_micro_batch_lies_between_the_lengths_of_one(lengths, settings):
    plan = plan_epoch(lengths, 20, **(settings | {"order": "by-length"}))
    ranges = sorted((min(of), max(of)) for rows in plan if (of := [lengths[row] for row in rows]))
    assert all(left[1] <= right[0] for left, right in pairwise(ranges))


def test_by_length_shuffles_the_steps_and_the_rows_of_equal_length():
    plans = [plan_epoch([3, 1, 2, 2] * 20, 4, False, 4, order="by-length", seed=seed) for seed in range(3)]
    assert plans[0] != plans[1] != plans[2]
    sizes = [[3, 1, 2, 2][rows[0] % 4] for rows in plans[0]]
    assert sizes not in (sorted(sizes), sorted(sizes, reverse=True))
    assert sorted(map(sorted, plans[0])) != sorted(map(sorted, plans[1]))


def test_micro_batch_size_counts_packs_when_packing():
    assert [len(rows) for rows in plan_epoch([5] * 12, 10, True, 2)] == [4, 4, 4]
    assert [len(rows) for rows in plan_epoch([5] * 5, 10, False, 2)] == [2, 2, 1]


@pytest.mark.parametrize("order", ORDERS)
def test_a_row_longer_than_a_pack_is_an_error(order):
    with pytest.raises(DataError, match="row 1 has 11 tokens"):
        plan_epoch([3, 11], 10, True, 1, order=order)


@pytest.mark.parametrize(("order", "size"), [("longest", 1), ("shuffle", 0)])
def test_a_plan_with_bad_settings_is_an_error(order, size):
    with pytest.raises(DataError, match="must be one of shuffle, as-is"):
        plan_epoch([1], 10, True, size, order=order)


def test_a_hundred_thousand_rows_are_packed_in_seconds_and_fill_the_packs():
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 100_000).clip(1, 1024).astype(int).tolist()
    start = time.perf_counter()
    packs = plan_epoch(lengths, 1024, True, 1)
    assert time.perf_counter() - start < 5  # about 0.3 s; a quadratic packer takes minutes
    assert packing_efficiency(lengths, 1024, packs) > 0.99


def test_packing_efficiency_is_the_filled_share_of_the_room():
    assert packing_efficiency([5, 3, 2], 10, [[0, 1], [2]]) == 0.5
    assert packing_efficiency([], 10, []) == 0.0


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=5))
def test_labels_are_the_next_learned_token_of_the_same_row(masks):
    rows = [example(len(mask), mask, f"f:{i}", 10 * i) for i, mask in enumerate(masks)]
    expected = [
        int(row.token_ids[t + 1]) if t + 1 < len(row.token_ids) and row.is_target[t + 1] else -100
        for row in rows
        for t in range(len(row.token_ids))
    ]
    if set(expected) == {-100}:
        with pytest.raises(DataError, match=r"no token to learn in the rows f:0"):
            collate(rows)
        return
    batch = collate(rows)
    assert batch.labels.tolist() == expected
    assert batch.input_ids.tolist() == [[int(token) for row in rows for token in row.token_ids]]
    assert batch.position_ids.tolist() == [[t for row in rows for t in range(len(row.token_ids))]]
    assert batch.row_lengths == tuple(len(mask) for mask in masks)
    assert batch.where == tuple(row.where for row in rows)


def test_a_batch_has_the_types_and_shapes_that_models_take():
    batch = collate([example(3), example(2)])
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.input_ids.shape == batch.position_ids.shape == (1, 5)
    assert batch.labels.shape == (5,)


@given(rows=st.lists(st.integers(2, 60), min_size=1, max_size=8), more=st.tuples(*[st.integers(0, 30)] * 4))
def test_enlarged_rows_have_the_most_of_everything_that_some_micro_batch_has(rows, more):
    examples = [taught(length, length - 1 - length % 2) for length in rows]
    own = extent_of(rows, [int(e.is_target.sum()) for e in examples], [range(len(rows))])
    most = Extent(*(mine + beyond for mine, beyond in zip(own[:4], more, strict=True)))
    most = most._replace(tokens=max(most.tokens, 2 * most.rows, most.longest))
    most = most._replace(rows=max(most.rows, -(-most.tokens // most.longest)))  # as of any real ones
    batch = collate(enlarged(examples, most))
    longest = min(most.longest, most.tokens - (most.rows > 1))
    count = min(most.rows, most.tokens - longest + 1)
    assert sum(batch.row_lengths) == most.tokens and len(batch.row_lengths) == count >= min(2, most.rows)
    assert max(batch.row_lengths) == max(longest, -(-(most.tokens - longest) // max(1, count - 1)))
    assert int((batch.labels != -100).sum()) == min(most.targets, most.tokens - count)
    assert sorted(set(batch.input_ids[0].tolist())) == sorted({int(t) for e in examples for t in e.token_ids})
    assert min(batch.row_lengths) >= 1


def test_rows_that_have_the_most_of_everything_stay_as_they_are():
    examples = [taught(9, 4), taught(5, 4)]
    assert all(one is other for one, other in zip(enlarged(examples, Extent(14, 2, 9, 8)), examples, strict=True))
    is_target = [int(each.is_target.sum()) for each in enlarged(examples, Extent(14, 2, 9, 10))]
    assert is_target == [6, 4]


def test_the_rows_of_an_enlarged_batch_are_of_various_lengths_as_those_given_are():
    lengths = [200, 100, 50, 30, 20]
    found = enlarged([taught(n, 1) for n in lengths], Extent(400, 9, 150, 5))
    assert len(found[0].token_ids) == 150 and len({len(each.token_ids) for each in found}) >= 5


def test_the_most_of_some_micro_batches_is_that_of_a_look_at_each():
    rows = [5, 7, 2, 9], [1, 6, 1, 3], [[0, 1], [2], [3, 2, 0]]
    assert extent_of(*rows) == (16, 3, 9, 7, 0, 0)
    assert extent_of(*rows, np.array([(0, 0), (4, 2), (1, 1), (5, 3)])) == (16, 3, 9, 7, 6, 3)


def taught(length, count):
    return example(length, [place >= length - count for place in range(length)])
