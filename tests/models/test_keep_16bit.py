"""Layers that stay in 16 bit beside 4-bit ones: loaded, planned, trained, resumed, merged and written as they are."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import build_tiny
from tiny_files import MERGES, VOCABULARY, save_tiny, write_recipe
from tiny_runs import logits, make_run
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_lite.adapters.lora.inject import lora_layers
from qlora_lite.adapters.lora.start import Start
from qlora_lite.errors import ModelError, RecipeError
from qlora_lite.export.formats import ExportSettings, export_run
from qlora_lite.export.merge import MergeSettings, merge_run
from qlora_lite.ext.gguf.model import MODEL_FILE
from qlora_lite.models.kept import kept_layers
from qlora_lite.models.load import load_model
from qlora_lite.models.memory_options import MemoryOptions, place, set_memory_options
from qlora_lite.models.quantizer import InFiles, quantize_in_place
from qlora_lite.models.save import save_quantized
from qlora_lite.models.skeleton import block_pattern, meta_model, read_config
from qlora_lite.prepare.model import build_model, build_skeleton, build_to_use
from qlora_lite.quant.linear import QuantLinear
from qlora_lite.quant.packed import PackedWeight
from qlora_lite.quant.product import materialize
from qlora_lite.recipe.load import load_recipe

KEEP = ("v_proj", "model.layers.0.*")
# model type, patterns, ends of paths that are in 16 bit
CASES = [
    ("llama", KEEP, {"layers.0.mlp.up_proj", "layers.0.self_attn.o_proj", "layers.1.self_attn.v_proj"}),
    ("gpt2", ("c_fc",), {"h.0.mlp.c_fc", "h.1.mlp.c_fc"}),
    ("qwen3_moe", ("down_proj",), {"layers.0.mlp.experts.down_proj", "layers.1.mlp.experts.down_proj"}),
    ("qwen3_moe", ("gate_up_proj", "q_proj"), {"layers.1.mlp.experts.gate_up_proj", "layers.0.self_attn.q_proj"}),
    (
        "gpt_oss",
        ("model.layers.1.*", "*.1.mlp.experts.*"),
        {"layers.1.mlp.experts.down_proj", "layers.1.self_attn.q_proj"},
    ),
    ("qwen3_moe", ("experts",), {"layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"}),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def load(folder, keep=(), **options):
    return load_model(str(folder), compute_dtype=torch.float32, keep_16bit=keep, **options)


def modules(model):
    return [(name, type(module).__name__) for name, module in model.named_modules()]


def recipe_of(folder, model, keep):
    return load_recipe(write_recipe(folder, model), [f"model.keep_16bit={json.dumps(keep)}"])


@pytest.mark.parametrize(("model_type", "keep", "ends"), CASES)
def test_every_way_in_leaves_the_same_layers_with_the_weights_of_the_files(model_type, keep, ends, tmp_path, cache):
    plain = save_tiny(tmp_path / "model", model_type)
    kept = kept_layers(plain, keep)
    assert all(any(path.endswith(end) for path in kept) for end in ends)
    arrived = load(tmp_path / "model", keep, use_cache=False)
    made, cached = load(tmp_path / "model", keep), load(tmp_path / "model", keep)
    assert len(list(cache.iterdir())) == 1
    skeleton = meta_model(plain.config, "nf4", True, torch.float32, False, keep)
    in_place = save_tiny(tmp_path / "again", model_type)
    quantize_in_place(in_place, "nf4", True, keep)
    expected = in_place.state_dict()
    assert any(isinstance(module, PackedWeight) for module in in_place.modules())
    for model in (arrived, made, cached):
        assert modules(model) == modules(skeleton)
        assert expected.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    sizes = {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in skeleton.state_dict().items()} == sizes
    theirs = plain.state_dict()
    for path in kept:
        name = path if path in theirs else f"{path}.weight"
        assert torch.equal(expected[name], theirs[name])


def test_layers_that_share_a_weight_stay_in_16_bit_in_the_plan_too_and_are_not_split(tmp_path):
    config = AutoConfig.for_model(
        "zamba",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=6,
        attn_layer_period=2,
        attn_layer_offset=1,
        n_mamba_heads=2,
        mamba_d_state=8,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model", (), use_cache=False)
    skeleton = meta_model(read_config(str(tmp_path / "model")), "nf4", True, torch.float32, False)
    assert modules(loaded) == modules(skeleton) and any(isinstance(m, PackedWeight) for m in loaded.modules())
    with pytest.raises(ModelError, match=r"lora\.start pissa splits each weight by itself, and .* is another layer's"):
        load_model(str(tmp_path / "model"), "none", start=Start("pissa", rank=2), use_cache=False)


def test_other_layers_in_16_bit_are_another_entry_of_the_cache_and_other_words_for_the_same_are_not(tmp_path, cache):
    save_tiny(tmp_path / "model")
    for keep, entries in (((), 1), (("v_proj",), 2), (("*.v_proj",), 2), (("k_proj",), 3), (("k_proj", "v_proj"), 4)):
        load(tmp_path / "model", keep)
        assert len(list(cache.iterdir())) == entries


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_it_computes_what_the_plain_model_does_with_4_bit_weights_in_the_other_layers(model_type, tmp_path):
    keep = ("v_proj", "down_proj")
    plain = save_tiny(tmp_path / "model", model_type)
    model, all_packed = load(tmp_path / "model", keep), load(tmp_path / "model")
    for name, module in all_packed.named_modules():
        if isinstance(module, QuantLinear) and not name.endswith(keep):
            plain.get_submodule(name).weight.data = dequantized(module)
        elif isinstance(module, PackedWeight) and name.endswith("packed_gate_up_proj"):
            plain.get_parameter(name.replace("packed_", "")).data = dequantized(module)
    plain.set_experts_implementation("eager") if model_type == "qwen3_moe" else None
    assert torch.allclose(logits(model), logits(plain), atol=2e-4)
    assert not torch.allclose(logits(all_packed), logits(plain), atol=0.05)


def dequantized(module):
    return materialize(*module.described, torch.float32)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_what_stays_in_16_bit_goes_into_files_where_memory_has_no_room(model_type, tmp_path, monkeypatch):
    put, own = [], InFiles.put
    monkeypatch.setattr(InFiles, "put", lambda self, tensor: put.append(tuple(tensor.shape)) or own(self, tensor))
    plain, keep = save_tiny(tmp_path / "model", model_type), ("v_proj", "down_proj")
    model = load(tmp_path / "model", keep, use_cache=False, in_files=True)
    for path in kept_layers(plain, keep):
        name = path if path in plain.state_dict() else f"{path}.weight"
        assert tuple(plain.state_dict()[name].shape) in put
        assert torch.equal(model.state_dict()[name], plain.state_dict()[name])


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        (
            ("q_proj", "vproj", "model.layers.7.*"),
            r"model.keep_16bit: 'vproj', 'model.layers.7.\*' matches no linear layer .* did you mean .*v_proj",
        ),
        (("all-linear",), "leaves no layer in 4 bit: that is model.quant none"),
    ],
)
def test_what_cannot_be_meant_is_one_error_before_anything_is_loaded(keep, text, tmp_path, monkeypatch):
    save_tiny(tmp_path / "model")
    recipe = recipe_of(tmp_path, tmp_path / "model", keep)
    monkeypatch.setattr("qlora_lite.models.load.model_of", None)
    for attempt in (lambda: load(tmp_path / "model", keep), lambda: build_skeleton(recipe)):
        with pytest.raises(ModelError, match=text):
            attempt()


def test_it_is_an_error_of_a_recipe_for_a_16_bit_model(tmp_path):
    path = write_recipe(tmp_path, "nowhere")
    with pytest.raises(RecipeError, match=r"model.keep_16bit: with model.quant none all layers are in 16 bit"):
        load_recipe(path, ["model.quant=none", "model.keep_16bit=v_proj"], check_files=False)
    with pytest.raises(ModelError, match="quant is none"):
        save_tiny(tmp_path / "model")
        load_model(str(tmp_path / "model"), "none", keep_16bit=["v_proj"])


def test_a_4_bit_checkpoint_is_planned_and_loaded_as_it_is_and_other_wishes_are_refused(tmp_path):
    save_tiny(tmp_path / "model", intermediate_size=128)
    made = load(tmp_path / "model", KEEP, use_cache=False)
    save_quantized(made, tmp_path / "packed")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert sum(type(m).__name__ == "Linear4bit" for m in theirs.modules()) == 6
    for keep in ((), ("v_proj",), KEEP):
        loaded = load(tmp_path / "packed", keep)
        assert all(torch.equal(t, made.state_dict()[name]) for name, t in loaded.state_dict().items())
        recipe = recipe_of(tmp_path, tmp_path / "packed", keep)
        assert modules(build_skeleton(recipe)) == modules(loaded)
        assert block_pattern(AutoConfig.from_pretrained(tmp_path / "packed"), None, keep) == (1, 1)
    recipe = recipe_of(tmp_path, tmp_path / "packed", ("v_proj", "up_proj"))
    for attempt in (lambda: load(tmp_path / "packed", ["up_proj"]), lambda: build_skeleton(recipe)):
        with pytest.raises(ModelError, match=r"published with 1 of these layers packed, such as .*1.mlp.up_proj"):
            attempt()


def test_layers_of_a_gguf_file_stay_in_16_bit(tmp_path):
    save_tiny(tmp_path / "model", merges=MERGES)
    export_run(make_run(tmp_path / "made", tmp_path / "model"), tmp_path / "gguf", ExportSettings("gguf"))
    path = tmp_path / "gguf" / MODEL_FILE
    model, plain = load(path, KEEP), load_model(str(path), "none", compute_dtype=torch.float32)
    kept = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    assert kept == kept_layers(plain, KEEP) and len(kept) == 8
    assert all(torch.equal(model.get_submodule(name).weight, plain.get_submodule(name).weight) for name in kept)


@pytest.mark.parametrize("on_disk", [False, True])
def test_streamed_blocks_of_two_kinds_give_the_bits_of_resident_ones(on_disk, tmp_path):
    save_tiny(tmp_path / "model", num_hidden_layers=4)
    found = []
    for options in (MemoryOptions(), MemoryOptions(resident_layers=1, stream_from="disk" if on_disk else "host")):
        model = load(tmp_path / "model", KEEP, in_files=options.weights_on_disk)
        place(model, torch.device("cpu"), options)
        set_memory_options(model, options)
        found.append(logits(model))
    assert torch.equal(*found)


def test_merged_and_exported_they_have_the_update_on_the_weights_of_the_files(tmp_path):
    plain = save_tiny(tmp_path / "model", merges=MERGES)
    run = make_run(tmp_path / "made", tmp_path / "model", [f"model.keep_16bit={json.dumps(KEEP)}"])
    report = merge_run(run, tmp_path / "trained", MergeSettings(dtype="f32", rows=4))
    assert report["models"]["merged"]["kl"] < 1e-7, "the model that was trained"
    merge_run(run, tmp_path / "original", MergeSettings(dtype="f32", base="original", rows=0))
    trained, original = (load_file(tmp_path / name / "model.safetensors") for name in ("trained", "original"))
    kept = kept_layers(plain, KEEP)
    for name, weight in trained.items():
        path = name.removesuffix(".weight")
        assert torch.equal(weight, original[name]) != (path.endswith("_proj") and path not in kept), name
    export_run(run, tmp_path / "gguf", ExportSettings("gguf"))  # which compares logits with the trained model's


def test_merged_and_quantised_again_the_same_layers_stay_in_16_bit(tmp_path):
    save_tiny(tmp_path / "model", intermediate_size=128)
    run = make_run(tmp_path, tmp_path / "model", [f"model.keep_16bit={json.dumps(KEEP)}"])
    adapted = build_to_use(load_recipe(run / "recipe.yaml"))
    assert sum(isinstance(module, QuantLinear) for module in adapted.modules()) == 6
    merge_run(run, tmp_path / "out", MergeSettings(base="original", quantize="nf4", rows=4))
    skipped = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert {*skipped} == {"lm_head", *kept_layers(build_tiny("llama"), KEEP)}


def test_lora_weights_go_on_layers_in_16_bit_too(tmp_path):
    plain = save_tiny(tmp_path / "model")
    layers = dict(lora_layers(build_model(recipe_of(tmp_path, tmp_path / "model", KEEP))))
    assert len(layers) == 14
    assert {path for path, layer in layers.items() if layer.base.weight.is_floating_point()} == kept_layers(plain, KEEP)
