"""A merged checkpoint is the trained model: weight by weight against float64, and in plain transformers."""

import json
import re
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, EAGER
from tiny_files import byte_tokenizer, save_tiny
from tiny_runs import END_OF_ANSWER, logits, make_run, replace_adapter, tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qlora_lite.adapters.files import load_adapter
from qlora_lite.adapters.lora.inject import linear_layers, lora_layers
from qlora_lite.adapters.read import Factors
from qlora_lite.artifacts.run_folder import open_run
from qlora_lite.artifacts.trained_run import open_trained
from qlora_lite.errors import ModelError
from qlora_lite.export.merge import MergeSettings, merge_run, prepare_merge
from qlora_lite.models.load import load_model
from qlora_lite.models.merge import ORIGINAL, TRAINED, merged_weight, open_merged
from qlora_lite.models.save import save_quantized
from qlora_lite.prepare.model import build_to_use
from qlora_lite.quant.linear import frozen_weight, is_conv1d
from qlora_lite.quant.product import materialize
from qlora_lite.quant.tensor_file import stream_tensors

FULL_NAMES = {"bf16": "bfloat16", "f32": "float32"}
EXACT = MergeSettings(dtype="f32", rows=0)
LORA = {"targets": ["all-linear", {"pattern": "*.1.*", "rank": 3, "alpha": 5}], "rank": 4, "alpha": 8}


def merge(run, out, **settings):
    merge_run(run, out, MergeSettings(**({"dtype": "f32", "rows": 0} | settings)))
    return AutoModelForCausalLM.from_pretrained(out, **EAGER)


def weight_of(module):
    """The weight of a linear layer as [out, in]."""
    return module.weight.t() if is_conv1d(module) else module.weight


def trained_model(run):
    opened = open_run(run)
    return load_adapter(build_to_use(opened.recipe), opened.adapter)


def test_the_update_is_added_in_float32():
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(size, generator=generator).bfloat16() for size in ((48, 64), (3, 64), (48, 3)))
    expected = weight.double() + 6.0 / 3 * b.double() @ a.double()
    kept = weight.clone()
    merged = merged_weight(weight, Factors(a, b, 6.0))
    assert merged.dtype == torch.float32 and torch.equal(weight, kept)
    assert (merged - expected).abs().max() <= 2e-6 * expected.abs().max()
    stable = merged_weight(weight, Factors(a, b, 6.0, rslora=True))
    assert torch.allclose(stable.double(), weight.double() + 6.0 / 3**0.5 * b.double() @ a.double(), atol=1e-5)


@pytest.mark.parametrize("base", ["nf4", "original"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_merged_weight_is_base_plus_update(model_type, base, tmp_path):
    run = tiny_run(tmp_path, model_type, LORA)
    merged, trained = merge(run, tmp_path / "out", base=base), trained_model(run)
    original = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_modules())
    adapted = dict(lora_layers(trained))
    assert len(adapted) > 4 and {layer.rank for layer in adapted.values()} == {3, 4}
    for name, layer in adapted.items():
        frozen = materialize(*frozen_weight(layer.base), torch.float32)
        start = frozen if base == "nf4" else weight_of(original[name])
        expected = start.double() + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
        found = weight_of(merged.get_submodule(name)).double()
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max(), name


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_merged_into_the_weights_that_the_run_saw_it_gives_the_trained_logits(model_type, tmp_path):
    run = tiny_run(tmp_path, model_type, LORA)
    found, expected = logits(merge(run, tmp_path / "out")), logits(trained_model(run))
    base = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    assert (expected - base).abs().max() > 1e-2
    assert torch.allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", "adapter.train_also=[embeddings, head, norms]"),
        ("gpt2", "adapter.train_also=[norms, biases]"),
        ("gemma2", "adapter.train_also=embeddings"),
        ("gemma2", 'adapter.train_tokens=["<|new|>", "a"]'),
        ("llama", 'adapter.train_tokens=["<|new|>"]'),
        ("gpt2", "adapter.train_also=biases lora.targets=[]"),
    ],
)
def test_trained_weights_of_the_base_are_in_the_merged_model(model_type, settings, tmp_path):
    run = tiny_run(tmp_path, model_type, overrides=[settings] if "targets" not in settings else settings.split())
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    chance, new = torch.Generator().manual_seed(0), {}
    for name, tensor in stored.items():
        if "lora_" not in name:  # a tied table is there twice
            same = next((new[other] for other in new if torch.equal(stored[other], tensor)), None)
            moved = tensor + 0.1 * torch.randn(tensor.shape, generator=chance)
            new[name] = moved if same is None else same.clone()
    assert new
    replace_adapter(run, stored | new)
    merged, trained = merge(run, tmp_path / "out"), trained_model(run)
    size = logits(trained).shape[-1]
    assert merged.config.vocab_size == size
    ids = torch.randint(5, size, (2, 11), generator=chance)
    ids[:, 3] = size - 1
    assert torch.allclose(logits(merged, ids), logits(trained, ids), atol=2e-4)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) <= size


