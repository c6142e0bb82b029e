"""A recipe's base model: its files, its skeleton, and the model as training and inference load it."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from qlora_lite.adapters.files import begin_at, begin_with, keep_first
from qlora_lite.adapters.lora.start import First, load_first, take_first
from qlora_lite.adapters.read import adapter_bytes, begins_with_qera, changes_base, read_adapter
from qlora_lite.errors import DoesNotFitError
from qlora_lite.experts.packing import adapts_experts, expert_weights
from qlora_lite.memory.meter import free_bytes, set_memory_limit
from qlora_lite.models.anatomy import blocks
from qlora_lite.models.cache import base_fingerprint
from qlora_lite.models.load import name_of_base, resolve_device
from qlora_lite.models.locate import ModelFiles
from qlora_lite.models.memory_options import MemoryOptions, place, set_memory_options
from qlora_lite.offload.stream import Ranks
from qlora_lite.planning.answering import left_on_host, memory_to_use, placement
from qlora_lite.recipe.schema import Recipe

from .method import build_method
from .settings import fixed_options
from .start import keeps_initial, resolve_start, without_start
from .task import find_task
from .transformer import quantization

log = logging.getLogger(__name__)


def resolve_dtype(recipe: Recipe) -> torch.dtype:
    """Return the type that a recipe's model computes in on its device."""
    return find_task(recipe).compute_dtype(recipe, resolve_device(recipe.model.device))


def build_skeleton(recipe: Recipe) -> nn.Module:
    """Return a recipe's base model on the meta device; see ``Task.skeleton``."""
    return find_task(recipe).skeleton(recipe, resolve_dtype(recipe))


def fingerprint(recipe: Recipe, files: ModelFiles) -> str:
    """Return what names the base that a recipe's LoRA weights belong to, by its content and how it was split."""
    if (start := resolve_start(recipe)) is None:
        return base_fingerprint(files)
    return name_of_base(files, start, *quantization(recipe, files.config))


def build_model(
    recipe: Recipe,
    options: MemoryOptions | None = None,
    adapter: Path | None = None,
    first: First | None = None,
    ranks: Ranks | None = None,
) -> nn.Module:
    """Load a recipe's base model on its device, with LoRA weights, for training.

    Args:
        options: which of its weights stay in host memory, on a disk or on other ranks.
        adapter: see ``add_adapter``.
        first: what the LoRA weights begin as, of lora.start eva and qera.
        ranks: among which weights are divided.
    """
    task, device, options = find_task(recipe), resolve_device(recipe.model.device), options or MemoryOptions()
    where = "cpu" if options.places_weights else device
    model = task.load(recipe, where, resolve_dtype(recipe), options.loads_from_files)
    add_adapter(recipe, model, adapter)
    if first:
        begin_at(model, first)
        if keeps_initial(recipe):
            keep_first(model, first)
    return task.place(recipe, model, device, options, build_method(recipe).trains_base, ranks)


def add_adapter(recipe: Recipe, model: nn.Module, adapter: Path | None = None) -> nn.Module:
    """Add a recipe's LoRA weights to a base model (a skeleton, too); return the model.

    Args:
        adapter: folder of the adapter that lora.init_from means; None makes new LoRA weights.

    Raises:
        ModelError: a target matches no layer, or the adapter is not of the recipe's layers, ranks and scales.
    """
    first = read_adapter(model, adapter) if adapter else None
    torch.manual_seed(recipe.train.seed)
    build_method(recipe).apply(model)
    if any(expert_weights(model)) and not adapts_experts(model):
        log.info("the model's experts get no LoRA weights; lora.targets: [all-linear, experts] adapts them too")
    if adapter is None or first is None:
        return model
    if begins_with_qera(adapter):
        keep_first(model, load_first(adapter))
    return begin_with(model, first)


def build_to_use(
    recipe: Recipe, adapters: Sequence[Path] = (), context_tokens: int | None = None, use_cache: bool = True
) -> nn.Module:
    """Load a recipe's base model for answers and evaluations, its weights on the device as far as they fit.

    From then on the process is capped at ``memory.budget``.

    Args:
        adapters: folders of those that the device must have room for; they are for the caller to attach. Without any,
            the model is loaded as its files have it, whatever lora.start is.
        context_tokens: of the longest prompt with its answer that it must have room for; None is data.max_tokens.
        use_cache: keep and reuse the quantized model on disk.
    """
    task, device = find_task(recipe), resolve_device(recipe.model.device)
    # without fused kernels, which training alone tries
    tiles, options = (
        MemoryOptions(tile_tokens=fixed_options(recipe).get("tile_tokens"), kernels="plain"),
        MemoryOptions(),
    )
    memory = memory_to_use(device, recipe.memory.budget_bytes) if task.writes_text else None
    if memory is not None:
        set_memory_limit(device, None)  # loading may take more for a moment
        skeleton = build_skeleton(recipe)
        if tiles.tile_tokens:
            set_memory_options(skeleton, tiles)
        memory -= sum(adapter_bytes(folder) for folder in adapters)
        options = placement(skeleton, context_tokens or recipe.data.max_tokens, memory, free_bytes(torch.device("cpu")))
    where = "cpu" if options.places_weights else device
    as_trained = recipe if adapters else without_start(recipe)
    model = task.load(as_trained, where, resolve_dtype(recipe), options.weights_on_disk, use_cache)
    take_first(model)  # which training alone begins with
    if options.resident_layers is not None and any(map(changes_base, adapters)):
        raise DoesNotFitError(
            "the GPU has no room for all weights, and those of an adapter that has norms, biases or "
            "tables of its own cannot be brought to it one block at a time: merge it (qlora-lite "
            "merge), and use the merged model"
        )
    if options.places_weights:
        left = left_on_host(options, len(blocks(model)))
        log.warning("the GPU has no room for all weights, so that answers take longer; in host memory: %s", left)
        place(model, device, options)
    if tiles.tile_tokens:
        set_memory_options(model, tiles)
    set_memory_limit(device, recipe.memory.budget_bytes)
    return model
