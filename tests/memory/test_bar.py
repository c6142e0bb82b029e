"""The terminal's bar: lengths that add up, a mark at the budget, and nothing dropped."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from qlora_lite.memory.bar import BESIDE, CATEGORIES, COLOURS, OTHER, in_order, memory_bar

GIB = 2**30
BREAKDOWN = {"logits": GIB, "base weights": 3 * GIB, "saved activations": 2 * GIB, "gradients": 0}


def plain(*args, **kwargs):
    return Text.from_markup(memory_bar(*args, **kwargs)).plain.split("\n")


def test_a_bar_within_the_budget_leaves_room_and_says_how_much():
    bar, total, *legend = plain(BREAKDOWN, 8 * GIB, 64)
    assert bar == "B" * 24 + "S" * 16 + "L" * 8 + "·" * 15 + "┃"
    assert total == "6.0 GiB of 8.0 GiB, 2.0 GiB left"
    assert legend[0].startswith("B base weights 3.0 GiB, 50 %")


def test_a_bar_over_the_budget_is_marked_where_the_budget_ends():
    bar, total, *_ = plain(BREAKDOWN, 4 * GIB, 60)
    assert len(bar) == 60 and bar.index("┃") == 39
    assert total == "6.0 GiB of 4.0 GiB, 2.0 GiB too much"


def test_without_a_budget_the_bar_is_the_total():
    bar, total, *_ = plain(BREAKDOWN, None, 60)
    assert bar == "B" * 30 + "S" * 20 + "L" * 10
    assert total == "6.0 GiB"


def test_every_category_has_a_letter_of_its_own_in_the_bar_and_before_its_name():
    sizes = dict.fromkeys((*CATEGORIES, BESIDE, OTHER), GIB)
    bar, _, *legend = plain(sizes, None, 4 * len(sizes))
    letters = list(dict.fromkeys(bar))
    assert len(letters) == len(sizes)
    for letter, name in zip(letters, sizes, strict=True):
        assert f"{letter} {name} 1.0 GiB" in "\n".join(legend)


def test_an_unknown_category_is_counted_as_other():
    assert in_order({"[red]new[/]": 5, "base weights": 1, "more": 2}) == {"base weights": 1, OTHER: 7}
    assert any("other" in line for line in plain({"new": GIB}, None, 40))


def test_an_empty_breakdown_is_drawn():
    assert plain({}, None, 40)[1] == "0 B"
    assert plain({}, GIB, 40)[0] == "·" * 39 + "┃"


@given(
    st.dictionaries(st.sampled_from(CATEGORIES), st.integers(0, 2**40), max_size=11),
    st.one_of(st.none(), st.integers(1, 2**40)),
    st.integers(20, 200),
)
def test_no_bar_is_longer_than_asked(breakdown, budget_bytes, width):
    bar, *_ = plain(breakdown, budget_bytes, width)
    assert len(bar) == (width if sum(breakdown.values()) or budget_bytes else 0)


def lightness(colour):
    """Return CIE L*, 0 to 100, of #rrggbb."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = sum(c * w for c, w in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))
    return 116 * luminance ** (1 / 3) - 16


@pytest.mark.parametrize("paper", [0, 1])
def test_neighbours_differ_in_lightness(paper):
    tones = [lightness(colours[paper]) for colours in COLOURS.values()]
    assert min(abs(a - b) for a, b in pairwise(tones)) > 10
    assert len(set(COLOURS.values())) == len(COLOURS)
