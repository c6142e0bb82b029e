"""Adapter files go both ways between this package and the real peft, with equal logits."""

import peft
import pytest
import torch
from tiny import build_tiny, random_factors

from qlora_lite.adapters.files import load_adapter, save_adapter
from qlora_lite.adapters.lora.inject import Target, add_lora
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
    "patterns": dict(target_modules="all-linear", r=4, lora_alpha=6, rank_pattern={r".*\.0\..*": 2, ".*.1.mlp..*": 3},
                     alpha_pattern={r".*\.0\..*": 9, r".*\.1\.mlp\..*": 5}),
    "one layer": dict(target_modules=None, r=4, lora_alpha=6, layers_to_transform=[1]),  # of ATTENTION
}  # fmt: skip


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
