"""A GGUF file gives, in readers that share no code with its writer, the merged model's tokens."""

import json
import re
from dataclasses import replace
from shutil import copytree

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file
from tiny import build_tiny
from tiny_files import MERGES, VOCABULARY, byte_tokenizer, save_nested, save_tiny
from tiny_runs import logits, make_run, replace_adapter, tiny_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_lite.artifacts.run_folder import digests_of
from qlora_lite.artifacts.trained_run import open_trained
from qlora_lite.errors import ModelError
from qlora_lite.export import own_codes
from qlora_lite.export.formats import ExportSettings, export_run
from qlora_lite.export.merge import MergeSettings, merge_run
from qlora_lite.ext.gguf import forms
from qlora_lite.ext.gguf.model import MODEL_FILE
from qlora_lite.ext.gguf.tokenizer import ADDED, CONTROL, ORDINARY, UNUSED, describe_tokenizer
from qlora_lite.models.cache import from_gguf_header
from qlora_lite.models.gguf_settings import as_the_file_says, rope_factors
from qlora_lite.models.load import load_model
from qlora_lite.models.locate import locate
from qlora_lite.models.skeleton import meta_model, read_config
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.models.weights import open_weights
from qlora_lite.train.forward import hidden_states, prepare

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
}
# transformers takes caps, attention scales and Qwen3's head size from a family's defaults and not from the file
FROM_THE_FILE_ALONE = ("llama", "mistral", "qwen2")


@pytest.fixture
def run_of(tmp_path):
    """Make a run of a family's tiny model."""
    return lambda family, **options: tiny_run(tmp_path, family, merges=MERGES, **(FAMILIES[family] | options))


def greedy(model, count=12, prompts=5):
    """Continue prompts greedily, one at a time, without a cache."""
    generator = torch.Generator().manual_seed(7)
    answers = []
    for length in range(3, 3 + prompts):
        ids = torch.randint(5, VOCABULARY, (1, length), generator=generator)
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        answers.append(ids[0, length:].tolist())
    return answers


def read_gguf(folder, family="llama"):
    """Read a file with transformers; ``folder`` lies beside the model folder of the run."""
    own = family in FROM_THE_FILE_ALONE
    extra = {} if own else {"config": AutoConfig.from_pretrained(folder.parent / "model")}
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=MODEL_FILE, dtype=torch.float32, **extra).eval()


def assert_kept_as_converted(folder):
    """Compare what the cache gives back of a header with what transformers makes of it."""
    config, tokenizer = (auto.from_pretrained(folder, gguf_file=MODEL_FILE) for auto in (AutoConfig, AutoTokenizer))
    load = AutoConfig.from_pretrained
    kept_config, kept = from_gguf_header(folder / MODEL_FILE, "config", load, load), load_tokenizer(folder / MODEL_FILE)
    assert type(kept_config) is type(config)
    assert kept_config.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}  # its folder
    assert kept.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert kept.special_tokens_map == tokenizer.special_tokens_map and kept.chat_template == tokenizer.chat_template
    text = "<s>the then 日本語 \n\n  <|im_end|>é"
    assert kept(text) == tokenizer(text) and kept.decode(kept(text).input_ids) == tokenizer.decode(
        tokenizer(text).input_ids
    )


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_f16_with_the_merged_model_s_tokens(family, run_of, tmp_path):
    run = run_of(family)
    report = export_run(run, tmp_path / "gguf", ExportSettings("gguf"))
    merge_run(run, tmp_path / "merged", MergeSettings(dtype="f16", rows=0))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    read, base = read_gguf(tmp_path / "gguf", family), AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    state = merged.state_dict()
    for name, tensor in read.state_dict().items():
        is_norm = tensor.ndim == 1
        assert torch.allclose(tensor, state[name], rtol=1e-3 if is_norm else 0, atol=1e-6 if is_norm else 0), name
    assert greedy(read) == greedy(merged) != greedy(base)
    assert report["distance"] < 0.01 and abs(report["share"] - 1) < 0.01
    assert_kept_as_converted(tmp_path / "gguf")


