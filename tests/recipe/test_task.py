"""What a recipe's task section goes with, and what ends in an error with the cure."""

import pytest
import yaml

from qlora_lite.errors import RecipeError
from qlora_lite.prepare.task import find_task
from qlora_lite.recipe.load import load_recipe


def recipe(tmp_path, *overrides, **sections):
    path = tmp_path / "recipe.yaml"
    settings = {"model": {"path": "owner/name"}, "data": {"train": "rows.jsonl"}} | sections
    path.write_text(yaml.safe_dump(settings))
    return load_recipe(path, overrides, check_files=False)


def test_a_task_says_what_its_head_is_for_in_transformers_words(tmp_path):
    problems = {
        kind: find_task(found).head(found).problem
        for kind in ("classification", "multi-label", "regression", "reward")
        for found in [recipe(tmp_path, f"task.kind={kind}")]
    }
    assert problems == {
        "classification": "single_label_classification",
        "multi-label": "multi_label_classification",
        "regression": "regression",
        "reward": "regression",
    }
    assert find_task(recipe(tmp_path)).head(recipe(tmp_path)) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.metrics_examples=8", "data.eval=rows.jsonl"], "train.metrics_examples = 8: for a language model"),
        (["train.merge_aware=nf4"], "train.merge_aware = nf4: for a language model"),
        (["train.compile=true"], "train.compile = true: for a language model"),
        (["model.quant_head=true"], "model.quant_head = true: for a language model"),
        (["data.template=plain"], "data.template = plain: for a language model"),
        (["data.train_on=all"], "data.train_on = all: for a language model"),
        (["data.overflow=split"], "data.overflow = split: a text of task.kind classification has one label"),
        (["adapter.method=bottleneck", "train.learning_rate=1e-3"], "adapter.method = bottleneck: a head"),
        (["adapter.train_also=biases"], "adapter.train_also"),
        (["memory.loss_chunk_tokens=64"], "memory.loss_chunk_tokens = 64: for a language model"),
        (["task.labels=[a]"], "task.labels: one label is nothing to choose from"),
        (["data.streaming=true", "data.order=as-is", "train.max_steps=3"], "task.labels: a stream is not read"),
    ],
)
def test_what_makes_no_sense_beside_a_head_is_an_error_with_the_cure(tmp_path, overrides, message):
    with pytest.raises(RecipeError) as error:
        recipe(tmp_path, *overrides, task={"kind": "classification"})
    assert message in str(error.value) and len(error.value.problems) == 1


def test_names_of_labels_belong_to_labels(tmp_path):
    for kind in ("language-model", "regression"):
        with pytest.raises(RecipeError, match=r"task\.labels: only with task\.kind classification, .* or multi-label"):
            recipe(tmp_path, task={"kind": kind, "labels": ["a", "b"]})
    assert recipe(tmp_path, task={"kind": "classification", "labels": ["a", "b"]}).task.labels == ("a", "b")


def test_a_head_alone_can_be_trained_and_so_can_all_of_the_model(tmp_path):
    assert recipe(tmp_path, "lora.targets=[]", task={"kind": "classification"}).lora.targets == ()
    found = recipe(tmp_path, "adapter.method=full", "model.quant=none", task={"kind": "regression"})
    assert found.adapter.method == "full"