def test_layers_without_weights_are_merged_as_the_run_saw_them(tmp_path):
    run = tiny_run(tmp_path, lora={"targets": ["q_proj"], "rank": 4})
    merged = merge(run, tmp_path / "nf4")
    quantized = load_model(str(tmp_path / "model"), compute_dtype=torch.float32)
    for name, layer in linear_layers(quantized).items():
        seen = materialize(*frozen_weight(layer), torch.float32)
        assert torch.equal(merged.get_submodule(name).weight, seen) == (not name.endswith("q_proj")), name
    original, kept = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        merge(run, tmp_path / "o", base="original"),
    )
    for name, parameter in original.named_parameters():
        assert torch.equal(kept.get_parameter(name), parameter) == ("q_proj" not in name), name


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_what_transformers_keeps_in_float32_stays_so_in_16_bit(quant, tmp_path):
    """The biases that experts are chosen by lie close to each other, and far from 0."""
    save_tiny(tmp_path / "model", "deepseek_v3")
    file = tmp_path / "model" / "model.safetensors"
    stored = load_file(file)
    router = name, _ = sorted(name for name in stored if ".mlp.gate." in name)
    assert name.endswith("e_score_correction_bias")
    stored[name] = 14.8 + 0.01 * torch.arange(len(stored[name]), dtype=torch.float32)
    save_file(stored, file, {"format": "pt"})
    overrides = [f"model.quant={quant}", "model.compute_dtype=bfloat16"]
    run = make_run(tmp_path, tmp_path / "model", overrides, lora={"rank": 4, "alpha": 8})
    for dtype in ("bf16", "f32"):
        merge_run(run, tmp_path / dtype, MergeSettings(dtype=dtype, rows=0))
        merged = load_file(tmp_path / dtype / "model.safetensors")
        assert all(torch.equal(merged[each], stored[each]) for each in router)
        assert {merged[other].dtype for other in merged.keys() - {*router}} == {getattr(torch, FULL_NAMES[dtype])}


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_a_16_bit_weight_is_the_float32_one_rounded_once(dtype, torch_dtype, tmp_path):
    run = tiny_run(tmp_path, "qwen2")
    merge_run(run, tmp_path / "f32", EXACT)
    merge_run(run, tmp_path / "16", MergeSettings(dtype=dtype, rows=0))
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("f32", "16"))
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(rounded[name], tensor.to(torch_dtype)) for name, tensor in exact.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "16").dtype == torch_dtype


