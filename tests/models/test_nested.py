"""Of a model with a vision tower the language model alone is loaded, trained and merged; adapters fit the whole."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import NESTED
from tiny_files import save_nested, save_tiny, write_recipe
from tiny_runs import logits, make_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, BitsAndBytesConfig

from qlora_lite.adapters.checkpoint_names import prefixes_of
from qlora_lite.adapters.files import load_adapter
from qlora_lite.adapters.lora.inject import lora_layers
from qlora_lite.errors import ModelError
from qlora_lite.export.merge import MergeSettings, merge_run
from qlora_lite.models.load import adopt, load_model
from qlora_lite.models.quantizer import quantize_in_place
from qlora_lite.models.skeleton import read_config
from qlora_lite.quant.linear import QuantLinear
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs.run import run_recipe

PLAIN = ["model.quant=none"]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers


def load(folder, quant="none", dtype=torch.bfloat16):
    return load_model(str(folder), quant, compute_dtype=dtype, use_cache=False)


def language_model(whole):
    """The language model inside a whole, as a module of the same weights."""
    return whole.model.language_model


@pytest.mark.parametrize("name", NESTED)
def test_its_logits_are_those_of_the_whole_to_the_bit(name, tmp_path, caplog):
    whole = save_nested(tmp_path, name, dtype=torch.bfloat16)
    with caplog.at_level("INFO"):
        alone = load_model(str(tmp_path), "none")
    assert torch.equal(logits(alone), logits(adopt(whole)))
    assert not any("vision" in path or "projector" in path for path, _ in alone.named_modules())
    assert ("its language model alone is loaded" in caplog.text) == (name != "qwen3_5")
    assert "UNEXPECTED" not in caplog.text


def test_names_that_newer_transformers_give_are_read_as_well(tmp_path):
    whole = save_nested(tmp_path, dtype=torch.bfloat16)
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items() if name != "lm_head.weight"}
    assert "model.language_model.norm.weight" in state
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load(tmp_path)), logits(adopt(whole)))


def test_whether_the_head_is_tied_is_what_the_whole_says(tmp_path):
    whole = save_nested(tmp_path, "mistral3", dtype=torch.bfloat16, tie_word_embeddings=True)
    assert whole.config.text_config.tie_word_embeddings and not whole.config.tie_word_embeddings
    alone = load(tmp_path)
    assert not alone.config.tie_word_embeddings and torch.equal(logits(alone), logits(adopt(whole)))


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("use_cache", [False, True])
def test_in_4_bit_it_has_the_bytes_of_quantising_the_whole_in_place(name, use_cache, tmp_path):
    whole = save_nested(tmp_path, name)
    for _ in range(1 + use_cache):
        alone = load_model(str(tmp_path), compute_dtype=torch.float32, use_cache=use_cache)
    inner = language_model(whole)
    inner.get_output_embeddings = lambda: None
    quantize_in_place(inner, "nf4", double_quant=True)
    ours = {path: m for path, m in alone.model.named_modules() if isinstance(m, QuantLinear)}
    theirs = {path: m for path, m in inner.named_modules() if isinstance(m, QuantLinear)}
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(layer.weight, theirs[path].weight) for path, layer in ours.items())


def test_a_whole_in_bitsandbytes_4_bit_keeps_the_layers_that_it_leaves_out(tmp_path):
    save_nested(tmp_path / "plain", intermediate_size=128)
    skipped = ["vision_tower", "multi_modal_projector", "lm_head", "language_model.model.layers.1.mlp"]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=[*skipped, "model.language_model.layers.1.mlp"],
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = skipped  # as files of before transformers 4.52 say it
    path.write_text(json.dumps(config))
    alone = load(tmp_path / "model", "nf4", torch.float32)
    layers = {path for path, module in alone.named_modules() if isinstance(module, QuantLinear)}
    assert "model.layers.0.mlp.up_proj" in layers and "model.layers.1.self_attn.q_proj" in layers
    assert not any("layers.1.mlp" in path for path in layers)
    theirs.train()  # its inference kernel rounds to bf16
    ids = torch.randint(5, 160, (2, 11), generator=torch.Generator().manual_seed(0))
    expected = theirs(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
    assert torch.allclose(logits(alone), expected, atol=1e-4)


def test_one_that_transformers_cannot_load_alone_is_refused_by_name_from_its_configuration(tmp_path):
    AutoConfig.for_model("glm4v").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"type glm4v hold a language model among other parts.* of text alone"):
        read_config(str(tmp_path))
    AutoConfig.for_model("qwen3_vl").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"it alone: .*; set task.kind to image-text-to-text, which takes chats with"):
        read_config(str(tmp_path))


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_run_trains_no_layer_of_a_tower_and_its_adapter_fits_what_transformers_loads(name, quant, tmp_path):
    save_nested(tmp_path / "model", name)
    settings = {"max_steps": 3, "metrics_examples": 0}
    run_recipe(load_recipe(write_recipe(tmp_path, tmp_path / "model", train=settings), [f"model.quant={quant}"]))
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    begin = "base_model.model.model." + ("" if name == "qwen3_5" else "language_model.") + "layers."
    assert tensors and all(key.startswith(begin) for key in tensors)
    ours = load_adapter(load(tmp_path / "model", "none", torch.float32), tmp_path / "out" / "adapter")
    auto = AutoModelForMultimodalLM if name == "mistral3" else AutoModelForCausalLM
    base = auto.from_pretrained(tmp_path / "model")
    expected = logits(base)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert {key for key in theirs.state_dict() if "lora_" in key} == {
        key.replace(".weight", ".default.weight") for key in tensors
    }
    assert not torch.allclose(logits(theirs), expected, atol=1e-3)
    assert torch.allclose(logits(ours), logits(theirs), atol=2e-4)


def test_an_adapter_that_peft_trained_on_the_whole_gives_the_same_logits_here(tmp_path):
    whole = save_nested(tmp_path / "model")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=r".*language_model.*(q|up)_proj",
        r=4,
        lora_alpha=6,
        alpha_pattern={r"model\.language_model\.layers\.0.*": 9},
    )
    theirs = peft.get_peft_model(whole, settings)
    for key, parameter in theirs.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(load(tmp_path / "model", "none", torch.float32), tmp_path / "adapter")
    assert {layer.alpha for _, layer in lora_layers(ours)} == {6, 9}
    assert torch.allclose(logits(ours), logits(theirs), atol=2e-4)


@pytest.mark.parametrize("name", NESTED)
def test_merged_it_is_the_whole_again_with_the_trained_logits(name, tmp_path):
    save_nested(tmp_path / "model", name)
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"size": 56}')
    run = make_run(tmp_path, tmp_path / "model", PLAIN, lora={"rank": 4, "alpha": 8})
    merge_run(run, tmp_path / "merged", MergeSettings(dtype="f32", rows=2))
    assert (tmp_path / "merged" / "preprocessor_config.json").read_text() == '{"size": 56}'
    merged, info = AutoModelForMultimodalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    trained = load_adapter(load(tmp_path / "model", "none", torch.float32), run / "adapter")
    assert torch.allclose(logits(merged), logits(trained), atol=2e-4)
    base, found = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "merged"))
    assert base.keys() == found.keys()
    towers = [key for key in base if "vision" in key or "visual" in key]
    assert towers and all(torch.equal(base[key], found[key]) for key in towers)


def test_merged_in_another_type_every_part_of_its_configuration_says_so(tmp_path):
    save_nested(tmp_path / "model", "qwen3_5")
    run = make_run(tmp_path, tmp_path / "model", PLAIN, lora={"rank": 4, "alpha": 8})
    merge_run(run, tmp_path / "merged", MergeSettings(dtype="bf16", rows=0))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_a_language_model_by_itself_has_no_other_names_outside(tmp_path):
    save_tiny(tmp_path, "gemma3_text")
    assert prefixes_of(load(tmp_path)) is None
