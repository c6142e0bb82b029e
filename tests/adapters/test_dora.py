"""DoRA equals its formula in float64 and the real peft, in value and in every gradient, without forming B A."""

import copy
from functools import partial

import peft
import pytest
import torch
from test_layer import BASES, IN, OUT, make_base, make_layer, random_input
from test_layer import check_against_formula as check_against_formula_of
from tiny import build_tiny, quantized_pair
from tiny_trainer import trainer
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lite.adapters.files import attach_adapter, load_adapter, save_adapter
from qlora_lite.adapters.lora.dora import DoraLinear
from qlora_lite.adapters.lora.inject import Target, add_lora, lora_layers, lora_parameters
from qlora_lite.adapters.lora.layer import LoraLinear
from qlora_lite.adapters.lora.switch import add_switch
from qlora_lite.adapters.read import read_adapter
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.models.merge import merged_weight
from qlora_lite.quant.linear import frozen_weight, squared_row_norms
from qlora_lite.quant.product import materialize
from qlora_lite.train.checkpoints import Checkpoint
from qlora_lite.train.state import STATE, capture, restore

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft asks transformers
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),  # peft corrects it for Conv1D, and says so
]
IDS = torch.randint(3, 160, (2, 11), generator=torch.Generator().manual_seed(0))


class PlainDora(DoraLinear):
    """The layer by the formula and plain autograd, as it computes with dropout."""

    def forward(self, x):
        return self.by_autograd(x, x)


def dora(base, rank=5, kind=DoraLinear, **options):
    """A layer whose magnitudes are no norms of any weight."""
    layer = make_layer(base, rank, kind, **options)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(1 + 0.3 * torch.randn(OUT, generator=torch.Generator().manual_seed(5)))
    return layer


def formula(layer, x):
    """``x (m / |W + scale B A| (W + scale B A))^T + bias`` in float64, the norms constant, with leaves to derive by."""
    weight = materialize(*frozen_weight(layer.base), torch.float32).double()
    trained = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
    x, a, b, m = leaves = [t.detach().double().requires_grad_() for t in (x, *trained)]
    adapted = weight + layer.scale * b @ a
    y = x @ ((m / adapted.norm(dim=1).detach())[:, None] * adapted).t()
    return (y if layer.base.bias is None else y + layer.base.bias.double()), leaves


check_against_formula = partial(check_against_formula_of, formula=formula)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("path", [DoraLinear, PlainDora])
@pytest.mark.parametrize("bias", [False, True])
def test_both_paths_equal_the_float64_formula(kind, path, bias):
    check_against_formula(dora(make_base(kind, bias), kind=path), random_input(2, 9, IN), 1e-6)


@pytest.mark.parametrize(("rank", "rslora"), [(1, False), (64, False), (5, True)])
def test_any_rank_and_scale_works(rank, rslora):
    check_against_formula(dora(make_base("nf4"), rank, rslora=rslora), random_input(7, IN), 1e-6)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("bias", [False, True])
def test_bf16_rounds_as_bf16_does(kind, bias):
    layer = dora(make_base(kind, bias, torch.bfloat16), dtype=torch.bfloat16)
    assert layer.lora_magnitude_vector.dtype == torch.float32
    check_against_formula(layer, random_input(2, 30, IN, dtype=torch.bfloat16), 1e-2)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_new_layer_gives_what_its_base_gives_to_the_bit(kind, dtype, bias):
    """But for a bias in 16 bits, which LoRA layers add after they have rounded, and a Conv1D without one."""
    base, x = make_base(kind, bias, dtype), random_input(2, 9, IN, dtype=dtype)
    layers = [of(base, 8, 16, 0.0, False, torch.bfloat16) for of in (DoraLinear, LoraLinear)]
    assert torch.equal(layers[0](x), layers[1](x))
    if not (bias and dtype == torch.bfloat16) and not (kind == "conv1d" and not bias):
        assert torch.equal(layers[0](x), base(x))


