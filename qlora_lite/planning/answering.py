"""Place a model that only answers: weights on the device as far as they fit beside a prompt, the others on the host.

Answers need far less memory than training does, and whatever lies in host memory comes over the bus for every token: so
the memory options of training are not taken over, and nothing stays on the host that has room on the device.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from qlora_lite.memory.marks import phase
from qlora_lite.memory.meter import free_bytes, held_bytes
from qlora_lite.memory.process import CUDA_CONTEXT_BYTES, CUDA_LATER_BYTES, overheads
from qlora_lite.memory.shapes import planning_for
from qlora_lite.memory.work import WorkCounter
from qlora_lite.models.anatomy import blocks, decoder
from qlora_lite.models.load import uses_row_attention
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.offload.offload import pinned_bytes
from qlora_lite.offload.stream import SLOTS, flat_sizes, spare_bytes
from qlora_lite.train.out_of_memory import free_cached_memory

from .meta_results import NeedsValuesError
from .plan_ledger import PlanLedger
from .simulate import remembered

MAX_PROMPTS = 32  # that are read at once
UNPLANNED = 1.25  # times what is planned for prompts is more than they took (tests/planning/test_answering.py)
UNKNOWN_SHARE = 0.25  # of the memory: for a prompt of a model that cannot run without values


def memory_to_use(device: torch.device, budget_bytes: int | None) -> int | None:
    """Return what a model may take of a GPU, in bytes; None for a CPU, whose memory is the host's."""
    if device.type != "cuda":
        return None
    free_cached_memory(device)  # of a model before this one
    free = free_bytes(device) - CUDA_LATER_BYTES
    return free if budget_bytes is None else min(free, budget_bytes - CUDA_CONTEXT_BYTES - held_bytes(device))


def placement(model: nn.Module, tokens: int, memory_bytes: int, host_bytes: int | None = None) -> MemoryOptions:
    """Return the fastest way to place a model's weights that fits beside a prompt, or the one that needs least.

    Args:
        model: as it would be loaded, on the meta device.
        tokens: of the longest prompt.
        memory_bytes: of the device.
        host_bytes: of the host, free; streamed weights that it has no room for stay on the disk.
    """
    try:
        room = memory_bytes - prompt_bytes(model, tokens)
    except NeedsValuesError:
        room = int((1 - UNKNOWN_SHARE) * memory_bytes)
    for options in _placements(model):
        if bytes_on_device(model, options) <= room:
            break
    if options.resident_layers is None or host_bytes is None or bytes_on_host(model, options) <= host_bytes:
        return options
    return replace(options, stream_from="disk")


def prompt_bytes(model: nn.Module, tokens: int, prompts: int = 1, device_type: str = "cuda") -> int:
    """Return what prompts take of a device when they are read: keys and values, and what is computed on the way.

    Args:
        tokens: of each prompt.
        prompts: how many are read at once.

    Raises:
        NeedsValuesError: the model cannot run on the meta device.
    """
    ids = torch.zeros((prompts, tokens), dtype=torch.int64, device="meta")
    no_mask = {"attention_mask": ids.new_empty((prompts, 1, 0, 0))} if uses_row_attention(model) else {}
    counter = WorkCounter()
    ledger = PlanLedger(device_type, work=counter, run=remembered)
    with planning_for(device_type), torch.no_grad(), ledger, phase("forward"):
        ledger.claim((*model.parameters(), *model.buffers()), "base weights")
        before = ledger.now()
        decoder(model)(input_ids=ids, position_ids=torch.arange(tokens, device="meta")[None], use_cache=True, **no_mask)
    beside = sum(
        each.bytes for each in overheads(device_type, ledger.peaks.values(), before, counter.work.compiled_products)
    )
    return ledger.peak.total - before.total + beside - (CUDA_CONTEXT_BYTES if device_type == "cuda" else 0)


def prompts_at_once(model: nn.Module, tokens: int, room_bytes: float, device_type: str) -> int:
    """Return how many prompts can be read at once, a power of two up to ``MAX_PROMPTS``; 1 where not even one fits.

    Args:
        model: on the meta device.
        tokens: of the longest prompt with its answer.
        room_bytes: what is left of the device beside the loaded model.
    """
    prompts = MAX_PROMPTS
    try:
        while prompts > 1 and UNPLANNED * prompt_bytes(model, tokens, prompts, device_type) > room_bytes:
            prompts //= 2
    except NeedsValuesError:  # then memory that runs out on the way says it
        return MAX_PROMPTS
    return prompts


def left_on_host(options: MemoryOptions, depth: int) -> str:
    """Say what lies in host memory, and what on a disk, of a model with so many blocks."""
    streamed, on_disk = f"{options.streamed_of(depth)} of {depth} blocks", options.weights_on_disk
    left = {
        "embeddings": options.host_embeddings,
        "head": options.host_head,
        streamed: options.streamed_of(depth) and not on_disk,
    }
    in_memory = ", ".join(filter(left.get, left)) or "nothing"
    return in_memory + (f"; on the disk: {streamed}" if on_disk else "")


def _placements(model: nn.Module) -> Iterator[MemoryOptions]:
    """Yield ways to place the weights, from the fastest to the smallest.

    Of embeddings in host memory only the rows of the batch travel. A head there travels whole, as a block does.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    alone = embedding.weight is not head.weight
    yield MemoryOptions()
    yield MemoryOptions(host_embeddings=alone)
    for resident in reversed(range(len(blocks(model)) - SLOTS)):  # fewer streamed ones than slots would save nothing
        yield MemoryOptions(host_embeddings=alone, resident_layers=resident)
    if isinstance(head, nn.Linear):
        yield MemoryOptions(host_embeddings=True, host_head=True, resident_layers=0)


def bytes_on_device(model: nn.Module, options: MemoryOptions) -> int:
    """Return what a model's weights take of the device as ``memory_options.place`` leaves them."""
    tables = [
        (model.get_input_embeddings(), options.host_embeddings),
        (model.get_output_embeddings(), options.host_head),
    ]
    elsewhere = {id(table.weight) for table, on_host in tables if on_host}
    found = [] if options.resident_layers is None else blocks(model)
    streamed = [_weights(block) for block in found[: options.streamed_of(len(found))]]
    for weights in streamed:
        elsewhere |= weights.keys()
    resident = sum(size for key, size in _weights(model).items() if key not in elsewhere)
    return resident + SLOTS * max((sum(weights.values()) for weights in streamed), default=0)


def bytes_on_host(model: nn.Module, options: MemoryOptions) -> int:
    """Return what a model's weights take of host memory beside a GPU, as ``memory_options.place`` leaves them: all is
    pinned but embeddings that are not the head."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tables = pinned_bytes(head.nbytes) if options.host_head else 0
    tables += embeddings.nbytes if options.host_embeddings and not (options.host_head and embeddings is head) else 0
    found = [] if options.resident_layers is None else blocks(model)
    sizes = flat_sizes(found[: options.streamed_of(len(found))])
    return tables + sum(sizes) + spare_bytes(sizes)


def _weights(module: nn.Module) -> dict[int, int]:
    """Return the bytes of a module's parameters and buffers, each once."""
    return {id(tensor): tensor.nbytes for tensor in (*module.parameters(), *module.buffers())}
