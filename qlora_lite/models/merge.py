"""Write a base model with an adapter merged into it as an ordinary transformers checkpoint.

Weights are made one at a time while their file is written, so the memory is that of one weight, however large the
model or the file. (Loading the whole model, merging in place and saving, the usual way, needs all of it twice.)

What an adapter is merged into is a choice, since no choice is right for all:

- ``trained``: the weights as the run saw them, quantised to 4 bits, dequantised and rounded to the compute type. The
  result is the trained model to rounding, quantisation error of the base included.
- ``original``: the 16-bit weights of the files. They are better than what the run saw, but the adapter was fitted to
  the quantised ones and may have learned to correct their errors: the result is another model.

Names, tensors that are no floats, and parts of the checkpoint outside the language model stay as they are.

Merging leaves nothing to compute at generation, but only a weight of more bits can hold the sum: in bf16 a step of the
weight is 1/256 of it and small updates are rounded away one by one; ``Rounding`` measures what came of it.

Shapes: W [out, in], A [r, in], B [out, r]. Source: LoRA, arXiv 2106.09685, section 4.1; of DoRA, whose weights have
their rows scaled to the learned norms, arXiv 2402.09353, section 4.1.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from shutil import copyfile

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from qlora_lite.adapters.lora.inject import linear_layers
from qlora_lite.adapters.lora.layer import merging_of
from qlora_lite.adapters.parts import TOKEN_ROWS
from qlora_lite.adapters.read import Adapter, Factors
from qlora_lite.errors import ModelError
from qlora_lite.experts.packing import packs_experts
from qlora_lite.files import require_space
from qlora_lite.kernels.token_rows import RowsOver
from qlora_lite.quant.formats import FOUR_BIT
from qlora_lite.quant.linear import QuantLinear, stands_for_conv1d
from qlora_lite.quant.nf4 import Packed, dequantize, quantize
from qlora_lite.quant.product import WeightSpec, materialize
from qlora_lite.quant.tensor_file import Entries, stream_tensors

from .locate import INDEX_NAME, ModelFiles, read_json
from .nested import without_weights
from .save import SHARD_BYTES
from .weights import BaseWeights, OfExperts, open_weights

TRAINED, ORIGINAL = "trained", "original"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")  # of towers
HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}
ROUNDING_CHUNK = 1 << 18  # weights whose rounding is measured at once, in 4 MiB
SPARE_BYTES = 64 * 2**20  # of disk, beside the weights: tokenizer, configurations, index


class BeyondRange(ModelError):
    """Report a number that a type cannot hold."""


class Rounding:
    """How much of an adapter's updates is left once the merged weights are rounded to each type of 16 bits.

    With W the weights before, U the update and R what is stored, summed over all weights: (R - W) U / U U. Noise leaves
    it at 1; where W lies on the type's own grid and U is below half a step, R is W again, and it is 0.
    """

    def __init__(self):
        self._updates, self._kept = 0.0, dict.fromkeys(HALVES, 0.0)

    def add(self, merged: torch.Tensor, weight: torch.Tensor) -> None:
        """Count a tensor that is not rounded yet, and what it was before the update, both of the same shape."""
        parts = (each.reshape(-1).split(ROUNDING_CHUNK) for each in (merged, weight))
        for after, before in zip(*parts, strict=True):
            update = after.float() - before
            self._updates += _dot(update, update)
            for name, dtype in HALVES.items():
                self._kept[name] += _dot(after.to(dtype) - before.float(), update)

    def kept(self) -> dict[str, float | None]:
        """Return the share that is left, by type; None where some number of the model is too large for the type."""
        updates = self._updates or 1.0
        return {name: kept / updates if math.isfinite(kept) else None for name, kept in self._kept.items()}


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one * other).sum(dtype=torch.float64).item()


def merged_weight(weight: torch.Tensor, factors: Factors) -> torch.Tensor:
    """Return ``weight + scale * lora_B @ lora_A``, of DoRA with its rows scaled, in float32: it is rounded once, later.

    Args:
        weight: [out, in], any float type; left as it is.
        factors: of the same layer.
    """
    merged = weight.to(torch.float32, copy=True)
    merged.addmm_(factors.lora_B.float(), factors.lora_A.float(), alpha=factors.scale)
    if (magnitude := factors.lora_magnitude_vector) is not None:
        norms = torch.linalg.vector_norm(merged, dim=1).clamp_(min=torch.finfo(torch.float32).tiny)
        merged.mul_((magnitude.float() / norms)[:, None])
    return merged


def merged_experts(weight: torch.Tensor, factors: Factors, stored: OfExperts) -> torch.Tensor:
    """Return a stored tensor of experts with their updates, as ``merged_weight`` does a layer's.

    Args:
        weight: [out, in] of one expert, or a part of its rows; or of all, [E, out, in] or [E, in, out].
        factors: of all experts.
    """
    if stored.expert is not None:
        own = factors.of_expert(stored.expert)
        return merged_weight(weight, replace(own, lora_B=own.lora_B.chunk(stored.parts)[stored.part]))
    merged = weight.to(torch.float32, copy=True)
    for expert, each in enumerate(merged):
        own = factors.of_expert(expert)
        whole = each.t() if stored.is_transposed else each
        whole.addmm_(own.lora_B.float(), own.lora_A.float(), alpha=own.scale)
    return merged


@dataclass(frozen=True, slots=True)
class Merged:
    """A model with an adapter merged into it, whose weights are made when they are asked for.

    Args:
        files: of the base model.
        base: its tensors.
        config: transformers configuration.
        architecture: the model's class.
        layers: its linear layers by path, on the meta device; those that the run quantised are ``QuantLinear``.
        adapter: what is merged.
        onto: ``TRAINED`` or ``ORIGINAL``.
        compute_dtype: that the run computed in.
        packs_experts: whether the run quantised experts, which are here as the files have them.
        packed: weights that the run saw instead of quantised ones, by the path of the layer.
        in_float32: stored names that stay so in any type, as transformers and a run have them: a router's bias, of
            which the experts that are chosen depend on small differences.
    """

    files: ModelFiles
    base: BaseWeights
    config: PreTrainedConfig
    architecture: str
    layers: dict[str, nn.Module]
    adapter: Adapter
    onto: str
    compute_dtype: torch.dtype
    packs_experts: bool
    packed: Mapping[str, Packed] = field(default_factory=dict)
    in_float32: frozenset[str] = frozenset()

    @property
    def has_new_tokens(self) -> bool:
        """Whether tables are longer than the base's."""
        return any(
            self.entries(torch.float32)[stored][1][:1] > shape[:1]
            for stored, (_, shape) in self.base.entries.items()
            if self._tokens(stored)
        )

    def entries(self, dtype: torch.dtype) -> Entries:
        """Return dtype and shape of what ``weight`` gives for every stored name."""
        return {
            stored: (
                dtype if kept.is_floating_point and stored not in self.in_float32 else kept,
                shape[::-1]
                if stored in self.base.packed and self._is_conv1d(stored)
                else (max([shape[0], *(token + 1 for token in self._tokens(stored))]), *shape[1:])
                if shape
                else shape,
            )
            for stored, (kept, shape) in self.base.entries.items()
        }

    def _tokens(self, stored: str) -> tuple[int, ...]:
        """Return the tokens that have rows of their own in a table."""
        path, _, leaf = self.base.parameters.get(stored, "").rpartition(".")
        return self.adapter.tokens.get(path, ()) if leaf == "weight" else ()

    def _layer(self, stored: str) -> tuple[str, nn.Module | None]:
        path, _, leaf = self.base.parameters.get(stored, "").rpartition(".")
        return path, self.layers.get(path) if leaf == "weight" else None

    def _is_conv1d(self, stored: str) -> bool:
        layer = self._layer(stored)[1]
        return layer is not None and stands_for_conv1d(layer)

    def weight(self, stored: str, dtype: torch.dtype, rounding: Rounding | None = None) -> torch.Tensor:
        """Return one tensor by its stored name and in its stored layout; floats are rounded once, to ``dtype``.

        Args:
            rounding: counts the tensor before that.

        Raises:
            BeyondRange: a number is too large for the type.
        """
        tensor = self.base.read(stored)
        if not tensor.is_floating_point():
            return tensor
        path, layer = self._layer(stored)
        stays, dtype = stored in self.in_float32, torch.float32 if stored in self.in_float32 else dtype
        if not tensor.ndim:  # a bound of what a layer of Gemma 4's tower takes or gives, which may be infinite
            return tensor.to(dtype)
        is_conv1d, is_packed = self._is_conv1d(stored), stored in self.base.packed
        weight = tensor.t() if is_conv1d and not is_packed else tensor  # [out, in] from here on
        packed: Packed | None = None
        if self.onto == TRAINED and not stays:
            weight = weight.to(self.compute_dtype).contiguous()
            if is_packed and self.base.read_packed:
                packed = self.base.read_packed(stored)
            elif isinstance(layer, QuantLinear) and layer.quant_type in FOUR_BIT and not self.base.packed:
                # a 4-bit checkpoint leaves layers out itself
                packed = self.packed.get(path) or quantize(weight, layer.quant_type, layer.double_quant)
                weight = dequantize(packed, weight.shape, self.compute_dtype, layer.quant_type)
        before, experts = weight, self.base.experts.get(stored)
        factors = self.adapter.layers.get(path)
        if layer is not None and factors is not None:
            if merging := merging_of(layer, self.adapter.merge_aware, factors.scale, path):
                own = (weight.to(self.compute_dtype),) if packed is None else tuple(x for x in packed if x is not None)
                quant_type = None if packed is None else layer.quant_type
                spec = WeightSpec(tuple(weight.shape), quant_type, merging=merging)
                weight = materialize(spec, (*own, factors.lora_A, factors.lora_B), torch.float32)
            else:
                weight = merged_weight(weight, factors)
        elif experts is not None and experts.path in self.adapter.layers:
            weight = merged_experts(weight, self.adapter.layers[experts.path], experts)
        trained = self.adapter.weights.get(self.base.parameters.get(stored, ""))
        weight = weight if trained is None else trained.to(self.compute_dtype).float()  # as the run computed with it
        if tokens := self._tokens(stored):
            weight = RowsOver(weight.float(), tokens, self.adapter.weights[f"{path}.{TOKEN_ROWS}"])[:]
        if rounding is not None:
            rounding.add(weight[: len(before)], before)
        rounded = (weight.t() if is_conv1d else weight).to(dtype).contiguous()
        if rounded.numel() and not torch.stack(torch.aminmax(rounded)).isfinite().all():  # isfinite alone copies it
            name = str(dtype).removeprefix("torch.")
            raise BeyondRange(
                f"a number of {stored} is too large for {name}, or not finite; choose another --dtype, such as bf16"
            )
        return rounded


