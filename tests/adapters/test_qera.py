"""LoRA weights that begin as what makes up for the error of 4 bits on the training rows: ``lora.start: qera``."""

import json
import shutil
from functools import partial

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_files import as_if_packed, byte_tokenizer, save_tiny, write_recipe
from tiny_runs import logits, run_whole_and_stopped, stop_at
from transformers import AutoModelForCausalLM

from qlora_lite.adapters.files import detach_adapter, load_adapter, save_adapter
from qlora_lite.adapters.lora.inject import add_lora, linear_layers, lora_layers
from qlora_lite.adapters.lora.qera import RandomSums, correction
from qlora_lite.adapters.lora.start import FIRST_NAME
from qlora_lite.artifacts.trained_run import open_trained
from qlora_lite.errors import Interrupted, ModelError, RecipeError
from qlora_lite.export.formats import ExportSettings, export_run
from qlora_lite.export.merge import MergeSettings, merge_run
from qlora_lite.models.load import load_model
from qlora_lite.prepare import first_weights
from qlora_lite.prepare.datasets import build_data
from qlora_lite.prepare.first_weights import first_of
from qlora_lite.prepare.model import build_model, build_to_use
from qlora_lite.prepare.ranks import plan_run
from qlora_lite.quant.nf4 import dequantize, quantize
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs.run import run_recipe
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.forward import hidden_states

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft asks transformers
    pytest.mark.usefixtures("simulations"),
]
LORA = {"rank": 4, "alpha": 8, "dtype": "float32", "start": "qera"}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path_factory.getbasetemp() / "cache of qera"))


def recipe_of(folder, overrides=(), model_type="llama", **lora):
    (folder / "at").mkdir(exist_ok=True)
    if not (folder / "model").exists():
        save_tiny(folder / "model", model_type)
    return load_recipe(write_recipe(folder / "at", folder / "model", 12, lora=LORA | lora), overrides)


def examples_of(recipe):
    return build_data(recipe, byte_tokenizer()).examples


def uneven(rows, columns, seed=0):
    """Rows in some directions of which there is much more than in others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    return torch.randn(rows, columns, generator=generator) / torch.arange(1, columns + 1) @ mixed


def by_the_roots(error, x, rank):
    """The product of A and B as the paper has it, with a root of the inputs' autocorrelation and its inverse."""
    values, vectors = torch.linalg.eigh(x.double().t() @ x.double())
    root, inverse = (vectors * values.sqrt() @ vectors.t(), vectors / values.sqrt() @ vectors.t())
    u, s, v = torch.linalg.svd(error.double() @ root)
    return u[:, :rank] * s[:rank] @ v[:rank] @ inverse


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_it_is_the_best_product_for_the_inputs(scale):
    x, error = uneven(200, 24), torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    lora_a, lora_b, share = correction(error, x, 4, scale, torch.float32)
    left = error - scale * lora_b @ lora_a
    assert share == pytest.approx(1 - ((left @ x.t()).norm() / (error @ x.t()).norm()).item() ** 2, rel=1e-4)
    assert torch.allclose(scale * (lora_b @ lora_a).double(), by_the_roots(error, x, 4), atol=1e-4)
    assert torch.allclose(lora_a.norm(dim=1), lora_b.norm(dim=0), rtol=1e-4)
    lora_a, lora_b, share = correction(error[:3], x, 4, scale, torch.float32)
    assert share == pytest.approx(1) and not lora_a[3].any() and not lora_b[:, 3].any()
    assert torch.allclose(scale * lora_b @ lora_a, error[:3], atol=1e-4), "as many ranks as outputs"


