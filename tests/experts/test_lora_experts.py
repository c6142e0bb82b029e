"""LoRA on fused experts computes what a loop over the experts does, and what peft does with its files."""

import copy
import json

import peft
import pytest
import torch
from jobs import changed, new_job
from tiny import build_tiny, quantized_pair, random_batch
from tiny_trainer import trainer
from transformers import AutoConfig

from qlora_lite.adapters.files import Lora, detach_adapter, load_adapter, save_adapter
from qlora_lite.adapters.lora.inject import Target, add_lora, lora_layers, lora_parameters
from qlora_lite.adapters.lora.layer import LoraExperts
from qlora_lite.adapters.lora.switch import add_switch
from qlora_lite.adapters.read import read_adapter
from qlora_lite.errors import ModelError, TrainingError
from qlora_lite.experts import grouped, packing, routed
from qlora_lite.experts.packing import GROUPED, both_names, described_experts, expert_weights
from qlora_lite.kernels.grouped_product import add_grouped_sums
from qlora_lite.memory.ledger import Ledger
from qlora_lite.memory.marks import phase
from qlora_lite.memory.shapes import planning_for
from qlora_lite.memory.work import WorkCounter
from qlora_lite.models.families import known_config
from qlora_lite.models.kernels import kernels_of, use_kernels
from qlora_lite.models.load import adopt
from qlora_lite.models.memory_options import MemoryOptions, set_memory_options
from qlora_lite.models.quantizer import quantize_in_place
from qlora_lite.models.skeleton import block_pattern
from qlora_lite.planning.simulate import simulate
from qlora_lite.quant.product import materialize
from qlora_lite.train import kernels
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.checkpoints import Checkpoint
from qlora_lite.train.forward import prepare
from qlora_lite.train.inventory import categorised
from qlora_lite.train.optim import build_optimizer
from qlora_lite.train.state import STATE, capture, restore
from qlora_lite.train.step import train_step
from qlora_lite.train.text_guards import check_compilable

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft asks transformers
    pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module"),  # it used them
]
FORMS = "qwen3_moe", "gpt_oss", "deepseek_v3"  # plain; interleaved, transposed and with biases; beside dense layers
IDS = torch.randint(3, 160, (2, 11), generator=torch.Generator().manual_seed(0))


def moved(model):
    """Give the LoRA weights values under which every part of them shows."""
    for name, parameter in lora_parameters(model):
        chance = torch.Generator().manual_seed(sum(map(ord, name)))
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=chance, dtype=torch.float64).to(parameter.dtype)
    return model


def plain(name, dtype=torch.float32):
    """A model in 16 bit, or more, its experts' biases with values."""
    model = build_tiny(name, dtype)
    for key, bias in model.named_parameters():
        if key.endswith("proj_bias"):
            bias.data.normal_(generator=torch.Generator().manual_seed(5))
    return model


def adapted(name="qwen3_moe", targets=("experts",), dtype=torch.float64):
    """Such a model with LoRA on its experts."""
    return moved(add_lora(plain(name, dtype), list(targets), rank=3, alpha=7.0, dtype=dtype)).train()


def own_experts(model):
    return next(iter(expert_weights(model).values())).experts


def loop(experts, hidden, chosen, weights):
    """Return the sum over experts and the leaves of their LoRA weights, each expert by itself in float64."""
    names, out, leaves = both_names(experts), torch.zeros_like(hidden), {}
    whole = []
    for projection in expert_weights(experts).values():
        weight = (
            materialize(*projection.described, torch.float32)
            if hasattr(experts, f"packed_{projection.name}")
            else projection.straight(projection.parameter)
        )
        layer = getattr(experts, f"lora_{projection.name}", None)
        whole.append(weight.double())
        if layer is not None:
            leaves[projection.name] = [p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B)]

    def product(x, expert, number):
        name = names[number]
        y = x @ whole[number][expert].t()
        if name in leaves:
            (a, b), layer = leaves[name], getattr(experts, f"lora_{name}")
            rank, count = layer.rank, len(whole[number])
            a, b = a[expert * rank : (expert + 1) * rank], b[:, expert::count]
            y = y + layer.scale * (x @ a.t()) @ b.t()
        bias = getattr(experts, f"{name}_bias", None)
        return y if bias is None else y + bias[expert].double()

    for expert in range(len(whole[0])):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        inner = experts._apply_gate(product(hidden[token], expert, 0))
        out = out.index_add(0, token, weights[token, place, None] * product(inner, expert, 1))
    return out, [leaf for pair in leaves.values() for leaf in pair]


