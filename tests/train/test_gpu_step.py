"""On a GPU: the same step as on a CPU, and memory as planned. Needs a CUDA device."""

import copy
import gc
import os
from dataclasses import replace

import pytest
import torch
from jobs import changed, new_job
from memory_option_cases import (
    COPYING,
    FEW_WORDS,
    PLAIN,
    SAME_ARITHMETIC,
    build,
    gradients,
    gradients_of_steps,
    losses_without_gradients,
)
from tiny import build_tiny, quantized_pair, random_batch, random_factors
from tiny_trainer import SETTINGS, examples
from transformers import AutoConfig

from qlora_lite.adapters.full import Full
from qlora_lite.adapters.lora.inject import add_lora, lora_parameters
from qlora_lite.memory.process import CUBLAS_WORKSPACE_BYTES
from qlora_lite.models.anatomy import blocks
from qlora_lite.models.load import adopt
from qlora_lite.models.memory_options import MemoryOptions, place, set_memory_options, settle
from qlora_lite.offload.stream import ALIGNMENT
from qlora_lite.planning.predict import predict
from qlora_lite.quant.tensor_file import bit_sums
from qlora_lite.train.causal_lm import CrossEntropy, causal_lm
from qlora_lite.train.forward import prepare
from qlora_lite.train.loop import Trainer
from qlora_lite.train.memory_probe import probe_step
from qlora_lite.train.optim import build_optimizer
from qlora_lite.train.settings import TrainSettings
from qlora_lite.train.step import accumulate_gradients

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda")
SIZES = dict(vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=8)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product; see ``repeatable``


@pytest.fixture
def repeatable():
    """Make the GPU compute the same bits every time, which its attention's backward does not do by itself."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def card_model(depth, device=CARD):
    """A model whose block inputs, at 4,096 tokens, are 8 MiB each."""
    model, _ = quantized_pair("llama", dtype=torch.bfloat16, num_hidden_layers=depth, **SIZES)
    return add_lora(model, rank=4).to(device)


def asked_for(when="current"):
    """Bytes of the tensors on the GPU; what is allocated also has the rest of a piece that is not worth cutting."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


def with_gradients(model, batch):
    set_memory_options(model.train(), MemoryOptions())
    loss = accumulate_gradients(causal_lm(objective=CrossEntropy(8)), model, [prepare(batch, model.device)]).loss.item()
    return loss, [parameter.grad.cpu() for _, parameter in lora_parameters(model)]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_loss_and_gradients_on_a_gpu_are_those_on_a_cpu(model_type):
    model, _ = quantized_pair(model_type)
    add_lora(model, rank=3, alpha=6.0, dtype=torch.float32)
    random_factors(model)
    batch = random_batch()
    loss, gradients = with_gradients(copy.deepcopy(model).to("cuda"), batch)
    expected, wanted = with_gradients(model, batch)
    assert loss == pytest.approx(expected, rel=1e-4)
    for found, other in zip(gradients, wanted, strict=True):
        assert (found - other).norm() <= 1e-3 * other.norm() + 1e-7


@pytest.mark.real_card
def test_allocated_memory_is_what_the_plan_says():
    sizes = SIZES | {"num_hidden_layers": 4}
    gc.collect()  # what is left on the GPU are cuBLAS's workspaces, which a plan counts
    model, _ = quantized_pair("llama", dtype=torch.bfloat16, **sizes)
    model = add_lora(model, rank=16).to("cuda")
    set_memory_options(model, MemoryOptions())
    batch = random_batch((2048,), vocabulary=8192)
    job = new_job(AutoConfig.for_model("llama", **sizes), causal_lm().shape(batch), device_type="cuda")
    parameters = [parameter for _, parameter in lora_parameters(model)]
    optimizer = build_optimizer(parameters, job.optimizer, 0.0, 0.0)
    torch.cuda.reset_peak_memory_stats()
    probe_step(causal_lm(), model, parameters, optimizer, prepare(batch, model.device), None, 1.0, False)
    measured = asked_for("peak")
    predicted = predict(changed(job, config=model.config)).allocated_bytes
    assert -0.01 <= predicted / measured - 1 <= 0.05


