"""Held-out pictures on a run's page: what is shown of a good file, and nothing of one that is not what it should be."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qlora_lite.artifacts.run_files import RunFiles
from qlora_lite.ext.pictures.report import pictures
from qlora_lite.ext.pictures.shown import maps_of, neighbour_score, spread
from qlora_lite.prepare.task import Task
from qlora_lite.reporting.report import render

URI = "data:image/png;base64,AAAA"
GIVEN = {"where": "a/x.png:1", "label": "cat & dog", "picture": URI}
SEEN = {"label": "<b>", "share": 0.75, "neighbours": [{"picture": URI, "label": "n"}], "map": URI}


def test_a_card_shows_label_share_neighbours_and_map_before_and_after():
    found = pictures({"given": [GIVEN], "before": [SEEN], "after": [SEEN | {"label": "cat & dog"}]})
    assert found.count("<img") == 1 + 2 * 2 and found.count('class="card"') == 1
    assert "cat &amp; dog" in found and "&lt;b&gt;" in found and "<b>" not in found
    assert "before: " in found and "after: " in found and found.count("75%") == 2
    assert found.count('class="bad"') == 1 and found.count('class="good"') == 1


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"given": 3},
        {"given": [7]},
        {"given": [GIVEN | {"picture": "https://x/y.png"}]},
        {"given": [GIVEN | {"picture": 'data:image/png;base64,A" onload="x'}]},
        {"given": [GIVEN | {"picture": None}]},
    ],
)
def test_what_is_no_picture_is_left_out(found):
    assert pictures(found) == ""


@pytest.mark.parametrize("before", [None, [], [3], [{"neighbours": 3}], [{"neighbours": [4], "map": "javascript:x"}]])
def test_what_is_missing_of_a_picture_is_left_out(before):
    found = pictures({"given": [GIVEN], "before": before})
    assert found.count("<img") == 1 and "javascript" not in found


def test_patches_that_are_alike_get_one_colour_and_signs_do_not_matter():
    chance = torch.Generator().manual_seed(0)
    kinds = torch.randn(3, 8, generator=chance)
    patches = kinds[torch.randint(3, (2, 4, 5), generator=chance)]
    maps = maps_of(patches)
    assert maps.shape == (2, 4, 5, 3) and maps.dtype == np.uint8
    colours = {tuple(kind.tolist()): set() for kind in kinds}
    for patch, colour in zip(patches.flatten(0, 2), maps.reshape(-1, 3), strict=True):
        colours[tuple(patch.tolist())].add(tuple(colour.tolist()))
    assert all(len(found) == 1 for found in colours.values()) and len(set.union(*colours.values())) == 3
    assert maps.min() == 0 and maps.max() == 255
    assert maps_of(torch.ones(1, 2, 2, 8)).shape == (1, 2, 2, 3)


def test_the_nearest_picture_is_that_of_the_smallest_angle_and_its_label_counts():
    held, training = ([SimpleNamespace(answer=label) for label in labels] for labels in ("aabb", "ab"))
    features = torch.tensor([[9.0, 1.0], [1.0, 9.0], [1.0, 2.0], [0.1, 0.3]])
    score = neighbour_score(held, features, training, torch.tensor([[0.1, 0.0], [0.0, 50.0]]))
    assert (score.value, score.examples) == (0.75, 4)  # the second of a kind is nearer to the other


def test_shown_examples_are_spread_over_all():
    assert spread(range(100), 4) == [0, 33, 66, 99] and spread(range(3), 12) == [0, 1, 2] and spread([], 5) == []


def test_a_step_s_own_accuracy_is_no_measurement_of_held_out_rows(tmp_path):
    score = {"accuracy": {"value": 0.5, "standard_error": 0.1, "examples": 4}}
    steps = [{"step": 1, "loss": 2.0, "accuracy": 0.125}, {"step": 1, "accuracy": 0.375}]
    page = render(RunFiles({"metrics": {"before": score, "after": score}}, steps, "", [], {}), "run", Task(), tmp_path)
    assert "0.375 (step 1)" in page and "0.125 (step" not in page
