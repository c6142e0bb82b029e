"""Choose a model's linear layers by name and wrap them with LoRA weights, and put such beside the weights of experts.

Targets are ``"all-linear"`` (every linear layer inside the decoder blocks; never the head or a vision tower),
``"experts"`` (the weights of all fused experts), plain names such as ``"q_proj"`` or ``"gate_up_proj"`` (the last part
of a path), or glob patterns over the whole path such as ``"model.layers.*.mlp.*"``. A name or pattern that matches
linear layers means those alone, so that experts are adapted only where that was asked for. A pattern may carry its own
rank and alpha; where several match, the last one wins. A target that matches nothing is an error, since silence would
train less than was asked for.
"""

import math
from collections import Counter
from collections.abc import Collection, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from inspect import signature
from typing import Never

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lite.errors import ModelError, matches_nothing, require_one_of
from qlora_lite.experts.packing import LORA, expert_weights, use_experts
from qlora_lite.memory.marks import category, once_a_step
from qlora_lite.offload.own_blocks import OwnBlocks
from qlora_lite.quant.formats import FOUR_BIT
from qlora_lite.quant.linear import QuantLinear, frozen_weight, is_linear, is_linear_16_bit, of_mamba, untouched
from qlora_lite.quant.merging import GGUF, GGUF_BLOCK, NF4, OFF
from qlora_lite.quant.product import merged

from ..parts import has_vision_tower, head_paths
from .dora import DoraLinear
from .layer import LoraExperts, LoraLinear, LoraWeights, merging_of
from .shared import share_inputs

ALL_LINEAR, EXPERTS = "all-linear", "experts"
_PEFT_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "use_rslora": "rslora",
    "use_dora": "dora",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A name or glob pattern of layers or experts to adapt, with its own rank and alpha where they differ.

    Raises:
        ModelError: one of these is invalid.
    """

    pattern: str
    rank: int | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        _check_factors(1 if self.rank is None else self.rank, 1 if self.alpha is None else self.alpha)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer but those of the head and ``untouched`` ones by path: those that LoRA may wrap."""
    head, left_out = model.get_output_embeddings(), untouched(model) | head_paths(model)
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and module is not head and name not in left_out
    }