def open_merged(
    files: ModelFiles,
    skeleton: nn.Module,
    adapter: Adapter,
    onto: str,
    compute_dtype: torch.dtype,
    packed: Mapping[str, Packed] | None = None,
) -> Merged:
    """Open a base model for merging.

    Args:
        skeleton: the model on the meta device with the layers that the run quantised.
        adapter: read for this model.
        packed: see ``Merged``.

    Raises:
        ModelError: the files cannot be read, hold no weight for an adapted layer, or no original weights.
    """
    base = open_weights(files, skeleton, compute_dtype)
    if base.packed and onto == ORIGINAL:
        raise ModelError(
            f"{files.name} is a 4-bit checkpoint: there are no original weights to merge into; leave out --base"
        )
    found = {parameter.removesuffix(".weight") for parameter in base.parameters.values()}
    found |= {experts.path for experts in base.experts.values()}
    if missing := sorted(adapter.layers.keys() - found):
        raise ModelError(f"{files.name} stores no weight of its own for {len(missing)} adapted layers: {missing[:8]}")
    tied = {
        path
        for path, parameter in skeleton.named_parameters(remove_duplicate=False)
        if parameter is skeleton.get_input_embeddings().weight
    }
    whole = {path for path in adapter.weights if not path.endswith(TOKEN_ROWS)}
    whole |= {f"{path}.weight" for path in adapter.tokens}
    if missing := sorted(whole - tied - {*base.parameters.values()}):
        raise ModelError(f"{files.name} stores no weight of its own for {len(missing)} trained ones: {missing[:8]}")
    config = copy.deepcopy(skeleton.config)
    text = config.get_text_config(decoder=True)
    text.vocab_size = max([text.vocab_size, *(tokens[-1] + 1 for tokens in adapter.tokens.values())])
    name, layers, head = type(skeleton).__name__, linear_layers(skeleton), skeleton.get_output_embeddings()
    if isinstance(head, QuantLinear) and not skeleton.config.tie_word_embeddings:
        layers |= {path: module for path, module in skeleton.named_modules() if module is head}
    return Merged(
        files,
        base,
        config,
        name,
        layers,
        adapter,
        onto,
        compute_dtype,
        packs_experts(skeleton),
        packed or {},
        _in_float32(skeleton.config, base),
    )