@pytest.mark.parametrize("options", SAME_ARITHMETIC, ids=str)
def test_where_tensors_lie_and_whether_they_are_kept_changes_no_bit_on_a_gpu(options, repeatable, monkeypatch):
    monkeypatch.setattr("qlora_lite.kernels.loss.TILE_WORDS", FEW_WORDS)
    expected = gradients(build(device=CARD), PLAIN)
    model = build(options=options, device=CARD)
    for _ in range(2):  # the second step finds the stream where the first left it
        for one, other in zip(gradients(model, options), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("options", COPYING, ids=str)
def test_copies_change_no_bit_of_steps_and_evaluations_on_a_gpu(options, repeatable, monkeypatch):
    monkeypatch.setattr("qlora_lite.kernels.loss.TILE_WORDS", FEW_WORDS)
    found, expected = (
        gradients_of_steps(build(options=each, device=CARD), each, losses_without_gradients)
        for each in (options, replace(PLAIN, tile_tokens=options.tile_tokens))
    )
    assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("resident", [0, 2])
def test_weights_that_are_streamed_to_a_gpu_are_trained_as_resident_ones(resident, repeatable):
    def trained(layers):
        options = MemoryOptions(optimizer_in_backward=True, resident_layers=layers)
        model = adopt(build_tiny("llama", num_hidden_layers=4))
        Full().apply(model)
        place(model, CARD, options, trains_base=True)
        changes = dict(gradient_accumulation_steps=1, max_grad_norm=0.0, options=options)
        training = Trainer(model, examples(), TrainSettings(**(SETTINGS | changes)), workload=causal_lm(method=Full()))
        training.check()
        training.probe_memory(examples())
        losses = [step.loss for step in training] + [training.evaluate(examples()).loss]
        settle(model)
        return losses, {name: weight.detach().cpu() for name, weight in model.named_parameters()}

    (losses, weights), (expected, wanted) = trained(resident), trained(None)
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, weight in weights.items():
        assert (weight - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


@pytest.mark.parametrize("on_disk", [False, True])
def test_block_inputs_of_steps_of_any_length_come_back_to_a_gpu(on_disk, repeatable, tmp_path):
    options = MemoryOptions(offload_checkpoints=True, offload_folder=str(tmp_path) if on_disk else None)
    model = build(device=CARD)
    assert all(map(torch.equal, gradients_of_steps(model, options), gradients_of_steps(model, PLAIN)))


def active_bytes_of_a_step(depth, options):
    """Return the most memory in use during a step, above what lay there before it and less its gradients.

    Memory whose copy to the host has not ended is in use although no tensor holds it: ``memory_allocated`` leaves it
    out, "active" does not. Nothing here waits for the GPU, so that the process runs ahead of it as in training.
    """
    model = card_model(depth)
    set_memory_options(model.train(), options)
    inputs = [prepare(random_batch((4096,), vocabulary=8192), CARD)]
    parameters = [parameter for _, parameter in lora_parameters(model)]
    for _ in range(2):  # the first allocates pinned memory, which makes the process wait
        for parameter in parameters:
            parameter.grad = None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["active_bytes.all.current"]
        accumulate_gradients(causal_lm(objective=CrossEntropy(1024)), model, inputs)
    peak = torch.cuda.memory_stats()["active_bytes.all.peak"]
    return peak - before - sum(parameter.nbytes for parameter in parameters)


@pytest.mark.real_card
def test_offloaded_checkpoints_leave_at_most_two_block_inputs_on_the_device():
    input_bytes, few, many = 4096 * SIZES["hidden_size"] * 2, 4, 16
    offloaded, kept = (
        active_bytes_of_a_step(many, options) - active_bytes_of_a_step(few, options)
        for options in (MemoryOptions(offload_checkpoints=True), MemoryOptions())
    )
    assert kept >= 0.9 * (many - few) * input_bytes  # what there is to save; the peak may stand elsewhere
    assert offloaded <= 2 * input_bytes


def test_of_streamed_weights_two_blocks_are_on_the_device():
    model = card_model(6, "cpu")

    def frozen(module):
        return [tensor for tensor in (*module.parameters(), *module.buffers()) if not tensor.requires_grad]

    slot_bytes = sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in frozen(blocks(model)[0]))
    streamed = {id(tensor) for block in blocks(model) for tensor in frozen(block)}
    others = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in streamed]
    before = asked_for()
    place(model, CARD, MemoryOptions(resident_layers=0))
    held = asked_for() - before
    assert held == sum(tensor.nbytes for tensor in others) + 2 * slot_bytes
    options = MemoryOptions(resident_layers=0)
    set_memory_options(model.train(), options)
    accumulate_gradients(causal_lm(), model, [prepare(random_batch((64,), vocabulary=8192), CARD)])
    for _, parameter in lora_parameters(model):
        parameter.grad = None
    torch.cuda.synchronize()
    assert asked_for() - before - held <= CUBLAS_WORKSPACE_BYTES  # and no block's weights


@pytest.mark.real_card
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute", "ignore:TensorFloat32")
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text"])
def test_compiled_blocks_have_the_gradients_of_the_blocks_on_a_gpu(model_type):
    options = MemoryOptions(uncheckpointed_layers=2, compile=True)
    expected = gradients(build(model_type, device=CARD), PLAIN)
    for one, other in zip(gradients(build(model_type, device=CARD), options), expected, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()


@pytest.mark.real_card
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute", "ignore:TensorFloat32")
@pytest.mark.parametrize("checkpointing", ["block", "none"])
def test_a_compiled_step_needs_no_more_memory_than_a_plain_one_which_is_what_plans_count(checkpointing):
    plain = active_bytes_of_a_step(4, MemoryOptions(checkpointing))
    assert active_bytes_of_a_step(4, MemoryOptions(checkpointing, compile=True)) <= 1.02 * plain


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_bits_are_summed_on_a_gpu_as_on_a_cpu(dtype):
    tensor = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(50).abs_().to(dtype)[:-3]
    assert bit_sums(tensor.cuda()) == bit_sums(tensor)