def given(experts, tokens=41, dtype=torch.float64):
    """Return hidden states, the router's choice, its weights, and a gradient that comes back; no token is the last
    expert's."""
    random = torch.Generator().manual_seed(2)
    size = next(iter(expert_weights(experts).values())).described[0].shape[2]
    hidden, upstream = (torch.randn(tokens, size, generator=random, dtype=dtype) for _ in range(2))
    scores = torch.rand(tokens, experts.num_experts - 1, generator=random, dtype=dtype)
    weights, chosen = scores.softmax(1).topk(2)
    return hidden.requires_grad_(), chosen, weights.detach().requires_grad_(), upstream


@pytest.mark.parametrize("targets", [("experts",), ("*.experts.gate_up_proj",), ("*.experts.down_proj",)])
@pytest.mark.parametrize("tile_rows", [1024, 3])
@pytest.mark.parametrize("name", FORMS)
def test_experts_compute_in_float64_what_a_loop_over_them_does(name, tile_rows, targets, monkeypatch):
    monkeypatch.setattr(routed, "TILE_ROWS", tile_rows)
    experts = own_experts(adapted(name, targets))
    hidden, chosen, weights, upstream = given(experts)
    expected, leaves = loop(experts, hidden, chosen, weights)
    wanted = torch.autograd.grad((expected * upstream).sum(), [hidden, weights, *leaves])
    y = experts(hidden, chosen, weights)
    own = [p for p in experts.parameters() if p.requires_grad]
    found = torch.autograd.grad((y * upstream).sum(), [hidden, weights, *own])
    for one, other in zip((y, *found), (expected, *wanted), strict=True):
        assert (one - other).norm() <= 1e-10 * other.norm()


def test_every_expert_that_saw_a_token_has_a_gradient_and_others_have_zeros():
    experts = own_experts(adapted())
    hidden, chosen, weights, upstream = given(experts, tokens=4)
    (experts(hidden, chosen, weights) * upstream).sum().backward()
    seen = {*chosen.flatten().tolist()}
    assert 0 < len(seen) < experts.num_experts
    for layer in (experts.lora_gate_up_proj, experts.lora_down_proj):
        of_a = layer.lora_A.grad.view(experts.num_experts, -1).any(1)
        of_b = layer.lora_B.grad.view(-1, experts.num_experts).any(0)
        assert {*of_a.nonzero().flatten().tolist()} == {*of_b.nonzero().flatten().tolist()} == seen


def logits_and_gradients(model):
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.double().log_softmax(-1)[..., 7].sum().backward()
    return logits.detach(), {name: p.grad for name, p in lora_parameters(model)}


@pytest.mark.parametrize("name", FORMS)
def test_packed_experts_give_what_dequantised_ones_do(name):
    packed, plain = quantized_pair(name)
    for model in (packed, plain):
        moved(add_lora(model, ["all-linear", "experts"], rank=3, alpha=7.0, dtype=torch.float32)).train()
    (logits, grads), (expected, wanted) = map(logits_and_gradients, (packed, plain))
    assert torch.allclose(logits, expected, atol=1e-4) and grads.keys() == wanted.keys()
    assert all((grads[key] - wanted[key]).norm() <= 1e-4 * wanted[key].norm() for key in grads)


