"""Targets choose layers by name, glob and pattern with its own rank; a target that matches nothing is an error."""

import pytest
import torch
from tiny import ARCHITECTURES, build_tiny

from qlora_lite.adapters.lora.inject import Target, add_lora, linear_layers, lora_layers, lora_parameters
from qlora_lite.adapters.lora.layer import LoraLinear
from qlora_lite.errors import ModelError
from qlora_lite.models.quantizer import quantize_in_place
from qlora_lite.quant.linear import QuantLinear


def adapted(*targets, model_type="llama", **options):
    model = add_lora(build_tiny(model_type), list(targets), **options)
    return {name: (layer.rank, layer.alpha) for name, layer in lora_layers(model)}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_all_linear_wraps_every_linear_layer_of_the_blocks_and_never_the_head(model_type):
    model = build_tiny(model_type)
    linears = [name for name, m in model.named_modules() if type(m).__name__.endswith(("Linear", "Conv1D"))]
    head = model.get_output_embeddings()
    add_lora(model)
    wrapped = [name for name, _ in lora_layers(model)]
    assert len(wrapped) == len(linears) - 1
    assert model.get_output_embeddings() is head
    assert not isinstance(head, LoraLinear)


def test_all_linear_leaves_layers_outside_the_blocks_alone_and_their_names_take_them():
    everywhere, inside = set(linear_layers(build_tiny("opt"))), set(adapted("all-linear", model_type="opt"))
    assert everywhere - inside == {"model.decoder.project_in", "model.decoder.project_out"}
    assert set(adapted("project_in", model_type="opt")) == {"model.decoder.project_in"}


def test_all_linear_is_every_layer_but_the_head_where_no_block_is_marked():
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.lm_head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 8)

        def get_output_embeddings(self):
            return self.lm_head

    assert [name for name, _ in lora_layers(add_lora(Bare(), rank=2))] == ["q_proj"]


@pytest.mark.filterwarnings("ignore")  # what they say about missing kernels
@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "bamba", "falcon_h1"])
def test_all_linear_leaves_out_what_mamba_s_kernels_read_past_the_lora_weights(model_type):
    ids, plain = torch.arange(3, 12)[None], build_tiny(model_type)
    for quant in ("none", "nf4"):
        model = build_tiny(model_type)
        if quant != "none":
            quantize_in_place(model, quant, True)
        packed = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        found = {name for name, _ in lora_layers(add_lora(model))}
        leaves = {name.rpartition(".")[2] for name in found}
        assert "in_proj" in leaves and not leaves & {"x_proj", "dt_proj", "out_proj"}
        assert not packed or packed - found == {n for n in linear_layers(plain) if n.endswith(("x_proj", "out_proj"))}
        assert model.train()(ids, use_cache=False).logits.isfinite().all()
    model = add_lora(build_tiny(model_type), "out_proj")
    with pytest.raises(ModelError, match=r"the weight of .*\.out_proj itself, .*: leave it out of lora\.targets$"):
        model.train()(ids, use_cache=False)


def test_a_plain_name_is_the_last_part_of_a_path():
    assert set(adapted("q_proj")) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}


def test_part_of_a_name_is_no_match():
    with pytest.raises(ModelError, match="'proj' matches no linear layer"):
        adapted("proj")


def test_a_glob_matches_the_whole_path():
    assert set(adapted("model.layers.1.mlp.*")) == {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")}
    assert len(adapted("*.[qv]_proj")) == 4


def test_a_pattern_has_its_own_rank_and_alpha_and_the_last_one_wins():
    layers = adapted(
        "all-linear", Target("*.mlp.*", rank=2), Target("*.1.mlp.up_proj", rank=3, alpha=9.0), rank=5, alpha=10.0
    )
    assert layers["model.layers.0.self_attn.q_proj"] == (5, 10.0)
    assert layers["model.layers.1.mlp.gate_proj"] == (2, 10.0)
    assert layers["model.layers.1.mlp.up_proj"] == (3, 9.0)
    assert adapted(Target("up_proj", rank=3), "all-linear", rank=5)["model.layers.1.mlp.up_proj"][0] == 5


def test_every_target_without_a_match_is_named_with_near_names():
    with pytest.raises(ModelError) as caught:
        adapted("q_porj", "down_proj", "query_key_value")
    text = str(caught.value)
    assert "'q_porj', 'query_key_value'" in text
    assert "did you mean" in text and "q_proj" in text
    assert "\n" not in text


def test_a_target_far_from_every_name_lists_what_there_is():
    with pytest.raises(ModelError, match="this model has down_proj, gate_proj, k_proj"):
        adapted("zzzzzz")


@pytest.mark.parametrize("target", ["lm_head", "*lm_head*", "embed_tokens", "norm"])
def test_the_head_the_embeddings_and_the_norms_are_no_targets(target):
    with pytest.raises(ModelError, match="matches no linear layer"):
        adapted(target)


def test_a_failed_target_leaves_the_model_unwrapped():
    model = build_tiny("llama")
    with pytest.raises(ModelError):
        add_lora(model, ["q_proj", "nothing"])
    assert not list(lora_layers(model))


def test_only_the_weights_are_trainable_and_they_come_a_before_b_layer_by_layer():
    model = add_lora(build_tiny("llama").requires_grad_(True), ["q_proj"], rank=2)
    names = [name for name, _ in lora_parameters(model)]
    assert names == [f"model.layers.{i}.self_attn.q_proj.lora_{side}" for i in (0, 1) for side in "AB"]
    assert sum(p.requires_grad for p in model.parameters()) == len(names)


def test_the_seed_alone_decides_the_weights():
    def factors(seed):
        model = build_tiny("llama")
        torch.manual_seed(seed)
        return [p.detach() for _, p in lora_parameters(add_lora(model))]

    assert all(torch.equal(a, b) for a, b in zip(factors(3), factors(3), strict=True))
    assert not torch.equal(factors(3)[0], factors(4)[0])


def test_conv1d_layers_are_linear_layers():
    assert {name.rpartition(".")[2] for name in linear_layers(build_tiny("gpt2"))} == {"c_attn", "c_proj", "c_fc"}