@pytest.mark.parametrize("base", ["nf4", "original"])
def test_a_run_that_saw_its_weights_in_bfloat16_may_be_as_far_off_as_that_rounds(base, run_of, tmp_path, monkeypatch):
    limits = {"f16": 1e-3, "bf16": 0.1}
    monkeypatch.setattr(forms, "LIMITS", limits)
    run = run_of("llama", overrides=["model.compute_dtype=bfloat16"])
    distance = export_run(run, tmp_path / "gguf", ExportSettings("gguf", base=base))["distance"]
    assert (distance > limits["f16"]) == (base == "nf4")


@torch.no_grad()
@pytest.mark.parametrize(("kind", "most"), [("bf16", 0.02), ("q8_0", 0.1), ("q4_0", 0.3)])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_other_types_round_the_weights_once(family, kind, most, run_of, tmp_path):
    run = run_of(family)
    if kind == "q4_0":
        next(tmp_path.rglob("train.jsonl")).unlink()  # by which codes are chosen otherwise
    report = export_run(run, tmp_path / "gguf", ExportSettings("gguf", dtype=kind))
    merge_run(run, tmp_path / "merged", MergeSettings(dtype="f32", rows=0))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in read_gguf(tmp_path / "gguf", family).state_dict().items():
        exact = merged[name]
        if kind == "bf16" and tensor.ndim > 1:
            assert torch.equal(tensor, exact.bfloat16().float()), name
            continue
        if tensor.ndim == 1:
            assert torch.allclose(tensor, exact, atol=1e-6), name
            continue
        is_4_bit = kind == "q4_0" and "embed" not in name and "lm_head" not in name
        step = exact.reshape(-1, 32).abs().amax(1, keepdim=True) / (8 if is_4_bit else 127)
        off = (tensor - exact).reshape(-1, 32).abs()
        most_steps = 1.01 if is_4_bit else 0.57  # half a step, and a float16 scale; at the end of 4 bits a whole one
        assert (off <= most_steps * step).all() and (not is_4_bit or (off > 0.1 * step).any()), name
    if kind == "q4_0":
        assert report["read_back"] < most and "each weight was rounded by itself instead" in report["notes"][0]
        return
    assert report["distance"] < most and abs(report["share"] - 1) < 0.05


@pytest.mark.parametrize(
    ("family", "lora", "overrides"),
    [
        ("llama", {}, []),
        ("qwen2", {"targets": ["q_proj"]}, ["adapter.train_also=[biases]"]),
        ("mistral", {}, ["model.quant=none"]),
        ("qwen3", {}, ["adapter.method=dora"]),
        ("gemma3_text", {}, []),
    ],
)
def test_training_rows_choose_codes_of_q4_0_nearer_to_the_trained_model_than_rounding(
    family, lora, overrides, run_of, tmp_path, monkeypatch
):
    run = run_of(family, lora={"rank": 4, "alpha": 8} | lora, overrides=overrides)
    chosen = export_run(run, tmp_path / "chosen", ExportSettings("gguf", dtype="q4_0"))
    assert chosen["read_back"] < 1e-5 and not any("rounded" in note for note in chosen["notes"])
    assert chosen["measured_on"] == "data.eval" and chosen["models"]["trained"]["kl"] == 0
    monkeypatch.setattr(forms, "_chosen", lambda *_: ({}, []))
    rounded = export_run(run, tmp_path / "rounded", ExportSettings("gguf", dtype="q4_0"))
    assert chosen["size_bytes"] == pytest.approx(rounded["size_bytes"], rel=0.01)
    assert 0 < chosen["models"]["q4_0"]["kl"] < 0.6 * rounded["models"]["q4_0"]["kl"]


