"""Work that is dealt to ranks by their speed, and the micro-batches that each has of a step."""

from itertools import product

import pytest

from qlora_lite.train.shares import Share, deal, own_micro_batches, own_part


def last_end(given, speeds):
    return max(number / speed for number, speed in zip(given, speeds, strict=True))


@pytest.mark.parametrize("speeds", [[1, 1], [165, 51], [1, 1, 3], [7.5, 2, 2, 0.1], [1e12]])
@pytest.mark.parametrize("count", [4, 7, 16])
def test_no_other_way_to_deal_ends_earlier(count, speeds):
    given = deal(count, speeds)
    ways = [way for way in product(range(1, count + 1), repeat=len(speeds)) if sum(way) == count]
    assert sum(given) == count and min(given) >= 1
    assert last_end(given, speeds) == min(last_end(way, speeds) for way in ways)


def test_equally_fast_ranks_get_as_many_and_the_first_ones_what_is_left():
    assert deal(8, [2.0, 2.0]) == [4, 4] and deal(8, [3, 3, 3]) == [3, 3, 2] and deal(3, [1, 9, 9]) == [1, 1, 1]


@pytest.mark.parametrize("shares", [[(3, 3), (1, 1)], [(6, 2), (3, 1), (3, 1)], [(4, 1), (1, 1)]])
def test_all_micro_batches_of_a_step_are_computed_once_also_of_a_short_one(shares):
    shares = [Share(*share) for share in shares]
    whole = sum(share.micro_batches for share in shares)
    for count in range(whole + 1):
        step = [[2 * number, 2 * number + 1] for number in range(count)]
        found = [own_micro_batches(step, shares, rank) for rank in range(len(shares))]
        assert [row for own in found for rows in own for row in rows] == [*range(2 * count)]
        for own, share in zip(found, shares, strict=True):
            assert len(own) <= share.runs and all(len(rows) <= 2 * share.joined for rows in own)
    assert [len(own) for own in found] == [share.runs for share in shares]


def test_equal_parts_are_equal():
    assert [list(own_part("abcdefg", [1, 1, 1], rank)) for rank in range(3)] == [
        ["a", "b"],
        ["c", "d"],
        ["e", "f", "g"],
    ]