def sharing_layers(model: nn.Module) -> set[str]:
    """Return the paths of the linear layers in 16 bit whose weight is another's too, as Zamba's blocks have them."""
    weights = {path: id(layer.weight) for path, layer in linear_layers(model).items() if is_linear_16_bit(layer)}
    counts = Counter(weights.values())
    return {path for path, weight in weights.items() if counts[weight] > 1}


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a model, which transformers marks by their class, by path, in order."""
    if isinstance(model, OwnBlocks):
        return {path: model.get_submodule(path) for path in model.block_paths()}
    return {path: m for path, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)}


def in_blocks(model: nn.Module) -> set[str]:
    """Return the paths of everything inside the blocks of a model; all of its paths, where nothing is marked."""
    blocks = blocks_of(model)
    if not blocks:
        return {path for path, _ in model.named_modules()}
    return {f"{path}.{name}" for path, block in blocks.items() for name, _ in block.named_modules()}


def usually_adapted(model: nn.Module) -> set[str]:
    """Return the paths that "all-linear" means: all inside of blocks, but for a vision tower's beside a language model,
    and for those of Mamba layers whose weights fused kernels read past the LoRA weights, which peft refuses too."""
    inside = in_blocks(model) - of_mamba(model, "x_proj", "out_proj")
    if not has_vision_tower(model):
        return inside
    decoder = next(path for path, module in model.named_modules() if module is model.get_decoder())
    return {path for path in inside if path.startswith(f"{decoder}.")}


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or name.rpartition(".")[2] == pattern


def matching(
    linear: Collection[str], experts: Collection[str], targets: Sequence[Target], inside: Container[str]
) -> dict[str, tuple[int, ...]]:
    """Return which of the targets match each layer, and each weight of experts, by number; see ``choose_layers``."""

    def matched(pattern: str) -> Collection[str]:
        if pattern == ALL_LINEAR:
            return {name for name in linear if name in inside}
        if pattern == EXPERTS:
            return experts
        found = {name for name in linear if _matches(pattern, name)}
        return found or {name for name in experts if _matches(pattern, name)}

    of_targets = [matched(target.pattern) for target in targets]
    return {
        name: tuple(number for number, names in enumerate(of_targets) if name in names) for name in (*linear, *experts)
    }


def choose_layers(
    linear: Collection[str],
    experts: Collection[str],
    targets: Sequence[Target],
    inside: Container[str],
    setting: str = "lora.targets",
) -> dict[str, Target]:
    """Return the target of each chosen layer, and of each chosen weight of experts.

    Args:
        linear: paths of the layers there are.
        experts: paths of the weights of experts.
        inside: the paths that "all-linear" means.
        setting: that the targets are of, for messages.

    Raises:
        ModelError: targets that match no layer, all of them at once, each with the nearest names.
    """
    found, names = matching(linear, experts, targets, inside), (*linear, *experts)
    used = {number for numbers in found.values() for number in numbers}
    if unmatched := [target.pattern for number, target in enumerate(targets) if number not in used]:
        known = {name.rpartition(".")[2] for name in names} | ({EXPERTS} if experts else set())
        what = "linear layer or weight of experts" if experts else "linear layer"
        raise ModelError(f"{setting}: {matches_nothing(unmatched, known, what)}")
    return {name: targets[numbers[-1]] for name, numbers in found.items() if numbers}


def add_lora(
    model: nn.Module,
    targets: str | Sequence[str | Target] = ALL_LINEAR,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    rslora: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    dora: bool = False,
    merge_aware: str = OFF,
    **unknown: Never,
) -> nn.Module:
    """Freeze the model, wrap the chosen linear layers in place and adapt the chosen experts; return the model.

    Args:
        targets: ``"all-linear"``, ``"experts"``, or names, glob patterns and ``Target`` objects.
        rank, alpha, dropout, rslora, dtype: see ``LoraLinear``.
        dora: learn the norms of the adapted weights' rows too; see ``dora``.
        merge_aware: "off", or "nf4", "q4_0" or "q8_0" to compute with the weights that merging into that format will
            leave; see ``quant.merging``. Layers in 16 bit beside NF4 ones have their updates beside them.
        unknown: other names of these, such as peft's, for an error that names the one here.

    Raises:
        ModelError: a target matches no layer, there are LoRA layers already, or an argument is invalid, such as
            dropout or dora for experts.
    """
    if unknown:
        raise ModelError(_why_unknown(min(unknown)))
    require_base(model)
    wanted = _as_targets(targets)
    _check_factors(rank, alpha)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ModelError(f"dropout is {dropout!r}; give a number of at least 0 and below 1")
    # gradients of LoRA weights in float16 would be lost where the scale of the loss is taken out of them
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype == torch.float16:
        raise ModelError(f"dtype is {dtype!r}; give torch.bfloat16 or torch.float32")
    layers, experts, kind = linear_layers(model), expert_weights(model), DoraLinear if dora else LoraLinear
    idle = set(model.idle_layers()) if isinstance(model, OwnBlocks) else set()
    usual = usually_adapted(model) - idle
    chosen = choose_layers(layers, experts, wanted, usual)
    adapted = experts.keys() & chosen.keys()
    if adapted and (dropout or dora):
        is_set, cure = ("adapter.method dora", "to lora") if dora else (f"lora.dropout {dropout:g}", "to 0")
        raise ModelError(
            f"{is_set} is for linear layers, and lora.targets name experts too, such as {min(adapted)}: "
            f"set it {cure}, or leave the experts out"
        )
    if merge_aware != OFF:
        _check_merging(merge_aware, [layers[path] for path in chosen.keys() - adapted], adapted or dropout or dora)
        _check_all_merged(
            merge_aware, {*choose_layers(layers, {}, _as_targets(ALL_LINEAR), usual), *experts} - {*chosen}
        )
    model.requires_grad_(False)
    for name, target in chosen.items():
        if projection := experts.get(name):
            own = LoraExperts(projection, target.rank or rank, target.alpha or alpha, rslora, dtype)
            projection.experts.add_module(LORA + projection.name, own.train(model.training))
            continue
        wrapped = kind(layers[name], target.rank or rank, target.alpha or alpha, dropout, rslora, dtype)
        wrapped.path = name
        wrapped.merging = merging_of(layers[name], merge_aware, wrapped.scale, name)
        wrapped.train(model.training)
        model.set_submodule(name, wrapped)
    share_inputs(model)
    if adapted:
        use_experts(model)
    return model


def _why_unknown(name: str) -> str:
    known = [argument for argument in signature(add_lora).parameters if argument != "unknown"]
    meant = _PEFT_NAMES.get(name) or next(iter(get_close_matches(name, known, 1)), None)
    return f"add_lora has no argument {name}; " + (f"here it is {meant}" if meant else f"it has {', '.join(known)}")


def _check_merging(to: str, layers: Sequence[nn.Module], not_plain: object) -> None:
    """Check that the updates of layers can be merged into a format while they are trained.

    Raises:
        ModelError: they cannot.
    """
    require_one_of("merge_aware", to, (OFF, NF4, *GGUF))
    if not_plain:
        raise ModelError(
            f"train.merge_aware {to} is for LoRA beside linear layers, without dropout, DoRA or experts; set it to off"
        )
    specs = [frozen_weight(layer)[0] for layer in layers]
    kinds = {spec.quant_type for spec in specs}
    if kinds - {None, *([NF4] if to == NF4 else FOUR_BIT)} or (to == NF4 and NF4 not in kinds):
        found = ", ".join(sorted(kind or "16 bit" for kind in kinds))
        raise ModelError(
            f"train.merge_aware {to}: the adapted weights are in {found} and would be quantised twice; set it to off"
        )
    multiple = 2 if to == NF4 else GGUF_BLOCK
    if odd := {spec.shape[1] for spec in specs if spec.shape[1] % multiple}:
        raise ModelError(
            f"train.merge_aware {to}: a weight has rows of {min(odd)}, no multiple of {multiple}; set it to off"
        )


def _check_all_merged(to: str, left: Collection[str]) -> None:
    """Check that no matrix of the blocks would be rounded in a file and not in training.

    Args:
        left: paths of those without an update.

    Raises:
        ModelError: some would.
    """
    if to in GGUF and left:
        raise ModelError(
            f"train.merge_aware {to}: a GGUF file of that type rounds every matrix of the blocks, and "
            f"{len(left)} would be trained as they are now, such as {min(left)}: adapt all linear layers "
            "(lora.targets: [all-linear]) of a model without experts, or set it to off"
        )


def require_model(model: object) -> nn.Module:
    """Check that a function was given a model of transformers, and return it.

    Raises:
        ModelError: it is something else, such as the path of one.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings"):
        raise ModelError(f"a model is wanted, not {type(model).__name__}; qlora_lite.load_model(PATH) loads one")
    return model