class Shapes(TorchDispatchMode):
    """Note the shapes of all results but views of a weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.seen = weight.data_ptr(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple) else (result,)
        self.seen += [tuple(t.shape) for t in results if torch.is_tensor(t) and t.data_ptr() != self.weight]
        return result


def test_no_matrix_of_the_weight_s_shape_is_made():
    layer, x = dora(make_base("linear")), random_input(7, IN).requires_grad_()
    with Shapes(layer.base.weight) as shapes:
        layer(x).sum().backward()
    assert (7, OUT) in shapes.seen and not {(OUT, IN), (IN, OUT)} & set(shapes.seen)


@pytest.mark.parametrize("shape", [(70, 64), (9, 48)])
def test_norms_of_rows_are_those_of_the_weight_however_it_is_cut(shape, monkeypatch):
    from qlora_lite.quant import linear

    base = linear.QuantLinear.from_weight(random_input(*shape), None, "nf4", True)
    monkeypatch.setattr(linear, "WEIGHTS_AT_ONCE", 1000)
    expected = materialize(*base.described, torch.float32).double().square().sum(1)
    assert torch.allclose(squared_row_norms(base).double(), expected, rtol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_a_row_of_zeros_gives_zeros_and_numbers_for_gradients(bias):
    base = make_base("linear", bias)
    base.weight.data[3] = 0
    layer = DoraLinear(base, 5, 7.0, 0.0, False, torch.float32)
    for magnitude in (layer.lora_magnitude_vector.data[3].item(), 0.0):  # ours, and peft's
        layer.lora_magnitude_vector.data[3] = magnitude
        y = layer(random_input(7, IN).requires_grad_())
        y.square().sum().backward()
        assert torch.equal(y[:, 3], (base.bias[3] if bias else torch.zeros(())).expand(7))
        assert all(p.grad.isfinite().all() for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))


def test_norms_are_found_once_for_an_evaluation_and_again_for_other_weights(monkeypatch):
    layer, x, found = dora(make_base("nf4")).eval(), random_input(3, IN), []
    own = DoraLinear._compute_norms
    monkeypatch.setattr(DoraLinear, "_compute_norms", lambda self, dtype: found.append(0) or own(self, dtype))
    with torch.no_grad():
        layer(x), layer(x)
        assert len(found) == 1
        layer.lora_A.mul_(2)
        changed = layer(x)
        assert len(found) == 2 and torch.allclose(changed.double(), formula(layer, x)[0], rtol=1e-4, atol=1e-4)
        layer.train().eval()
        layer(x)
    assert len(found) == 3


@pytest.mark.filterwarnings("ignore:.*should not be instantiated", "ignore:`torch.jit.script_method` is deprecated")
def test_a_compiled_layer_has_the_layer_s_gradients():
    layer, found = dora(make_base("nf4")), []
    torch._dynamo.reset()
    for call in (layer, torch.compile(lambda x: layer(x), fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        x = random_input(1, 9, IN).requires_grad_()
        call(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    torch._dynamo.reset()
    assert len(found[0]) == 4
    assert all((a - b).norm() <= 1e-5 * a.norm() for a, b in zip(*found, strict=True))


ATTENTION = {"llama": "q_proj", "gpt2": "c_attn", "phi3": "qkv_proj", "falcon": "query_key_value", "qwen2": "k_proj"}
CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.3},
    "patterns": {"rank_pattern": {r".*\.0\..*": 2}, "alpha_pattern": {r".*\.0\..*": 9}},
}
OURS = {
    "plain": {},
    "rslora": {"rslora": True},
    "dropout": {"dropout": 0.3},
    "patterns": {"targets": ["all-linear", Target("*.0.*", rank=2, alpha=9.0)]},
}


def moved(model, names):
    """Give the trained weights of either package the same values, by the names of files."""
    for name, parameter in names.items():
        chance = torch.Generator().manual_seed(sum(map(ord, name)))
        change = torch.randn(parameter.shape, generator=chance)
        with torch.no_grad():
            parameter.mul_(1 + 0.1 * change) if "magnitude" in name else parameter.copy_(0.1 * change)
    return model


def of_peft(model):
    return {
        name.removeprefix("base_model.model.").replace(".default", "").replace(".weight", ""): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize(
    ("model_type", "case"),
    [(name, "plain") for name in ATTENTION] + [("llama", case) for case in CONFIGS if case != "plain"],
)
def test_losses_and_gradients_are_peft_s(model_type, case, quant):
    ours, plain = quantized_pair(model_type) if quant == "nf4" else (build_tiny(model_type), build_tiny(model_type))
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=4, lora_alpha=6, use_dora=True, **CONFIGS[case]
    )
    theirs = peft.get_peft_model(plain, config).train()
    add_lora(ours, **{"rank": 4, "alpha": 6, "dtype": torch.float32, "dora": True} | OURS[case]).train()
    mine, other = dict(lora_parameters(ours)), of_peft(theirs)
    assert mine.keys() == other.keys()
    assert all(torch.allclose(mine[name], other[name], rtol=1e-5) for name in mine if "magnitude" in name)
    moved(ours, mine), moved(theirs, other)
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        logits = model(input_ids=IDS, use_cache=False).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for name, parameter in mine.items():
        expected = other[name].grad
        assert (parameter.grad - expected).norm() <= 2e-5 * expected.norm(), name


def adapted(model_type="llama", **options):
    model = add_lora(build_tiny(model_type), rank=4, alpha=6.0, dtype=torch.float32, dora=True, **options)
    return moved(model, dict(lora_parameters(model)))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("model_type", ATTENTION)
def test_a_saved_adapter_gives_the_same_logits_in_peft_and_comes_back_from_it(model_type, tmp_path):
    ours, base = adapted(model_type), logits(build_tiny(model_type))
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build_tiny(model_type), tmp_path / "ours")
    assert (logits(ours) - base).abs().max() > 1e-2
    assert torch.allclose(logits(theirs), logits(ours), atol=2e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(build_tiny(model_type), tmp_path / "theirs")
    assert torch.equal(logits(again), logits(ours))
    assert {type(layer) for _, layer in lora_layers(again)} == {DoraLinear}


@pytest.mark.parametrize("model_type", ["qwen2", "opt"])  # with biases; OPT joins the tokens of all rows
def test_rows_of_a_batch_have_their_own_magnitudes(tmp_path, model_type):
    model = quantized_pair(model_type)[0]
    adapters, expected = {}, {None: logits(copy.deepcopy(model))}
    for name, options in (("dora", {"dora": True}), ("lora", {}), ("some", {"dora": True, "targets": ["k_proj"]})):
        trained = add_lora(copy.deepcopy(model), rank=3, dtype=torch.float32, **options)
        moved(trained, dict(lora_parameters(trained)))
        for _, layer in lora_layers(trained):
            if layer.shared is not None:
                layer.shared.fall_apart()
        save_adapter(trained, tmp_path / name)
        adapters[name], expected[name] = read_adapter(model, tmp_path / name), logits(trained)
    switch = add_switch(model, adapters)
    for name, wanted in expected.items():
        switch.use(name)
        assert torch.allclose(logits(model), wanted, atol=1e-5), name
    for rows in (("dora", "lora"), (None, "some"), ("some", "dora")):
        switch.use_rows(rows)
        together = logits(model)
        assert all(torch.allclose(together[i], expected[name][i], atol=2e-4) for i, name in enumerate(rows))


def test_a_merged_weight_has_the_magnitudes_for_norms(tmp_path):
    ours = adapted()
    save_adapter(ours, tmp_path)
    adapter, plain = read_adapter(build_tiny("llama"), tmp_path), build_tiny("llama")
    for name, layer in lora_layers(ours):
        weight = plain.get_submodule(name).weight
        merged = merged_weight(weight, adapter.layers[name])
        assert torch.allclose(merged.norm(dim=1), layer.lora_magnitude_vector.abs(), rtol=1e-5)
        weight.data = merged
    assert torch.allclose(logits(plain), logits(ours), atol=2e-4)
    assert torch.allclose(logits(attach_adapter(build_tiny("llama"), adapter)), logits(ours), atol=1e-5)


OPTIONS = [
    MemoryOptions("none"),
    MemoryOptions(cache_dequantized=True),
    MemoryOptions(layers_per_checkpoint=2),
    MemoryOptions(offload_checkpoints=True, resident_layers=0),
    MemoryOptions(uncheckpointed_layers=1),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_memory_options_change_no_bit(options):
    plain = trainer(dora=True)
    steps, other = list(plain), trainer(dora=True, options=options)
    assert [step.loss for step in other] == [step.loss for step in steps]
    assert all(torch.equal(a, b) for a, b in zip(other.parameters, plain.parameters, strict=True))


def test_tiles_change_rounding_alone():
    whole, tiled = (
        [step.loss for step in trainer(dora=True, options=MemoryOptions(tile_tokens=tile))] for tile in (None, 5)
    )
    assert tiled == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(("optimizer", "dtype"), [("adamw_torch", torch.float32), ("adamw_8bit", torch.bfloat16)])
def test_killed_and_resumed_it_goes_on_to_the_bit(optimizer, dtype):
    settings = dict(dora=True, optimizer=optimizer, dtype=dtype, rank=64)
    whole = trainer(**settings)
    steps = list(whole)
    first, resumed = trainer(**settings), trainer(**settings)
    metrics = iter(first)
    next(metrics), next(metrics)
    tensors, numbers = capture(first)
    restore(resumed, Checkpoint(first.step, tensors, {STATE: numbers}))
    assert [step.loss for step in resumed] == [step.loss for step in steps[2:]]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))
    names = [name for name in whole.names if "magnitude" in name]
    begun = dict(lora_parameters(trainer(**settings).model))
    assert names and all(not torch.equal(begun[n], p) for n, p in zip(whole.names, whole.parameters, strict=True))