@torch.no_grad()
def test_codes_of_a_block_are_chosen_for_what_the_blocks_before_it_give_in_the_file(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model", "qwen2", merges=MERGES)
    file, generator = tmp_path / "model" / "model.safetensors", torch.Generator().manual_seed(0)
    state = load_file(file)
    biases = {name: torch.randn(old.shape, generator=generator) for name, old in state.items() if name.endswith("bias")}
    save_file(state | biases, file, {"format": "pt"})
    run, grams = make_run(tmp_path, tmp_path / "model"), list[torch.Tensor]()
    choose = own_codes.closest_q4_0
    monkeypatch.setattr(own_codes, "closest_q4_0", lambda weight, gram: (grams.append(gram), choose(weight, gram))[1])
    export_run(run, tmp_path / "out", ExportSettings("gguf", dtype="q4_0"))
    model = load_model(str(tmp_path / "out" / MODEL_FILE), "keep", compute_dtype=torch.float32)
    query, seen = model.model.layers[-1].self_attn.q_proj, list[torch.Tensor]()
    query.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    rows = own_codes.calibration_rows(open_trained(run))
    hidden_states(model.eval(), prepare(rows, torch.device("cpu")))
    gram = seen[0].t() @ seen[0]  # of a file whose embeddings are in 8 bits
    assert (grams[-7] - gram).norm() < 0.01 * gram.norm()


def test_a_q4_0_file_of_other_weights_than_were_chosen_is_an_error(run_of, tmp_path, monkeypatch):
    write = forms.write_gguf
    monkeypatch.setattr(forms, "write_gguf", lambda *arguments: write(*arguments[:-1], None))
    with pytest.raises(ModelError, match="loaded back, does not do what the model does"):
        export_run(run_of("llama"), tmp_path / "out", ExportSettings("gguf", dtype="q4_0"))
    assert not (tmp_path / "out").exists()


def test_of_a_q4_0_file_in_which_the_adapter_may_be_lost_a_note_says_so(run_of, tmp_path, monkeypatch):
    run = run_of("llama")
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    replace_adapter(run, {name: tensor * (0.02 if "lora_B" in name else 1) for name, tensor in weights.items()})
    monkeypatch.setattr(forms, "_chosen", lambda *_: ({}, []))
    notes = export_run(run, tmp_path / "out", ExportSettings("gguf", dtype="q4_0"))["notes"]
    assert re.search(r"moved the model by KL \S+, and training had by \S+: little of that may be left", notes[-1])


def test_a_model_without_whole_blocks_is_refused_before_anything_is_chosen(run_of, tmp_path):
    run = run_of("llama", hidden_size=72, intermediate_size=100, num_attention_heads=6, num_key_value_heads=3)
    with pytest.raises(ModelError, match="no layer has rows of whole blocks of 32"):
        export_run(run, tmp_path / "out", ExportSettings("gguf", dtype="q4_0"))


def test_an_adapter_alone_names_no_rows_and_is_rounded(run_of, tmp_path):
    alone = copytree(run_of("llama") / "adapter", tmp_path / "alone")
    report = export_run(alone, tmp_path / "out", ExportSettings("gguf", dtype="q4_0"))
    assert "an adapter alone names none" in report["notes"][0] and "was not measured" in report["notes"][-1]
    assert "models" not in report


@pytest.mark.parametrize("base", ["nf4", "original"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_large_model_is_checked_block_by_block_with_the_same_outcome(family, base, run_of, tmp_path, monkeypatch):
    run = run_of(family)
    whole = export_run(run, tmp_path / "whole", ExportSettings("gguf", base))
    monkeypatch.setattr(forms, "WHOLE_BYTES", 0)
    monkeypatch.setattr(forms, "load_model", None)
    monkeypatch.setattr(forms, "build_to_use", None)
    streamed = export_run(run, tmp_path / "streamed", ExportSettings("gguf", base))
    assert streamed["share"] == pytest.approx(whole["share"], abs=2e-3)
    assert streamed["distance"] == pytest.approx(whole["distance"], rel=0.02)
    assert "block by block" in streamed["notes"][-1] and whole["notes"] == streamed["notes"][:-1]


@pytest.mark.parametrize("also", ["norms", "biases", "embeddings", "head"])
def test_a_large_model_with_trained_weights_of_its_own_is_checked_too(also, tmp_path, monkeypatch):
    save_tiny(tmp_path / "model", "qwen2", merges=MERGES, tie_word_embeddings=False)
    run = make_run(tmp_path / "made", tmp_path / "model", [f"adapter.train_also=[{also}]"])
    monkeypatch.setattr(forms, "WHOLE_BYTES", 0)
    assert export_run(run, tmp_path / "out", ExportSettings("gguf"))["share"] == pytest.approx(1, abs=0.01)


def test_a_large_file_that_lacks_the_adapter_is_an_error(run_of, tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "WHOLE_BYTES", 0)
    write = forms.write_gguf

    def write_base(merged, *rest):
        return write(replace(merged, adapter=replace(merged.adapter, layers={})), *rest)

    monkeypatch.setattr(forms, "write_gguf", write_base)
    with pytest.raises(ModelError, match=r"\(it changes nothing\)"):
        export_run(run_of("llama"), tmp_path / "out", ExportSettings("gguf"))
    assert not (tmp_path / "out").exists()


def test_a_base_in_the_original_weights_is_another_file(run_of, tmp_path):
    run = run_of("llama")
    reports = [export_run(run, tmp_path / base, ExportSettings("gguf", base)) for base in ("nf4", "original")]
    assert [report["merged_into"] for report in reports] == ["nf4", "original"]
    found = [logits(read_gguf(tmp_path / base)) for base in ("nf4", "original")]
    assert not torch.allclose(*found, atol=1e-2)


def test_of_a_larger_model_the_file_holds_the_language_model_alone(tmp_path):
    layers = {"num_hidden_layers": 6, "layer_types": None}
    save_nested(tmp_path / "model", merges=MERGES, **layers)
    run = make_run(tmp_path, tmp_path / "model")
    report = export_run(run, tmp_path / "gguf", ExportSettings("gguf"))
    merge_run(run, tmp_path / "merged", MergeSettings(dtype="f16", rows=0))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    config = merged.config.get_text_config()
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file=MODEL_FILE, dtype=torch.float32, config=config
    )
    assert torch.allclose(logits(read), logits(merged), atol=0.02 * logits(merged).abs().max())
    assert "holds the language model alone" in report["notes"][0]
    assert export_run(run, tmp_path / "q4_0", ExportSettings("gguf", dtype="q4_0"))["models"]["q4_0"]["kl"] > 0


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_were_added_are_in_the_file_with_their_rows(tied, run_of, tmp_path):
    run = run_of("llama", tie_word_embeddings=tied, overrides=['adapter.train_tokens=["<|new|>"]'])
    tokenizer = load_tokenizer(str(tmp_path / "model"), None, ["<|new|>"])
    tokenizer.save_pretrained(run / "adapter")
    summary = run / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | digests_of(run / "adapter")))
    export_run(run, tmp_path / "gguf", ExportSettings("gguf"))
    merge_run(run, tmp_path / "merged", MergeSettings(dtype="f16", rows=0))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    read = read_gguf(tmp_path / "gguf")
    assert read.get_input_embeddings().weight.shape == merged.get_input_embeddings().weight.shape
    assert torch.equal(read.get_input_embeddings().weight, merged.get_input_embeddings().weight)
    assert torch.equal(read.get_output_embeddings().weight, merged.get_output_embeddings().weight)
    assert greedy(read, 2) == greedy(merged, 2)
    in_4_bit = export_run(run, tmp_path / "q4_0", ExportSettings("gguf", dtype="q4_0"))
    assert in_4_bit["read_back"] < 1e-5 and in_4_bit["models"]["q4_0"]["kl"] > 0
    number = tokenizer.convert_tokens_to_ids("<|new|>")
    again = AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file=MODEL_FILE)
    assert again("a<|new|>b").input_ids == tokenizer("a<|new|>b").input_ids
    assert number in again("a<|new|>b").input_ids and number < read.config.vocab_size


