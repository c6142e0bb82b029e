"""Experts that are computed in groups give what one after the other does, with few launches and no wait."""

import logging

import pytest
import torch
from tiny import build_tiny, quantized_pair, random_batch
from tiny_trainer import trainer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from qlora_lite.experts import grouped as grouped_experts
from qlora_lite.experts import packing
from qlora_lite.experts.packing import GROUPED, described_experts, first_experts, pack_in_place
from qlora_lite.experts.routed import routed
from qlora_lite.memory.ledger import Ledger
from qlora_lite.memory.marks import phase
from qlora_lite.memory.shapes import planning_for
from qlora_lite.memory.work import WorkCounter
from qlora_lite.models.families import known_config
from qlora_lite.models.kernels import kernels_of, use_kernels
from qlora_lite.models.memory_options import MemoryOptions, set_memory_options
from qlora_lite.models.skeleton import meta_model
from qlora_lite.train import kernels
from qlora_lite.train.forward import prepare

FORMS = "qwen3_moe", "gpt_oss", "deepseek_v3"
TOKENS = 41


@pytest.fixture
def small_parts(monkeypatch):
    """Cut the experts, the tokens and the first products of the tiny models into five parts or more."""
    monkeypatch.setattr(grouped_experts, "GROUP_BYTES", 1)
    monkeypatch.setattr(grouped_experts, "PAIRS_BYTES", 9 << 10)
    monkeypatch.setattr(grouped_experts, "TILE_BYTES", 1 << 10)


def inputs_of(described, router="any", device="cpu", tokens=TOKENS):
    """Return hidden states, chosen experts, the router's weights and a gradient that comes back."""
    random = torch.Generator().manual_seed(2)
    count, size = described.up.shape[0], described.up.shape[2]
    hidden, upstream = (torch.randn(tokens, size, generator=random) for _ in range(2))
    scores = torch.rand(tokens, count, generator=random) + 2.0 * (router == "one") * torch.arange(count)
    weights, chosen = scores.softmax(1).topk(2)
    return [each.to(device) for each in (hidden, chosen, weights, upstream)]


def results(described, tensors, given, grouped):
    """Return the value and the gradients of the hidden states and of the router's weights."""
    hidden, chosen, weights, upstream = given
    hidden, weights = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
    with phase("forward"):
        y = routed(hidden, chosen, weights, described._replace(grouped=grouped), tensors)
        return [y.detach(), *torch.autograd.grad(y, [hidden, weights], upstream)]


def experts_of(name, double_quant=True):
    model = build_tiny(name)
    for key, bias in model.named_parameters():
        if key.endswith("proj_bias"):
            bias.data.normal_(generator=torch.Generator().manual_seed(5))
    pack_in_place(model, "nf4", double_quant)
    return described_experts(first_experts(model))


@pytest.mark.parametrize(
    ("name", "router", "double_quant"),
    [
        *((name, router, True) for name in FORMS for router in ("any", "one")),
        ("qwen3_moe", "any", False),
    ],
)
def test_values_and_gradients_are_those_of_one_expert_after_the_other(name, router, double_quant, small_parts):
    described, tensors = experts_of(name, double_quant)
    given = inputs_of(described, router)
    found, expected = (results(described, tensors, given, grouped) for grouped in (True, False))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * other.abs().max())