def test_rank_stabilised_scales_are_merged(tmp_path):
    run = tiny_run(tmp_path, lora={"rank": 4, "alpha": 8, "rslora": True})
    assert torch.allclose(logits(merge(run, tmp_path / "out")), logits(trained_model(run)), atol=2e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2"])
def test_dora_is_merged_into_the_rows_that_it_scales(model_type, tmp_path):
    run = tiny_run(tmp_path, model_type, LORA, ["adapter.method=dora"])
    found, expected = logits(merge(run, tmp_path / "out")), logits(trained_model(run))
    plain = logits(merge(tiny_run(tmp_path / "lora", model_type, LORA), tmp_path / "plain"))
    assert torch.allclose(found, expected, atol=2e-4)
    assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied_and_untouched(tied, tmp_path):
    run = tiny_run(tmp_path, tie_word_embeddings=tied)
    merged = merge(run, tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    is_tied = merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    assert is_tied == tied
    assert torch.equal(merged.lm_head.weight, original.lm_head.weight)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_in_four_bits_is_merged_as_the_run_saw_it_or_said_to_be_another(tied, tmp_path):
    run = tiny_run(tmp_path, overrides=["model.quant_head=true"], tie_word_embeddings=tied)
    report = merge_run(run, tmp_path / "out", EXACT)
    merged, trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), trained_model(run)
    assert torch.allclose(logits(merged), logits(trained), atol=2e-4) == (not tied)
    assert any("4-bit copy of the head" in note for note in report["notes"]) == tied
    merge_run(run, tmp_path / "original", MergeSettings(base="original", dtype="f32", rows=2))
    head = AutoModelForCausalLM.from_pretrained(tmp_path / "original").lm_head.weight
    assert torch.equal(head, AutoModelForCausalLM.from_pretrained(tmp_path / "model").lm_head.weight)


def test_shards_hold_what_one_file_holds_and_none_is_larger_than_asked(tmp_path):
    run = tiny_run(tmp_path, shard="60KB")
    one, many = merge(run, tmp_path / "one"), merge(run, tmp_path / "many", shard_bytes=60_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and max(file.stat().st_size for file in files) < 80_000
    for name, parameter in one.named_parameters():
        assert torch.equal(many.get_parameter(name), parameter), name


def test_files_that_name_weights_without_the_model_s_prefix_are_merged(tmp_path):
    save_tiny(tmp_path / "whole", "gpt2")
    save_tiny(tmp_path / "model", "gpt2")
    (tmp_path / "model" / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    config = (tmp_path / "model" / "config.json").read_text()
    model.transformer.save_pretrained(tmp_path / "model")  # "h.0.attn...", as the first GPT-2 files are
    (tmp_path / "model" / "config.json").write_text(config)
    run = make_run(tmp_path, tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert not any(name.startswith("transformer.") for name in file.keys())  # noqa: SIM118
    assert torch.allclose(logits(merge(run, tmp_path / "out")), logits(trained_model(run)), atol=2e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2"])
def test_a_base_that_is_a_4_bit_checkpoint_is_unpacked(model_type, tmp_path):
    save_tiny(tmp_path / "plain", model_type)
    model = load_model(str(tmp_path / "plain"), compute_dtype=torch.float32, use_cache=False)
    save_quantized(model, tmp_path / "model", byte_tokenizer())
    run = make_run(tmp_path, tmp_path / "model")
    assert torch.allclose(logits(merge(run, tmp_path / "out")), logits(trained_model(run)), atol=2e-4)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(ModelError, match="no original weights to merge into; leave out --base"):
        prepare_merge(open_trained(run), ORIGINAL)


def test_a_run_on_16_bit_weights_is_merged_into_them(tmp_path):
    run = tiny_run(tmp_path, overrides=["model.quant=none"])
    assert torch.allclose(logits(merge(run, tmp_path / "out")), logits(trained_model(run)), atol=2e-4)
    with pytest.raises(ModelError, match="leave out --base, or choose original"):
        merge_run(run, tmp_path / "nf4", MergeSettings(base="nf4", rows=0))


def test_the_folder_has_tokenizer_template_and_the_ends_that_training_taught(tmp_path):
    run = tiny_run(tmp_path)
    merge_run(run, tmp_path / "out", EXACT)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == (run / "template.jinja").read_text()
    ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert ends == sorted({END_OF_ANSWER, tokenizer.eos_token_id})


def test_at_most_one_tensor_is_alive_while_a_file_is_written(tmp_path):
    alive = weakref.WeakSet()
    most = 0

    def make(name):
        nonlocal most
        tensor = torch.full((64, 64), float(name))
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    names = [str(number) for number in range(6)]
    stream_tensors(tmp_path / "t.safetensors", {name: (torch.float32, (64, 64)) for name in names}, make)
    assert most == 1
    loaded = load_file(tmp_path / "t.safetensors")
    assert list(loaded) == names and all(torch.equal(loaded[n], torch.full((64, 64), float(n))) for n in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8])
def test_streamed_files_are_safetensors_of_any_kind(dtype, tmp_path):
    tensors = {"a": torch.ones(3, 5), "scalar": torch.tensor(1.0), "empty": torch.ones(0, 2), "odd": torch.ones(7)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    stream_tensors(tmp_path / "t.safetensors", entries, tensors.__getitem__)
    loaded = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == dtype for name, tensor in tensors.items())


def test_experts_are_merged_under_the_names_of_the_files_and_from_their_revision(tmp_path, monkeypatch):
    hub = tmp_path / "hub" / "models--o--moe"
    for revision, (sha, seed) in {"main": ("a" * 40, 0), "v2": ("b" * 40, 1)}.items():
        save_tiny(hub / "snapshots" / sha, "deepseek_v3", seed=seed)
        (hub / "refs").mkdir(exist_ok=True)
        (hub / "refs" / revision).write_text(sha)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    base = load_file(hub / "snapshots" / ("b" * 40) / "model.safetensors")
    assert any(name.endswith("mlp.experts.0.up_proj.weight") for name in base)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = hub / "snapshots" / ("b" * 40)
    run = make_run(tmp_path / "run", folder, ["model.quant=none"], lora={"rank": 4, "alpha": 8})
    text = (run / "recipe.yaml").read_text().replace(str(folder), "o/moe").replace("revision: null", "revision: v2")
    (run / "recipe.yaml").write_text(text)
    report = merge_run(run, tmp_path / "merged", EXACT)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == base.keys() and not any("names and layout" in note for note in report["notes"])
    trained = load_adapter(load_model(str(folder), "none", compute_dtype=torch.float32), run / "adapter")
    changed = {name for name in base if not torch.equal(base[name], found[name])}
    assert changed == {f"{path}.weight" for path, _ in lora_layers(trained)}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(trained), atol=2e-4)


def test_experts_that_a_run_packed_are_merged_in_16_bit_and_that_is_noted(tmp_path):
    save_tiny(tmp_path / "model", "qwen3_moe")
    base = load_file(tmp_path / "model" / "model.safetensors")
    run = make_run(tmp_path / "run", tmp_path / "model", lora={"rank": 4, "alpha": 8})
    report = merge_run(run, tmp_path / "merged", EXACT)
    assert any("experts are in 16 bit" in note for note in report["notes"])
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(found[name], base[name]) for name in base if ".experts." in name)
    assert not any(torch.equal(found[name], base[name]) for name in base if "_proj" in name and "self_attn" in name)
    original = merge_run(run, tmp_path / "original", replace(EXACT, base="original"))
    assert not any("experts" in note for note in original["notes"])
    with pytest.raises(ModelError, match="leave out --quantize"):
        merge_run(run, tmp_path / "packed", replace(EXACT, quantize="nf4", rows=1))
    assert not (tmp_path / "packed").exists()


def test_linear_layers_that_files_have_only_joined_are_merged_in_memory_from_the_folder_and_that_is_noted(
    tmp_path, monkeypatch
):
    run = tiny_run(tmp_path, overrides=["model.quant=none"])

    def joined(model, stored, mapping=None):
        return {name: (name, "qkv" if "q_proj" in name else None) for name in stored}

    monkeypatch.setattr("qlora_lite.models.weights.names_in_model", joined)
    trained = open_trained(run)
    elsewhere = replace(trained, files=replace(trained.files, name="no/such-model"))
    monkeypatch.setattr("qlora_lite.export.merge.open_trained", lambda *_: elsewhere)
    report = merge_run(run, tmp_path / "merged", EXACT)
    assert any("the names and layout that transformers uses in memory" in note for note in report["notes"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(trained_model(run)), atol=2e-4)


def test_a_layer_without_a_stored_weight_is_named(tmp_path):
    run = tiny_run(tmp_path)
    trained = open_trained(run)
    skeleton = trained.skeleton()
    adapter = trained.read_adapter(skeleton)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ModelError, match=r"no weight of its own for 1 adapted layers.*layers\.1\.mlp\.up_proj"):
        open_merged(trained.files, skeleton, adapter, TRAINED, trained.compute_dtype)


@pytest.mark.parametrize("targets", [["all-linear", "experts"], ["*.experts.down_proj", {"pattern": "gate_up_proj"}]])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_lora_on_experts_is_merged_into_each_of_them(model_type, targets, tmp_path):
    """Whether files have a tensor for each expert, or one for all of them, transposed."""
    run = tiny_run(tmp_path, model_type, {"targets": targets, "rank": 4, "alpha": 8}, ["model.quant=none"])
    found, expected = logits(merge(run, tmp_path / "out")), logits(trained_model(run))
    base = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    assert (expected - base).abs().max() > 1e-2
    assert torch.allclose(found, expected, atol=2e-4)
    stored, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    changed = {name for name in stored if not torch.equal(stored[name], merged[name])}
    assert stored.keys() == merged.keys()
    assert {name for name in stored if re.search(r"\.experts\..*proj(\.weight)?$", name)} <= changed


def test_lora_on_experts_that_a_run_packed_is_merged_into_those_of_the_files(tmp_path):
    run = tiny_run(tmp_path, "qwen3_moe", {"targets": ["experts"], "rank": 4, "alpha": 8})
    report = merge_run(run, tmp_path / "out", EXACT)
    assert any("experts are in 16 bit" in note for note in report["notes"])
    stored, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    layer = dict(lora_layers(trained_model(run)))["model.layers.1.mlp.experts.down_proj"]
    lora_a, lora_b = layer.lora_A[4 * 5 : 4 * 6].double(), layer.lora_B[:, 5::8].double()
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    assert torch.allclose(merged[name].double(), stored[name].double() + 2 * lora_b @ lora_a, atol=1e-6)