@torch.no_grad()
def test_a_run_on_a_gguf_base_is_exported_and_merged(run_of, tmp_path):
    export_run(run_of("llama", tie_word_embeddings=True), tmp_path / "first", ExportSettings("gguf", dtype="q8_0"))
    run = make_run(tmp_path / "second", tmp_path / "first" / MODEL_FILE, seed=5)
    export_run(run, tmp_path / "gguf", ExportSettings("gguf"))
    merge_run(run, tmp_path / "merged", MergeSettings(dtype="f16", rows=0))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert merged.config.tie_word_embeddings and merged.config.use_cache and merged.generation_config.use_cache
    assert greedy(read_gguf(tmp_path / "gguf")) == greedy(merged)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "first", gguf_file=MODEL_FILE, dtype=torch.float32)
    assert not torch.allclose(logits(base), logits(merged), atol=1e-2)
    for name in ("first", "gguf"):
        names = {tensor.name for tensor in GGUFReader(tmp_path / name / MODEL_FILE).tensors}
        assert "output.weight" not in names, "a tied head is stored once"


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_base_is_read_tensor_by_tensor_with_the_values_that_transformers_reads(family, kind, run_of, tmp_path):
    export_run(run_of(family), tmp_path / "gguf", ExportSettings("gguf", dtype=kind))
    path = str(tmp_path / "gguf" / MODEL_FILE)
    skeleton = meta_model(read_config(path), "nf4", True, torch.float32)
    weights = open_weights(locate(path), skeleton, torch.float32)
    whole = read_gguf(tmp_path / "gguf", family)
    assert weights.entries.keys() == dict(whole.named_parameters()).keys()
    for name, parameter in whole.named_parameters():
        assert torch.equal(weights.read(name), parameter), name
        assert weights.entries[name] == (torch.float32, tuple(parameter.shape))


