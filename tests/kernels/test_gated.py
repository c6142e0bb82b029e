"""The product of a gated MLP has autograd's bits, and keeps its two factors alone."""

import pytest
import torch
from tiny import ARCHITECTURES, UNUSUAL, build_tiny
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from qlora_lite.kernels.gated import GatedMLP, gated, use_lean_mlps

GATED = ["llama", "mistral", "qwen2", "qwen3", "olmo2", "cohere", "granite", "deepseek_v3"]


def factors(dtype):
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(2, 5, 24, generator=generator).to(dtype) for _ in range(3)]
    return *(tensor.requires_grad_() for tensor in numbers[:2]), numbers[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients_are_those_of_autograd_to_the_bit(dtype):
    gate, up, upstream = factors(dtype)
    before = upstream.clone()
    found, wanted = gated(gate, up), functional.silu(gate) * up
    assert torch.equal(found, wanted)
    grads = [torch.autograd.grad(out, (gate, up), upstream) for out in (found, wanted)]
    assert all(map(torch.equal, *grads)) and torch.equal(upstream, before)


def test_the_two_weights_are_all_that_is_saved():
    gate, up, _ = factors(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        gated(gate, up)
    assert saved == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *UNUSUAL])
def test_mlps_that_compute_the_formula_are_replaced_with_their_value_and_no_name_changes(model_type):
    model = build_tiny(model_type)
    names, state = list(model.state_dict()), torch.get_rng_state()
    use_lean_mlps(model)
    assert torch.equal(torch.get_rng_state(), state) and list(model.state_dict()) == names
    replaced = [module for module in model.modules() if isinstance(module, GatedMLP)]
    for mlp in replaced:
        x = torch.randn(1, 3, mlp.gate_proj.in_features)
        assert torch.equal(mlp(x), mlp.inner(x))
    assert bool(replaced) or model_type not in GATED


class OtherMLP(nn.Module):
    """An MLP of the usual parts."""

    def __init__(self, act):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn = act

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class AddingMLP(OtherMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


def test_mlps_of_another_kind_stay_as_they_are():
    mlps = [OtherMLP(ACT2FN["silu"]), AddingMLP(ACT2FN["silu"]), OtherMLP(nn.GELU())]
    for mlp, replaced in zip(mlps, (True, False, False), strict=True):
        model = nn.ModuleList([mlp]).to("meta")
        use_lean_mlps(model)
        assert isinstance(model[0], GatedMLP) == replaced


class Other(nn.Module):
    """An MLP with the names of the known one, and a formula that differs from it where its switch says."""

    def __init__(self, limit=None, in_float32=False):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
        self.act_fn, self.limit, self.in_float32 = nn.SiLU(), limit, in_float32

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.limit:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.in_float32:
            return self.down_proj((self.act_fn(gate.float()) * up.float()).to(x.dtype))
        return self.down_proj(self.act_fn(gate) * up)


def test_mlps_of_one_class_that_clamp_or_multiply_in_float32_stay_as_they_are():
    model = nn.ModuleList([Other(), Other(limit=10.0), Other(in_float32=True)])
    use_lean_mlps(model)
    assert [type(mlp) for mlp in model] == [GatedMLP, Other, Other]
