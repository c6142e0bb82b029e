"""What lowers a model's memory and not its result: the settings, and putting them into a model.

Where weights lie (``place``) is decided once, before training; how blocks run (``set_memory_options``) can be changed
at any time. The module that does the work is named beside each memory option; ``planning.search`` chooses among them.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from qlora_lite.adapters.lora.inject import lora_layers
from qlora_lite.constraints import DIVIDED_ON_GPUS
from qlora_lite.errors import ModelError
from qlora_lite.kernels.token_rows import EmbeddingWithRows, HeadWithRows
from qlora_lite.memory.shapes import is_planned
from qlora_lite.offload import compiled
from qlora_lite.offload.checkpoint import Checkpoint, Segments, Skipping
from qlora_lite.offload.divided import Divided, TrainedOnAllRanks
from qlora_lite.offload.offload import HostStore
from qlora_lite.offload.own_blocks import OwnBlocks
from qlora_lite.offload.stream import (
    UNDIVIDED,
    BlockStream,
    Division,
    InHostMemory,
    OnAllRanks,
    PlacementFactory,
    PlannedRanks,
    Ranks,
    in_files,
)
from qlora_lite.offload.tile import Tiled
from qlora_lite.quant.product import keeping_weights

from .anatomy import blocks, decoder, device_of, tokenwise_parts
from .host_tables import HostEmbedding, HostHead
from .kernels import KERNELS, use_kernels

# What the recipe calls otherwise: its key, and its words for values.
_IN_A_RECIPE: dict[str, tuple[str, dict[Any, str]]] = {
    "host_embeddings": ("embeddings", {False: "device", True: "host"}),
    "host_head": ("head", {False: "device", True: "host"}),
    "tile_tokens": ("tile_tokens", {None: "off"}),
    "resident_layers": ("resident_layers", {None: "all"}),
}
_streams: WeakKeyDictionary[nn.Module, BlockStream] = WeakKeyDictionary()  # by model


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """How memory is traded for time, without arguments by checkpointing alone; names and meanings are the recipe's.

    ``uncheckpointed_layers`` and ``layers_per_checkpoint`` count only where blocks are recomputed;
    ``loss_chunk_tokens`` None takes the default, ``tile_tokens`` None runs MLPs and norms whole, ``resident_layers``
    None streams nothing. ``compile`` is the train section's. ``offload_folder`` counts only with
    ``offload_checkpoints``, and ``stream_from`` only with ``resident_layers``. ``kernels`` "auto" allows a GPU's
    fused kernels (``models.kernels``), "plain" none. ``shards`` is no setting: how streamed blocks are divided among
    ranks, on their devices ("ranks") or in their host memory.
    """

    checkpointing: str = "block"
    uncheckpointed_layers: int = 0
    layers_per_checkpoint: int = 1
    loss_chunk_tokens: int | None = None
    tile_tokens: int | None = None
    host_embeddings: bool = False
    host_head: bool = False
    offload_checkpoints: bool = False
    resident_layers: int | None = None
    optimizer_in_backward: bool = False
    cache_dequantized: bool = False
    cache_merged: bool = False
    compile: bool = False
    offload_folder: str | None = None
    stream_from: str = "host"
    kernels: str = "auto"
    shards: Division = UNDIVIDED

    @property
    def settings(self) -> dict[str, object]:
        """The keys of a recipe's memory section (``compile`` is the train section's), with values in its words."""
        said = {}
        for field in fields(self):
            key, words = _IN_A_RECIPE.get(field.name, (field.name, {}))
            value = getattr(self, field.name)
            said[key] = words.get(value, value)
        del said["shards"]
        return said

    @property
    def recomputes(self) -> bool:
        """Whether a block's backward computes the block again; "selective" does so too, but for its attention."""
        return self.checkpointing != "none"

    @property
    def is_of_second_runs(self) -> bool:
        """Whether anything in it is of use only where blocks are recomputed."""
        return (
            self.uncheckpointed_layers > 0
            or self.layers_per_checkpoint > 1
            or self.offload_checkpoints
            or self.resident_layers is not None
            or (self.cache_dequantized and self.tile_tokens is None)
        )

    @property
    def allowed_kernels(self) -> tuple[str, ...]:
        """The fused kernels that a model may compute with; a compiler makes its own of all of them."""
        return KERNELS if self.kernels == "auto" and not self.compile else ()

    @property
    def dequantizes_once(self) -> bool:
        """Whether weights dequantised for a recomputation, or for a tile, serve what follows too."""
        return self.cache_dequantized and (self.recomputes or self.tile_tokens is not None)

    def streamed_of(self, depth: int) -> int:
        """Return how many of a model's blocks, the first ones, have their weights streamed."""
        return 0 if self.resident_layers is None else max(0, depth - self.resident_layers)

    @property
    def host_rank(self) -> tuple[bool, bool, bool, bool, bool]:
        """What lies on the disk, in host memory or on other ranks: blocks, checkpoints, head, embeddings; larger tuples
        ask more of the disk or the bus."""
        streams = self.resident_layers is not None
        return self.weights_on_disk, streams, self.offload_checkpoints, self.host_head, self.host_embeddings

    @property
    def uses_disk(self) -> bool:
        """Whether block inputs lie on a disk until backward."""
        return self.offload_checkpoints and self.offload_folder is not None

    @property
    def weights_on_disk(self) -> bool:
        """Whether streamed blocks come from a disk."""
        return self.stream_from == "disk" and self.resident_layers is not None

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of the streamed blocks."""
        return self.shards.count > 1 and self.stream_from != "disk" and self.resident_layers is not None

    @property
    def loads_from_files(self) -> bool:
        """Whether streamed blocks stay in the files that they are loaded from."""
        return self.weights_on_disk or self.is_sharded

    @property
    def places_weights(self) -> bool:
        """Whether ``place`` leaves any weights in host memory, on a disk or on other ranks."""
        return self.host_head or self.host_embeddings or self.resident_layers is not None


def memory_options_of(settings: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of ``MemoryOptions`` that settings in a recipe's words fix; "auto" and None fix nothing."""
    found = {}
    for field in fields(MemoryOptions):
        key, words = _IN_A_RECIPE.get(field.name, (field.name, {}))
        if (said := settings.get(key)) not in ("auto", None):
            found[field.name] = next((value for value, word in words.items() if word == said), said)
    return found