class Operators(TorchDispatchMode):
    """Note the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_the_host_never_asks_for_a_value():
    """On tensors without values it could not; nor does it run what asks inside."""
    described, tensors = experts_of("gpt_oss")
    with Operators() as operators:
        results(described, [t.to("meta") for t in tensors], inputs_of(described, device="meta"), grouped=True)
    assert {"qlora_lite::grouped_product", "aten::searchsorted.Tensor"} <= set(operators.names)
    assert not {name for name in operators.names if "_local_scalar" in name or "nonzero" in name}


def measured(described, tensors, given):
    """Return the most bytes and the work of the value and the gradients."""
    work = WorkCounter()
    with Ledger(work=work) as ledger:
        ledger.claim([*tensors, *given], "base weights")
        results(described, tensors, given, grouped=True)
    return ledger.peak.total, work.work


@pytest.mark.parametrize("name", FORMS)
def test_a_plan_counts_what_runs_to_the_byte_whatever_the_router_chooses(name, small_parts):
    described, tensors = experts_of(name)
    ran = [measured(described, tensors, inputs_of(described, router)) for router in ("any", "one")]
    with planning_for("cuda"):
        planned = measured(described, [t.to("meta") for t in tensors], inputs_of(described, device="meta"))
    assert ran == [planned, planned] and planned[1].operations > 100


def planned_of_all_blocks(config, tokens):
    """Return how many operations a GPU's plan starts for the experts of all blocks, forward and backward, and the most
    bytes that those of one block need beside what they are given."""
    depth, per_token = config.num_hidden_layers, config.num_experts_per_tok
    config.num_hidden_layers = 1
    described, tensors = described_experts(first_experts(meta_model(config, "nf4", True, torch.bfloat16)))
    hidden = torch.empty(tokens, config.hidden_size, dtype=torch.bfloat16, device="meta")
    weights = hidden[:, :per_token].contiguous()
    with planning_for("cuda"):
        peak, work = measured(described, tensors, (hidden, weights.long(), weights, hidden))
    return depth * work.operations, peak - sum(t.nbytes for t in (*tensors, hidden)) - 5 * weights.nbytes


@pytest.mark.parametrize(("capability", "is_grouped"), [((7, 5), False), ((8, 0), True)])
def test_experts_are_planned_in_groups_for_gpus_where_triton_has_tensor_cores(capability, is_grouped, monkeypatch):
    seen = []
    monkeypatch.setattr(packing, "routed", lambda *given: seen.append(given[3].grouped))
    experts = first_experts(quantized_pair("qwen3_moe")[0])
    with planning_for("cuda", capability):
        packing.compute_experts(experts, torch.empty(2, 8), None, None, grouped=True)
    assert seen == [is_grouped]


@pytest.mark.parametrize("name", ["Qwen/Qwen3-30B-A3B", "unsloth/gpt-oss-20b-BF16"])
def test_large_mixtures_take_few_launches_and_memory_that_is_bounded(name):
    known = known_config(name)
    for tokens, chunks in ((4096, 1), (16384, 4)):
        launches, peak = planned_of_all_blocks(AutoConfig.for_model(**known), tokens)
        assert launches < 4000 * chunks
        bound = grouped_experts.PAIRS_BYTES + max(grouped_experts.GROUP_BYTES, 8 * grouped_experts.TILE_BYTES)
        assert peak < bound + 3 * tokens * known["hidden_size"] * 2


def test_one_group_is_unpacked_at_a_time(monkeypatch):
    described, tensors = experts_of("qwen3_moe")
    given, peaks, size = inputs_of(described, tokens=8), [], 64 * 64 * 4  # of one expert's first weight
    for at_once in (1, 2):
        monkeypatch.setattr(grouped_experts, "GROUP_BYTES", at_once * size)
        peaks.append(measured(described, tensors, given)[0])
    assert peaks[1] - peaks[0] == size


def test_a_batch_that_uses_few_experts_does_not_unpack_them_all():
    described, tensors = experts_of("qwen3_moe")
    for tokens, grouped in ((3, False), (4, True)):  # of two experts each, of eight
        with Operators() as operators:
            results(described, tensors, inputs_of(described, tokens=tokens), grouped=True)
        assert ("qlora_lite::grouped_product" in operators.names) == grouped


@pytest.mark.parametrize(
    ("device", "options", "grouped"),
    [
        ("cuda", MemoryOptions(), True),
        ("cuda", MemoryOptions(kernels="plain"), False),
        ("cpu", MemoryOptions(), False),
    ],
)
def test_a_gpu_s_plan_is_of_groups_unless_plain_operators_are_wanted(device, options, grouped):
    model = meta_model(build_tiny("qwen3_moe").config, "nf4", True, torch.float32)
    set_memory_options(model, options)
    block = first_experts(model)
    hidden, chosen, weights, _ = inputs_of(described_experts(block)[0], device="meta")
    with planning_for(device), Operators() as operators:
        block(hidden, chosen, weights)
    assert ("qlora_lite::grouped_product" in operators.names) == grouped


@pytest.fixture
def tried(monkeypatch):
    """Return whether experts are the better ones in groups, which take so much of the time of one after the other."""

    def better(share=0.5, dtype=torch.float32, model=None):
        shares = iter((1.0, share))
        monkeypatch.setattr(kernels, "timed", lambda run, _: (run(), (next(shares), 0))[1])
        model = (model or quantized_pair("gpt_oss")[0]).to(dtype)
        inputs = prepare(random_batch((23, 18)), torch.device("cpu"))
        use_kernels(model, ["experts"])
        kernels.choose_kernels(model, inputs)
        used = kernels_of(model) == {"experts"}
        assert used == (model.config._experts_implementation == GROUPED)
        return used

    return better


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_agrees_and_is_faster_is_used(dtype, tried, caplog):
    caplog.set_level(logging.INFO)
    assert tried(dtype=dtype)
    assert "the experts' grouped kernel takes 0.50 of the time of one expert after the other" in caplog.text
    assert not tried(0.99, dtype)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda out: out.mul_(1.01), "since its value is off by"),
        (lambda out: out.fill_(torch.nan), "since its value is off by nan"),
        (lambda out: out.add_(out.new_ones(7)), "does not run here (RuntimeError:"),
    ],
)
def test_a_kernel_that_does_not_agree_is_not(wrong, said, tried, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    right = grouped_experts.grouped_product

    def product(out, *others):
        right(out, *others)
        wrong(out)

    monkeypatch.setattr(grouped_experts, "grouped_product", product)
    assert not tried() and said in caplog.text


@pytest.mark.parametrize("factors", [(1.01, 1.0), (1.0, 1.01)])
def test_wrong_gradients_alone_are_found(factors, tried, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    gradients = grouped_experts.gradients
    monkeypatch.setattr(
        grouped_experts,
        "gradients",
        lambda *given: tuple(grad * factor for grad, factor in zip(gradients(*given), factors, strict=True)),
    )
    assert not tried() and "since its gradient is off" in caplog.text


def test_a_repeatable_run_and_a_model_without_experts_try_none(tried, monkeypatch):
    assert not tried(model=quantized_pair("llama")[0])
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not tried()


def test_training_computes_experts_in_groups_only_once_they_are_chosen(monkeypatch):
    monkeypatch.setattr(packing, "device_type", lambda _device: "cuda")
    training, plain = (trainer("qwen3_moe", max_steps=1) for _ in range(2))
    training.choose_kernels(["experts"])
    losses = []
    for each, grouped in ((training, True), (plain, False)):
        with Operators() as operators:
            [metrics] = each
        assert ("qlora_lite::grouped_product" in operators.names) == grouped
        losses.append((metrics.loss, metrics.grad_norm))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.real_card
def test_a_gpu_agrees_with_one_expert_after_the_other():
    model = quantized_pair("gpt_oss")[0].to("cuda")
    use_kernels(model, ["experts"])
    kernels.choose_kernels(model, prepare(random_batch((512,)), torch.device("cuda")))
    assert kernels_of(model) == {"experts"}