def _in_float32(config: PreTrainedConfig, base: BaseWeights) -> frozenset[str]:
    """Return the stored names of what is float32 in the files and in transformers' model of 16 bit."""
    model = without_weights(config, dtype=torch.bfloat16)
    tensors = (*model.named_parameters(), *model.named_buffers())
    # by the ends of names: those of buffers may have another beginning in the files
    ends = {_end(name) for name, tensor in tensors if tensor.dtype == torch.float32}
    return frozenset(
        stored
        for stored, (dtype, _) in base.entries.items()
        if dtype == torch.float32 and _end(base.parameters.get(stored, stored)) in ends
    )


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def write_merged(
    merged: Merged,
    folder: Path,
    dtype: torch.dtype,
    tokenizer,
    end_token_ids: list[int],
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, float | None]:
    """Write a merged model into a folder that exists; return what ``Rounding.kept`` does.

    Args:
        dtype: of every float.
        tokenizer: with the chat template that training used.
        end_token_ids: tokens that end an answer, for the generation configuration.
        shard_bytes: at most, of a weights file; a larger tensor gets a file of its own.

    Raises:
        BeyondRange: a number is too large for the type.
        OutputError: the disk has no room.
        OSError: it cannot be written.
    """
    entries = merged.entries(dtype)
    total_bytes = sum(_size(entry) for entry in entries.values())
    require_space(folder.parent, total_bytes + SPARE_BYTES)
    shards, rounding = _into_shards(entries, shard_bytes), Rounding()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        one = "model.safetensors"
        file = one if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        stream_tensors(
            folder / file, {name: entries[name] for name in names}, lambda n: merged.weight(n, dtype, rounding)
        )
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        _write_json(folder / INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    _write_configs(merged, folder, dtype, end_token_ids)
    tokenizer.save_pretrained(folder)
    return rounding.kept()


def _size(entry: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return prod(entry[1]) * entry[0].itemsize


def _into_shards(entries: Entries, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, entry in entries.items():
        if shards[-1] and filled + _size(entry) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _size(entry)
    return shards


def _write_configs(merged: Merged, folder: Path, dtype: torch.dtype, end_token_ids: list[int]) -> None:
    """Write the base's configurations with the new type and the tokens that training taught as ends."""
    config, generation = _configs(merged)
    config.pop("quantization_config", None)
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    for part in (config, text):
        if "vocab_size" in part or (part is text and merged.has_new_tokens):  # many leave it to their class
            part["vocab_size"] = merged.config.get_text_config(decoder=True).vocab_size
    config["architectures"] = config.get("architectures") or [merged.architecture]
    config.setdefault("torch_dtype" if "torch_dtype" in config else "dtype", None)
    _say_dtype(config, str(dtype).removeprefix("torch."))
    generation["eos_token_id"] = end_token_ids
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)
    for name in () if merged.base.in_memory or merged.files.gguf_file else PROCESSOR_FILES:
        if (merged.files.folder / name).is_file():
            copyfile(merged.files.folder / name, folder / name)


def _configs(merged: Merged) -> tuple[dict, dict]:
    """Return the configurations of the model and of its generation.

    As JSON, not through transformers' classes: these refuse to save what some well-known models ship.
    """
    as_loaded, source = copy.deepcopy(merged.config), merged.files.folder
    as_loaded.use_cache = True  # off for training
    if merged.files.gguf_file:
        return as_loaded.to_dict(), GenerationConfig.from_model_config(as_loaded).to_diff_dict()
    stored = source / "generation_config.json"
    config = as_loaded.to_dict() if merged.base.in_memory else read_json(source / "config.json")
    return config, read_json(stored) if stored.is_file() else {}


def _say_dtype(config: dict, name: str) -> None:
    """Write the type of all floats wherever a configuration, or one inside it, says one."""
    for key, value in config.items():
        if key in ("torch_dtype", "dtype"):
            config[key] = name
        elif isinstance(value, dict):
            _say_dtype(value, name)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
