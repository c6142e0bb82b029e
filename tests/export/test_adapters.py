"""Adapter folders work in peft and by vLLM's rules, adapter files by llama.cpp's; what does nothing is an error."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from tiny import ReferenceLora
from tiny_files import save_nested
from tiny_runs import END_OF_ANSWER, logits, make_run, tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lite.adapters.files import load_adapter
from qlora_lite.adapters.read import Adapter, Factors
from qlora_lite.artifacts.trained_run import open_trained
from qlora_lite.errors import ModelError, OutputError
from qlora_lite.export import adapters
from qlora_lite.export import form as export_form
from qlora_lite.export.adapters import VLLM_FAMILIES, for_vllm, with_one_scaling
from qlora_lite.export.check import Change, check_change, check_merged
from qlora_lite.export.formats import ExportSettings, export_run
from qlora_lite.ext.gguf.adapter import ADAPTER_FILE

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft asks transformers
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),  # peft corrects it for Conv1D, and says so
]
MIXED = {"targets": ["all-linear", {"pattern": "*.1.*", "rank": 3, "alpha": 5}], "rank": 4, "alpha": 8}
LORAS = {
    "plain": {"rank": 4, "alpha": 8},
    "rslora": {"rank": 4, "alpha": 8, "rslora": True},
    "one kind of layer": {"targets": ["q_proj"], "rank": 4, "alpha": 8},
    "mixed": MIXED,
    "mixed rslora": MIXED | {"rslora": True},
}
PLAIN_WEIGHTS = ["model.quant=none"]  # plain transformers then has the very base that the run saw
# What LoraConfig of peft 0.13 (October 2024) knows; a key it does not know is a TypeError there.
PEFT_0_13 = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "use_dora",
    "layer_replication",
    "runtime_config",
}


def plain(tmp_path):
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def adapted_logits(run):
    """The run's adapter on plain transformers' model, by a reference that shares no code with the package."""
    model = AutoModelForCausalLM.from_pretrained(run.parent / "model")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    for name in {name.split(".lora_")[0] for name in tensors}:
        path = name.removeprefix("base_model.model.")
        a, b = (tensors[f"{name}.lora_{side}.weight"].float() for side in "AB")
        alpha = config.get("alpha_pattern", {}).get(path, config["lora_alpha"])
        scale = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
        model.set_submodule(path, ReferenceLora(model.get_submodule(path), a, b, scale))
    return logits(model)


@pytest.mark.parametrize("case", LORAS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "gemma3_text"])
def test_peft_loads_the_folder_with_equal_logits(model_type, case, tmp_path):
    lora = LORAS[case] if case != "one kind of layer" or model_type != "gpt2" else LORAS[case] | {"targets": ["c_attn"]}
    lora = lora if case != "one kind of layer" or model_type != "phi3" else lora | {"targets": ["qkv_proj"]}
    run = tiny_run(tmp_path, model_type, lora, PLAIN_WEIGHTS)
    report = export_run(run, tmp_path / "out", ExportSettings("peft"))
    theirs = peft.PeftModel.from_pretrained(plain(tmp_path), tmp_path / "out")
    expected, base = adapted_logits(run), logits(plain(tmp_path))
    assert (expected - base).abs().max() > 1e-2
    assert torch.allclose(logits(theirs), expected, atol=2e-4)
    assert report["error"] < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == (run / "template.jinja").read_text()


@pytest.mark.parametrize(
    ("model_type", "lora", "overrides"),
    [
        ("llama", MIXED, []),
        ("gpt2", None, ["adapter.train_also=[norms, biases]"]),
        ("phi3", None, ["lora.start=pissa"]),
        ("qwen2", None, ["adapter.method=dora"]),
        ("llama", None, ["adapter.train_also=[embeddings, head]"]),
        ("qwen3_moe", {"targets": ["all-linear", "experts"], "rank": 2, "alpha": 4}, []),
        ("llama", None, ["adapter.train_tokens=[e]"]),
    ],
)
def test_a_large_base_in_16_bit_is_read_block_by_block_for_the_check(
    model_type, lora, overrides, tmp_path, monkeypatch
):
    run = tiny_run(tmp_path, model_type, lora, [*PLAIN_WEIGHTS, *overrides])
    whole = export_run(run, tmp_path / "whole", ExportSettings("peft"))
    monkeypatch.setattr(export_form, "WHOLE_BYTES", 0)
    monkeypatch.setattr(export_form, "build_to_use", lambda *_: pytest.fail("a model was loaded as a whole"))
    streamed = export_run(run, tmp_path / "streamed", ExportSettings("peft"))
    assert streamed["error"] < 1e-5 and streamed["notes"] == whole["notes"]
    weights = "adapter_model.safetensors"
    same = load_file(tmp_path / "whole" / weights), load_file(tmp_path / "streamed" / weights)
    assert same[0].keys() == same[1].keys() and all(torch.equal(same[0][name], same[1][name]) for name in same[0])


@pytest.mark.parametrize("tied", [True, False])
def test_trained_tokens_are_exported_to_peft(tied, tmp_path):
    run = tiny_run(tmp_path, tie_word_embeddings=tied, overrides=["adapter.train_tokens=[e]", *PLAIN_WEIGHTS])
    export_run(run, tmp_path / "out", ExportSettings("peft"))
    theirs = peft.PeftModel.from_pretrained(plain(tmp_path), tmp_path / "out")
    ours = load_adapter(plain(tmp_path), run / "adapter")
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-4)
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum("token_adapter" in name for name in names) == (1 if tied else 2)


def test_dora_is_exported_to_peft_and_refused_where_its_magnitudes_would_be_left_out(tmp_path, monkeypatch):
    run = tiny_run(tmp_path, "qwen2", MIXED, [*PLAIN_WEIGHTS, "adapter.method=dora"])
    export_run(run, tmp_path / "out", ExportSettings("peft"))
    theirs = peft.PeftModel.from_pretrained(plain(tmp_path), tmp_path / "out")
    trained = peft.PeftModel.from_pretrained(plain(tmp_path), run / "adapter")
    assert torch.equal(logits(theirs), logits(trained))
    assert not torch.allclose(logits(theirs), adapted_logits(run), atol=1e-2)  # which are LoRA's
    keys = json.loads((tmp_path / "out" / "adapter_config.json").read_text()).keys()
    assert "use_dora" in keys and keys <= PEFT_0_13
    monkeypatch.setattr(export_form, "build_to_use", lambda *_: pytest.fail("a model was loaded"))
    for form, program in (("vllm", "vLLM"), ("gguf-adapter", "llama.cpp's --lora")):
        with pytest.raises(ModelError, match=f"is DoRA, and {program} takes LoRA alone.*`qlora-lite merge`"):
            export_run(run, tmp_path / form, ExportSettings(form))
        assert not (tmp_path / form).exists()


@pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module")  # peft used them
def test_lora_on_experts_is_exported_to_peft_and_refused_where_it_would_be_left_out(tmp_path, monkeypatch):
    mixed = {"targets": ["all-linear", "experts", {"pattern": "*.1.*.gate_up_proj", "rank": 3}], "rank": 4, "alpha": 8}
    run = tiny_run(tmp_path, "qwen3_moe", mixed, PLAIN_WEIGHTS)
    report = export_run(run, tmp_path / "out", ExportSettings("peft"))
    theirs = peft.PeftModel.from_pretrained(plain(tmp_path), tmp_path / "out")
    trained = peft.PeftModel.from_pretrained(plain(tmp_path), run / "adapter")
    assert torch.equal(logits(theirs), logits(trained)) and report["error"] < 1e-4
    assert not torch.allclose(logits(theirs), logits(plain(tmp_path)), atol=1e-2)
    monkeypatch.setattr(export_form, "build_to_use", lambda *_: pytest.fail("a model was loaded"))
    for form, program in (("vllm", "vLLM"), ("gguf-adapter", "llama.cpp's --lora")):
        with pytest.raises(ModelError, match=f"weights for fused experts, and {program} takes .*`qlora-lite merge`"):
            export_run(run, tmp_path / form, ExportSettings(form))
        assert not (tmp_path / form).exists()


@pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module")  # peft used them
def test_layers_named_like_experts_are_exported_for_peft_to_find(tmp_path, monkeypatch):
    """Of missing keys peft only warns, which is an error here."""
    run = tiny_run(tmp_path, "deepseek_v3", MIXED | {"dropout": 0.1}, PLAIN_WEIGHTS)
    report = export_run(run, tmp_path / "out", ExportSettings("peft"))
    theirs = peft.PeftModel.from_pretrained(plain(tmp_path), tmp_path / "out")
    trained = logits(load_adapter(plain(tmp_path), run / "adapter"))
    assert torch.allclose(logits(theirs), trained, atol=2e-4) and report["error"] < 1e-4
    assert not torch.allclose(trained, logits(plain(tmp_path)), atol=1e-2)
    run = make_run(tmp_path / "dora", tmp_path / "model", [*PLAIN_WEIGHTS, "adapter.method=dora"])
    monkeypatch.setattr(export_form, "build_to_use", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ModelError, match=r"no DoRA for them in 16 bit: leave them out of lora\.targets, .* or merge"):
        export_run(run, tmp_path / "other", ExportSettings("peft"))
    assert not (tmp_path / "other").exists()


# Of `pip install --no-deps --target FOLDER peft==0.11.1`, and of others: this environment has only one peft.
OLD_PEFT = os.environ.get("QLORA_LITE_OLD_PEFT")
LOAD_IN_OLD_PEFT = """
import sys, torch, peft
from safetensors.torch import save_file
from tiny_runs import logits
from transformers import AutoModelForCausalLM
assert peft.__file__.startswith(sys.argv[1]), peft.__file__
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
save_file({"logits": logits(peft.PeftModel.from_pretrained(model, sys.argv[3]))}, sys.argv[4])
"""


@pytest.mark.skipif(not OLD_PEFT, reason="QLORA_LITE_OLD_PEFT names no folder with an old peft")
@pytest.mark.parametrize("case", LORAS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_an_old_peft_loads_the_folder_with_equal_logits(model_type, case, tmp_path):
    lora = LORAS[case] if case != "one kind of layer" or model_type != "gpt2" else LORAS[case] | {"targets": ["c_attn"]}
    run = tiny_run(tmp_path, model_type, lora, PLAIN_WEIGHTS)
    export_run(run, tmp_path / "out", ExportSettings("peft"))
    places = [OLD_PEFT, str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    arguments = [OLD_PEFT, tmp_path / "model", tmp_path / "out", tmp_path / "logits.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", LOAD_IN_OLD_PEFT, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert torch.allclose(load_file(tmp_path / "logits.safetensors")["logits"], adapted_logits(run), atol=2e-4)
    assert (adapted_logits(run) - logits(plain(tmp_path))).abs().max() > 1e-2


def test_the_configuration_has_only_keys_that_old_versions_know(tmp_path):
    for case, lora in LORAS.items():
        run = tiny_run(tmp_path / case, lora=lora)
        export_run(run, tmp_path / case / "out", ExportSettings("peft"))
        assert json.loads((tmp_path / case / "out" / "adapter_config.json").read_text()).keys() <= PEFT_0_13


def vllm_reads(folder, model):
    """Apply an adapter as vLLM does: one rank, one scale, and an error for what it cannot do."""
    config = json.loads((folder / "adapter_config.json").read_text())
    known = {"r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_rslora", "use_dora"}
    config = {key: value for key, value in config.items() if key in known}  # all others are ignored without a word
    assert not config.get("modules_to_save") and not config.get("use_dora") and config.get("bias", "none") == "none"
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        assert parts[:2] == ["base_model", "model"] and parts[-2] in ("lora_A", "lora_B") and parts[-1] == "weight"
        modules.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = tensor
    for path, pair in modules.items():
        assert pair["lora_A"].shape[0] == pair["lora_B"].shape[1] == config["r"], "one rank for all"
        assert path.rpartition(".")[2] in {target.rpartition(".")[2] for target in config["target_modules"]}
        wrapped = ReferenceLora(model.get_submodule(path), pair["lora_A"].float(), pair["lora_B"].float(), scale)
        model.set_submodule(path, wrapped)
    return model


@pytest.mark.parametrize("case", LORAS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_a_reader_with_vllm_s_rules_gives_equal_logits(model_type, case, tmp_path):
    run = tiny_run(tmp_path, model_type, LORAS[case], PLAIN_WEIGHTS)
    report = export_run(run, tmp_path / "out", ExportSettings("vllm"))
    assert torch.allclose(logits(vllm_reads(tmp_path / "out", plain(tmp_path))), adapted_logits(run), atol=2e-4)
    assert "--max-lora-rank 8" in report["use"]


def test_vllm_is_told_of_a_template_and_of_ends_of_answers_that_the_base_does_not_know(tmp_path):
    run = tiny_run(tmp_path / "a")
    report = export_run(run, tmp_path / "known", ExportSettings("vllm"))
    assert report["notes"] == [
        "vLLM does not stop at the end tokens of the training data: send stop_token_ids "
        f"[{END_OF_ANSWER}] with requests"
    ]
    shutil.copytree(tmp_path / "a" / "model", tmp_path / "b" / "model")
    generation = {"eos_token_id": [0, END_OF_ANSWER]}
    (tmp_path / "b" / "model" / "generation_config.json").write_text(json.dumps(generation))
    run = make_run(tmp_path / "b", tmp_path / "b" / "model")
    assert export_run(run, tmp_path / "out", ExportSettings("vllm"))["notes"] == []
    (run / "template.jinja").write_text("{{ messages[0].content }}")
    notes = export_run(run, tmp_path / "other", ExportSettings("vllm"))["notes"]
    template = tmp_path / "other" / "chat_template.jinja"
    assert notes == [f"vLLM renders chats with the base's template: serve with --chat-template {template}"]
    assert template.read_text() == "{{ messages[0].content }}"


@pytest.mark.parametrize("form", ["peft", "vllm"])
def test_of_a_larger_model_the_folder_fits_the_whole_and_says_so(form, tmp_path):
    whole = save_nested(tmp_path / "model")
    run = make_run(tmp_path, tmp_path / "model", PLAIN_WEIGHTS, lora=MIXED)
    report = export_run(run, tmp_path / "out", ExportSettings(form))
    theirs = (
        peft.PeftModel.from_pretrained(plain(tmp_path), tmp_path / "out")
        if form == "peft"
        else (vllm_reads(tmp_path / "out", plain(tmp_path)))
    )
    assert not torch.allclose(logits(theirs), logits(whole), atol=1e-2)
    assert torch.allclose(logits(theirs), adapted_logits(run), atol=2e-4)
    assert "fits the whole of" in report["notes"][0] and "'model.language_model.'" in report["notes"][0]


def test_vllm_s_rules_read_an_unfolded_adapter_wrongly(tmp_path):
    lora = {"targets": ["q_proj", {"pattern": "v_proj", "alpha": 3}], "rank": 4, "alpha": 8}
    run = tiny_run(tmp_path, lora=lora, overrides=PLAIN_WEIGHTS)
    wrong = logits(vllm_reads(run / "adapter", plain(tmp_path)))
    assert not torch.allclose(wrong, adapted_logits(run), atol=1e-2)


@pytest.mark.parametrize(
    ("model_type", "lora", "text"),
    [
        ("gpt2", {"rank": 4}, "not known to support adapters for gpt2"),
        ("llama", {"rank": 513}, "ranks up to 512"),
    ],
)
def test_what_vllm_cannot_serve_is_refused(model_type, lora, text, tmp_path):
    trained = open_trained(tiny_run(tmp_path, model_type, lora))
    skeleton = trained.skeleton()
    with pytest.raises(ModelError, match=text):
        for_vllm(trained.read_adapter(skeleton), skeleton, model_type)
    assert model_type in VLLM_FAMILIES or model_type == "gpt2"


def test_folding_keeps_every_update_and_the_bits_where_it_can():
    generator = torch.Generator().manual_seed(0)

    def factors(rank, alpha, rslora=False):
        pair = torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator)
        return Factors(*(part.bfloat16() for part in pair), alpha, rslora)

    for rslora in (False, True):
        adapter = Adapter(
            {"a": factors(4, 8.0, rslora), "b": factors(4, 8.0, rslora), "c": factors(2, 3.0, rslora)}, 0.0
        )
        for rank in (None, 4, 6):
            folded = with_one_scaling(adapter, rank)
            assert len({f.alpha for f in folded.layers.values()}) == 1
            for name, f in adapter.layers.items():
                g = folded.layers[name]
                assert g.rank == (rank or f.rank) and not g.rslora
                expected = f.scale * f.lora_B.double() @ f.lora_A.double()
                assert torch.allclose(g.scale * g.lora_B.double() @ g.lora_A.double(), expected, rtol=1e-6, atol=1e-7)
    same = Adapter({"a": factors(4, 8.0), "b": factors(4, 16.0)}, 0.0)
    folded = with_one_scaling(same)
    assert folded.layers["a"].lora_B.dtype == torch.bfloat16, "a factor of two moves the exponent only"
    assert torch.equal(folded.layers["a"].lora_A, same.layers["a"].lora_A)
    one, other = factors(4, 8.0), factors(4, 8.0)
    exact = replace(other, lora_A=other.lora_A.float() * 1.001, lora_B=other.lora_B.float() * 1.001)
    kept = with_one_scaling(Adapter({"a": one, "b": exact}, 0.0)).layers["b"]
    assert torch.equal(kept.lora_A, exact.lora_A) and torch.equal(kept.lora_B, exact.lora_B)


def llama_cpp_reads(path, model, names):
    """Apply an adapter file as llama.cpp does: scale = alpha / rank of the pair, rows as in its own weight."""
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    for parameter, (name, heads) in names.items():
        a, b = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
        if heads:  # rows 2i and 2i + 1 of each head are rows i of its halves
            size = b.shape[0] // heads
            order = [
                head * size + 2 * (i % (size // 2)) + i // (size // 2) for head in range(heads) for i in range(size)
            ]
            b = b[order]
        base = model.get_submodule(parameter)
        model.set_submodule(parameter, ReferenceLora(base, a, b, fields["adapter.lora.alpha"] / a.shape[0]))
    assert not tensors
    return model


GGUF_LEAVES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


@pytest.mark.parametrize("case", LORAS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text"])
def test_a_reader_with_llama_cpp_s_rules_gives_equal_logits(model_type, case, tmp_path):
    run = tiny_run(tmp_path, model_type, LORAS[case], PLAIN_WEIGHTS)
    export_run(run, tmp_path / "out", ExportSettings("gguf-adapter"))
    heads = {"q_proj": 4, "k_proj": 2} if model_type == "llama" else {}
    names = {}
    for block in range(2):
        for leaf, name in GGUF_LEAVES.items():
            if case == "one kind of layer" and leaf != "q_proj":
                continue
            part = "self_attn" if name.startswith("attn") else "mlp"
            names[f"model.layers.{block}.{part}.{leaf}"] = f"blk.{block}.{name}.weight", heads.get(leaf, 0)
    model = llama_cpp_reads(tmp_path / "out" / ADAPTER_FILE, plain(tmp_path), names)
    assert torch.allclose(logits(model), adapted_logits(run), atol=2e-4)


def test_a_file_that_does_nothing_or_too_little_is_an_error_and_is_not_left(tmp_path, monkeypatch):
    run = tiny_run(tmp_path)

    def write_nothing(adapter, skeleton, out, base_model, tokenizer):
        nothing = {n: Factors(f.lora_A, f.lora_B * 0, f.alpha) for n, f in adapter.layers.items()}
        whole(Adapter(nothing, 0.0), skeleton, out, base_model, tokenizer)

    whole = adapters.write_peft
    monkeypatch.setattr(adapters, "write_peft", write_nothing)
    with pytest.raises(ModelError, match=r"does not do what the adapter does \(it changes nothing\)"):
        export_run(run, tmp_path / "out", ExportSettings("peft"))
    assert not (tmp_path / "out").exists()

    base, adapted = torch.zeros(4, 8), torch.ones(4, 8)
    assert check_change(Change(base, adapted), adapted * 1.0005, "it") == pytest.approx(5e-4, rel=1e-3)
    with pytest.raises(ModelError, match=r"makes 50% of its change; relative error 5\.0e-01"):
        check_change(Change(base, adapted), adapted * 0.5, "it")


def test_a_merged_file_is_judged_by_its_share_of_the_change_where_rounding_is_larger():
    generator = torch.Generator().manual_seed(0)
    base = 10 * torch.randn(48, 2000, generator=generator)
    step, noise, other = (torch.randn(base.shape, generator=generator) for _ in range(3))
    rounding = 3 * noise - 0.4 * step  # of three times the change, and a part of it against the adapter's way
    change, rounded = Change(base, base + step), base + rounding
    share, distance = check_merged(change, base + step + rounding, rounded, "it", 0.5)
    assert share == pytest.approx(1, abs=0.01) and distance == pytest.approx(0.3, rel=0.1)
    same = check_merged(change, base + step + rounding, rounded, "it", 0.01)  # rounding moves the base as far
    assert same == (share, distance)
    for exported, text in (
        (rounded, r"\(it changes nothing\): it makes -?0% of its change"),
        (rounded + 0.5 * step, "makes 50% of its change"),
        (rounded + step + 6 * other, "distance of the logits"),
        (base * float("nan"), "nan"),
    ):
        with pytest.raises(ModelError, match=text):
            check_merged(change, exported, rounded, "it", 0.5)


def test_a_folder_with_something_in_it_is_refused_and_kept(tmp_path):
    run = tiny_run(tmp_path)
    with pytest.raises(OutputError, match="not an empty folder"):
        export_run(run, tmp_path / "model", ExportSettings("peft"))
    assert (Path(tmp_path) / "model" / "model.safetensors").exists()
    (tmp_path / "empty").mkdir()
    export_run(run, tmp_path / "empty", ExportSettings("peft"))
    shutil.rmtree(tmp_path / "empty")