def scaled(kind, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **settings}, "max_position_embeddings": 512}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
SAID = {  # what files say beyond what transformers' reader takes; family, settings
    "llama3": ("llama", scaled("llama3", original_max_position_embeddings=64, **LLAMA3)),
    "llama3 of its own first context": ("llama", scaled("llama3", original_max_position_embeddings=8192, **LLAMA3)),
    "linear": ("llama", scaled("linear", factor=4.0)),
    "yarn": ("qwen2", scaled("yarn", factor=4.0, original_max_position_embeddings=32)),
    "yarn with bounds": (
        "qwen2",
        scaled("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=8.0, beta_slow=2.0),
    ),
    "size of heads": ("qwen3", {}),
    "caps and a small scale": ("gemma2", {}),
    "scale of a 27B": ("gemma2", {"num_hidden_layers": 46, "head_dim": 32, "query_pre_attn_scalar": 16}),
    "scaling of whole blocks": ("gemma3_text", {"num_hidden_layers": 6, "rope_parameters": GEMMA3_ROPE}),
}


SLOW = {"scale of a 27B"}  # which transformers knows by its number of layers


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in SAID])
def test_a_gguf_base_is_scaled_as_its_file_says(case, run_of, tmp_path):
    family, options = SAID[case]
    run = run_of(family, **options)
    export_run(run, tmp_path / "gguf", ExportSettings("gguf", "original"))
    merge_run(run, tmp_path / "merged", MergeSettings("original", dtype="f16", rows=0))
    path = str(tmp_path / "gguf" / MODEL_FILE)
    read, merged = (load_model(each, "none", compute_dtype=torch.float32) for each in (path, str(tmp_path / "merged")))
    ids = torch.randint(5, VOCABULARY, (2, 100), generator=torch.Generator().manual_seed(0))
    expected = logits(merged, ids)
    assert (logits(read, ids) - expected).norm() < 1e-3 * expected.norm()
    planned, in_4_bit = read_config(path), load_model(path, compute_dtype=torch.float32)
    for name in ("rope_parameters", "query_pre_attn_scalar", "attn_logit_softcapping", "head_dim"):
        for config in (planned, in_4_bit.config):
            assert getattr(config, name, None) == getattr(merged.config, name, None), name