def test_random_sums_stand_for_all_rows():
    x, error = uneven(700, 64), torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    seen = RandomSums(8)
    for part in x.split(90):
        seen.add(part.bfloat16().float())
    assert seen.sums.shape == (128, 64)
    (high := RandomSums(300)).add(x)
    assert high.sums.shape == (600, 64), "or ranks would be left that are zero for good"
    left = {}
    for name, sums in (("sums", seen.sums), ("all", x), ("weight alone", torch.eye(64))):
        lora_a, lora_b, _ = correction(error, sums, 8, 1.0, torch.float32)
        left[name] = ((error - lora_b @ lora_a) @ x.t()).norm().item()
    assert left["all"] <= left["sums"] < 1.08 * left["all"] < 0.5 * left["weight alone"]


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("gpt2", []),
        ("llama", ["adapter.method=dora", "model.keep_16bit=[v_proj]"]),
        ("qwen3", ["model.quant=fp4"]),
    ],
)
def test_what_4_bits_change_of_the_outputs_on_the_rows_is_made_up_for(model_type, overrides, tmp_path):
    recipe = recipe_of(tmp_path, overrides, model_type)
    examples, base = examples_of(recipe), build_to_use(recipe)
    first = first_of(recipe, examples)
    model = build_model(recipe, first=first)
    kept = ("head", "v_proj") if recipe.model.keep_16bit else "head"
    assert first.keys() == {path for path in linear_layers(base) if not path.endswith(kept)}
    plain = load_model(str(tmp_path / "model"), "none", compute_dtype=torch.float32)
    layers, seen, shares, work = dict(lora_layers(model)), {path: [] for path in first}, [], causal_lm()
    for path in first:
        base.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen[path].append(args[0].reshape(-1, args[0].shape[-1]))
        )
    for example in examples:
        with torch.no_grad():
            hidden_states(base, work.batches.inputs(work.batches.collate([example]), torch.device("cpu")))
        for parts in seen.values():
            parts[-1] = parts[-1][: len(example.token_ids)]
    for path, x in ((path, torch.cat(parts)) for path, parts in seen.items()):
        own, error = layers[path], plain.get_submodule(path)(x) - base.get_submodule(path)(x)
        assert torch.equal(own.lora_A, first[path][0])
        left = error - own.scale * x @ own.lora_A.t() @ own.lora_B.t()
        shares.append((left.norm() / torch.linalg.svdvals(error)[4:].norm()).item())
    assert max(shares) < 1.2, "of a rank of 4, the rows having as many directions as layers have inputs"


def test_it_is_found_once_for_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    recipe = recipe_of(tmp_path)
    examples = examples_of(recipe)
    first = first_of(recipe, examples)
    other = first_of(recipe_of(tmp_path, ["lora.alpha=16"]), examples)
    path = next(iter(first))
    assert torch.allclose(first[path][0], other[path][0] * 2**0.5), "half the product for twice the scale"
    monkeypatch.setattr("qlora_lite.prepare.first_weights._corrections", None)
    again = first_of(recipe, examples)
    assert all(torch.equal(a, b) for path in first for a, b in zip(first[path], again[path], strict=True))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["model.quant=none"], "lora.start = qera: begins with the error of 4 bits, and model.quant none has none"),
        (["model.quant=keep"], "lora.start = qera: needs 16-bit weights, and quant keep has none"),
        (["lora.init_from=somewhere"], "lora.start = qera: lora.init_from has LoRA weights to begin with"),
        (["train.merge_aware=nf4"], "merge_aware"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, text, tmp_path):
    with pytest.raises(RecipeError, match=text):
        recipe_of(tmp_path, overrides)


def test_experts_and_files_in_4_bit_are_refused(tmp_path):
    recipe = recipe_of(tmp_path, model_type="qwen3_moe", targets=["all-linear", "experts"])
    with pytest.raises(ModelError, match=r"lora.start qera is for linear layers, and lora.targets name experts too"):
        plan_run(recipe, examples_of(recipe), ())
    (other := tmp_path / "kept").mkdir()
    recipe = recipe_of(other, ["model.keep_16bit=[v_proj]"], targets=["v_proj"])
    with pytest.raises(ModelError, match=r"no layer .* has an error of 4 bits .*model.keep_16bit stay"):
        first_of(recipe, examples_of(recipe))
    (other := tmp_path / "other").mkdir()
    recipe = recipe_of(other)
    examples = examples_of(recipe)
    as_if_packed(other / "model")
    said = r"lora.start qera needs the 16-bit weights, and the model's files have them"
    for use in (partial(plan_run, recipe, examples, ()), partial(first_of, recipe, examples)):
        with pytest.raises(ModelError, match=said):
            use()


