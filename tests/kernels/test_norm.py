"""A lean norm gives its model's own values, and the gradient of the formula, from its input alone."""

import pytest
import torch
from counted import counted
from tiny import ARCHITECTURES, UNUSUAL, build_tiny
from torch import nn
from torch._decomp import decomposition_table

from qlora_lite.kernels import norm as norm_module
from qlora_lite.kernels.norm import LeanNorm, exact_norm, gain_offset, use_lean_norms
from qlora_lite.memory.marks import phase
from qlora_lite.memory.shapes import planning_for

aten = torch.ops.aten

SIZE = 24
WITH_RMS_NORMS = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "granite",
    "gpt_oss",
    "deepseek_v3",
]


class MeanToo(nn.Module):
    """A norm with an RMS norm's name and another formula."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(SIZE)), 1e-6

    def forward(self, x):
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, eps=self.eps)


class MeanTooRMSNorm(MeanToo):
    pass


class GatedRMSNorm(MeanToo):
    def forward(self, x, gate=None):
        normed = nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return normed if gate is None else normed * gate


def norms_of(model_type, dtype):
    """Return the two kinds of RMS norm that a model may have: over the hidden size and over a head's."""
    model = build_tiny(model_type, dtype=dtype)
    use_lean_norms(model)
    found = {}
    for module in model.modules():
        if isinstance(module, LeanNorm):
            module.weight.data.normal_(generator=torch.Generator().manual_seed(0))
            found[type(module.inner), len(module.weight)] = module
    assert found
    return found.values()


def inputs_of(norm, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, 5, len(norm.weight))
    x, upstream = (torch.randn(shape, generator=generator).to(norm.weight.dtype) for _ in range(2))
    return (scale * x).transpose(1, 2).requires_grad_(), upstream.transpose(1, 2)


def expected_gradient(norm, x, upstream):
    x = x.detach().double().requires_grad_()
    eps = getattr(norm.inner, "variance_epsilon", getattr(norm.inner, "eps", None))
    y = (norm.weight.double() + norm.offset) * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return torch.autograd.grad(y, x, upstream.double())[0]