def place(
    model: nn.Module,
    device: torch.device,
    options: MemoryOptions,
    of_model: Sequence[nn.Module] | None = None,
    trains_base: bool = False,
    ranks: Ranks | None = None,
    in_files: bool = True,
) -> nn.Module:
    """Move a model from host memory to its device, but for what the memory options keep there; return it.

    Args:
        of_model: its blocks; None are those of a causal language model.
        trains_base: stream weights that are trained, too; an adapter's, which are few, stay on the device.
        ranks: among which sharded blocks are divided; None for a plan.
        in_files: the blocks that these load are pages of a file, and not in host memory.

    Raises:
        ModelError: of embeddings that are also the head only one is to stay on the host, the head is no 16-bit
            linear layer, a table that is to stay there is trained, or blocks are to be divided where there is one
            process.
    """
    if options.host_embeddings or options.host_head:
        _place_tables(model, device, options)
    found = blocks(model) if of_model is None else of_model
    streamed = found[: options.streamed_of(len(found))]
    staying = {id(part) for block in streamed for part in block.modules()}
    staying |= {id(module) for module in model.modules() if isinstance(module, HostEmbedding | HostHead)}
    for module in model.modules():
        for registry in (module._parameters, module._buffers):
            for tensor in registry.values():
                if tensor is not None and ((tensor.requires_grad and not trains_base) or id(module) not in staying):
                    tensor.data = tensor.data.to(device)
    if streamed:
        placement = _placement(options, ranks, in_files, trains_base)
        _streams[model] = BlockStream(streamed, device, placement, trains_base)
    return model


def _placement(options: MemoryOptions, ranks: Ranks | None, are_in_files: bool, trains_base: bool) -> PlacementFactory:
    if options.stream_from == "disk":
        return in_files
    if options.stream_from == "host" and options.shards.count == 1:
        return InHostMemory
    if not is_planned() and (ranks is None or ranks.count == 1):
        raise ModelError("memory.stream_from ranks divides the model among several processes, and this is the only one")
    found = ranks if ranks is not None and not is_planned() else PlannedRanks(options.shards)
    waits_on_host = options.stream_from == "host"
    if trains_base:
        if waits_on_host or len({*options.shards.weights}) > 1:
            raise ModelError(DIVIDED_ON_GPUS)
        return partial(TrainedOnAllRanks, ranks=found)
    return partial(
        OnAllRanks, ranks=found, weights=options.shards.weights, in_host_memory=waits_on_host, in_files=are_in_files
    )