def test_a_layer_that_no_row_passes_through_is_named(tmp_path, monkeypatch):
    def bypassed(recipe):
        model = build_to_use(recipe)
        model.model.layers[1].mlp.forward = lambda x: x
        return model

    monkeypatch.setattr(first_weights, "build_to_use", bypassed)
    recipe = recipe_of(tmp_path)
    with pytest.raises(ModelError, match=r"lora.start qera: no row passes through model.layers.1.mlp.down_proj: leave"):
        first_of(recipe, examples_of(recipe))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model, and runs of it: one that was never stopped, and one resumed without the cache."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_LITE_CACHE", str(folder / "cache"))
        recipe = recipe_of(folder, ["train.save_every_steps=2"])
        whole = run_whole_and_stopped(recipe, folder)
        shutil.rmtree(folder / "cache")
        return folder, whole, run_recipe(recipe, None, "")


def test_a_resumed_run_ends_as_one_that_was_never_stopped(trained):
    _, whole, resumed = trained
    for name in ("adapter_model.safetensors", FIRST_NAME):
        one, other = (load_file(run / "adapter" / name) for run in (whole, resumed))
        assert one and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, resumed)]
    assert summaries[0]["eval_loss_after"] == summaries[1]["eval_loss_after"] < summaries[0]["eval_loss_before"]


