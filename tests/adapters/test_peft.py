"""Adapter files go both ways between this package and the real peft, with equal logits."""

import json
import logging

import peft
import pytest
import torch
from peft.utils import transformers_weight_conversion
from tiny import build_tiny, random_factors

from qlora_lite.adapters.files import load_adapter, save_adapter
from qlora_lite.adapters.fused_names import FAMILY, TAKEN, taken_for_experts
from qlora_lite.adapters.lora.inject import Target, add_lora
from qlora_lite.errors import ModelError
from qlora_lite.models.quantizer import quantize_in_place

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft asks transformers
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),  # peft corrects it for Conv1D, and says so
]
ATTENTION = {"llama": "q_proj", "gpt2": "c_attn", "phi3": "qkv_proj", "falcon": "query_key_value"}
OURS = {
    "all-linear": dict(targets="all-linear"),
    "by name": dict(targets=None),  # the attention projection of ATTENTION
    "rslora": dict(targets="all-linear", rslora=True),
    "one block": dict(targets=["*.1.*"]),
    "ranks and alphas": dict(targets=["all-linear", Target("*.0.*", rank=2, alpha=9.0), Target("*.1.mlp.*", rank=3)]),
}
IDS = torch.randint(3, 160, (2, 11), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("model_type", ATTENTION)
@pytest.mark.parametrize("case", OURS)
def test_an_adapter_saved_here_gives_the_same_logits_in_peft(model_type, case, tmp_path):
    options = OURS[case] | {"targets": OURS[case]["targets"] or [ATTENTION[model_type]]}
    model = add_lora(build_tiny(model_type), **options, rank=4, alpha=6.0, dtype=torch.float32)
    random_factors(model)
    save_adapter(model, tmp_path, base_model="tiny")

    theirs = peft.PeftModel.from_pretrained(build_tiny(model_type), tmp_path)

    ours, plain = logits(model), logits(build_tiny(model_type))
    assert (ours - plain).abs().max() > 1e-2
    assert torch.allclose(logits(theirs), ours, atol=2e-4)


@pytest.mark.parametrize("model_type", ATTENTION)
def test_an_adapter_of_a_4_bit_model_names_the_same_layers_as_one_of_the_plain_model(model_type, tmp_path):
    model = build_tiny(model_type)
    quantize_in_place(model, "nf4", double_quant=True)
    save_adapter(add_lora(model, rank=2), tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(build_tiny(model_type), tmp_path / "a")
    adapted = {n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    save_adapter(add_lora(build_tiny(model_type), rank=2), tmp_path / "b")
    plain = peft.PeftModel.from_pretrained(build_tiny(model_type), tmp_path / "b")
    assert adapted == {
        n for n, m in plain.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    }


PEFT_CONFIGS = {
    "all-linear": dict(target_modules="all-linear", r=4, lora_alpha=6),
    "rslora": dict(target_modules="all-linear", r=4, lora_alpha=6, use_rslora=True),
    "dropout": dict(target_modules="all-linear", r=4, lora_alpha=6, lora_dropout=0.3),
    "patterns": dict(
        target_modules="all-linear",
        r=4,
        lora_alpha=6,
        rank_pattern={r".*\.0\..*": 2, ".*.1.mlp..*": 3},
        alpha_pattern={r".*\.0\..*": 9, r".*\.1\.mlp\..*": 5},
    ),
    "one layer": dict(target_modules=None, r=4, lora_alpha=6, layers_to_transform=[1]),  # of ATTENTION
}


@pytest.mark.parametrize("model_type", ATTENTION)
@pytest.mark.parametrize("case", PEFT_CONFIGS)
def test_an_adapter_trained_by_peft_gives_the_same_logits_here(model_type, case, tmp_path):
    options = PEFT_CONFIGS[case] | {"target_modules": PEFT_CONFIGS[case]["target_modules"] or [ATTENTION[model_type]]}
    theirs = peft.get_peft_model(build_tiny(model_type), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # after one step only B has moved
        theirs.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path)

    ours = load_adapter(build_tiny(model_type), tmp_path)

    expected, plain = logits(theirs), logits(build_tiny(model_type))
    assert (expected - plain).abs().max() > 1e-2
    assert torch.allclose(logits(ours), expected, atol=2e-4)


def test_saving_what_peft_trained_gives_it_back_to_peft(tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", **PEFT_CONFIGS["patterns"])
    theirs = peft.get_peft_model(build_tiny("llama"), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path / "theirs")
    save_adapter(load_adapter(build_tiny("llama"), tmp_path / "theirs"), tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build_tiny("llama"), tmp_path / "ours")
    assert torch.equal(logits(again), logits(theirs))


LIKE_EXPERTS = {
    "all-linear": dict(targets="all-linear"),
    "with experts": dict(targets=["all-linear", "experts"]),
    "ranks and alphas": dict(
        targets=[
            "all-linear",
            "experts",
            Target("*.down_proj", rank=2, alpha=9.0),
            Target("*.1.*_proj", rank=3, alpha=5.0),
        ],
        rslora=True,
    ),
    "whole paths": dict(targets=["*.1.*.up_proj", "o_proj"], dropout=0.1),
    "nothing else": dict(targets=["gate_proj"]),
}
# peft looks at modules alone, and used them
ignore_patterns = pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module")


@ignore_patterns
@pytest.mark.parametrize("case", LIKE_EXPERTS)
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next"])
def test_layers_named_like_experts_keep_their_lora_weights_in_peft(name, case, tmp_path):
    """Shared experts and dense blocks; of weights that it misses, peft only warns, which is an error here."""
    model = add_lora(build_tiny(name), **LIKE_EXPERTS[case], rank=4, alpha=6.0, dtype=torch.float32)
    random_factors(model)
    save_adapter(model, tmp_path / "ours")

    theirs = peft.PeftModel.from_pretrained(build_tiny(name), tmp_path / "ours")

    ours, plain = logits(model), logits(build_tiny(name))
    assert (ours - plain).abs().max() > 1e-2
    assert torch.allclose(logits(theirs), ours, atol=2e-4)
    assert torch.equal(logits(load_adapter(build_tiny(name), tmp_path / "ours")), ours)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(logits(load_adapter(build_tiny(name), tmp_path / "theirs")), ours)


def test_dora_of_layers_named_like_experts_is_saved_with_one_warning_and_refused_by_peft(tmp_path, caplog):
    model = add_lora(build_tiny("deepseek_v3"), rank=2, dora=True)
    with caplog.at_level(logging.WARNING, "qlora_lite"):
        for folder in ("a", "b"):
            save_adapter(model, tmp_path / folder)
        save_adapter(add_lora(build_tiny("deepseek_v3"), ["o_proj"], rank=2, dora=True), tmp_path / "c")
        save_adapter(add_lora(build_tiny("llama"), rank=2, dora=True), tmp_path / "d")
    said = "the adapter is DoRA, and peft takes down_proj, gate_proj, up_proj of deepseek_v3 for experts"
    assert [text.startswith(said) for text in caplog.messages] == [True]
    with pytest.raises(ValueError, match="use_dora"):
        peft.PeftModel.from_pretrained(build_tiny("deepseek_v3"), tmp_path / "a")
    for folder, name in (("c", "deepseek_v3"), ("d", "llama")):
        peft.PeftModel.from_pretrained(build_tiny(name), tmp_path / folder)


def test_the_names_that_peft_takes_for_those_of_experts_are_known():
    theirs = transformers_weight_conversion
    assert theirs._MOE_TARGET_MODULE_MAPPING.keys() == {FAMILY, "mixtral"}  # which has no layers beside its experts
    assert theirs._MOE_TARGET_MODULE_MAPPING[FAMILY].keys() == TAKEN
    assert theirs._MODEL_TO_CONVERSION_PATTERN["deepseek_v3"] == FAMILY
    assert taken_for_experts(build_tiny("deepseek_v3"), ["a.up_proj", "a.o_proj", "gate"]) == {"a.up_proj", "gate"}
    assert not taken_for_experts(build_tiny("llama"), ["a.up_proj"])


@ignore_patterns
def test_weights_of_linear_layers_that_peft_adapts_are_read(tmp_path):
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        r=4,
        lora_alpha=6,
        init_lora_weights=False,
        target_parameters=["mlp.down_proj.weight", "k_proj.weight"],
        alpha_pattern={r".*\.0\..*\.weight": 9},
        rank_pattern={r"down_proj\.weight": 2},
    )
    theirs = peft.get_peft_model(build_tiny("llama"), config)
    theirs.save_pretrained(tmp_path)
    assert torch.allclose(logits(load_adapter(build_tiny("llama"), tmp_path)), logits(theirs), atol=2e-4)


def test_weights_of_conv1d_are_not_read_the_other_way_round(tmp_path):
    """peft takes them for [out, in]."""
    save_adapter(add_lora(build_tiny("gpt2"), ["*.attn.c_proj"], rank=2), tmp_path)
    path = tmp_path / "adapter_config.json"
    change = {"target_modules": [], "target_parameters": ["attn.c_proj.weight"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=r"target_parameters names 'attn\.c_proj\.weight'"):
        load_adapter(build_tiny("gpt2"), tmp_path)
