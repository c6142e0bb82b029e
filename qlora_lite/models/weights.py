"""Read a base model's weights one at a time, under the names of its files.

A merge and an export walk a model weight by weight, so that a 13 GiB checkpoint passes through the memory of one
weight. What a stored name is called inside the model is asked of transformers (renames, the base model's prefix), and
for GGUF files of ``gguf_names``. What transformers joins into something else than a linear layer (experts,
convolutions) stays as the files have it; ``OfExperts`` says what it is of experts. Files that have no weight of their
own for a linear layer, and GGUF files of other families, are loaded into memory as a whole, which is logged.

Names: "stored" is a tensor's name in the files, "parameter" its name in the model.
"""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.core_model_loading import dot_natural_key

from qlora_lite.adapters.lora.start import First, Start
from qlora_lite.adapters.parts import has_vision_tower
from qlora_lite.errors import ModelError
from qlora_lite.experts.packing import expert_weights
from qlora_lite.quant.linear import is_conv1d, is_linear
from qlora_lite.quant.nf4 import Packed, dequantize, from_bnb_state
from qlora_lite.quant.tensor_file import DTYPES, Entries

from .gguf_codes import dense, stored_bytes
from .gguf_header import read_header
from .gguf_names import gguf_names
from .load import entry_of, load_model
from .locate import ModelFiles, check_gguf
from .nested import names_in_model, read_language_part, stacking_rules, turning_rules, without_weights
from .progress import Progress
from .published import dense_tensors, is_published
from .split import read_first

log = logging.getLogger("qlora_lite")


@dataclass(frozen=True, slots=True)
class BaseWeights:
    """A base model's tensors, to be read one at a time.

    Args:
        entries: dtype and shape by stored name, in the order of the files.
        parameters: parameter name by stored name; what is joined, or no part of the language model, is not in it.
        read: returns the tensor of a stored name, on the host.
        packed: stored names of 4-bit weights, which ``read`` dequantises to [out, in] in the compute type.
        in_memory: the stored names are transformers' own, and not those of ordinary files.
        experts: what a stored name has of a weight of fused experts.
        read_packed: returns the codes and constants of one of ``packed``.
    """

    entries: Entries
    parameters: dict[str, str]
    read: Callable[[str], torch.Tensor]
    packed: frozenset[str] = frozenset()
    in_memory: bool = False
    experts: Mapping[str, "OfExperts"] = field(default_factory=dict)
    read_packed: Callable[[str], Packed] | None = None

    def reader(self) -> Callable[[str], torch.Tensor]:
        """Return a function that reads a parameter of the model by its name, the experts of one put together."""
        stored = {parameter: name for name, parameter in self.parameters.items()}
        parts: defaultdict[str, dict[int, dict[int, str]]] = defaultdict(dict)
        for name, each in self.experts.items():
            if each.expert is None:
                stored[each.path] = name
            else:
                parts[each.path].setdefault(each.expert, {})[each.part] = name

        def read(parameter: str) -> torch.Tensor:
            if parameter in stored:
                tensor, own = self.read(stored[parameter]), self.experts.get(stored[parameter])
                return tensor.transpose(1, 2) if own and own.is_turned and own.is_transposed else tensor
            if parameter not in parts:
                raise ModelError(f"the files hold no weight {parameter} of its own")
            experts = [by_part for _, by_part in sorted(parts[parameter].items())]
            return torch.stack([torch.cat([self.read(n) for _, n in sorted(each.items())]) for each in experts])

        return read


class OfExperts(NamedTuple):
    """What a stored tensor is of a weight of fused experts.

    Args:
        path: of the weight.
        expert: number of the one whose it is, [out, in] or a part of its rows; None if it is all of them.
        part, parts: which part of the rows it is, and of how many equal ones.
        is_transposed: the tensor of all of them is [E, in, out].
        is_turned: that is the files' choice, and the model's weight is [E, out, in].
    """

    path: str
    expert: int | None = None
    part: int = 0
    parts: int = 1
    is_transposed: bool = False
    is_turned: bool = False