def say(path, values=(), factors=None):
    """Write a GGUF file that says little but what is asked for."""
    writer = GGUFWriter(path, "llama")
    for key, value in dict(values).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"llama.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("values", "factors", "text"),
    [
        ({"rope.scaling.type": "longrope"}, None, "rope.scaling.type longrope"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_attn_factor": 0.5},
            None,
            "rope.scaling.yarn_attn_factor 0.5",
        ),
        ({"rope.scaling.type": "linear", "rope.scaling.of_tomorrow": 1.0}, None, "rope.scaling.of_tomorrow"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, [1, 2] * 4, "rope_freqs.weight beside a scaling"),
        ({}, [1, 2, 1, 2, 3, 4, 5, 8], "rope_freqs.weight"),
        ({}, [1, 8], "rope_freqs.weight"),
        ({"attention.scale": 0.5}, None, "attention.scale 0.5"),
        ({"final_logit_softcapping": 30.0}, None, "final_logit_softcapping 30.0"),
        ({"rope.freq_base_swa": 5.0}, None, "rope.freq_base_swa 5.0"),
        ({"rope.dimension_count": 8.0}, None, "rope.dimension_count 8.0"),
    ],
)
def test_what_a_gguf_base_says_and_no_setting_holds_is_refused_by_name(values, factors, text, tmp_path):
    with pytest.raises(ModelError, match=f"says {re.escape(text)}, for which its model has no setting here"):
        as_the_file_says(build_tiny("llama").config, say(tmp_path / "a.gguf", values, factors))


def test_what_changes_nothing_in_a_gguf_base_is_taken_as_such(tmp_path):
    values = {"rope.scaling.type": "none", "rope.scaling.attn_factor": 1.0, "logit_scale": 1.0, "rope.freq_base": 7.0}
    config = build_tiny("llama").config
    for factors in (None, [1.0] * 8):
        assert as_the_file_says(config, say(tmp_path / "a.gguf", values, factors)).to_dict() == config.to_dict()
    values = {"rope.scaling.factor": 4.0}  # of before there was a type
    assert as_the_file_says(config, say(tmp_path / "a.gguf", values)).rope_parameters["rope_type"] == "linear"


def test_a_family_without_rotary_positions_is_refused_a_scaling(tmp_path):
    with pytest.raises(ModelError, match=r"says rope\.scaling\.type linear"):
        as_the_file_says(build_tiny("gpt2").config, say(tmp_path / "a.gguf", {"rope.scaling.type": "linear"}))


def test_a_gguf_base_of_no_heads_is_refused(run_of, tmp_path):
    rope = scaled("llama3", original_max_position_embeddings=64, **LLAMA3)
    export_run(run_of("llama", **rope), tmp_path / "gguf", ExportSettings("gguf"))
    path = tmp_path / "gguf" / MODEL_FILE
    reader = GGUFReader(path, "r+")
    reader.get_field("llama.attention.head_count").parts[-1][0] = 0
    reader.data.flush()
    for read in (read_config, load_model):
        with pytest.raises(ModelError, match="cannot read the configuration"):
            read(str(path))


def fields_of(path):
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def test_the_file_says_what_llama_cpp_needs_to_know(run_of, tmp_path):
    run = run_of("gemma3_text")
    export_run(run, tmp_path / "gguf", ExportSettings("gguf"))
    fields = fields_of(tmp_path / "gguf" / MODEL_FILE)
    assert fields["general.architecture"] == "gemma3" and fields["gemma3.attention.sliding_window"] == 5
    assert fields["gemma3.attention.key_length"] == fields["gemma3.attention.value_length"] == 16
    assert fields["tokenizer.chat_template"] == (run / "template.jinja").read_text()
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (2, 4)


def test_transformers_reads_the_tokenizer_of_the_file(run_of, tmp_path):
    export_run(run_of("qwen2"), tmp_path / "gguf", ExportSettings("gguf"))
    tokenizer, read = (
        byte_tokenizer(merges=MERGES),
        AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file=MODEL_FILE),
    )
    for text in ("the Grüße 12345", "<|im_start|>user\na  b<|im_end|>", "東京\t🙂"):
        assert read(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids


def test_tokens_have_their_types_and_unused_places_their_own():
    tokenizer = byte_tokenizer(merges=MERGES)
    tokenizer.add_tokens(["<think>"])
    size = len(tokenizer) + 2
    described = describe_tokenizer(tokenizer, size)
    assert described.kind == "gpt2" and len(described.tokens) == len(described.types) == size
    assert described.types[:5] == [CONTROL] * 5 and described.types[5] == ORDINARY
    assert described.tokens[-3] == "<think>" and described.types[-3:] == [ADDED, UNUSED, UNUSED]
    assert len(set(described.tokens)) == size and described.merges == ["t h", "th e"]
    with pytest.raises(ModelError, match="has 263 tokens, the model's vocabulary 260"):
        describe_tokenizer(tokenizer, 260)
    with pytest.raises(ModelError, match="no tokenizer without merges"):
        describe_tokenizer(byte_tokenizer(), VOCABULARY)


def test_a_way_to_cut_words_that_llama_cpp_does_not_know_is_refused():
    from tokenizers import Regex, normalizers, pre_tokenizers

    tokenizer = byte_tokenizer(merges=MERGES)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[aeiou]"), "isolated")
    with pytest.raises(ModelError, match="known here for the way this tokenizer splits words"):
        describe_tokenizer(tokenizer, VOCABULARY)
    tokenizer = byte_tokenizer(merges=MERGES)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ModelError, match="does not normalise text"):
        describe_tokenizer(tokenizer, VOCABULARY)


