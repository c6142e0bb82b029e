"""What lies in memory for the whole run: a table printed at the start, so that no copy is hidden."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.memory.bar import TRAINED
from qlora_lite.models.anatomy import text_config
from qlora_lite.models.memory_options import divided_weights, on_disk, on_host, stream_of
from qlora_lite.offload.gradients import ToOwners
from qlora_lite.quant.formats import FORMATS, FOUR_BIT
from qlora_lite.quant.linear import QuantLinear
from qlora_lite.quant.packed import PackedWeight

from .workload import Workload


@dataclass(frozen=True, slots=True)
class Entry:
    """One group of tensors: bytes on a device, and why they are there in this type."""

    group: str
    dtype: str
    device: str
    bytes: int
    why: str


def inventory(workload: Workload, model: nn.Module) -> list[Entry]:
    """Return the model's parameters and buffers by group, type and device, each storage counted once."""
    groups: dict[tuple[str, str, str, str], int] = {}
    seen: set[int] = set()
    for tensor, group, why in categorised(workload, model):
        storage = tensor.untyped_storage()
        if storage._cdata in seen:
            continue
        seen.add(storage._cdata)
        key = (group, str(tensor.dtype).removeprefix("torch."), str(tensor.device), why)
        groups[key] = groups.get(key, 0) + storage.nbytes()
    return sorted((Entry(g, t, d, size, why) for (g, t, d, why), size in groups.items()), key=lambda e: -e.bytes)


def categorised(workload: Workload, model: nn.Module) -> Iterator[tuple[torch.Tensor, str, str]]:
    """Yield every parameter and buffer with its category (see ``memory.ledger``) and why it is there in this type."""
    embedding, head = workload.spec.tables(model)
    stream, divided = stream_of(model), divided_weights(model)
    slots = {slot.untyped_storage()._cdata for slot in stream.slots} if stream and divided else set()
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor in divided or tensor.untyped_storage()._cdata in slots:
                continue  # the former takes no memory, the latter is a copy
            if on_disk(model, tensor):
                yield tensor, "on disk", "in the prepared model's file; read when it is needed"
            elif on_host(model, module, tensor):
                yield tensor, "offloaded", "in host memory; travels to the device when it is needed"
            else:
                yield (tensor, *_category(module, name, tensor, embedding, head, workload.method.trains_base))
    if stream:
        for slot in stream.slots:
            yield slot, "base weights", "room for a streamed block"
        kind = TRAINED[True] if divided else "base weights"
        for shard in stream.shards:
            yield shard, kind, "this rank's part of a block, put together when it is needed"
        if isinstance(gradients := stream.placement.gradients, ToOwners):
            yield gradients.buffer, "gradients", "room for those of a block, until ranks add them up"
        for buffer in stream.buffers:
            what = (
                "this rank's part of a block" if stream.placement.gathers else "room for one that is read from the disk"
            )
            yield buffer, "offloaded", f"in host memory: {what}"


def _category(module, name, tensor, embedding, head, trains_base) -> tuple[str, str]:
    if tensor.requires_grad:
        return TRAINED[trains_base], "trained; the gradient has the same size and type"
    if module is head and isinstance(module, QuantLinear):
        return "head", f"{module.quant_type}, because of model.quant_head"
    if isinstance(module, PackedWeight) and name == "weight":
        return "base weights", f"{FORMATS[module.quant_type].about}, never dequantised for longer than a product"
    if isinstance(module, PackedWeight) and name != "bias":
        constants = "absmax of 64 weights, quantised again if model.double_quant"
        return "quantisation constants", constants if module.quant_type in FOUR_BIT else "of the codes, as published"
    if module is embedding:
        tied = head is not None and getattr(head, "weight", None) is tensor
        return "embeddings", "the compute type; " + ("also the head (tied)" if tied else "only rows are read")
    if module is head:
        return "head", "the compute type; a 4-bit head would cost accuracy"
    if isinstance(tensor, nn.Parameter) and tensor.ndim >= 2:
        return "base weights", "frozen, not quantised"
    return "base weights", "norms, biases, tables: small and sensitive to rounding"


def total_parameters(model: nn.Module, method: AdapterMethod) -> int:
    """Return the number of weights of the model without the adapter, 4-bit ones counted whole."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    plain = sum(parameter.numel() for parameter in {*frozen, *method.trained_base(model)})
    head = model.get_output_embeddings()
    copy = head if head is not None and getattr(text_config(model), "tie_word_embeddings", False) else None
    packed = [m for m in model.modules() if isinstance(m, PackedWeight) and m is not copy]
    return plain + sum(prod(m.shape) for m in packed)
