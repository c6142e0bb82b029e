"""Experts whose weights are in 4 bits compute what transformers' own would with the dequantised weights."""

import logging
import weakref

import pytest
import torch
from jobs import new_job
from tiny import UNUSUAL, build_tiny, quantized_pair, random_batch, random_factors
from tiny_files import as_if_packed
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_lite.adapters.lora.inject import add_lora, linear_layers, lora_parameters
from qlora_lite.errors import ModelError, TrainingError
from qlora_lite.experts import routed
from qlora_lite.experts.packing import PACKED
from qlora_lite.memory.ledger import Ledger
from qlora_lite.memory.shapes import planning_for
from qlora_lite.memory.work import WorkCounter
from qlora_lite.models import load
from qlora_lite.models.anatomy import blocks
from qlora_lite.models.load import adopt, load_model
from qlora_lite.models.memory_options import MemoryOptions, set_memory_options
from qlora_lite.models.quantizer import OnArrivalQuantizer, QuantizeConfig, quantize_in_place
from qlora_lite.models.save import save_quantized
from qlora_lite.models.skeleton import give_storage, meta_model
from qlora_lite.planning.plan_ledger import PlanLedger, on_real_tensors
from qlora_lite.planning.simulate import remembered, simulate
from qlora_lite.quant.linear import QuantLinear
from qlora_lite.quant.product import materialize
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.forward import prepare
from qlora_lite.train.inventory import categorised, total_parameters
from qlora_lite.train.optim import build_optimizer
from qlora_lite.train.step import accumulate_gradients, train_step
from qlora_lite.train.text_guards import check_compilable

# a plain form; interleaved, transposed and with biases; with experts for all tokens
FORMS = "qwen3_moe", "gpt_oss", "deepseek_v3"
UNGATED = dict(
    vocab_size=160,
    hidden_size=64,
    num_hidden_layers=2,
    layers_block_type=["attention", "moe"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
    mamba_num_heads=4,
    mamba_head_dim=16,
    n_groups=1,
    ssm_state_size=8,
)


def logits_and_gradient(model, count=21):
    """Return a model's logits for random tokens, and a gradient of its embedded input."""
    ids = torch.randint(3, 160, (1, count), generator=torch.Generator().manual_seed(4)).to(model.device)
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=inputs, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 7].sum().backward()
    return logits.detach(), inputs.grad


