"""Build a model that has shapes and no values, to plan a run before anything is downloaded.

The modules are the ones that loading would give: transformers' own, its block linears replaced by
``QuantLinear``. Tensors are on torch's meta device: each knows its size and owns a storage, none has memory behind
it.
"""

import copy
import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

from qlora_lite.adapters.lora.inject import linear_layers, usually_adapted
from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.errors import ModelError, first_line
from qlora_lite.experts.packing import expert_weights

from .anatomy import blocks
from .families import CONFIG_IS_ENOUGH, known_config, namesake, nearest
from .gguf_codes import Formats
from .kept import kept_layers
from .load import KEEP, adopt
from .locate import folder_of, locate
from .nested import LanguagePart, language_part, of_blocks, read_language_part, without_weights
from .quantizer import quantize_head, replace_weights

log = logging.getLogger("qlora_lite")

MAX_BUILT = 8  # models that are kept to be copied
_built: dict[tuple, nn.Module] = {}  # by configuration and what else ``meta_model`` is given
_patterns: dict[tuple, tuple[int, int]] = {}  # by configuration and adapter method, see ``block_pattern``


def read_config(path: str, revision: str | None = None):
    """Return the configuration of a model, or of the language model inside it; see ``read_part``."""
    return read_part(path, revision).config


def read_part(path: str, revision: str | None = None, with_vision: bool = False) -> LanguagePart:
    """Find a model's language model without its weights: in the configuration of its folder or file, in the hub's
    cache, or among the families that ship with the package, there under another owner too; nothing is downloaded.

    Args:
        with_vision: see ``nested.language_part``.

    Raises:
        ModelError: it is in none of these places, or cannot be loaded alone.
    """
    local = Path(os.path.expanduser(path))
    if os.path.isdir(local):
        return read_language_part(local, path, with_vision=with_vision)
    if path.startswith("package:") or local.suffix == ".gguf":
        files = locate(path)
        return read_language_part(files.folder, path, files.gguf_file, with_vision)
    if (folder := folder_of(path, revision)) is not None:
        return read_language_part(folder, path, with_vision=with_vision)
    known = known_config(path)
    if known is None and (named := namesake(path)):
        log.warning("%s is taken for a copy of %s: planned with the shapes of that", path, named)
        known = known_config(named)
    if known is None:
        near = nearest(path)
        hint = f"the nearest known models are {', '.join(near)}" if near else "see qlora-lite plan --models"
        raise ModelError(
            f"{path!r} is no folder or file here, not in the hub's cache, and not among the configurations that "
            f"ship for planning; {hint}. {CONFIG_IS_ENOUGH}"
        )
    return language_part(AutoConfig.for_model(**known), with_vision)


def shallow_config(config, layers: int):
    """Return a copy of a model's configuration with fewer blocks."""
    config = copy.deepcopy(config)
    part = of_blocks(config)
    part.num_hidden_layers = layers
    types = getattr(part, "layer_types", None) or ()
    if len(types) > layers:  # else they follow from the number, and cannot be set
        part.layer_types = types[:layers]
    return config


