"""What tests of levers share on a CPU and on a card: a tiny 4-bit model, its gradients, levers that change no bit."""

import tempfile

import torch
from counted import counted
from tiny import ARCHITECTURES, quantized_pair, random_batch, random_factors

from qlora_lite.adapters.lora.inject import add_lora, lora_parameters
from qlora_lite.memory.marks import phase
from qlora_lite.models.anatomy import device_of
from qlora_lite.models.levers import Levers, place, set_levers
from qlora_lite.models.quantizer import quantize_head
from qlora_lite.train.causal_lm import CausalLM
from qlora_lite.train.forward import prepare
from qlora_lite.train.step import accumulate_gradients, evaluate_loss, train_step_in_backward

PLAIN = Levers("none")
CPU = torch.device("cpu")
DEPTH = 5
FOLDER = tempfile.gettempdir()  # for files without a name, which are gone by themselves
SAME_ARITHMETIC = [
    Levers(), Levers(kept_blocks=2), Levers(offload_checkpoints=True), Levers(host_embeddings=True),
    Levers(host_head=True), Levers(resident_blocks=0), Levers(resident_blocks=2),
    Levers(resident_blocks=2, kept_blocks=2), Levers(resident_blocks=0, stream_from_disk=True),
    Levers(resident_blocks=1, stream_from_disk=True, offload_checkpoints=True, reuse_dequantized=True),
    Levers(resident_blocks=0, offload_checkpoints=True, host_embeddings=True, host_head=True),
    Levers(reuse_dequantized=True), Levers(reuse_dequantized=True, kept_blocks=2),
    Levers(reuse_dequantized=True, resident_blocks=1, offload_checkpoints=True),
    Levers("selective"), Levers("selective", kept_blocks=2, offload_checkpoints=True),
    Levers("selective", resident_blocks=1, offload_checkpoints=True, reuse_dequantized=True),
    Levers(checkpoint_every=2), Levers(checkpoint_every=DEPTH), Levers(checkpoint_every=2, kept_blocks=1),
    Levers(checkpoint_every=3, offload_checkpoints=True, reuse_dequantized=True),
    Levers("selective", checkpoint_every=2, offload_checkpoints=True, host_embeddings=True),
]  # fmt: skip
COPYING = [
    *(levers for levers in SAME_ARITHMETIC if any(levers.host_rank[:4])),
    Levers(resident_blocks=0, tile_tokens=20), Levers(resident_blocks=0, reuse_dequantized=True),
    Levers(resident_blocks=1, tile_tokens=20, reuse_dequantized=True, offload_checkpoints=True, kept_blocks=1),
    Levers("selective", resident_blocks=2, kept_blocks=1, offload_checkpoints=True, host_head=True),
]  # fmt: skip
FEW_WORDS = {"cpu": 48, "cuda": 48}  # of a vocabulary of 160, that a head is multiplied with at once


def build(model_type="llama", levers=PLAIN, dropout=0.0, device=CPU, quant_head=False, **changes):
    """A 4-bit model with random factors, its weights where the levers want them."""
    layers = {"num_hidden_layers": DEPTH} if model_type in ARCHITECTURES and model_type != "gpt2" else {}
    model = quantized_pair(model_type, **(layers | changes))[0]
    if quant_head:
        quantize_head(model, "nf4", True)
    add_lora(model, rank=4, dropout=dropout, dtype=torch.float32)
    random_factors(model)
    return place(model, device, levers)


def rotary_flops(model, tokens):
    """Return the operations of a Llama's rotary embedding, which is a product in transformers 5.17."""
    with phase("forward"), counted() as counter:
        model.model.rotary_emb(torch.zeros(1, tokens, 64), torch.arange(tokens)[None])
    return counter.work.flops


def gradients_of_steps(model, levers, between=lambda model: []):
    """Return the gradients of two steps, each of micro-batches of several lengths, the levers set once.

    Args:
        between: what else to do with the model after each step; gives more tensors to return.
    """
    set_levers(model.train(), levers)
    found = []
    for number, lengths in enumerate([((9, 14, 6), (40,)), ((30, 31), (3, 4), (50,))]):
        inputs = [prepare(random_batch(rows, seed=number), device_of(model)) for rows in lengths]
        accumulate_gradients(CausalLM().with_options(levers), model, inputs)
        for _, parameter in lora_parameters(model):
            found.append(parameter.grad)
            parameter.grad = None
        found += between(model)
    return found


def gradients(model, levers, batches=2):
    """Return the gradients of a step of several micro-batches, and its loss."""
    set_levers(model, levers)
    torch.manual_seed(0)
    inputs = [prepare(random_batch(seed=seed), device_of(model)) for seed in range(batches)]
    loss = accumulate_gradients(CausalLM().with_options(levers), model.train(), inputs).loss
    found = [parameter.grad for _, parameter in lora_parameters(model)]
    for _, parameter in lora_parameters(model):
        parameter.grad = None
    return [loss, *found]


def gradients_in_backward(model, levers):
    """Return what ``gradients`` does of one micro-batch, as the optimizer of a step that updates in backward saw it."""
    set_levers(model, levers)
    parameters = [parameter for _, parameter in lora_parameters(model)]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=1.0)  # whose state is the sum of the gradients that it saw
    step = train_step_in_backward(CausalLM().with_options(levers), model.train(), random_batch(seed=0), optimizer)
    assert all(parameter.grad is None for parameter in parameters)
    return [torch.tensor(step.loss), *(optimizer.state[parameter]["momentum_buffer"] for parameter in parameters)]


def losses_without_gradients(model):
    """Return the losses of an evaluation and of a forward in training mode, after which training goes on."""
    batches = [random_batch((5, 40)), random_batch(seed=2)]
    evaluated = evaluate_loss(CausalLM(), model, batches).loss
    with torch.no_grad():
        return [torch.tensor(evaluated), CausalLM().loss(model, prepare(batches[0], device_of(model))).sum]
