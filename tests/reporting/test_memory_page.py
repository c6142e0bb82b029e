"""The page about a step's memory: sums, the peak, escaping, and records with little in them."""

import json
import re
from html import unescape
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_sample import MIB, sample_record
from test_report import HOSTILE, Elements

from qlora_lite.reporting.memory_page import STYLE_OF, memory_page, peak_in_words
from qlora_lite.reporting.stacked import Moment, thin

GIB = 2**30


def small(**changes):
    """Return a record of three moments and a budget."""
    moments = [("forward", "a", 1), ("backward", "b", 3), ("optimizer", "", 2)]
    timeline = [
        {"phase": phase, "module": module, "bytes": {"base weights": GIB, "logits": size * GIB}}
        for phase, module, size in moments
    ]
    peak = {"bytes": 4 * GIB, "phase": "backward", "module": "b", "breakdown": timeline[1]["bytes"]}
    return {"title": "small", "peak": peak, "timeline": timeline, "budget_bytes": 6 * GIB} | changes


def data_of(html):
    """Return what the page's script reads."""
    return json.loads(unescape(re.search(r'data-moments="([^"]*)"', html)[1]))


def test_the_peak_is_told_with_its_place_its_parts_and_what_is_left():
    text = Elements(memory_page(small())).text
    for words in [
        "small fits",
        "Peak 4.0 GiB",
        "Where backward b",
        "Largest part 75 % logits",
        "Budget 6.0 GiB",
        "Left 2.0 GiB",
        "Peak of 4.0 GiB in backward of b: logits 75 %, base weights 25 %.",
        "base weights 1.0 GiB 25 %",
        "logits 3.0 GiB 75 %",
        "4.0 GiB at the peak · backward · b",
        "peak 4.0 GiB",
        "budget 6.0 GiB",
        "changes of memory, in order",
    ]:
        assert words in text


def test_what_stands_outside_the_tensors_counts_against_the_budget():
    constants = [{"name": "context", "bytes": 3 * GIB, "why": "driver"}]
    html = memory_page(small(constants=constants))
    text = Elements(html).text
    for words in [
        "does not fit",
        "Peak 7.0 GiB tensors 4.0 GiB",
        "Too much 1.0 GiB",
        "non-tensor memory 3.0 GiB 43 %",
        "context 3.0 GiB driver",
    ]:
        assert words in text
    assert [sum(row) for row in data_of(html)["kib"]] == [5 * MIB, 7 * MIB, 6 * MIB]


def test_every_moment_shown_sums_to_what_the_timeline_holds():
    record = sample_record(constants=[])
    data = data_of(memory_page(record))
    totals = [round(sum(point["bytes"].values()) / 1024) for point in record["timeline"]]
    assert len(data["kib"]) == len(data["edges"]) - 1 == len(data["phase"]) == len(data["module"]) <= 1500
    slices = [totals[start:end] for start, end in pairwise(data["edges"])]
    assert [sum(row) for row in data["kib"]] == [max(part) for part in slices]
    assert sum(map(len, slices)) == len(totals)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=300), st.integers(1, 40))
def test_thinning_keeps_the_fullest_moment_and_the_order(sizes, limit):
    moments = [Moment(index, "forward", "", (size, 1)) for index, size in enumerate(sizes)]
    kept = thin(moments, limit)
    assert len(kept) <= limit
    assert max(moment.total_bytes for moment in kept) == max(sizes) + 1
    assert kept[0].index == 0 and [moment.index for moment in kept] == sorted({moment.index for moment in kept})


def test_the_bands_are_drawn_from_the_ground_up_in_the_order_of_the_categories():
    html = memory_page(small())
    wide = html[html.index("<svg") : html.index("</svg>")]
    logits, weights = re.findall(r'<path class="(band-\d+)" d="M([\d.]+),([\d.]+)H[\d.]+V([\d.]+)', wide)
    assert (logits[0], weights[0]) == ("band-11", "band-1")
    assert logits[1:3] == weights[1:3]
    heights = [float(ground) - float(top) for _, _, ground, top in (logits, weights)]
    assert heights[0] == pytest.approx(2 * heights[1], rel=0.01)  # the first moment: 1 GiB upon 1 GiB


def test_an_unknown_category_is_shown_as_other():
    record = small()
    record["timeline"][0]["bytes"]["new"] = 2 * GIB
    html = memory_page(record)
    assert "other" in Elements(html).words
    assert sum(data_of(html)["kib"][0]) == 4 * MIB


def test_phases_are_named_and_a_narrow_one_stands_above_the_others():
    wide = memory_page(sample_record()).split("</svg>")[0]
    names = re.findall(r'phase-name" x="[\d.]+" y="([\d.]+)" text-anchor="middle">(\w+)', wide)
    assert names == [("30.0", "forward"), ("30.0", "backward"), ("14.0", "optimizer"), ("30.0", "evaluation")]


