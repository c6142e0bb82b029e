"""Training that begins with an adapter resumes from its factors to the bit, and never with one that does not fit."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import random_factors
from tiny_files import save_tiny, write_recipe
from tiny_runs import summary_of
from transformers import AutoModelForCausalLM

from qlora_lite.adapters.files import adapter_tensors, save_adapter
from qlora_lite.adapters.lora.inject import lora_layers
from qlora_lite.artifacts.run_folder import open_run
from qlora_lite.artifacts.trained_run import adapter_to_begin_with
from qlora_lite.errors import Interrupted, ModelError, RecipeError
from qlora_lite.inference.evaluate import evaluate_recipe
from qlora_lite.prepare.method import build_method
from qlora_lite.prepare.model import add_adapter, build_model, build_skeleton
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs.profile import profile_recipe
from qlora_lite.runs.run import run_recipe

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def first(model_folder, tmp_path_factory):
    """A finished run."""
    return run_recipe(load_recipe(write_recipe(tmp_path_factory.mktemp("first"), model_folder)))


@pytest.fixture
def second(model_folder, tmp_path):
    """Make the recipe of a run that begins with an adapter."""

    def make(adapter, *overrides, **sections):
        path = write_recipe(tmp_path, model_folder, **sections)
        return load_recipe(path, [f"lora.init_from={adapter}", *overrides])

    return make


@pytest.mark.parametrize("part", ["", "adapter"])
def test_a_second_run_begins_where_the_first_one_ended(first, second, part):
    folder = run_recipe(second(first / part, "train.seed=7"))
    ended, began = summary_of(first), summary_of(folder)
    assert began["eval_loss_before"] == ended["eval_loss_after"] < ended["eval_loss_before"]
    assert began["eval_loss_after"] < began["eval_loss_before"]
    assert open_run(folder).recipe.lora.init_from == str(first / part)


def test_the_weights_are_those_of_the_file_and_all_of_them_are_trained(first, second):
    recipe = second(first)
    model = build_model(recipe, adapter=adapter_to_begin_with(recipe))
    given = load_file(first / "adapter" / WEIGHTS)
    for name, layer in lora_layers(model):
        for letter in ("A", "B"):
            factor = getattr(layer, f"lora_{letter}")
            assert factor.requires_grad and torch.equal(factor, given[f"base_model.model.{name}.lora_{letter}.weight"])
    assert model.get_submodule("model.layers.0.mlp.up_proj").lora_B.any()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers
def test_an_adapter_that_peft_wrote_is_begun_with(model_folder, second, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    theirs.save_pretrained(tmp_path / "theirs")
    recipe = second(tmp_path / "theirs", "lora.dtype=float32")
    model, given = build_model(recipe, adapter=tmp_path / "theirs"), load_file(tmp_path / "theirs" / WEIGHTS)
    layers = dict(lora_layers(model))
    assert len(layers) * 2 == len(given)
    for name, layer in layers.items():
        assert torch.equal(layer.lora_B, given[f"base_model.model.{name}.lora_B.weight"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["lora.rank=8"], ["lora.rank is 8, its rank 4"]),
        (["lora.alpha=16", "lora.rslora=true"], ["lora.alpha is 16.0, its alpha 8.0", "lora.rslora is True"]),
        (["lora.targets=[q_proj]"], ["lora.targets lack model.layers.0.mlp.down_proj, ", " and 9 more"]),
        (["lora.targets=[all-linear, {pattern: q_proj, rank: 2, alpha: 4}]"], ["lora.rank is 2, its rank 4"]),
    ],
)
def test_an_adapter_of_other_weights_is_refused_before_rows_are_read_with_all_that_differs(
    first, second, overrides, said, monkeypatch
):
    def read_rows(*_):
        raise AssertionError("rows were read")

    monkeypatch.setattr("qlora_lite.runs.stages.preflight", read_rows)
    with pytest.raises(ModelError, match=r"lora\.init_from: the adapter has other factors than this recipe") as caught:
        run_recipe(second(first, *overrides))
    assert all(text in str(caught.value) for text in said)


def test_layers_that_the_adapter_lacks_are_named(model_folder, second, tmp_path):
    model = build_model(load_recipe(write_recipe(tmp_path, model_folder), ["lora.targets=[q_proj, v_proj]"]))
    random_factors(model)
    save_adapter(model, tmp_path / "fewer")
    with pytest.raises(ModelError, match=r"it lacks model\.layers\.0\.mlp\.down_proj, .* and 7 more"):
        recipe = second(tmp_path / "fewer")
        add_adapter(recipe, build_skeleton(recipe), tmp_path / "fewer")


def test_a_run_of_another_base_model_is_refused_by_name(first, second, tmp_path):
    save_tiny(tmp_path / "other", seed=5)
    with pytest.raises(ModelError, match=r"lora\.init_from: .* is another model: give the right one with model\.path"):
        run_recipe(second(first, f"model.path={tmp_path / 'other'}"))


def test_what_is_no_adapter_is_a_fault_of_the_recipe(second, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for path, said in (("nowhere", "no such folder in"), ("empty", "is neither a run folder nor an adapter: ")):
        with pytest.raises(RecipeError, match=f"lora.init_from = .*{said}"):
            second(path if path == "nowhere" else tmp_path / path)
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert second("empty").lora.init_from == str(tmp_path / "empty")


def test_a_stopped_second_run_goes_on_to_the_very_same_end_without_the_adapter_it_began_with(first, second, tmp_path):
    whole = run_recipe(second(first, f"output.dir={tmp_path / 'whole'}", "train.save_every_steps=2"))

    def stop(metrics, _total):
        if metrics.step == 3:
            raise KeyboardInterrupt

    overrides = [f"output.dir={tmp_path / 'cut'}", "train.save_every_steps=2"]
    with pytest.raises(Interrupted):
        run_recipe(second(first, *overrides), stop)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text("{}")  # no adapter at all, and not looked at
    run_recipe(second(tmp_path / "other", *overrides), resume="")
    one, two = (load_file(Path(folder) / "adapter" / WEIGHTS) for folder in (whole, tmp_path / "cut"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_a_run_of_dora_is_resumed_to_the_bit_begun_with_and_answers(model_folder, second, tmp_path):
    overrides = ["adapter.method=dora", "train.loraplus_lr_ratio=4", "train.save_every_steps=2"]
    path = write_recipe(tmp_path, model_folder)
    whole, cut = (load_recipe(path, [*overrides, f"output.dir={tmp_path / name}"]) for name in ("whole", "cut"))
    run_recipe(whole)

    def stop(metrics, _total):
        if metrics.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run_recipe(cut, stop)
    run_recipe(cut, resume="")
    one, two = (load_file(tmp_path / name / "adapter" / WEIGHTS) for name in ("whole", "cut"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert any(name.endswith("lora_magnitude_vector") for name in one)

    summary, recipe = summary_of(tmp_path / "whole"), second(tmp_path / "whole", "adapter.method=dora")
    begun = build_model(recipe, adapter=adapter_to_begin_with(recipe))
    assert all(torch.equal(tensor, adapter_tensors(begun)[name]) for name, tensor in one.items())
    with pytest.raises(ModelError, match=r"other factors than this recipe: adapter\.method is lora, its method dora"):
        add_adapter(plain := second(tmp_path / "whole"), build_skeleton(plain), tmp_path / "whole" / "adapter")
    found = evaluate_recipe(whole, tmp_path / "whole" / "adapter", 0)
    assert found["eval_loss"] == pytest.approx(summary["eval_loss_after"], rel=1e-4)
    assert found["eval_loss"] < summary["eval_loss_before"]


def test_a_run_with_a_prefix_begins_as_its_text_before_every_row_does(model_folder, tmp_path):
    path = write_recipe(
        tmp_path,
        model_folder,
        adapter={"method": "prefix"},
        lora={},
        prompt={"init_text": "Some words."},
        train={"max_steps": 1, "learning_rate": 1e-9},
    )
    path.write_text(path.read_text().replace("lora:\n  alpha: 8\n  rank: 4\n", ""))
    recipe = load_recipe(path)
    saved = load_file(run_recipe(recipe) / "adapter" / WEIGHTS)
    model = build_model(recipe)
    method = build_method(recipe)
    assert method.init_ids
    method.begin(model)
    torch.testing.assert_close(saved, method.files(model), rtol=1e-5, atol=1e-6)


def test_a_profile_measures_the_adapter_that_training_would_begin_with(first, second, tmp_path, monkeypatch):
    seen = []
    built = build_model

    def build(recipe, options, adapter, first):
        seen.append(adapter)
        return built(recipe, options, adapter, first)

    monkeypatch.setattr("qlora_lite.runs.profile.build_model", build)
    profile_recipe(second(first), tmp_path / "profile", 1)
    assert seen == [first / "adapter"]


def test_the_base_model_of_a_recipe_is_measured_without_the_adapter_it_begins_with(first, second):
    result = evaluate_recipe(second(first), None, 0)
    assert result["eval_loss"] == pytest.approx(summary_of(first)["eval_loss_before"], rel=1e-5)