@torch.no_grad()
def logits_of(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


CASES = {
    "both": ["experts"],
    "first": ["gate_up_proj"],
    "second": ["*.experts.down_proj"],
    "layers": ["o_proj", Target("*.1.*.gate_up_proj", rank=2, alpha=9.0), "*.experts.down_proj"],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FORMS)
def test_a_saved_adapter_gives_the_same_logits_in_peft_and_comes_back_from_it(name, case, tmp_path):
    ours, base = adapted(name, CASES[case], torch.float32), logits_of(plain(name))
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(plain(name), tmp_path / "ours")
    expected = logits_of(ours)
    assert (expected - base).abs().max() > 1e-2
    assert torch.allclose(logits_of(theirs), expected, atol=2e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(plain(name), tmp_path / "theirs")
    assert torch.equal(logits_of(again), expected)
    assert any(isinstance(layer, LoraExperts) for _, layer in lora_layers(again))
    assert torch.allclose(logits_of(detach_adapter(again)), base, atol=1e-4)


def test_rows_of_a_batch_have_their_own_adapters(tmp_path):
    model = quantized_pair("qwen3_moe")[0]
    adapters, expected = {}, {None: logits_of(model)}
    for name, targets in (("both", ["all-linear", "experts"]), ("second", ["*.experts.down_proj"]), ("no", ["q_proj"])):
        trained = moved(add_lora(copy.deepcopy(model), targets, rank=len(name), dtype=torch.float32))
        save_adapter(trained, tmp_path / name)
        adapters[name], expected[name] = read_adapter(model, tmp_path / name), logits_of(trained)
    switch = add_switch(model, adapters)
    for name, wanted in expected.items():
        switch.use(name)
        assert torch.allclose(logits_of(model), wanted, atol=1e-4), name
    for rows in (("both", "second"), ("no", "both"), (None, "second")):
        switch.use_rows(rows)
        together = logits_of(model)
        assert all(torch.allclose(together[i], expected[name][i], atol=2e-4) for i, name in enumerate(rows))


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_made_is_read(rslora, tmp_path):
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        init_lora_weights=False,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={r".*\.0\..*\.down_proj": 2},
        alpha_pattern={"gate_up_proj": 9},
    )
    theirs = peft.get_peft_model(plain("qwen3_moe"), config)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(plain("qwen3_moe"), tmp_path)
    assert torch.allclose(logits_of(ours), logits_of(theirs), atol=2e-4)
    assert {(layer.rank, layer.alpha) for _, layer in lora_layers(ours)} == {(4, 6), (2, 6), (4, 9)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            dict(target_parameters=["norm.weight"]),
            "'norm.weight', and only weights of linear layers and of fused experts",
        ),
        (dict(target_parameters=["experts", "q_proj.weight"]), "'experts', and only weights"),
        (dict(target_parameters=["gate_up_proj", "down_proj", "q_proj.weight"]), "self_attn.q_proj has no factors"),
        (dict(target_parameters="down_proj "), "'down_proj ', and only weights"),
        (dict(target_parameters=[3]), "names 3"),
        (dict(target_parameters=["down_proj"]), r"experts.base_layer.lora_A.weight belongs to no linear layer"),
        (dict(target_parameters=None), r"experts.lora_A.weight belongs to no linear layer"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(change, said, tmp_path):
    save_adapter(adapted(dtype=torch.float32), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = plain("qwen3_moe")
    with pytest.raises(ModelError, match=said):
        load_adapter(model, tmp_path)
    assert not list(lora_layers(model))


def test_experts_without_factors_and_of_other_counts_are_refused(tmp_path):
    save_adapter(adapted(dtype=torch.float32, targets=["*.0.*.gate_up_proj"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_parameters": ["gate_up_proj"]}))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts has no factors"):
        load_adapter(plain("qwen3_moe"), tmp_path)
    save_adapter(adapted(dtype=torch.float32), tmp_path)
    with pytest.raises(ModelError, match=r"experts has shapes .*, its layer is 5 x 64 x 32"):
        load_adapter(build_tiny("qwen3_moe", num_experts=5), tmp_path)


def names_of(targets, model_type="qwen3_moe"):
    return {name.removeprefix("model.layers.") for name, _ in lora_layers(add_lora(build_tiny(model_type), targets))}


def test_targets_name_experts_by_a_word_a_name_or_a_pattern():
    every = {f"{block}.mlp.experts.{leaf}" for block in (0, 1) for leaf in ("gate_up_proj", "down_proj")}
    assert names_of(["experts"]) == names_of(["*.experts.*"]) == every
    assert names_of(["gate_up_proj"]) == {name for name in every if "gate" in name}
    assert names_of(["all-linear", "experts"]) == names_of(["all-linear"]) | every
    assert not names_of(["all-linear"]) & every


def test_a_name_or_pattern_that_linear_layers_have_means_those_alone():
    """As it did before experts could be adapted."""
    for targets in (["down_proj"], ["*.mlp.*"]):
        assert not [name for name in names_of(targets, "deepseek_v3") if ".experts." in name]
    assert names_of(["*.experts.down_proj"], "deepseek_v3") == {"1.mlp.experts.down_proj"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            dict(dropout=0.1),
            r"lora\.dropout 0\.1 is for linear layers, .*layers\.0\.mlp\.experts\.down_proj: set it to 0",
        ),
        (dict(dora=True), r"adapter\.method dora is for linear layers, and lora\.targets name experts too"),
    ],
)
def test_what_experts_cannot_have_is_refused_before_anything_is_changed(options, said):
    model = build_tiny("qwen3_moe").requires_grad_(True)
    with pytest.raises(ModelError, match=said):
        add_lora(model, ["all-linear", "experts"], **options)
    assert not list(lora_layers(model)) and all(p.requires_grad for p in model.parameters())


def test_a_model_without_experts_says_so():
    with pytest.raises(ModelError, match="'experts' matches no linear layer of this model"):
        add_lora(build_tiny("llama"), ["experts"])
    with pytest.raises(
        ModelError, match=r"'expert' matches no linear layer or weight of experts.*did you mean experts"
    ):
        add_lora(build_tiny("qwen3_moe"), ["expert"])


@pytest.mark.parametrize(
    ("quant", "options"),
    [
        ("nf4", MemoryOptions()),
        ("nf4", MemoryOptions("none")),
        ("none", MemoryOptions(uncheckpointed_layers=1)),
    ],
    ids=str,
)
def test_a_plan_is_what_a_step_takes_whose_tokens_choose_the_same_experts(quant, options, monkeypatch):
    monkeypatch.setattr(routed, "DEQUANTIZED_BYTES", 1)
    lengths, settings = (50, 70), dict(moe_intermediate_size=256)
    model = quantized_pair("qwen3_moe", **settings)[0] if quant == "nf4" else adopt(build_tiny("qwen3_moe", **settings))
    batch = random_batch(lengths)
    rows = BatchShape(lengths, int((batch.labels >= 0).sum()))
    job = new_job(
        model.config,
        rows,
        quant=quant,
        targets=(Target("all-linear"), Target("experts")),
        rank=4,
        options=options,
        compute_dtype=torch.float32,
        factor_dtype=torch.float32,
        optimizer="adamw_torch",
    )
    job.workload.method.apply(model)
    set_memory_options(model.train(), options)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight.zero_()
    parameters = [p for _, p in lora_parameters(model)]
    optimizer, planned = build_optimizer(parameters, job.optimizer, 1e-4, 0.0), simulate(job)
    with Ledger() as ledger:
        for tensor, name, _ in categorised(causal_lm(), model):
            ledger.claim([tensor], name)
        ledger.watch(model)
        for _ in range(2):
            ledger.peaks.clear()
            train_step(causal_lm(), model, [batch], optimizer, job.max_grad_norm)
            optimizer.zero_grad(set_to_none=True)
    for name in ("forward", "backward", "optimizer"):
        peak = max(moment.total for moment in ledger.peaks.values() if moment.phase == name)
        assert peak == pytest.approx(planned.peak(name).total, rel=0.01), name


ALL = ["all-linear", "experts"]


def trained(targets=ALL, **settings):
    """A trainer that has taken its steps, the losses of these, and what it began with."""
    training = trainer("qwen3_moe", targets=targets, **{"max_steps": 2} | settings)
    begun = [parameter.detach().clone() for parameter in training.parameters]
    return training, [step.loss for step in training], begun


@pytest.fixture(scope="module")
def plainly():
    """Such a trainer without memory options."""
    return trained()


def test_every_weight_is_trained(plainly):
    training, _, begun = plainly
    assert not any(torch.equal(a, b) for a, b in zip(training.parameters, begun, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        MemoryOptions("none"),
        MemoryOptions(uncheckpointed_layers=1),
        MemoryOptions(layers_per_checkpoint=2),
        MemoryOptions(offload_checkpoints=True, resident_layers=0),
        MemoryOptions("selective"),
    ],
    ids=str,
)
def test_memory_options_change_no_bit(options, plainly):
    training, losses, _ = trained(options=options)
    assert losses == plainly[1]
    assert all(torch.equal(a, b) for a, b in zip(training.parameters, plainly[0].parameters, strict=True))


@pytest.mark.parametrize(
    ("optimizer", "dtype", "options"),
    [
        ("adamw_torch", torch.float32, MemoryOptions()),
        ("adamw_8bit", torch.bfloat16, MemoryOptions()),
        ("adamw_torch", torch.float32, MemoryOptions(optimizer_in_backward=True)),
    ],
)
def test_killed_and_resumed_it_goes_on_to_the_bit(optimizer, dtype, options):
    settings = dict(targets=ALL, optimizer=optimizer, dtype=dtype, rank=16, options=options, max_steps=2)
    if options.optimizer_in_backward:
        settings |= dict(gradient_accumulation_steps=1, max_grad_norm=0.0)
    whole, losses, _ = trained(**settings)
    first, resumed = (trainer("qwen3_moe", **settings) for _ in range(2))
    next(iter(first))
    tensors, numbers = capture(first)
    restore(resumed, Checkpoint(first.step, tensors, {STATE: numbers}))
    assert [step.loss for step in resumed] == losses[1:]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))


def test_blocks_whose_experts_are_adapted_otherwise_are_planned_with_the_weights_they_get():
    config = build_tiny("qwen3_moe", num_hidden_layers=12).config
    targets = Target("all-linear"), Target("experts"), Target("model.layers.[0-2].mlp.experts.gate_up_proj", rank=64)
    assert block_pattern(config, Lora(targets)) == (3, 1) and block_pattern(config, Lora(targets[:2])) == (0, 1)


def test_blocks_with_adapted_experts_are_not_compiled_and_that_is_said():
    with pytest.raises(TrainingError, match="incompatible with LoRA weights on experts"):
        check_compilable(adopt(adapted(dtype=torch.float32)), MemoryOptions(compile=True))


@pytest.fixture
def small_parts(monkeypatch):
    """Cut the experts, the tokens and the first products of the tiny models into several parts."""
    for name, size in (("GROUP_BYTES", 1), ("PAIRS_BYTES", 9 << 10), ("TILE_BYTES", 1 << 10)):
        monkeypatch.setattr(grouped, name, size)


def results(experts, inputs, in_groups):
    """Return the value and all gradients, LoRA weights' last."""
    described, tensors = described_experts(experts)
    hidden, chosen, weights, upstream = inputs
    own = tensors[len(tensors) - described.lora_tensors :]
    with phase("forward"):
        y = routed.routed(hidden, chosen, weights, described._replace(grouped=in_groups), tensors)
        return y.detach(), *torch.autograd.grad(y, [hidden, weights, *own], upstream)


@pytest.mark.parametrize("targets", [ALL, ["*.experts.down_proj"], ["gate_up_proj"]])
@pytest.mark.parametrize("quant", ["nf4", "none"])
@pytest.mark.parametrize("name", FORMS)
def test_groups_have_the_values_and_gradients_of_one_expert_after_the_other(name, quant, targets, small_parts):
    model = plain(name)
    if quant != "none":
        quantize_in_place(model, quant, True)
    experts = own_experts(moved(add_lora(model, targets, rank=3, alpha=7.0, dtype=torch.float32)))
    inputs = given(experts, dtype=torch.float32)
    found, expected = (results(experts, inputs, in_groups) for in_groups in (True, False))
    assert len(found) == 3 + 2 * (2 if targets is ALL else 1)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * other.abs().max())