def open_weights(files: ModelFiles, skeleton: nn.Module, compute_dtype: torch.dtype) -> BaseWeights:
    """Open a base model's files.

    Args:
        skeleton: the model on the meta device, see ``models.skeleton``.
        compute_dtype: that 4-bit weights are dequantised to.

    Raises:
        ModelError: a file cannot be read.
    """
    if is_published(files.config.get("quantization_config") or {}):
        return _published_files(files, skeleton)
    if files.gguf_file:
        return _gguf_file(files, skeleton) or _whole_model(files)
    places, entries = _index(files)
    part = read_language_part(files.folder, files.name, with_vision=has_vision_tower(skeleton))
    mapping = part.key_mapping(entries)
    names = _parameter_names(skeleton, list(entries), mapping)
    experts = _of_experts(skeleton, entries, mapping)
    if any(".quant_state." in name for name in entries):
        return _packed_files(places, entries, names, compute_dtype)
    return _plain_files(places, entries, names, experts) or _whole_model(files)


def first_lora_weights(
    files: ModelFiles, start: Start, quant: str, double_quant: bool, dtype: torch.dtype, keep_16bit: Sequence[str] = ()
) -> First:
    """Return what the LoRA weights of a model that is split begin as: from the cache, or of one weight after the other.

    Args:
        start, quant, double_quant, dtype, keep_16bit: that the model is loaded with, see ``load_model``.

    Raises:
        ModelError: see ``open_weights`` and ``Start.split``.
    """
    config = read_language_part(files.folder, files.name, files.gguf_file).config
    skeleton = without_weights(config, dtype=dtype)
    entry = entry_of(files, config, quant, double_quant, dtype, keep_16bit, start)
    if (found := read_first(entry)) is not None:
        return found
    found, read, ranks = {}, open_weights(files, skeleton, dtype).reader(), start.ranks(skeleton)
    progress = Progress("splitting weights", len(ranks))
    for path, (rank, scale) in ranks.items():
        weight = read(f"{path}.weight").to(dtype)
        weight = weight.t() if is_conv1d(skeleton.get_submodule(path)) else weight
        packs = quant != "none"
        weight = weight.contiguous() if packs else weight  # as loading has it, which the last bits depend on
        lora_a, lora_b, _ = start.split(weight, rank, scale, quant if packs else None, double_quant)
        found[path] = lora_a, lora_b
        progress.step()
    return found


def _whole_model(files: ModelFiles) -> BaseWeights:
    log.info("%s is loaded into memory as a whole: its files cannot be read weight by weight", files.name)
    path = files.weights[0] if files.gguf_file else files.folder  # not the name, which may have other revisions
    model = load_model(str(path), "none", compute_dtype=torch.float32, use_cache=False)
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}  # tied ones are named once
    state = {
        name: tensor.detach()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if first_names.get(id(tensor), name) == name
    }
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    experts = {
        name: OfExperts(name, is_transposed=each.experts.is_transposed) for name, each in expert_weights(model).items()
    }
    return BaseWeights(entries, {name: name for name in state}, state.__getitem__, in_memory=True, experts=experts)


def _index(files: ModelFiles) -> tuple[dict[str, safe_open], dict]:
    """Return the open file, and dtype and shape, of every stored name."""
    places, entries = {}, {}
    for path in files.weights:
        try:
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 - not a dict
                stored = file.get_slice(name)
                places[name], entries[name] = file, (DTYPES[stored.get_dtype()], tuple(stored.get_shape()))
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelError(f"cannot read {path}: {error}") from None
    return places, entries


def _plain_files(
    places: dict, entries: dict, names: dict[str, str] | None, experts: Mapping[str, OfExperts]
) -> BaseWeights | None:
    """Read 16-bit safetensors; None if they have no weights of their own for linear layers."""
    if not names:
        return None
    return BaseWeights(entries, names, lambda name: places[name].get_tensor(name), experts=experts)


def _published_files(files: ModelFiles, skeleton: nn.Module) -> BaseWeights:
    """Read weights that are published packed, dequantised."""
    entries, read = dense_tensors(files, read_language_part(files.folder, files.name), ExitStack())
    names, experts = _parameter_names(skeleton, list(entries), None), _of_experts(skeleton, entries, None)
    return BaseWeights(entries, names or {}, read, experts=experts)


