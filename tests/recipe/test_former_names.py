"""Settings under the names that they had before."""

import pytest

from qlora_lite.errors import CheckpointError, RecipeError
from qlora_lite.explain import explain
from qlora_lite.prepare.settings import with_plan
from qlora_lite.recipe.load import load_recipe
from qlora_lite.recipe.schema import FORMER_NAMES, Recipe
from qlora_lite.runs.resume import RUN, Continuation
from qlora_lite.train.checkpoints import Checkpoint

MODEL = "model:\n  path: meta-llama/Llama-3.1-8B\ndata:\n  train: rows.jsonl\n"


def load(tmp_path, more: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(MODEL + more, encoding="utf-8")
    return load_recipe(path, overrides, check_files=False)


def test_a_recipe_and_overrides_with_former_names_are_those_with_the_present_ones(tmp_path):
    more = "memory:\n  checkpoint_every: 1\n  reuse_dequantized: true\ntrain:\n  exact_match_rows: 0\n"
    former = load(tmp_path, more, "memory.kept_blocks=3", "memory.resident_blocks=4")
    assert former.memory.layers_per_checkpoint == 1 and former.memory.cache_dequantized is True
    assert former.memory.uncheckpointed_layers == 3 and former.memory.resident_layers == 4
    present = "memory:\n  layers_per_checkpoint: 1\n  cache_dequantized: true\n"
    overrides = "memory.uncheckpointed_layers=3", "memory.resident_layers=4"
    assert load(tmp_path, present, *overrides).recipe_hash == former.recipe_hash


def test_a_setting_under_both_names_is_named_with_its_place(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe\.yaml:7: memory\.kept_blocks is now called memory\.uncheckpointed"):
        load(tmp_path, "memory:\n  uncheckpointed_layers: 3\n  kept_blocks: 2\n")


def test_a_wrong_value_under_a_former_name_is_reported_at_its_place(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe\.yaml:6: memory\.uncheckpointed_layers = many: must be"):
        load(tmp_path, "memory:\n  kept_blocks: many\n")


def test_the_plan_of_an_older_run_is_taken_over(tmp_path):
    recipe = with_plan(load(tmp_path, ""), {"memory.kept_blocks": 5, "memory.head": "device"})
    assert recipe.memory.uncheckpointed_layers == 5 and recipe.memory.head == "device"


@pytest.mark.parametrize("former", FORMER_NAMES)
def test_an_explanation_of_a_former_name_is_that_of_the_present_one(former):
    assert explain(former) == explain(FORMER_NAMES[former]) and FORMER_NAMES[former] in explain(former)


def test_a_checkpoint_with_former_names_is_of_the_same_run(tmp_path):
    recipe = load(tmp_path, "", "memory.uncheckpointed_layers=3", "train.max_steps=5")
    stored = recipe.model_dump(mode="json")
    for key, former in {key: former for former, key in FORMER_NAMES.items()}.items():
        section, name = key.split(".")
        stored[section][former.partition(".")[2]] = stored[section].pop(name)
    continuation = Continuation(Checkpoint(1, {}, {RUN: {"recipe": stored}}))
    continuation.compare_settings(recipe)
    assert not continuation.accepted
    with pytest.raises(CheckpointError, match=r"memory\.uncheckpointed_layers: 3 -> 4"):
        continuation.compare_settings(load(tmp_path, "", "memory.uncheckpointed_layers=4", "train.max_steps=5"))
