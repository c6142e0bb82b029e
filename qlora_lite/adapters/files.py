"""Adapter files in the PEFT format: ``adapter_model.safetensors`` and a small ``adapter_config.json``.

Only keys that every peft of the last years and vLLM understand are written. Reading and its checks are in ``read``.
The files fit what ``AutoModelForCausalLM`` makes of the base model's files: see ``outside`` for models with a tower.
"""

import json
from collections.abc import Collection, Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qlora_lite.errors import ModelError, OutputError
from qlora_lite.experts.packing import LORA, expert_weights
from qlora_lite.files import replacing_folder, sha256
from qlora_lite.quant.linear import is_conv1d, stands_for_conv1d
from qlora_lite.quant.tensor_file import write_tensors

from .checkpoint_names import outside
from .lora.dora import DoraLinear
from .lora.inject import (
    ALL_LINEAR,
    Target,
    add_lora,
    linear_layers,
    lora_layers,
    lora_parameters,
    matching,
    require_base,
    require_lora,
)
from .lora.layer import LoraLinear, LoraWeights
from .lora.shared import forget_begun
from .method import AdapterMethod
from .read import CONFIG_NAME, WEIGHTS_NAME, Adapter, Factors, read_adapter, stored_names, tensor_names
from .saved import Saved

_SHOWN = 3  # names of layers in an error