def block_pattern(
    config, method: AdapterMethod | None = None, keep_16bit: tuple[str, ...] = (), formats: Formats = ()
) -> tuple[int, int]:
    """Return how many of the first blocks are kinds of their own, and after how many the others repeat to the last.

    (0, 1) for equal blocks, (0, 6) for 12 of Gemma-3's, (3, 1) for DeepSeek-V3's, whose first three have no experts.
    Asked of the modules, since configurations have many words for it; the fewest blocks that show it count. Blocks
    whose layers are adapted differently, packed differently or stay in 16 bit are of another kind too.

    Raises:
        ModelError: see ``meta_model``.
    """
    key = config.to_json_string(use_diff=False), method, keep_16bit, formats
    if key not in _patterns:
        kinds = _kinds_of_blocks(config, method, keep_16bit, formats)
        depth = len(kinds)
        found = [
            (first, n)
            for n in range(1, depth + 1)
            for first in range(depth % n, depth, n)
            if kinds[first:] == kinds[first : first + n] * ((depth - first) // n)
        ]
        _patterns[key] = min(found, key=lambda pattern: (pattern[0] + 3 * pattern[1], pattern))
    return _patterns[key]


def _kinds_of_blocks(config, method: AdapterMethod | None, keep_16bit: tuple[str, ...], formats: Formats) -> list[int]:
    """Return a number for each block, equal for those that agree in all that memory and work can depend on."""
    model, depth = meta_model(config, "none", False, torch.float32), of_blocks(config).num_hidden_layers
    found, layers, experts = blocks(model), linear_layers(model), expert_weights(model)
    adapted = method.layer_kinds(list(layers), list(experts), usually_adapted(model)) if method else {}
    matched: dict[nn.Module, tuple] = {}
    kept = dict.fromkeys(kept_layers(model, keep_16bit, config), "16 bit")
    for name, kind in (*formats, *adapted.items(), *kept.items()):
        module = layers[name] if name in layers else experts[name].experts
        matched[module] = (*matched.get(module, ()), kind)
    types = getattr(of_blocks(config), "layer_types", None) or [None] * depth
    if not len(found) == len(types) == depth:
        return list(range(depth))  # nothing is known of them
    kinds = [_facts(block, matched) | {"layer type": kind} for block, kind in zip(found, types, strict=True)]
    differing = {key for number, kind in enumerate(kinds) for key, value in kind.items() if value != number}
    kinds = [{key: value for key, value in kind.items() if key in differing} for kind in kinds]  # but for their numbers
    distinct: list[dict] = []
    for each in kinds:
        if each not in distinct:
            distinct.append(each)
    return [distinct.index(each) for each in kinds]


def _facts(block: nn.Module, matched: Mapping[nn.Module, Hashable]) -> dict:
    """Return the classes, shapes, switches and adapters of a block's modules by name."""
    facts: dict[Hashable, Hashable] = {}
    for path, module in block.named_modules():
        said = {name: x if isinstance(x, int | str) else type(x) for name, x in vars(module).items() if name[0] != "_"}
        shapes = [(name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False)]
        kind = type(module), shapes, matched.get(module)
        facts |= {path: kind} | {(path, name): value for name, value in said.items()}
    return facts


def meta_model(
    config,
    quant: str,
    double_quant: bool,
    dtype: torch.dtype,
    quant_head: bool = False,
    keep_16bit: Sequence[str] = (),
    formats: Formats = (),
) -> nn.Module:
    """Build a frozen model on the meta device, its linears as loading would leave them.

    Args:
        config: transformers configuration of a causal language model.
        quant: ``nf4``, ``fp4``, ``keep`` or ``none``.
        quant_head: the head is in 4 bit too.
        keep_16bit: see ``kept.kept_layers``.
        formats: of layers whose codes are kept.

    Raises:
        ModelError: transformers has no causal language model for the configuration.
    """
    try:
        model = without_weights(config, dtype=dtype)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        kind = "model for classification" if config.problem_type else "causal language model"
        raise ModelError(f"no {kind} can be built from this configuration: {first_line(error)}") from error
    if quant != "none":
        kept = kept_layers(model, keep_16bit, config)
        replace_weights(model, quant, double_quant, kept, dict(formats) if quant == KEEP else None)
    if quant_head:
        quantize_head(model, quant, double_quant)
    return adopt(model)


def meta_copy(config, *how) -> nn.Module:
    """Return a model like ``meta_model``'s, a copy of an earlier one where there is one, which is sooner made."""
    key = (type(config), str(vars(config)), *how)
    if key not in _built:
        if len(_built) == MAX_BUILT:
            _built.clear()
        _built[key] = meta_model(config, *how)
    return copied(_built[key])


def copied(model: nn.Module) -> nn.Module:
    """Copy a model, and its tensors without asking torch what a copy of one without values is."""
    known = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_meta:
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            known[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return copy.deepcopy(model, known)


def give_storage(model: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Replace meta tensors by new, unfilled ones in place."""
    replaced: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:  # tied weights stay tied
                    is_parameter = isinstance(tensor, nn.Parameter)
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    replaced[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                registry[name] = replaced[id(tensor)]
    return model