def test_a_resumed_run_says_what_it_began_as_where_that_is_found_otherwise_now(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    recipe = recipe_of(tmp_path, ["train.save_every_steps=1", "train.metrics_examples=0"])
    whole = run_whole_and_stopped(recipe, tmp_path)
    monkeypatch.setitem(first_weights.TOKENS, "qera", 64)  # as another version of this package may have it
    one, other = (load_file(run / "adapter" / FIRST_NAME) for run in (whole, run_recipe(recipe, None, "")))
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_weight_that_four_bits_hold_begins_as_any_does(tmp_path):
    plain = "model.double_quant=false", "train.metrics_examples=0", "model.compute_dtype=float32"
    recipe = recipe_of(tmp_path, plain)
    file, examples = tmp_path / "model" / "model.safetensors", examples_of(recipe)
    tensors, path = load_file(file), "model.layers.0.mlp.up_proj"
    whole, exact = first_of(recipe, examples), tensors[f"{path}.weight"].float()
    tensors[f"{path}.weight"] = dequantize(quantize(exact, "nf4", False), exact.shape, torch.float32, "nf4")
    save_file({name: tensor.float() for name, tensor in tensors.items()}, file, {"format": "pt"})
    first = first_of(recipe, examples)
    assert whole.keys() - first.keys() == {path} and first
    assert json.loads((run_recipe(recipe) / "summary.json").read_text())["status"] == "complete"


def with_difference(folder, run, began=None):
    """The model's files with what training changed: W + scale * (B A - B0 A0)."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    first = load_file((began or run) / "adapter" / FIRST_NAME)
    with torch.no_grad():
        for path in {name.rpartition(".")[0] for name in first}:
            a, b = (tensors[f"base_model.model.{path}.lora_{leaf}.weight"] for leaf in "AB")
            a0, b0 = (first[f"{path}.lora_{leaf}"] for leaf in "AB")
            base.get_submodule(path).weight += 2 * (b @ a - b0 @ a0)
    return base


def test_exports_are_for_the_16_bit_files_and_a_merge_is_the_run(trained, tmp_path):
    folder, run, _ = trained
    wanted = logits(with_difference(folder, run))
    for name in ("peft", "vllm"):
        report = export_run(run, tmp_path / name, ExportSettings(name))
        assert any("began with lora.start qera: this adapter, of twice the rank" in note for note in report["notes"])
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        assert torch.allclose(logits(PeftModel.from_pretrained(base, tmp_path / name)), wanted, atol=1e-5)
    merge_run(run, tmp_path / "merged", MergeSettings(base="original", dtype="f32"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(logits(merged), wanted, atol=1e-5)
    own = load_adapter(build_to_use(open_trained(run).recipe), run / "adapter")
    merge_run(run, tmp_path / "own", MergeSettings(dtype="f32"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype=torch.float32)
    assert torch.allclose(logits(merged), logits(own), atol=1e-5)


def test_a_run_that_goes_on_from_its_adapter_knows_what_that_began_as(trained, tmp_path):
    folder, run, _ = trained
    recipe = load_recipe(
        write_recipe(tmp_path, folder / "model", 12, lora=LORA | {"start": "kaiming"}),
        [
            f"lora.init_from={run}",
            "train.save_every_steps=2",
            f"output.dir={tmp_path / 'next'}",
        ],
    )

    with pytest.raises(Interrupted):
        run_recipe(recipe, stop_at(3))
    following = run_recipe(recipe, None, "")
    summary = json.loads((following / "summary.json").read_text())
    assert summary["eval_loss_before"] == json.loads((run / "summary.json").read_text())["eval_loss_after"]
    export_run(following, tmp_path / "peft", ExportSettings("peft"))
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    wanted = logits(with_difference(folder, following, run))
    assert torch.allclose(logits(PeftModel.from_pretrained(base, tmp_path / "peft")), wanted, atol=1e-5)


def test_a_loaded_adapter_that_is_saved_again_knows_what_it_began_as(trained, tmp_path):
    folder, run, _ = trained
    adapter, recipe = run / "adapter", open_trained(run).recipe
    model = load_adapter(build_to_use(recipe), adapter)
    save_adapter(model, tmp_path / "copy")
    for name in ("adapter_model.safetensors", FIRST_NAME):
        one, other = (load_file(each / name) for each in (adapter, tmp_path / "copy"))
        assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    plain = load_model(str(folder / "model"), "none", compute_dtype=torch.float32)
    with pytest.raises(ModelError, match=r"began with lora.start qera, for the model in NF4, and this is not it"):
        load_adapter(plain, tmp_path / "copy")
    save_adapter(add_lora(detach_adapter(model), rank=2), tmp_path / "another")
    assert not (tmp_path / "another" / FIRST_NAME).exists()
    load_adapter(plain, tmp_path / "another")
    (tmp_path / "copy" / FIRST_NAME).unlink()  # it can be used, and is for no other model either
    save_adapter(load_adapter(build_to_use(recipe), tmp_path / "copy"), tmp_path / "without")
    with pytest.raises(ModelError, match=r"began with lora.start qera"):
        load_adapter(load_model(str(folder / "model"), "none", compute_dtype=torch.float32), tmp_path / "without")


def test_its_adapter_is_refused_beside_another_base(trained, tmp_path):
    folder, run, _ = trained
    for quant in ("none", "fp4"):
        model = load_model(str(folder / "model"), quant, compute_dtype=torch.float32)
        with pytest.raises(ModelError, match=r"began with lora.start qera, for the model in NF4, and this is not it"):
            load_adapter(model, run / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"init_lora_weights should be|nknown initiali"):
        PeftModel.from_pretrained(base, run / "adapter")
    copy = shutil.copytree(run, tmp_path / "copy")
    first = load_file(copy / "adapter" / FIRST_NAME)
    save_file({name: tensor[:-1] for name, tensor in first.items()}, copy / "adapter" / FIRST_NAME)
    with pytest.raises(ModelError, match="is damaged: its SHA-256 is not the one in"):
        export_run(copy, tmp_path / "out", ExportSettings("peft"))
    (copy / "summary.json").unlink()
    with pytest.raises(ModelError, match=f"{FIRST_NAME} does not fit the adapter beside it"):
        export_run(copy / "adapter", tmp_path / "out", ExportSettings("peft"))
    (copy / "adapter" / FIRST_NAME).unlink()
    with pytest.raises(ModelError, match=f"{FIRST_NAME} cannot be read"):
        export_run(copy / "adapter", tmp_path / "out", ExportSettings("peft"))
