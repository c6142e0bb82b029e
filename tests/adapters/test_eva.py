"""A begins with the largest directions of a layer's inputs, and layers share ranks out by them: ``lora.start: eva``."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_files import VOCABULARY, byte_tokenizer, save_tiny, write_recipe
from tiny_runs import logits, run_whole_and_stopped
from transformers import AutoModelForCausalLM

from qlora_lite.adapters.files import load_adapter
from qlora_lite.adapters.lora.eva import RATIO, Directions, kept_scale, share_out
from qlora_lite.adapters.lora.inject import linear_layers, lora_layers
from qlora_lite.artifacts.trained_run import open_trained
from qlora_lite.errors import DataError, ModelError, RecipeError
from qlora_lite.export.formats import ExportSettings, export_run
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.prepare import first_weights as eva
from qlora_lite.prepare.datasets import build_data
from qlora_lite.prepare.model import build_model, build_to_use
from qlora_lite.prepare.ranks import plan_run
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs import stages
from qlora_lite.runs.run import run_recipe
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.forward import hidden_states

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft asks transformers
    pytest.mark.usefixtures("simulations"),
]
LORA = {"rank": 4, "alpha": 8, "dtype": "float32", "start": "eva"}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path_factory.getbasetemp() / "cache of eva"))


def recipe_of(folder, overrides=(), model_type="llama", **lora):
    (folder / "at").mkdir(exist_ok=True)
    if not (folder / "model").exists():
        save_tiny(folder / "model", model_type)
    return load_recipe(write_recipe(folder / "at", folder / "model", 12, lora=LORA | lora), overrides)


def examples_of(recipe):
    return build_data(recipe, byte_tokenizer()).examples


def inputs_of(model, paths, examples):
    """The inputs [T, in] of layers over all examples, one by one, without the filler behind each."""
    seen, work = {path: [] for path in paths}, causal_lm()
    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: seen[path].append(args[0][0]))
    for example in examples:
        with torch.no_grad():
            hidden_states(model, work.batches.inputs(work.batches.collate([example]), torch.device("cpu")))
        for parts in seen.values():
            parts[-1] = parts[-1][: len(example.token_ids)].double()
    return {path: torch.cat(parts) for path, parts in seen.items()}


@pytest.mark.parametrize("columns", [20, 300])
def test_directions_that_are_found_in_parts_are_those_of_all_rows(columns):
    generator = torch.Generator().manual_seed(0)
    scales = 1 / torch.arange(1, columns + 1)
    rows = torch.randn(1500, columns, generator=generator) * scales + 0.3 * scales
    directions = Directions(8)
    for part in rows.split(200):
        directions.add(part)
    found, shares = directions.found(8)
    _, lengths, expected = torch.linalg.svd(rows.double(), full_matrices=False)
    assert torch.allclose((found.double() * expected[:8]).sum(1).abs(), torch.ones(8, dtype=torch.float64), atol=1e-4)
    assert shares == pytest.approx((lengths[:8] ** 2 / (lengths**2).sum()).tolist(), rel=1e-4)
    assert torch.allclose(found @ found.t(), torch.eye(8), atol=1e-5)


def test_directions_that_are_not_there_are_not_found():
    directions = Directions(8)
    directions.add(torch.ones(700, 1) * torch.arange(1.0, 33))
    found, shares = directions.found(8)
    assert found.shape == (1, 32) and shares == pytest.approx([1.0])


def test_ranks_go_to_the_largest_shares_and_sum_to_those_that_layers_had():
    shares = {"a": [0.9, 0.05], "b": [0.5, 0.3, 0.1, 0.04], "c": [0.02, 0.01, 0.01, 0.01]}
    assert share_out(shares, {"a": 1, "b": 2, "c": 2}) == {"a": 2, "b": 3}
    assert share_out(shares, {"a": 1, "b": 2, "c": 4}) == {"a": 2, "b": 4, "c": 1}
    assert share_out({"a": [0.5], "b": [0.5]}, {"a": 1, "b": 0}) == {"a": 1}, "the first of equals"
    with pytest.raises(ModelError, match=r"found 10 directions in the inputs of 3 layers, fewer than their ranks, 12"):
        share_out(shares, {"a": 4, "b": 4, "c": 4})
    assert kept_scale(8.0, 4, 6, rslora=False) / 6 == 8 / 4
    assert kept_scale(8.0, 4, 6, rslora=True) / 6**0.5 == pytest.approx(8 / 4**0.5)


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("gpt2", ["model.quant=none"]),
        ("falcon", []),
        ("bloom", []),
        ("llama", ["adapter.method=dora", "model.keep_16bit=[v_proj]"]),
    ],
)
def test_a_begins_with_the_directions_of_the_inputs_of_the_training_rows(model_type, overrides, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_lite.adapters.lora.eva.SPARE", 64)  # all, so that near equals are told apart
    recipe = recipe_of(tmp_path, overrides, model_type)
    examples, base = examples_of(recipe), build_to_use(recipe)
    first = eva.first_of(recipe, examples)
    ranks = eva.ranks_of(recipe, first)
    layers = [path for path in linear_layers(base) if not path.endswith("head")]
    assert sum(rank for rank, _ in ranks.values()) == 4 * len(layers)
    assert len({rank for rank, _ in ranks.values()}) > 1 and max(rank for rank, _ in ranks.values()) <= RATIO * 4
    model = build_model(eva.with_ranks(recipe, ranks), first=first)
    assert torch.equal(logits(model), logits(base)) and ranks.keys() == dict(lora_layers(model)).keys()
    expected = {
        path: torch.linalg.svd(rows, full_matrices=False) for path, rows in inputs_of(base, layers, examples).items()
    }
    least = []
    for path, layer in lora_layers(model):
        assert layer.rank == ranks[path][0] and layer.scale == pytest.approx(2) and not layer.lora_B.any()
        directions = expected[path].Vh[: layer.rank]
        assert (layer.lora_A.double() @ directions.t()).abs().diag().min() > 0.999, path
        least.append((expected[path].S[layer.rank - 1] ** 2 / (expected[path].S ** 2).sum()).item())
    left = [
        (expected[path].S[ranks.get(path, (0,))[0]] ** 2 / (expected[path].S ** 2).sum()).item()
        for path in layers
        if ranks.get(path, (0,))[0] < RATIO * 4
    ]
    assert max(left) <= min(least) * (1 + 1e-6)


@pytest.mark.parametrize("start", ["eva", "qera"])
def test_rows_that_the_model_has_no_positions_for_are_named(start, tmp_path):
    save_tiny(tmp_path / "model", "gpt2", n_positions=24)
    recipe = recipe_of(tmp_path, start=start)
    with pytest.raises(DataError, match="takes 28 positions, and the model has embeddings of 24"):
        eva.first_of(recipe, examples_of(recipe))


def test_both_sequences_of_a_preference_are_rows_of_their_own(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path)
    rows = list(examples_of(recipe))
    pairs = [joined(*two) for two in zip(rows[::2], rows[1::2], strict=True)]
    monkeypatch.setattr(eva, "_batches", lambda examples, *_: [list(examples)])
    alone, together = (eva.first_of(recipe, each) for each in (rows, pairs))
    assert alone.keys() == together.keys()
    for path, (lora_a, _) in alone.items():
        assert torch.allclose(lora_a, together[path][0], atol=1e-5), path


def joined(first, second):
    ids, is_target = (
        np.concatenate([first.token_ids, second.token_ids]),
        np.concatenate([first.is_target, second.is_target]),
    )
    return replace(first, token_ids=ids, is_target=is_target, first=len(first.token_ids))


def test_layers_with_ranks_and_alphas_of_their_own_keep_their_scales_and_the_sum(tmp_path):
    targets = [{"pattern": "q_proj", "rank": 2, "alpha": 6}, "down_proj"]
    recipe = recipe_of(tmp_path, targets=targets)
    ranks = eva.ranks_of(recipe, eva.first_of(recipe, examples_of(recipe)))
    assert sum(rank for rank, _ in ranks.values()) == 2 * (2 + 4)
    for path, (rank, alpha) in ranks.items():
        assert alpha / rank == pytest.approx(3 if path.endswith("q_proj") else 2)


def test_it_is_found_once_for_the_same_rows_and_anew_for_others(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    recipe, runs, own = recipe_of(tmp_path), [], eva._directions
    monkeypatch.setattr(eva, "_directions", lambda *given: runs.append(1) or own(*given))
    monkeypatch.setitem(eva.TOKENS, "eva", 150)
    examples = examples_of(recipe)
    first, again = eva.first_of(recipe, examples), eva.first_of(recipe, examples)
    assert len(runs) == 1 and first.keys() == again.keys()
    assert all(torch.equal(a, b) for path in first for a, b in zip(first[path], again[path], strict=True))
    for other in (["train.seed=5"], ["lora.rank=3"], ["model.quant=none"], ["lora.targets=q_proj"]):
        eva.first_of(recipe_of(tmp_path, other), examples)
    assert len(runs) == 5


def test_the_plan_of_the_run_has_the_ranks_that_are_trained(tmp_path):
    recipe = recipe_of(tmp_path)
    examples = examples_of(recipe)
    ranks = eva.ranks_of(recipe, eva.first_of(recipe, examples))
    plan, _ = plan_run(eva.with_ranks(recipe, ranks), examples, ())
    shapes = linear_layers(build_to_use(recipe))
    weights = sum(
        4 * rank * (shapes[path].in_features + shapes[path].out_features) for path, (rank, _) in ranks.items()
    )
    assert plan.chosen.prediction.simulation.trained_bytes == weights


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["lora.init_from=somewhere"], "lora.init_from has LoRA weights to begin with"),
        (["adapter.method=prompt", "train.learning_rate=0.1"], "lora.start: only with adapter.method dora or lora"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, text, tmp_path):
    with pytest.raises(RecipeError, match=text):
        recipe_of(tmp_path, overrides)


def test_experts_and_too_few_rows_are_refused(tmp_path):
    recipe = recipe_of(tmp_path, model_type="qwen3_moe", targets=["all-linear", "experts"])
    for refused in (lambda: plan_run(recipe, examples_of(recipe), ()), lambda: eva.first_of(recipe, [])):
        with pytest.raises(ModelError, match=r"lora.start eva is for linear layers, and lora.targets name experts too"):
            refused()
    recipe = recipe_of(tmp_path, ["lora.rank=60"])
    with pytest.raises(ModelError, match=r"directions in the inputs of \d+ layers, fewer than their ranks, \d+"):
        eva.first_of(recipe, examples_of(recipe)[:1])


def test_rows_may_have_tokens_that_the_model_lacks(tmp_path):
    recipe = recipe_of(tmp_path, [f"adapter.train_tokens={[f'<|{number}|>' for number in range(9)]}"])
    new = len(load_tokenizer(recipe.model.path)) + 8
    assert new >= VOCABULARY
    examples = [replace(each, token_ids=np.full_like(each.token_ids, new)) for each in examples_of(recipe)]
    with_new = eva.first_of(recipe, [*examples_of(recipe), *examples])
    assert sum(len(lora_a) for lora_a, _ in with_new.values()) == 4 * 14


def test_a_run_is_planned_with_its_ranks_and_begins_with_them(tmp_path, monkeypatch):
    planned, own = [], stages.plan_run
    monkeypatch.setattr(stages, "plan_run", lambda recipe, *rest: planned.append(recipe) or own(recipe, *rest))
    recipe = recipe_of(tmp_path, ["train.max_steps=1", "train.learning_rate=1e-9", "train.metrics_examples=0"])
    first = eva.first_of(recipe, examples_of(recipe))
    found = load_file(run_recipe(recipe) / "adapter" / "adapter_model.safetensors")
    ranks = {target.pattern: target.rank for target in planned[0].lora.targets}
    assert ranks == {path: len(lora_a) for path, (lora_a, _) in first.items()}
    for path, (lora_a, _) in first.items():
        assert torch.allclose(found[f"base_model.model.{path}.lora_A.weight"], lora_a, atol=1e-6), path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model, and a run of it that was resumed, without the cache, after it was stopped."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_LITE_CACHE", str(folder / "cache"))
        recipe = recipe_of(folder, ["model.quant=none", "train.save_every_steps=2"])
        whole = run_whole_and_stopped(recipe, folder)
        shutil.rmtree(folder / "cache")
        patch.setattr(eva, "first_of", None)
        return folder, whole, run_recipe(recipe, None, "")


def test_a_resumed_run_ends_as_one_that_was_never_stopped(trained):
    _, whole, resumed = trained
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, resumed))
    assert one and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, resumed)]
    assert summaries[0]["eval_loss_after"] == summaries[1]["eval_loss_after"] < summaries[0]["eval_loss_before"]
    assert summaries[0]["lora_ranks"] == summaries[1]["lora_ranks"]
    assert {name.split(".lora_A")[0]: len(tensor) for name, tensor in one.items() if "lora_A" in name} == {
        f"base_model.model.{path}": rank for path, (rank, _) in summaries[0]["lora_ranks"].items()
    }


def test_plain_peft_loads_the_run_and_its_export_with_equal_logits(trained, tmp_path):
    folder, run, _ = trained
    trained_run = open_trained(run)
    wanted = logits(load_adapter(build_to_use(trained_run.recipe), run / "adapter"))
    for name in ("peft", "vllm", "gguf-adapter"):
        export_run(run, tmp_path / name, ExportSettings(name))
    for adapter in (run / "adapter", tmp_path / "peft", tmp_path / "vllm"):
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        assert torch.allclose(logits(PeftModel.from_pretrained(base, adapter)), wanted, atol=1e-5)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] and "init_lora_weights" not in config