def test_what_changes_is_drawn_apart_where_most_stays():
    assert "Only what changes during the step" in memory_page(sample_record())
    loading = {"phase": "load", "module": "", "bytes": {"base weights": MIB}}
    record = small(timeline=[loading] * 400 + sample_record()["timeline"])
    drawn = memory_page(record).partition("Only what changes during the step")[2]
    assert drawn and f'class="{STYLE_OF["base weights"]}"' not in drawn.partition("</svg>")[0]
    assert ">load<" in memory_page(record).partition("</svg>")[0] and ">load<" not in drawn.partition("</svg>")[0]
    after = memory_page(record | {"timeline": [*record["timeline"], *[loading] * 400]}).partition("</svg>")[0]
    assert after.count(">load<") == after.count(">end<") == 1
    between = memory_page(small(timeline=[sample_record()["timeline"][0], loading, sample_record()["timeline"][-1]]))
    assert ">load<" not in between and ">end<" not in between
    assert "Only what changes" not in memory_page(small(timeline=[loading]))
    assert "Only what changes during the step" not in memory_page(small())


def test_a_far_budget_is_told_and_not_drawn():
    html = memory_page(small(budget_bytes=80 * GIB))
    assert "Budget 80.0 GiB" in Elements(html).text and 'class="budget"' not in html
    assert 'class="budget"' in memory_page(small())
    assert 'class="budget"' not in memory_page(small(budget_bytes=None))


def test_predicted_and_measured_are_compared():
    text = Elements(memory_page(sample_record())).text
    assert "adapter 80.0 MiB 81.0 MiB -1.0 MiB -1.2 %" in text
    assert "head 1002.0 MiB 1002.0 MiB 0 B" in text
    assert re.search(r"total 7\.0 GiB 7\.0 GiB -10\.0 MiB -0\.1 %", text)


@pytest.mark.parametrize("key", ["predicted", "measured"])
def test_one_side_alone_is_shown_without_a_difference(key):
    text = Elements(memory_page(small(**{key: {"logits": GIB}}))).text
    assert f"{key.capitalize()} Tensors at the peak. category {key} logits 1.0 GiB total 1.0 GiB" in text


def test_other_settings_are_listed_against_this_one():
    text = Elements(memory_page(sample_record())).text
    assert "no checkpointing 14.9 GiB +7.5 GiB 11.0s does not fit" in text
    assert "4,096 tokens 7.8 GiB" in text


def test_an_empty_timeline_leaves_the_figures():
    text = Elements(memory_page(small(timeline=[]))).text
    assert "No timeline was recorded." in text and "Peak of 4.0 GiB" in text


@pytest.mark.parametrize("size", [0, 1, 700, 5 * GIB])
def test_one_moment_is_drawn(size):
    moment = {"phase": "forward", "module": "m", "bytes": {"logits": size}}
    peak = {"bytes": size, "phase": "forward", "module": "m", "breakdown": moment["bytes"]}
    html = memory_page({"peak": peak, "timeline": [moment]})
    assert "nan" not in html and "<svg" in html
    assert data_of(html)["kib"] == ([[round(size / 1024)]] if size else [[]])


def test_a_peak_alone_is_enough():
    assert peak_in_words({"peak": {"bytes": 5, "phase": "", "module": ""}}) == "Peak of 5 B."
    Elements(memory_page({"peak": {"bytes": 0, "phase": None, "module": None, "breakdown": {}}}))


def test_no_text_of_the_record_becomes_markup():
    good = sample_record()
    record = good | {
        "title": HOSTILE,
        "subtitle": HOSTILE,
        "sentences": [HOSTILE],
        "peak": good["peak"] | {"phase": HOSTILE, "module": HOSTILE, "breakdown": {HOSTILE: 1}},
        "timeline": [{"phase": HOSTILE, "module": HOSTILE, "bytes": {HOSTILE: 5}}] * 3,
        "predicted": {HOSTILE: 3},
        "measured": {HOSTILE: 2},
        "alternatives": [{"change": HOSTILE, "peak_bytes": 1, "step_seconds": 1.0, "fits": True}],
        "constants": [{"name": HOSTILE, "bytes": 1, "why": HOSTILE}],
    }
    html = memory_page(record)
    page = Elements(html)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE in page.words
    assert data_of(html)["modules"] == [HOSTILE]


def test_the_page_loads_nothing():
    html = memory_page(sample_record())
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://(?!www\.w3\.org)", html)
    assert len(html) < 600_000


def test_a_long_timeline_is_thinned():
    points = sample_record()["timeline"] * 8
    html = memory_page(sample_record(timeline=points[:20_000]))
    assert 700 < len(data_of(html)["kib"]) <= 1500
    assert len(html) < 900_000


@pytest.mark.parametrize("budget_gib", [3.9, 4.0, 4.1, 4.3, 4.6, 6])
@pytest.mark.parametrize("place", range(5))
def test_the_texts_of_budget_and_peak_lie_apart_in_wide_and_narrow_pictures(budget_gib, place):
    sizes = [1, 1, 1, 1, 1]
    sizes[place] = 3
    timeline = [
        {"phase": "forward", "module": "a", "bytes": {"base weights": GIB, "logits": size * GIB}} for size in sizes
    ]
    html = memory_page(small(timeline=timeline, budget_bytes=int(budget_gib * GIB)))
    found = re.findall(r'<text class="tick halo[^"]*" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)<', html)
    boxes = {"budget": [], "peak": []}
    for x, y, anchor, text in found:
        if (name := text.split()[0]) in boxes:
            width = 7 * len(text)
            left = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
            boxes[name].append((left, left + width, float(y)))
    assert len(boxes["budget"]) == len(boxes["peak"]) >= 2
    for (left, right, y), (left_of_peak, right_of_peak, y_of_peak) in zip(*boxes.values(), strict=True):
        assert right <= left_of_peak or right_of_peak <= left or abs(y - y_of_peak) >= 12