_SUFFIXES = ".json", ".safetensors", ".jinja", ".model", ".txt"  # of an adapter's files and a tokenizer's


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the factors of a model under the names of the PEFT format."""
    tensors: dict[str, torch.Tensor] = {}
    layers = dict(lora_layers(model))
    stored = stored_names(model, layers)
    for name, layer in layers.items():
        names = tensor_names(stored[name])
        tensors |= {names[leaf]: parameter.detach() for leaf, parameter in layer.named_parameters(recurse=False)}
    return tensors


def adapter_config(model: nn.Module, base_model: str) -> dict:
    """Return the content of ``adapter_config.json``: the commonest rank and alpha, patterns for the rest."""
    layers = {outside(model, name): layer for name, layer in lora_layers(model)}
    first = next(iter(layers.values()))
    ranks, alphas = [layer.rank for layer in layers.values()], [layer.alpha for layer in layers.values()]
    rank, alpha = max(set(ranks), key=ranks.count), max(set(alphas), key=alphas.count)
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, LoraLinear)}
    experts = [outside(model, name) for name in expert_weights(model)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "target_modules": _target_modules(model, linear),
        **({"target_parameters": _by_leaf(layers.keys() - linear, experts)} if len(linear) < len(layers) else {}),
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
        "use_rslora": first.rslora,
        **({"use_dora": True} if _is_dora(layers) else {}),
        "fan_in_fan_out": any(stands_for_conv1d(layer.base) for layer in linear.values()),
        "bias": "none",
        "inference_mode": True,
    }


def _target_modules(model: nn.Module, layers: Collection[str]) -> list[str]:
    """Return the last parts of the adapted layers' paths, or whole paths where other layers have the same.

    Whole paths too where files have other names than the model (``outside``): a tower's layers may end alike.
    """
    every = {n for n, m in model.named_modules() if n in layers or (isinstance(m, nn.Linear) or is_conv1d(m))}
    return _by_leaf(layers, every | set(linear_layers(model)))


def _by_leaf(chosen: Collection[str], every: Collection[str]) -> list[str]:
    """Return the last parts of the chosen paths, or whole paths where others of all there are have the same."""
    leaves = {name.rpartition(".")[2] for name in chosen}
    by_leaf = {name for name in every if name.rpartition(".")[2] in leaves}
    return sorted(leaves if by_leaf == set(chosen) else chosen)


@dataclass(frozen=True)
class Lora(AdapterMethod):
    """Low-rank adapters beside linear layers, LoRA's or DoRA's, and experts; arguments are those of ``add_lora``."""

    targets: tuple[Target, ...] = (Target(ALL_LINEAR),)
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    dtype: torch.dtype = torch.bfloat16
    dora: bool = False

    def apply(self, model: nn.Module) -> None:
        """See ``add_lora``."""
        add_lora(model, self.targets, self.rank, self.alpha, self.dropout, self.rslora, self.dtype, self.dora)

    def config(self, model: nn.Module, base_model: str) -> dict:
        """See ``adapter_config``."""
        return adapter_config(model, base_model)

    def parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield A, B and DoRA's magnitudes, layer by layer.

        Raises:
            ModelError: the model has no LoRA layers.
        """
        require_lora(model)
        return lora_parameters(model)

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return the weights under the names of the PEFT format.

        Raises:
            ModelError: the model has no LoRA layers.
        """
        require_lora(model)
        return adapter_tensors(model)

    def layers_not_reached(self, model: nn.Module, norms: Mapping[str, float]) -> list[str]:
        """B begins at zero, so A's first gradient is zero by construction and B's is the one to look at."""
        return [name for name, _ in lora_layers(model) if not norms[f"{name}.lora_B"]]

    def lr_ratios(self, names: Sequence[str], loraplus: float) -> list[float]:
        """Return the ratio of LoRA+ for each B, and 1 for the rest."""
        return [loraplus if name.endswith(".lora_B") else 1.0 for name in names]

    def does_nothing(self, model: nn.Module) -> bool:
        """Return whether every B is still zero."""
        return not any(layer.lora_B.any() for _, layer in lora_layers(model))

    def layer_kinds(
        self, linear: Sequence[str], experts: Sequence[str], in_blocks: Container[str]
    ) -> Mapping[str, Hashable]:  # fmt: skip
        """Return which targets match each layer, and each weight of experts."""
        return matching(linear, experts, self.targets, in_blocks)

    def forget_pass(self, model: nn.Module) -> None:
        """Drop products that layers with one input had begun together."""
        forget_begun(model)


def save_adapter(
    model: nn.Module, folder: str | Path, base_model: str | Path = "", tokenizer=None,
    method: AdapterMethod = Lora(),
) -> str:  # fmt: skip
    """Write the adapter, and the tokenizer with its chat template if given; return the weights' SHA-256.

    Args:
        base_model: path or hub id of the model that it belongs to, as files are to name it.
        method: the one that the model was adapted by.

    Raises:
        ModelError: the model has no adapter, or a factor is not finite.
        OutputError: the folder cannot be written.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in method.files(model).items()}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ModelError(f"the adapter is not saved: {len(broken)} tensors are not finite, first {broken[0]}")
    write_adapter(Path(folder), tensors, method.config(model, str(base_model)), tokenizer)
    return sha256(Path(folder) / WEIGHTS_NAME)


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], config: dict, tokenizer=None) -> None:
    """Write an adapter folder in one step; one that is there is replaced, if it holds nothing else.

    Args:
        tensors: contiguous, on the host, under the names of the PEFT format.
        config: content of ``adapter_config.json``.
        tokenizer: written beside with its chat template, if given.

    Raises:
        OutputError: the folder cannot be written, or holds something else than an adapter.
    """
    there = [folder] if folder.is_file() else list(folder.iterdir()) if folder.is_dir() else []
    other = [path.name for path in there if not path.is_file() or path.suffix not in _SUFFIXES or path == folder]
    if there and (other or not (folder / CONFIG_NAME).is_file()):
        what = f"{other[0]}, which is no part of an adapter" if other else "something else than an adapter"
        raise OutputError(f"{folder} holds {what} and would be gone; choose another folder")
    with replacing_folder(folder) as new:
        write_tensors(new / WEIGHTS_NAME, tensors)
        (new / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(new)


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Add the layers that an adapter folder describes and fill them; return the model.

    Args:
        model: a base model without LoRA layers.
        folder: written by ``save_adapter`` or by peft.

    Raises:
        ModelError: see ``read_adapter``; or the model has LoRA layers already.
    """
    require_base(model)
    return attach_adapter(model, read_adapter(model, folder))


def attach_adapter(model: nn.Module, adapter: Adapter | Saved) -> nn.Module:
    """Add LoRA layers with an adapter's factors to a model without any, or those of its method; return the model."""
    if isinstance(adapter, Saved):
        return adapter.attach(model)
    targets = [Target(name, factors.rank, factors.alpha) for name, factors in adapter.layers.items()]
    first = next(iter(adapter.layers.values()))
    add_lora(
        model, targets, dropout=adapter.dropout, rslora=first.rslora, dtype=first.lora_A.dtype, dora=adapter.is_dora
    )
    where: torch.device = model.device
    device = torch.device("cpu") if where.type == "meta" else where
    layers = dict(lora_layers(model))
    for layer in layers.values():
        if layer.lora_A.device != device:  # the layer's weight is elsewhere until it is needed
            for leaf, parameter in list(layer.named_parameters(recurse=False)):
                setattr(layer, leaf, nn.Parameter(torch.empty_like(parameter, device=device)))
            for leaf, buffer in list(layer.named_buffers(recurse=False)):
                setattr(layer, leaf, buffer if buffer.is_meta else buffer.to(device))
    _fill(layers, adapter.layers)
    return model


def begin_with(model: nn.Module, adapter: Adapter | Saved) -> nn.Module:
    """Copy an adapter's factors into a model's LoRA layers, which must be the same ones; return the model.

    Raises:
        ModelError: other layers, ranks or scales, all of what differs at once; or an adapter of another method.
    """
    if isinstance(adapter, Saved):
        raise ModelError(f"lora.init_from: the adapter is of another method, {type(adapter.method).__name__}")
    own, given = dict(lora_layers(model)), adapter.layers
    differences = [
        f"{what} {_some(names)}"
        for what, names in (("it lacks", own.keys() - given.keys()), ("lora.targets lack", given.keys() - own.keys()))
        if names
    ]
    for what in ("rank", "alpha", "rslora"):
        pairs = {(getattr(own[name], what), getattr(given[name], what)) for name in own.keys() & given.keys()}
        differences += [f"lora.{what} is {here}, its {what} {there}" for here, there in sorted(pairs) if here != there]
    methods = ["dora" if is_dora else "lora" for is_dora in (_is_dora(own), adapter.is_dora)]
    if methods[0] != methods[1]:
        differences.append(f"adapter.method is {methods[0]}, its method {methods[1]}")
    if differences:
        raise ModelError(f"lora.init_from: the adapter has other factors than this recipe: {'; '.join(differences)}")
    _fill(own, given)
    return model


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _is_dora(layers: Mapping[str, LoraWeights]) -> bool:
    return any(isinstance(layer, DoraLinear) for layer in layers.values())


def _fill(own: Mapping[str, LoraWeights], given: Mapping[str, Factors]) -> None:
    with torch.no_grad():
        for name, layer in own.items():
            for leaf, tensor in given[name].tensors.items():
                layer.get_parameter(leaf).copy_(tensor)


def detach_adapter(model: nn.Module) -> nn.Module:
    """Take the LoRA layers out of a model again; return the base model."""
    for name, layer in list(lora_layers(model)):
        if isinstance(layer, LoraLinear):
            model.set_submodule(name, layer.base)
        else:
            path, _, leaf = name.rpartition(".")
            delattr(model.get_submodule(path), LORA + leaf)
    return model
