"""What tests of memory options share on a CPU and on a GPU: a tiny 4-bit model, its gradients, memory options that
change no bit."""

import tempfile

import torch
from counted import counted
from tiny import ARCHITECTURES, quantized_pair, random_batch, random_factors

from qlora_lite.adapters.lora.inject import add_lora, lora_parameters
from qlora_lite.memory.marks import phase
from qlora_lite.models.anatomy import device_of
from qlora_lite.models.memory_options import MemoryOptions, place, set_memory_options
from qlora_lite.models.quantizer import quantize_head
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.forward import prepare
from qlora_lite.train.step import accumulate_gradients, evaluate_loss, train_step_in_backward

PLAIN = MemoryOptions("none")
CPU = torch.device("cpu")
DEPTH = 4
FOLDER = tempfile.gettempdir()  # for files without a name, which are gone by themselves
SAME_ARITHMETIC = [
    MemoryOptions(),
    MemoryOptions(uncheckpointed_layers=2),
    MemoryOptions(offload_checkpoints=True),
    MemoryOptions(host_embeddings=True),
    MemoryOptions(host_head=True),
    MemoryOptions(resident_layers=0),
    MemoryOptions(resident_layers=2),
    MemoryOptions(resident_layers=2, uncheckpointed_layers=2),
    MemoryOptions(resident_layers=0, stream_from="disk"),
    MemoryOptions(resident_layers=1, stream_from="disk", offload_checkpoints=True, cache_dequantized=True),
    MemoryOptions(resident_layers=0, offload_checkpoints=True, host_embeddings=True, host_head=True),
    MemoryOptions(cache_dequantized=True),
    MemoryOptions(cache_dequantized=True, uncheckpointed_layers=2),
    MemoryOptions(cache_dequantized=True, resident_layers=1, offload_checkpoints=True),
    MemoryOptions("selective"),
    MemoryOptions("selective", uncheckpointed_layers=2, offload_checkpoints=True),
    MemoryOptions("selective", resident_layers=1, offload_checkpoints=True, cache_dequantized=True),
    MemoryOptions(layers_per_checkpoint=2),
    MemoryOptions(layers_per_checkpoint=DEPTH),
    MemoryOptions(layers_per_checkpoint=2, uncheckpointed_layers=1),
    MemoryOptions(layers_per_checkpoint=3, offload_checkpoints=True, cache_dequantized=True),
    MemoryOptions("selective", layers_per_checkpoint=2, offload_checkpoints=True, host_embeddings=True),
]
COPYING = [
    *(options for options in SAME_ARITHMETIC if any(options.host_rank[:4])),
    MemoryOptions(resident_layers=0, tile_tokens=20),
    MemoryOptions(resident_layers=0, cache_dequantized=True),
    MemoryOptions(
        resident_layers=1, tile_tokens=20, cache_dequantized=True, offload_checkpoints=True, uncheckpointed_layers=1
    ),
    MemoryOptions("selective", resident_layers=2, uncheckpointed_layers=1, offload_checkpoints=True, host_head=True),
]
FEW_WORDS = {"cpu": 48, "cuda": 48}  # of a vocabulary of 160, that a head is multiplied with at once


def build(model_type="llama", options=PLAIN, dropout=0.0, device=CPU, quant_head=False, **changes):
    """A 4-bit model with random factors, its weights where the memory options want them."""
    layers = {"num_hidden_layers": DEPTH} if model_type in ARCHITECTURES and model_type != "gpt2" else {}
    model = quantized_pair(model_type, **(layers | changes))[0]
    if quant_head:
        quantize_head(model, "nf4", True)
    add_lora(model, rank=4, dropout=dropout, dtype=torch.float32)
    random_factors(model)
    return place(model, device, options)


def rotary_flops(model, tokens):
    """Return the operations of a Llama's rotary embedding, which is a product in transformers 5.17."""
    with phase("forward"), counted() as counter:
        model.model.rotary_emb(torch.zeros(1, tokens, 64), torch.arange(tokens)[None])
    return counter.work.flops


def gradients_of_steps(model, options, between=lambda model: []):
    """Return the gradients of two steps, each of micro-batches of several lengths, the memory options set once.

    Args:
        between: what else to do with the model after each step; gives more tensors to return.
    """
    set_memory_options(model.train(), options)
    found = []
    for number, lengths in enumerate([((9, 14, 6), (40,)), ((30, 31), (3, 4), (50,))]):
        inputs = [prepare(random_batch(rows, seed=number), device_of(model)) for rows in lengths]
        accumulate_gradients(causal_lm().with_options(options), model, inputs)
        for _, parameter in lora_parameters(model):
            found.append(parameter.grad)
            parameter.grad = None
        found += between(model)
    return found


def gradients(model, options, batches=2):
    """Return the gradients of a step of several micro-batches, and its loss."""
    set_memory_options(model, options)
    torch.manual_seed(0)
    inputs = [prepare(random_batch(seed=seed), device_of(model)) for seed in range(batches)]
    loss = accumulate_gradients(causal_lm().with_options(options), model.train(), inputs).loss
    found = [parameter.grad for _, parameter in lora_parameters(model)]
    for _, parameter in lora_parameters(model):
        parameter.grad = None
    return [loss, *found]


def gradients_in_backward(model, options):
    """Return what ``gradients`` does of one micro-batch, as the optimizer of a step that updates in backward saw it."""
    set_memory_options(model, options)
    parameters = [parameter for _, parameter in lora_parameters(model)]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=1.0)  # whose state is the sum of the gradients that it saw
    step = train_step_in_backward(causal_lm().with_options(options), model.train(), random_batch(seed=0), optimizer)
    assert all(parameter.grad is None for parameter in parameters)
    return [torch.tensor(step.loss), *(optimizer.state[parameter]["momentum_buffer"] for parameter in parameters)]


def losses_without_gradients(model):
    """Return the losses of an evaluation and of a forward in training mode, after which training goes on."""
    batches = [random_batch((5, 40)), random_batch(seed=2)]
    evaluated = evaluate_loss(causal_lm(), model, batches).loss
    with torch.no_grad():
        return [torch.tensor(evaluated), causal_lm().loss(model, prepare(batches[0], device_of(model))).sum]
