"""The fused LoRA product equals the formula, in value and in every gradient, and keeps nothing dequantised."""

import itertools

import pytest
import torch
from tiny import PlainLora
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from qlora_lite.adapters.lora.layer import LoraLinear
from qlora_lite.memory.shapes import planning_for
from qlora_lite.offload.checkpoint import Checkpoint
from qlora_lite.quant.linear import QuantLinear, frozen_weight
from qlora_lite.quant.product import materialize

IN, OUT = 48, 80
BASES = ["linear", "conv1d", "nf4", "fp4"]


def make_base(kind, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator).to(dtype)
    offset = torch.randn(OUT, generator=generator).to(dtype) if bias else None
    if kind in ("nf4", "fp4"):
        return QuantLinear.from_weight(weight, offset, kind, double_quant=True)
    base = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT, bias=bias)
    base.weight = nn.Parameter(weight.t().contiguous() if kind == "conv1d" else weight)
    base.bias = nn.Parameter(offset) if bias else None
    return base


def make_layer(base, rank=5, kind=LoraLinear, **options):
    plain = {"dropout": 0.0, "rslora": False, "dtype": torch.float32}
    layer = kind(base, rank, alpha=7.0, **plain | options)
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(1))
        layer.lora_A.normal_(generator=torch.Generator().manual_seed(2))
    return layer


def formula(layer, x):
    """``x W^T + bias + scale x A^T B^T`` in float64, with leaves for every gradient."""
    spec, tensors = frozen_weight(layer.base)
    weight = materialize(spec, tensors, torch.float32).double()
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    y = leaves[0] @ weight.t() + layer.scale * leaves[0] @ leaves[1].t() @ leaves[2].t()
    return (y if layer.base.bias is None else y + layer.base.bias.double()), leaves


def check_against_formula(layer, x, tolerance, formula=formula):
    x = x.detach().requires_grad_()
    y, (expected, leaves) = layer(x), formula(layer, x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    y.backward(upstream.to(y.dtype))
    expected.backward(upstream.double())
    assert y.shape == expected.shape
    assert (y - expected).norm() <= tolerance * expected.norm()
    for tensor, leaf in zip((x, *layer.parameters(recurse=False)), leaves, strict=True):
        assert tensor.grad.dtype == tensor.dtype
        assert (tensor.grad - leaf.grad).norm() <= tolerance * leaf.grad.norm()


def random_input(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4)).to(dtype)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("path", [LoraLinear, PlainLora])
@pytest.mark.parametrize("bias", [False, True])
def test_both_paths_equal_the_float64_formula(kind, path, bias):
    layer = make_layer(make_base(kind, bias), kind=path)
    check_against_formula(layer, random_input(2, 9, IN), 1e-6)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("rank", [1, 2, 47, 64])
def test_any_rank_works_up_to_above_the_layer_s_own(kind, rank):
    check_against_formula(make_layer(make_base(kind), rank), random_input(1, 7, IN), 1e-6)


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BASES)
def test_bf16_compute_keeps_each_factor_s_type_and_rounds_as_bf16_does(kind, factors):
    """Measured 3.3e-3 to 4.2e-3 over these cases; the unit roundoff of bf16 is 3.9e-3."""
    layer = make_layer(make_base(kind, dtype=torch.bfloat16), dtype=factors)
    x = random_input(2, 30, IN, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    check_against_formula(layer, x, 8e-3)


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (3, 0, IN), (2, 3, 4, IN)])
def test_any_leading_shape_works(shape):
    check_against_formula(make_layer(make_base("nf4")), random_input(*shape), 1e-6)


def test_an_input_and_an_upstream_gradient_with_strides_work():
    layer = make_layer(make_base("nf4"))
    x = random_input(IN, 9, 2).permute(2, 1, 0).requires_grad_()
    y, (expected, leaves) = layer(x), formula(layer, x)
    upstream = random_input(OUT, 9, 2).permute(2, 1, 0)
    y.backward(upstream)
    expected.backward(upstream.double())
    assert torch.allclose(y.double(), expected, atol=1e-4)
    assert torch.allclose(x.grad.double(), leaves[0].grad, atol=1e-3)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 7 / 5), (True, 7 / 5**0.5)])
def test_the_scale_is_alpha_over_the_rank_or_its_root(rslora, scale):
    assert make_layer(make_base("linear"), rslora=rslora).scale == pytest.approx(scale)


def test_a_new_layer_gives_what_its_base_gives_with_a_kaiming_uniform_factor_a():
    base, x = make_base("nf4"), random_input(2, 9, IN)
    layer = LoraLinear(base, 64, 16, 0.0, False, torch.bfloat16)
    assert torch.equal(layer(x), base(x))
    bound = IN**-0.5
    assert layer.lora_A.dtype == torch.bfloat16
    assert 0.98 * bound < layer.lora_A.abs().max() <= bound * 1.01
    assert layer.lora_A.detach().float().std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not layer.lora_B.any()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_derivatives_pass_gradcheck(kind, bias):
    layer = make_layer(make_base(kind, bias).double(), rank=2, dtype=torch.float64)
    x = random_input(3, IN, dtype=torch.float64).requires_grad_()
    inputs = (x, layer.lora_A, layer.lora_B)

    def call(x, lora_a, lora_b):
        return torch.func.functional_call(layer, {"lora_A": lora_a, "lora_B": lora_b}, (x,))[:, :6]

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_weight_is_kept_unpacked_for_backward(kind, dropout):
    layer = make_layer(make_base(kind, dtype=torch.bfloat16), dropout=dropout, dtype=torch.bfloat16)
    own = {t.untyped_storage().data_ptr() for t in frozen_weight(layer.base)[1]}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(random_input(2, 3, IN, dtype=torch.bfloat16).requires_grad_())
    assert own <= {t.untyped_storage().data_ptr() for t in kept}  # the packed weight itself is seen by autograd
    others = [t.untyped_storage().nbytes() for t in kept if t.untyped_storage().data_ptr() not in own]
    assert max(others) < OUT * IN * 2 // 4