def error(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # of the second, eps is a large part
@pytest.mark.parametrize("model_type", WITH_RMS_NORMS)
def test_the_value_is_the_module_s_own_and_the_gradient_no_further_from_the_formula(model_type, scale, dtype):
    for norm in norms_of(model_type, dtype):
        x, upstream = inputs_of(norm, scale)
        y, own = norm(x), norm.inner(x)
        assert torch.equal(y, own) and y.dtype == dtype
        wanted = expected_gradient(norm, x, upstream)
        lean, plain = (error(torch.autograd.grad(out, x, upstream)[0], wanted) for out in (y, own))
        assert lean <= max(1.1 * plain, torch.finfo(torch.float32).eps)
        assert lean < {torch.float32: 3e-7, torch.bfloat16: 3e-3}[dtype]


def test_the_input_itself_is_all_that_is_saved_beside_the_weight():
    (norm,) = norms_of("llama", torch.bfloat16)
    x, _ = inputs_of(norm)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        norm(x)
    assert saved == [x.data_ptr(), norm.weight.data_ptr()]


def test_gradients_leave_input_and_upstream_alone():
    (norm,) = norms_of("llama", torch.float32)  # whose own type is the one that the formula computes in
    x, upstream = inputs_of(norm)
    before = x.detach().clone(), upstream.clone()
    torch.autograd.grad(norm(x), x, upstream)
    assert torch.equal(x, before[0]) and torch.equal(upstream, before[1])


def test_a_trained_weight_gets_its_gradient():
    (norm,) = norms_of("llama", torch.float32)
    norm.weight.requires_grad_()
    x, upstream = inputs_of(norm)
    found = torch.autograd.grad(norm(x), norm.weight, upstream)[0]
    assert torch.equal(found, torch.autograd.grad(norm.inner(x), norm.weight, upstream)[0])


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *UNUSUAL])
def test_every_plain_rms_norm_is_replaced_and_no_name_changes(model_type):
    model = build_tiny(model_type)
    names = list(model.state_dict())
    state = torch.get_rng_state()
    use_lean_norms(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == names
    kinds = {type(module).__name__ for module in model.modules()}
    assert not [kind for kind in kinds if kind.endswith("RMSNorm")]


def test_norms_of_another_kind_stay_as_they_are():
    model = nn.ModuleList([MeanTooRMSNorm(), GatedRMSNorm(), nn.LayerNorm(SIZE)])
    model.to("meta")
    use_lean_norms(model)
    assert [type(part) for part in model] == [MeanTooRMSNorm, GatedRMSNorm, nn.LayerNorm]
    assert gain_offset(model[0]) is None
    assert gain_offset(GatedRMSNorm()) == 0.0  # only its second argument speaks against it


@pytest.fixture
def card_kernels(monkeypatch):
    """Torch's own definitions of a GPU's kernels, on a CPU's tensors."""
    called = []

    def named(operator):
        def call(*args):
            called.append(operator)
            return decomposition_table[operator.default](*args)

        return call

    monkeypatch.setattr(norm_module, "_kernels_take", lambda *_: True)
    for name, operator in (("_FUSED", aten._fused_rms_norm), ("_FUSED_BACKWARD", aten._fused_rms_norm_backward)):
        monkeypatch.setattr(norm_module, name, named(operator))
    return called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("model_type", WITH_RMS_NORMS)
def test_a_gpu_s_kernels_are_as_near_to_the_formula(model_type, scale, dtype, card_kernels):
    for norm in norms_of(model_type, dtype):
        x, upstream = inputs_of(norm, scale)
        exact, wanted = exact_norm(norm, x.double()), expected_gradient(norm, x, upstream)
        errors = []
        for norm.fused in (True, False):
            y = norm(x)
            errors.append([error(y, exact), error(torch.autograd.grad(y, x, upstream)[0], wanted)])
            assert y.dtype == dtype
        rounded_once_more = 1.5 if norm.offset else 1.1  # the gradient times the gain
        for (fused, plain), more in zip(zip(*errors, strict=True), (1.1, rounded_once_more), strict=True):
            assert fused <= max(more * plain, torch.finfo(torch.float32).eps)
    assert aten._fused_rms_norm_backward in card_kernels and (aten._fused_rms_norm in card_kernels) != bool(norm.offset)


def test_with_kernels_a_value_is_the_same_with_and_without_a_gradient(card_kernels):
    for model_type in ("llama", "gemma2"):
        for norm in norms_of(model_type, torch.bfloat16):
            norm.fused = True
            x, _ = inputs_of(norm)
            with torch.no_grad():
                alone = norm(x)
            assert torch.equal(norm(x), alone)


def test_a_cpu_and_another_type_than_the_weight_s_have_no_kernel():
    (norm,) = norms_of("llama", torch.bfloat16)
    norm.fused = True
    x, _ = inputs_of(norm)
    assert torch.equal(norm(x), norm.inner(x))
    meta = x.detach().to("meta")
    with planning_for("cuda"):
        assert norm_module._kernels_take(meta, norm.weight) and not norm_module._kernels_take(meta.float(), norm.weight)


@pytest.mark.parametrize(("model_type", "forward", "backward"), [("llama", 4.3, 6.3), ("gemma2", None, 12)])
def test_a_norm_on_a_gpu_reads_and_writes_each_number_about_once(model_type, forward, backward):
    """Bytes a number in bf16, with 0.3 for what there is one of in a row of 64."""
    (norm,) = norms_of(model_type, torch.bfloat16)
    norm.to("meta")
    norm.fused = True
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with planning_for("cuda"):
        with counted() as value, phase("forward"):
            y = norm(x)
        with counted() as gradient, phase("backward"):
            y.backward(torch.empty_like(y))
    assert forward is None or value.work.moved_bytes <= forward * x.numel()
    rms = 2.7 if model_type == "gemma2" else 0  # found once more
    assert gradient.work.moved_bytes <= (backward + rms) * x.numel()
    assert gradient.work.operations == (7 if rms else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_on_a_gpu_kernels_are_as_near_to_the_formula(model_type):
    for norm in norms_of(model_type, torch.bfloat16):
        x, upstream = (tensor.detach().cuda() for tensor in inputs_of(norm))
        norm.to("cuda")
        x.requires_grad_()
        exact, wanted = exact_norm(norm, x.double()), expected_gradient(norm, x, upstream)
        for norm.fused in (True, False):
            y = norm(x)
            assert error(y, exact) < 5e-3 and error(torch.autograd.grad(y, x, upstream)[0], wanted) < 5e-3