def errors(found, exact):
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize(("tile_rows", "at_once"), [(1024, 99), (3, 1), (1024, 3)])
@pytest.mark.parametrize("name", FORMS)
def test_logits_and_gradients_are_as_near_to_float64_as_those_of_transformers_own_experts(
    name, tile_rows, at_once, monkeypatch
):
    monkeypatch.setattr(routed, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(
        routed, "DEQUANTIZED_BYTES", at_once * (3 * 64 * 32 * 4 if name != "gpt_oss" else 3 * 64 * 96 * 4)
    )
    packed, plain = quantized_pair(name)
    for key, bias in packed.named_parameters():
        if key.endswith("proj_bias"):
            plain.get_parameter(key).data = bias.data.normal_(generator=torch.Generator().manual_seed(5)).clone()
    ours, theirs = logits_and_gradient(packed), logits_and_gradient(plain)
    exact = logits_and_gradient(plain.double())
    for own, other in zip(errors(ours, exact), errors(theirs, exact), strict=True):
        assert own <= 3 * max(other, 1e-7)


def test_experts_without_a_gate_are_computed_too(monkeypatch):
    try:
        config = AutoConfig.for_model("nemotron_h", **UNGATED)
    except ValueError:
        pytest.skip("transformers 5.17 has other names for its layers")
    monkeypatch.setitem(UNUSUAL, "nemotron_h", ("nemotron_h", UNGATED))
    packed, plain = quantized_pair("nemotron_h")
    assert AutoModelForCausalLM.from_config(config).model.layers[1].mixer.experts.up_proj.ndim == 3
    assert max(errors(logits_and_gradient(packed), logits_and_gradient(plain.double()))) < 3e-6


def test_gradients_of_the_router_s_weights_are_those_of_plain_autograd():
    """In the model they reach the factors only through the router; here alone, with experts that share an input."""
    random = torch.Generator().manual_seed(0)
    count, size, tokens = 5, 64, 11
    model = quantized_pair("qwen3_moe", num_experts=count, num_experts_per_tok=2)[0]
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(tokens, size, generator=random).requires_grad_()
    chosen = torch.rand(tokens, count, generator=random).topk(2).indices
    weights = torch.rand(tokens, 2, generator=random).requires_grad_()
    up, down = (
        materialize(*getattr(experts, PACKED + name).described, torch.float32) for name in ("gate_up_proj", "down_proj")
    )
    y = experts(hidden, chosen, weights)
    gate, right = torch.einsum("td,tkid->tki", hidden, up[chosen]).chunk(2, -1)
    expected = torch.einsum("tki,tkdi,tk->td", torch.nn.functional.silu(gate) * right, down[chosen], weights)
    upstream = torch.randn(tokens, size, generator=random)
    found, wanted = (torch.autograd.grad((value * upstream).sum(), [hidden, weights]) for value in (y, expected))
    assert torch.allclose(y, expected, atol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_experts_of_a_checkpoint_are_packed_on_arrival_as_in_memory(name, double_quant, tmp_path):
    model = build_tiny(name, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)  # under the names of the hub's files: one weight for each expert
    loaded = load_model(str(tmp_path), "nf4", double_quant, use_cache=False)
    quantize_in_place(model, "nf4", double_quant)
    expected, found = model.state_dict(), loaded.state_dict()
    assert any(f".{PACKED}down_proj.weight" in key for key in found)
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    skeleton = meta_model(model.config, "nf4", double_quant, torch.bfloat16).state_dict()
    assert skeleton.keys() == found.keys()
    for key in (key for key in found if PACKED in key):
        assert (skeleton[key].shape, skeleton[key].dtype) == (found[key].shape, found[key].dtype)


def test_room_is_reserved_for_what_a_gpu_will_hold():
    """As transformers asks: codes by the byte, constants by what they are, parameters that are dropped not at all."""
    model = build_tiny("qwen3_moe", dtype=torch.bfloat16)
    quantizer = OnArrivalQuantizer(QuantizeConfig("nf4", double_quant=False))
    quantizer.pre_quantized = False
    model._keep_in_fp32_modules = None
    quantizer._process_model_before_weight_loading(model)
    block = "model.layers.0"
    sizes = {
        name: quantizer.param_element_size(model, f"{block}.{name}", model.state_dict()[f"{block}.{name}"])
        for name in (
            "self_attn.q_proj.weight",
            "self_attn.q_proj.absmax",
            "mlp.experts.down_proj",
            "mlp.experts.packed_down_proj.weight",
            "mlp.experts.packed_down_proj.absmax",
            "input_layernorm.weight",
        )
    }
    assert list(sizes.values()) == [1, 4, 0, 1, 4, 2]


@pytest.mark.parametrize("name", FORMS)
def test_experts_come_from_the_cache_as_they_were_packed(name, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    build_tiny(name, tie_word_embeddings=name == "gpt_oss").save_pretrained(tmp_path / "model")
    first = load_model(str(tmp_path / "model"))
    monkeypatch.setattr("qlora_lite.models.quantizer.quantize", None)  # is not called again
    second = load_model(str(tmp_path / "model"))
    expected, found = first.state_dict(), second.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(second(input_ids=ids).logits, first(input_ids=ids).logits)


def test_experts_in_four_bits_are_not_written_for_transformers(tmp_path):
    model = quantized_pair("qwen3_moe")[0]
    with pytest.raises(ModelError, match="transformers does not load experts in 4 bit"):
        save_quantized(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_four_bit_checkpoint_with_experts_is_refused_before_it_is_read(tmp_path, monkeypatch):
    build_tiny("qwen3_moe").save_pretrained(tmp_path)
    as_if_packed(tmp_path)
    monkeypatch.setattr("qlora_lite.models.load._from_pretrained", None)
    with pytest.raises(ModelError, match=r"4-bit checkpoint of a mixture of experts.*use the 16-bit model"):
        load_model(str(tmp_path))


def test_a_damaged_expert_is_named(tmp_path):
    model = build_tiny("qwen3_moe")
    model.model.layers[1].mlp.experts.down_proj.data[3, 5, 7] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.down_proj.* NaN"):
        load_model(str(tmp_path), use_cache=False)


@pytest.mark.parametrize(("name", "copies"), [("qwen3_moe", 2), ("gpt_oss", 3), ("llama", 0)])
def test_a_gpu_has_room_for_the_weights_and_a_block_s_experts_in_16_bit_or_the_host_packs_them(
    name, copies, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    model = build_tiny(name)
    model.save_pretrained(tmp_path)
    sizes = [p.numel() * 2 for path, p in model.named_parameters() if "experts" in path and p.ndim == 3]
    skeleton = meta_model(model.config, "nf4", True, torch.bfloat16)
    weights = sum(tensor.nbytes for tensor in (*skeleton.parameters(), *skeleton.buffers()))
    enough, places = weights + copies * max(sizes, default=0), []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 96)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 32)

    def loading(*args):
        places.append(args[3])
        raise ModelError("it is to be loaded there")

    monkeypatch.setattr(load, "_from_pretrained", loading)
    monkeypatch.setattr(load, "_check_device", lambda _device: None)
    for free in (enough - 64, enough - 65):
        monkeypatch.setattr(load, "free_bytes", lambda _device, free=free: free)
        with pytest.raises(ModelError, match="it is to be loaded there"):
            load_model(str(tmp_path), device="cuda", use_cache=False)
    assert places == ["cuda", "cpu" if copies else "cuda"]
    assert ("quantised in host memory" in caplog.text) == bool(copies)


@pytest.mark.gpu
def test_experts_that_the_host_packs_are_those_that_a_gpu_packs(tmp_path, monkeypatch):
    build_tiny("qwen3_moe").save_pretrained(tmp_path)
    expected = load_model(str(tmp_path), device="cuda", use_cache=False).state_dict()
    monkeypatch.setattr(load, "_has_room", lambda *_: False)
    found = load_model(str(tmp_path), device="cuda", use_cache=False).state_dict()
    assert expected.keys() == found.keys() and {tensor.device.type for tensor in found.values()} == {"cuda"}
    assert all(torch.equal(found[key], expected[key]) for key in found if "absmax" not in key)


def test_all_weights_are_counted_as_parameters():
    plain = build_tiny("qwen3_moe")
    packed = meta_model(plain.config, "nf4", True, torch.bfloat16)
    method = causal_lm().method
    assert total_parameters(packed, method) == total_parameters(plain, method)
    assert total_parameters(plain, method) == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("model_type", ["phimoe", "llama4_text"])
def test_a_router_that_gives_more_than_a_product_is_no_linear_layer(model_type):
    sizes = dict(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=0,
    )
    more = dict(head_dim=16, intermediate_size_mlp=96) if model_type == "llama4_text" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes | more), dtype=torch.float32)
    routers = [name for name, module in model.named_modules() if name.endswith("router")]
    quantize_in_place(model, "nf4", True)
    adopt(model)
    assert routers and not any(isinstance(model.get_submodule(name), QuantLinear) for name in routers)
    assert not {*routers} & linear_layers(model).keys()
    assert model(input_ids=torch.arange(9)[None]).logits.isfinite().all()


ROUTED = dict(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=32,
    pad_token_id=0,
)


@pytest.mark.parametrize(
    ("model_type", "changes", "ends"),
    [
        ("qwen2_moe", dict(shared_expert_intermediate_size=32), "shared_expert_gate"),
        ("afmoe", dict(num_dense_layers=1), "router.gate"),
        ("hunyuan_v1_moe", dict(moe_topk=2), "gate.wg"),
    ],
)
def test_what_chooses_among_experts_stays_as_it_is(model_type, changes, ends):
    config = AutoConfig.for_model(model_type, **ROUTED | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    layers = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    chooses = {name for name in layers if name.endswith(ends)}
    assert chooses and linear_layers(model).keys() == layers - chooses - {"lm_head"}
    for packed in (meta_model(config, "nf4", True, torch.float32), model):
        quantize_in_place(model, "nf4", True) if packed is model else None
        in_4_bit = {name for name, m in packed.named_modules() if isinstance(m, QuantLinear)}
        assert in_4_bit == layers - chooses - {"lm_head"}
        assert linear_layers(packed).keys() == in_4_bit


class Unpacked(TorchDispatchMode):
    """Note the sizes of weights as they are dequantised, and the most that were alive at once."""

    def __init__(self):
        super().__init__()
        self.sizes, self.most, self._alive = [], 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.bitsandbytes.dequantize_4bit.default:
            self._alive = [each for each in self._alive if each() is not None]
            self._alive.append(weakref.ref(result.untyped_storage()))
            self.sizes.append(result.numel())
            self.most = max(self.most, sum(each() is not None for each in self._alive))
        return result


def adapted(**changes):
    model = quantized_pair("qwen3_moe", **changes)[0]
    add_lora(model, rank=4, dtype=torch.float32)
    random_factors(model)
    return model.train()


def second_step(options, lengths, **changes):
    """Return what a second step dequantises and its gradients; the first shows what a block's recomputation may leave
    out."""
    model = adapted(moe_intermediate_size=48, **changes)  # like no weight of attention
    inputs = prepare(random_batch(lengths), torch.device("cpu"))
    set_memory_options(model, options)
    for _ in range(2):
        for _, parameter in lora_parameters(model):
            parameter.grad = None
        with Unpacked() as dequantized:
            accumulate_gradients(causal_lm(), model, [inputs])
    return dequantized, [parameter.grad for _, parameter in lora_parameters(model)]


def of_experts(dequantized):
    """Return the sizes of what was dequantised, in experts; no weight of attention is a multiple."""
    return [size // (64 * 48) for size in dequantized.sizes if size % (64 * 48) == 0]


def test_few_experts_are_unpacked_at_a_time_and_those_that_nobody_chose_not_at_all(monkeypatch):
    monkeypatch.setattr(routed, "DEQUANTIZED_BYTES", 2 * 3 * 64 * 48 * 4)
    dequantized, _ = second_step(MemoryOptions(), (4, 3), num_experts=64, num_experts_per_tok=2)
    sizes = of_experts(dequantized)
    assert dequantized.most <= 2 and max(sizes) == 2 * 2  # two experts' first weights, and their second
    assert 0 < sum(sizes) <= 3 * 2 * 2 * 2 * 7  # weights' thirds, layers, passes, experts of a token, tokens
    monkeypatch.setattr(routed, "DEQUANTIZED_BYTES", 1)
    alone, _ = second_step(MemoryOptions(), (4, 3), num_experts=64, num_experts_per_tok=2)
    assert max(of_experts(alone)) == 2 and sum(of_experts(alone)) == sum(sizes)


def test_a_checkpointed_block_computes_its_experts_once_forward_and_once_backward():
    (plain, expected), (checkpointed, found) = (
        second_step(options, (9, 14)) for options in (MemoryOptions("none"), MemoryOptions())
    )
    assert of_experts(checkpointed) == of_experts(plain) != []
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("at_once", [1, 3, 8])
@pytest.mark.parametrize("spread", ["one", "all"])
def test_no_router_makes_a_step_take_more_than_is_planned(spread, at_once, monkeypatch):
    """Whether all tokens go to the same experts or to all of them."""
    monkeypatch.setattr(routed, "DEQUANTIZED_BYTES", at_once * 3 * 64 * 512 * 4)
    lengths, tokens = (300, 410), 710
    model = adapted(max_position_embeddings=512, moe_intermediate_size=512)  # what a tile takes shows
    with torch.no_grad():
        for block in blocks(model):
            block.mlp.gate.weight.mul_(0 if spread == "one" else 20)
    batch = random_batch(lengths)
    rows = BatchShape(lengths, int((batch.labels >= 0).sum()))
    job = new_job(
        model.config,
        rows,
        None,
        compute_dtype=torch.float32,
        factor_dtype=torch.float32,
        rank=4,
        optimizer="adamw_torch",
        options=MemoryOptions("none"),
    )
    planned, optimizer = (
        simulate(job),
        build_optimizer([p for _, p in lora_parameters(model)], job.optimizer, 1e-4, 0.0),
    )
    set_memory_options(model, job.options)
    work = WorkCounter()
    with Ledger(work=work) as ledger:
        for tensor, name, _ in categorised(causal_lm(), model):
            ledger.claim([tensor], name)
        ledger.watch(model)
        for _ in range(2):
            ledger.peaks.clear()
            earlier = work.work.flops
            train_step(causal_lm(), model, [batch], optimizer, job.max_grad_norm)
            optimizer.zero_grad(set_to_none=True)
    for phase in ("forward", "backward"):
        peak = max(moment.total for moment in ledger.peaks.values() if moment.phase == phase)
        held = planned.resident.total
        assert peak <= planned.peak(phase).total + 16 * tokens  # the batch's own numbers stand a little longer
        if at_once == 1:  # more than the three that have rows are counted otherwise
            assert planned.peak(phase).total - held <= (1.1 if spread == "one" else 2.5) * (peak - held)
    assert planned.work.flops == pytest.approx(work.work.flops - earlier, rel=0.1)  # rows are rounded up on a CPU


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_plan_does_not_ask_the_router_even_where_it_runs_on_real_tensors(device):
    """As for families with an operator that needs values: what lies in those tensors means nothing."""
    config = build_tiny("qwen3_moe", num_experts=32, moe_intermediate_size=64).config
    model = give_storage(meta_model(config, "nf4", True, torch.float32), device)
    experts = model.model.layers[0].mlp.experts
    chosen = torch.zeros(60, 3, dtype=torch.int64, device=device)
    run = remembered if device == "meta" else on_real_tensors
    with planning_for("cuda"), PlanLedger("cuda", run=run) as ledger:
        experts(torch.zeros(60, 64, device=device), chosen, torch.zeros(60, 3, device=device))
    weights = 32 * 2 * 64 * 64 * 4  # the first of all of them, not of the one that was chosen
    assert ledger.peak.total > weights


def test_experts_are_not_compiled_and_that_is_said():
    with pytest.raises(TrainingError, match=r"set train\.compile to false: it is incompatible with experts in 4 bit"):
        check_compilable(adapted(), MemoryOptions(compile=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMS)
def test_experts_compute_on_a_gpu_what_they_do_on_a_cpu(name):
    packed, _ = quantized_pair(name)
    expected = logits_and_gradient(packed)
    found = logits_and_gradient(packed.to("cuda"))
    assert max(errors([tensor.cpu() for tensor in found], expected)) < 1e-4


def test_a_tile_s_rows_bound_what_lies_beside_an_expert_s_weights(monkeypatch):
    experts = quantized_pair("qwen3_moe", moe_intermediate_size=512)[0].model.layers[0].mlp.experts
    hidden, chosen = torch.randn(640, 64), torch.tensor([[0, 1, 2]]).expand(640, 3)
    peaks = []
    for rows in (1024, 32):
        monkeypatch.setattr(routed, "TILE_ROWS", rows)
        with Ledger() as ledger:
            experts(hidden, chosen, torch.ones(640, 3))
        peaks.append(ledger.peak.total)
    assert peaks[1] < 0.4 * peaks[0]