def test_the_input_gets_no_gradient_where_none_is_asked_for():
    layer, x = make_layer(make_base("nf4")), random_input(4, IN)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.lora_A.grad is not None
    assert layer.base.bias.grad is None


class BaseProducts(TorchDispatchMode):
    """Count the products with base weights."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.addmm_.default
        return function(*args, **(kwargs or {}))


def test_a_checkpoint_ending_in_a_sum_with_a_layer_does_not_multiply_by_its_weight_again():
    up, down = (
        make_layer(QuantLinear.from_weight(random_input(*shape), None, "nf4", True)) for shape in ((OUT, IN), (IN, OUT))
    )
    x, checkpoint = random_input(9, IN).requires_grad_(), Checkpoint()

    def block(x):
        return x + down(nn.functional.silu(up(x)))

    checkpoint(block, x).sum().backward()  # the first time it looks how the block ends
    x.grad = None
    with BaseProducts() as seen:
        checkpoint(block, x).sum().backward()
    assert seen.count == 2 + 1 + 2  # forward; up_proj again; backward
    found, x.grad = x.grad, None
    block(x).sum().backward()
    assert torch.equal(x.grad, found)


def test_a_checkpoint_whose_last_product_is_used_by_more_than_a_sum_multiplies_again():
    layer, x, checkpoint = make_layer(make_base("nf4")), random_input(9, IN).requires_grad_(), Checkpoint()

    def block(x):
        return torch.tanh(layer(x))

    for _ in range(2):
        x.grad = None
        with BaseProducts() as seen:
            checkpoint(block, x).sum().backward()
        assert seen.count == 2 + 1
    found, x.grad = x.grad, None
    block(x).sum().backward()
    assert torch.equal(x.grad, found)


def test_dropout_drops_inputs_of_the_low_rank_branch_only():
    layer, x = make_layer(make_base("nf4"), dropout=0.25), torch.ones(4000, IN)
    layer.train()
    torch.manual_seed(0)
    low = layer(x) - layer.base(x)
    full = layer.eval()(x) - layer.base(x)
    deviation = (low - full).std(0) / (4000**0.5)  # of the mean over the rows
    assert ((low.mean(0) - full[0]).abs() < 5 * deviation).all()  # the branch is scaled up by 1 / (1 - p)
    assert (low - full).abs().max() > 1e-3
    rows = torch.eye(IN).repeat(200, 1)
    layer.train()
    dropped = ((layer(rows) - layer.base(rows)).abs().amax(1) < 1e-5).float().mean()
    assert dropped == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(("device_type", "dtype"), [("cuda", torch.bool), ("cpu", torch.bfloat16)])
def test_a_plan_of_dropout_keeps_a_byte_a_value_on_a_gpu_as_its_kernel_does(device_type, dtype):
    base = nn.Linear(24, 8, device="meta", dtype=torch.bfloat16)
    layer = LoraLinear(base, 2, 1, 0.1, False, torch.bfloat16).to("meta")
    x, kept = torch.empty(1, 5, 24, device="meta", dtype=torch.bfloat16), []
    with planning_for(device_type), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        layer.train()(x.requires_grad_())
    masks = [tensor for tensor in kept if tensor.shape == x.shape and tensor is not x]
    assert dtype in {tensor.dtype for tensor in masks}
    assert any(tensor.dtype == torch.bool for tensor in masks) == (device_type == "cuda")


def test_dropout_gives_the_same_gradients_as_the_formula_under_the_same_mask():
    layer, x = make_layer(make_base("nf4"), dropout=0.5), random_input(6, IN).requires_grad_()
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    branch = nn.functional.dropout(x.detach(), 0.5).double()
    expected = (
        layer.base(x.detach()).double() + layer.scale * branch @ layer.lora_A.t().double() @ layer.lora_B.t().double()
    )
    assert torch.allclose(y.double(), expected, atol=1e-4)
    y.sum().backward()
    wanted = layer.scale * (layer.lora_B.double().sum(0)[:, None] * branch.sum(0)[None])
    assert torch.allclose(layer.lora_A.grad.double(), wanted, atol=1e-3)


def test_a_weight_changed_between_forward_and_backward_is_noticed():
    layer = make_layer(make_base("linear"))
    y = layer(random_input(3, IN).requires_grad_())
    with torch.no_grad():
        layer.base.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_base_is_frozen_by_wrapping():
    for kind, bias in itertools.product(BASES, (False, True)):
        base = make_base(kind, bias)
        trainable = [
            name for name, p in LoraLinear(base, 2, 4, 0.0, False, torch.bfloat16).named_parameters() if p.requires_grad
        ]
        assert trainable == ["lora_A", "lora_B"]