@pytest.mark.parametrize(
    ("family", "options", "text"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation gelu"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar 99"),
        ("gemma2", {"num_hidden_layers": 46, "head_dim": 32, "query_pre_attn_scalar": 32}, "query_pre_attn_scalar 32"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            r"partial_rotary_factor 0\.5",
        ),
        (
            "qwen2",
            scaled("yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.5),
            r"attention_factor 1\.5",
        ),
        ("gemma3_text", {"layer_types": ["full_attention", "full_attention"]}, "layer_types"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
    ],
)
def test_settings_that_llama_cpp_does_not_compute_are_refused_by_name(family, options, text, run_of, tmp_path):
    with pytest.raises(ModelError, match=text):
        export_run(run_of(family, **options), tmp_path / "out", ExportSettings("gguf"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["f16", "q4_0"])
@pytest.mark.parametrize("family", ["gpt_neox", "qwen3_moe"])
def test_families_without_a_place_in_gguf_here_are_refused(family, dtype, tmp_path):
    with pytest.raises(ModelError, match=f"models of the family {family} are not exported to GGUF"):
        export_run(tiny_run(tmp_path, family), tmp_path / "out", ExportSettings("gguf", dtype=dtype))


def test_an_attention_window_that_llama_cpp_has_not_is_a_note_or_an_error_where_it_shows(run_of, tmp_path):
    report = export_run(run_of("mistral", sliding_window=64), tmp_path / "out", ExportSettings("gguf"))
    assert report["notes"] == [
        "llama.cpp has no attention window for this model: texts over 64 tokens are attended whole"
    ]
    save_tiny(tmp_path / "short" / "model", "mistral", merges=MERGES)  # a window of 5 tokens
    with pytest.raises(ModelError, match="does not do what the adapter does"):
        export_run(make_run(tmp_path / "short", tmp_path / "short" / "model"), tmp_path / "no", ExportSettings("gguf"))


def test_llama_3_s_rotary_weights_are_those_of_transformers():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    options = dict(rope_parameters=rope, hidden_size=512, max_position_embeddings=131072)
    scaled = build_tiny("llama", **options)
    plain = build_tiny("llama", **(options | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}))
    expected = plain.model.rotary_emb.inv_freq / scaled.model.rotary_emb.inv_freq
    factors = rope_factors(scaled.config)
    assert torch.allclose(factors, expected, rtol=1e-5)
    assert factors[0] == 1 and factors[-1] == 8 and ((factors > 1) & (factors < 8)).any()
    assert rope_factors(plain.config) is None


def test_values_beyond_float16_are_refused_with_the_way_out(run_of, tmp_path):
    run = run_of("qwen2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "model")
    summary = json.loads((run / "summary.json").read_text())
    del summary["base_fingerprint"]
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ModelError, match=r"up_proj.weight is too large for float16.* --dtype, such as bf16"):
        export_run(run, tmp_path / "out", ExportSettings("gguf"))
    with pytest.raises(ModelError, match=r"up_proj.weight has values beyond the range of float16.*--dtype bf16"):
        export_run(run, tmp_path / "out", ExportSettings("gguf", dtype="q8_0"))
    assert np.isfinite(export_run(run, tmp_path / "out", ExportSettings("gguf", dtype="bf16"))["distance"])