def _place_tables(model: nn.Module, device: torch.device, options: MemoryOptions) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for key, table, on_host in (
        ("embeddings", embedding, options.host_embeddings),
        ("head", head, options.host_head),
    ):
        if on_host and (table.weight.requires_grad or isinstance(table, EmbeddingWithRows | HeadWithRows)):
            raise ModelError(
                f"memory.{key} host is for a frozen table, and this one is trained, or has rows that are "
                "(adapter.train_also, adapter.train_tokens): set it to device"
            )
    if options.host_embeddings != options.host_head and head is not None and embedding.weight is head.weight:
        raise ModelError("the embeddings are also the head: set memory.embeddings and memory.head to the same")
    if options.host_head and not isinstance(head, nn.Linear):
        raise ModelError(
            f"memory.head host is for a 16-bit head, and this one is a {type(head).__name__}: set it to device"
        )
    if options.host_embeddings:
        model.set_input_embeddings(HostEmbedding(embedding, device))
        _say_where_it_computes(model)
    if options.host_head:
        model.set_output_embeddings(HostHead(head, device))


def _say_where_it_computes(model: nn.Module) -> None:
    """Have ``model.device``, to which transformers' ``generate`` brings every input, be where the model computes.

    transformers takes it from the first parameter: the table in host memory. The class is the same in name and in
    ``isinstance``, as with torch's ``fully_shard``.
    """
    own = type(model)
    members = {"device": property(device_of), "__module__": own.__module__, "__doc__": own.__doc__}
    model.__class__ = type(own.__name__, (own,), members)


def stream_of(model: nn.Module) -> BlockStream | None:
    """Return what brings a model's streamed blocks to the device; None where ``place`` left all of them there."""
    return _streams.get(model)


def trained_on_host(model: nn.Module) -> Sequence[nn.Parameter]:
    """Return the weights that ``place`` left in host memory to be trained there."""
    stream = stream_of(model)
    return stream.trained if stream and not stream.placement.gathers else ()


def divided_weights(model: nn.Module) -> Mapping[nn.Parameter, Divided]:
    """Return the trained weights that are divided among ranks (``offload.divided``), those of each block in turn."""
    placement = stream.placement if (stream := stream_of(model)) else None
    return placement.weights if isinstance(placement, TrainedOnAllRanks) else {}


def settle(model: nn.Module) -> None:
    """Let a model's modules hold the weights that are trained, where copies on the device stand for them."""
    if stream := stream_of(model):
        stream.settle()


def on_host(model: nn.Module, module: nn.Module, tensor: torch.Tensor) -> bool:
    """Return whether a weight was left in host memory, or on a disk, by ``place``."""
    is_table = isinstance(module, HostEmbedding | HostHead) and tensor is module.weight
    return is_table or _is_streamed(model, tensor)


def on_disk(model: nn.Module, tensor: torch.Tensor) -> bool:
    """Return whether a weight was left by ``place`` in the file that it was loaded from."""
    stream = stream_of(model)
    return stream is not None and stream.holds(tensor) and stream.placement.in_files


def _is_streamed(model: nn.Module, tensor: torch.Tensor) -> bool:
    stream = stream_of(model)
    return stream is not None and stream.holds(tensor)