def require_base(model: object) -> None:
    """Check that a function was given a model without LoRA layers.

    Raises:
        ModelError: it has some, or is not a model.
    """
    if any(lora_layers(require_model(model))):
        raise ModelError("the model has LoRA layers already; load the base model again, or train those that it has")


def require_lora(model: nn.Module) -> None:
    """Check that a model has LoRA layers.

    Raises:
        ModelError: it has none, or is not a model.
    """
    require_model(model)
    if not any(lora_layers(model)):
        raise ModelError("the model has no LoRA layers; call add_lora first")


def _as_targets(targets: str | Sequence[str | Target]) -> list[Target]:
    listed = [targets] if isinstance(targets, str | Target) else targets
    if not isinstance(listed, list | tuple) or not listed or not all(isinstance(t, str | Target) for t in listed):
        raise ModelError(
            f"targets must be {ALL_LINEAR!r}, or a list of layers' names and glob patterns, not {targets!r}"
        )
    return [target if isinstance(target, Target) else Target(target) for target in listed]


def _check_factors(rank: object, alpha: object) -> None:
    if not isinstance(rank, int) or rank < 1:
        raise ModelError(f"rank is {rank!r}; give a whole number of at least 1")
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ModelError(f"alpha is {alpha!r}; give a number above 0")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraWeights]]:
    """Yield the wrapped layers of a model with their paths, and what adapts its experts with the path of the weight."""
    for name, module in model.named_modules():
        if isinstance(module, LoraExperts):
            path, _, leaf = name.rpartition(".")
            yield f"{path}.{leaf.removeprefix(LORA)}", module
        elif isinstance(module, LoraWeights):
            yield name, module


@contextmanager
def merged_once(model: nn.Module) -> Iterator[None]:
    """Keep the merged weights of layers with ``caches_merged`` for all products inside. No LoRA weight may change."""
    layers = [
        layer
        for _, layer in lora_layers(model)
        if isinstance(layer, LoraLinear) and layer.caches_merged and layer.merged is None
    ]
    try:
        with torch.no_grad(), once_a_step(), category("base weights"):
            for layer in layers:
                layer.merged = merged(*layer.described)
        yield
    finally:
        for layer in layers:
            layer.merged = None


def put_merged_in_place(model: nn.Module) -> None:
    """Put frozen layers with the merged weights in the place of layers with ``merging``: a model to use, whose weights
    stay where they are."""
    for path, layer in list(lora_layers(model)):
        if isinstance(layer, LoraLinear) and layer.merging is not None:
            (spec, tensors), base = merged(*layer.described), layer.base
            frozen = QuantLinear.from_packed(tensors, spec.shape, base.bias, spec.quant_type, base.weight.dtype)
            model.set_submodule(path, frozen.train(model.training))


def lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trainable weights of a model with their paths, layer by layer: A, B, and of DoRA the magnitudes."""
    for name, layer in lora_layers(model):
        for leaf, parameter in layer.named_parameters(recurse=False):
            yield f"{name}.{leaf}", parameter