def test_a_plan_of_groups_counts_what_runs_to_the_byte_and_never_asks_for_a_value(small_parts):
    found = []
    for device in ("cpu", "meta"):
        experts = own_experts(adapted("gpt_oss", dtype=torch.float32)).to(device)
        inputs = [tensor.detach().to(device) for tensor in given(own_experts(adapted("gpt_oss")), dtype=torch.float32)]
        inputs[0].requires_grad_(), inputs[2].requires_grad_()
        work = WorkCounter()
        with planning_for("cuda"), Ledger(work=work) as ledger:
            ledger.claim([*described_experts(experts)[1], *inputs], "base weights")
            results(experts, inputs, True)
        found.append((ledger.peak.total, work.work))
    assert found[0] == found[1]


@pytest.mark.parametrize(("quant", "wrong"), [("nf4", 1.0), ("none", 1.0), ("nf4", 1.1)])
def test_training_computes_adapted_experts_in_groups_where_all_their_gradients_agree(quant, wrong, monkeypatch):
    def sums(out, *others):
        add_grouped_sums(out, *others)
        out.mul_(wrong if out.shape[1] == 4 else 1)  # of A alone, which has no gradient beside a B of zeros

    monkeypatch.setattr(grouped, "add_grouped_sums", sums)
    monkeypatch.setattr(packing, "device_type", lambda _device: "cuda")
    monkeypatch.setattr(packing, "has_triton", lambda: True)
    shares = iter((1.0, 0.5))
    monkeypatch.setattr(kernels, "timed", lambda run, _: (run(), (next(shares), 0))[1])
    model = quantized_pair("qwen3_moe")[0] if quant == "nf4" else adopt(build_tiny("qwen3_moe"))
    add_lora(model, ALL, rank=4, dtype=torch.float32)
    inputs = prepare(random_batch((23, 18)), torch.device("cpu"))
    use_kernels(model, ["experts"])
    kernels.choose_kernels(model, inputs)
    assert (kernels_of(model) == {"experts"}) == (wrong == 1)
    assert (model.config._experts_implementation == GROUPED) == (wrong == 1)


def test_a_large_mixture_takes_lora_weights_gradients_and_states_and_less_than_one_block_s_weights_beside():
    """At the highest moment, in the first block's backward, which has no gradients of its own yet."""
    config = AutoConfig.for_model(**known_config("Qwen/Qwen3-30B-A3B") | {"num_hidden_layers": 4})
    rows, linear = BatchShape((2048,), 2047), (Target("all-linear"),)
    job = new_job(config, rows, device_type="cuda", targets=linear)
    without, adapted = (simulate(changed(job, targets=targets)) for targets in (linear, (*linear, Target("experts"))))
    weights = 4 * 16 * 128 * (2048 + 2 * 768 + 768 + 2048)
    assert sum(p.shape.numel() for p in adapted.trained) - sum(p.shape.numel() for p in without.trained) == weights
    grown, of_block = adapted.peak("backward").total - without.peak("backward").total, 2 * weights // 4
    held = 2 * weights + 2 * weights + 3 * of_block  # LoRA weights, two 8-bit states each, gradients
    assert 0 < grown - held < of_block
    assert adapted.work.operations < 1.3 * without.work.operations and adapted.work.flops < 1.05 * without.work.flops