def set_memory_options(model: nn.Module, options: MemoryOptions, of_model: Sequence[nn.Module] | None = None) -> None:
    """Run the blocks as the memory options say, whatever was set before.

    Of the last ``uncheckpointed_layers`` blocks everything is kept although blocks are recomputed: they are free again
    before the first block is computed a second time, so that the two never add up.

    Args:
        of_model: its blocks; None are those of a causal language model.

    Raises:
        ModelError: streamed blocks would have to keep what they saved, nothing of the model can be tiled, weights that
            belong in host memory were not left there by ``place``, or blocks to compile merge LoRA weights into theirs.
    """
    # the operator that a compiler sees has no place for what is merged, see ``quant.product``
    merging = [layer for _, layer in lora_layers(model) if getattr(layer, "merging", None)]
    if options.compile and merging:
        raise ModelError(
            "train.compile would leave out the updates that layers merge into their weights: set it to "
            "false, or train.merge_aware to off"
        )
    found = list(blocks(model) if of_model is None else of_model)
    streamed = options.streamed_of(len(found))
    if (
        (streamed and stream_of(model) is None)
        or (options.host_embeddings and not isinstance(model.get_input_embeddings(), HostEmbedding))
        or (options.host_head and not isinstance(model.get_output_embeddings(), HostHead))
    ):
        raise ModelError(
            "memory.resident_layers, and memory.embeddings or memory.head host, are for a model that was "
            "loaded so: call models.memory_options.place before training, or leave them out"
        )
    if streamed and options.cache_merged and merging:
        raise ModelError(
            "merged weights are kept where weights are not streamed: set memory.cache_merged to false, "
            "or memory.resident_layers to all"
        )
    for layer in merging:
        layer.caches_merged = options.cache_merged
    checkpointed = max(0, len(found) - options.uncheckpointed_layers) if options.recomputes else 0
    if streamed and options.recomputes and options.layers_per_checkpoint > 1:
        raise ModelError(
            "streamed blocks are recomputed one by one: set memory.layers_per_checkpoint to 1, or "
            "memory.resident_layers to all"
        )
    if checkpointed < streamed:
        raise ModelError(
            "streamed blocks cannot keep their activations: raise memory.resident_layers, or lower "
            "memory.uncheckpointed_layers with memory.checkpointing=block or selective"
        )
    parameters = list(model.parameters())
    trained = next((p for p in parameters if p.requires_grad), parameters[-1])  # the last one stands outside of blocks
    device = device_of(model) if of_model is None else trained.device
    host = HostStore(device, options.offload_folder) if options.offload_checkpoints else None
    skipping: dict[tuple, Skipping] = defaultdict(Skipping)  # what is learned of one block holds for its kind
    selective, segments = options.checkpointing == "selective", Segments(options.layers_per_checkpoint, checkpointed)
    calls: dict[nn.Module, Callable] = {}
    for number, block in enumerate(found):
        around = _keeping(options, stay=False)  # until the block's own backward
        checkpoint = Checkpoint(
            number, host, skipping[_kind(block)], around, selective, options.compile, segments, partial(_trains, block)
        )
        if number < checkpointed or options.compile:
            calls[block] = checkpoint if number < checkpointed else compiled.value
    _run_blocks(model, found, calls)
    use_kernels(model, options.allowed_kernels)
    outside = [decoder(model)] if of_model is None else []  # of blocks
    tiled = sum(_set_tiles(module, options, skipping) for module in (*outside, *found))
    if options.tile_tokens and not tiled:
        raise ModelError(
            f"{type(model).__name__} has no part that is known to work token by token: set memory.tile_tokens to off"
        )


def _run_blocks(model: nn.Module, found: Sequence[nn.Module], calls: Mapping[nn.Module, Callable]) -> None:
    if isinstance(model, OwnBlocks):
        model.run_blocks(calls)
        return
    for block in found:  # the place that transformers documents for it
        block.gradient_checkpointing = block in calls
        block._gradient_checkpointing_func = calls.get(block, compiled.value)


def _kind(module: nn.Module) -> tuple[type, ...]:
    """Return what tells modules apart that run other products: Qwen3.5's blocks of both kinds are of one class."""
    return tuple(type(part) for part in module.modules())


def _trains(block: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())


def _keeping(options: MemoryOptions, stay: bool) -> Callable[[], AbstractContextManager]:
    return partial(keeping_weights, stay) if options.cache_dequantized else nullcontext


def _set_tiles(module: nn.Module, options: MemoryOptions, skipping: dict[tuple, Skipping]) -> int:
    for name, part in list(module.named_children()):
        if isinstance(part, Tiled):
            setattr(module, name, part.inner)
    if not options.tile_tokens:
        return 0
    names = tokenwise_parts(module)
    for name in names:
        part = getattr(module, name)
        around = _keeping(options, stay=True)  # from tile to tile
        setattr(module, name, Tiled(part, options.tile_tokens, skipping[_kind(part)], around))
    return len(names)