def _of_experts(skeleton: nn.Module, stored: Entries, mapping: dict[str, str] | None) -> dict[str, OfExperts]:
    """Return what stored names have of the weights of fused experts; nothing of files that store them otherwise."""
    weights = expert_weights(skeleton)
    if not weights:
        return {}
    found, rules, numbers = {}, stacking_rules(skeleton, mapping), Counter[tuple[str, str]]()
    turned = turning_rules(skeleton, mapping)
    for name, (path, rule) in names_in_model(skeleton, sorted(stored, key=dot_natural_key), mapping).items():
        if path in weights and rule is None:
            found[name] = OfExperts(path, is_transposed=weights[path].experts.is_transposed)
        elif path in weights and rule in turned:
            spec, _ = weights[path].described
            found[name] = OfExperts(path, is_transposed=stored[name][1] != spec.shape, is_turned=True)
        elif path in weights and rule in rules:
            found[name] = OfExperts(path, numbers[path, rule], *rules[rule])
            numbers[path, rule] += 1
    return found


def _parameter_names(skeleton: nn.Module, stored: list[str], mapping: dict[str, str] | None) -> dict[str, str] | None:
    found, state = names_in_model(skeleton, stored, mapping), skeleton.state_dict()
    joined = {name for name, (_, rule) in found.items() if rule is not None}
    linear = {path for path, module in skeleton.named_modules() if is_linear(module)}
    if any(found[name][0].rpartition(".")[0] in linear for name in joined):
        return None
    names = {name: renamed if renamed in state else name for name, (renamed, _) in found.items() if name not in joined}
    return {name: parameter for name, parameter in names.items() if parameter in state}


def _gguf_file(files: ModelFiles, skeleton: nn.Module) -> BaseWeights | None:
    """Dequantise a GGUF file tensor by tensor, as transformers does; None if its names are not known here."""
    try:
        names = gguf_names(skeleton.config)
        places = {names.of(parameter): parameter for parameter in skeleton.state_dict() if _is_weight(parameter)}
    except ModelError:
        return None
    path = check_gguf(files.weights[0])
    tensors = {places[name]: each for name, each in read_header(path).tensors.items() if name in places}
    tied = {"lm_head.weight"} if skeleton.config.tie_word_embeddings else set()
    if set(places.values()) - tensors.keys() - tied:
        return None

    def read(parameter: str) -> torch.Tensor:
        start, number, shape = tensors[parameter]
        stored = np.fromfile(path, np.uint8, stored_bytes(number, shape), offset=start)
        return dense(names, parameter, torch.from_numpy(stored), number, shape, torch.float32)

    entries = {name: (torch.float32, shape) for name, (_, _, shape) in tensors.items()}
    return BaseWeights(entries, {name: name for name in entries}, read)


def _is_weight(parameter: str) -> bool:
    """Tell a weight or bias from the other parts of a 4-bit layer on the meta device."""
    return parameter.endswith((".weight", ".bias"))


def _packed_files(places: dict, stored: dict, names: dict[str, str] | None, compute_dtype: torch.dtype) -> BaseWeights:
    """Read a bitsandbytes 4-bit checkpoint, each packed weight under its plain name."""
    state_of = {name.rpartition(".quant_state.")[0]: name for name in stored if ".quant_state." in name}
    parts = {name: [part for part in stored if part == name or part.startswith(f"{name}.")] for name in state_of}

    def state_of_weight(name: str) -> dict[str, torch.Tensor]:
        return {part.removeprefix(name).removeprefix("."): places[part].get_tensor(part) for part in parts[name]}

    def read(name: str) -> torch.Tensor:
        if name not in parts:
            return places[name].get_tensor(name)
        packed, shape, _, quant_type = from_bnb_state(state_of_weight(name))
        return dequantize(packed, shape, compute_dtype, quant_type)

    def read_packed(name: str) -> Packed:
        return from_bnb_state(state_of_weight(name))[0]

    inside = {part for listed in parts.values() for part in listed} - parts.keys()
    entries = {name: entry for name, entry in stored.items() if name not in inside}
    for name, state in state_of.items():
        entries[name] = compute_dtype, _shape_before_packing(places[state].get_tensor(state), name)
    parameters = names or {name: name for name in entries}
    there = {name: p for name, p in parameters.items() if name in entries}
    return BaseWeights(entries, there, read, frozenset(parts), read_packed=read_packed)


def _shape_before_packing(state: torch.Tensor, name: str) -> tuple[int, ...]:
    try:
        return tuple(json.loads(bytes(state.tolist()))["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the 4-bit weight {name} does not say its shape: {error}") from None
