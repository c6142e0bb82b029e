"""Read an adapter folder in the PEFT format and check it against a model.

Whatever this package cannot compute is refused, and all tensors that are missing, unexpected, of a wrong shape or not
finite are listed in one error: an adapter that loads and does nothing is the worst fault of this kind.

Tensor names: ``base_model.model.PATH.lora_A.weight`` [r, in] and ``...lora_B.weight`` [out, r], of DoRA also
``...lora_magnitude_vector`` [out]; of weights of the base that were trained beside them (``modules_to_save``, ``bias``)
``base_model.model.PATH.weight`` and ``.bias``, or ``PATH.base_layer.bias`` where the layer is adapted. PATH is as files
have it (``outside``). Of a weight of E fused experts, which ``target_parameters`` of the configuration names, A is
[r E, in] and B [out, r E], and PATH is that of the module which holds the experts; where both of its weights are
adapted, the first one's has ``.base_layer`` after it. It may name weights of linear layers too (``fused_names``).
"""

import json
import logging
import re
import time
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from reprlib import repr as short
from typing import TypeGuard

import regex
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from qlora_lite.errors import ModelError
from qlora_lite.experts.packing import both_names, expert_weights
from qlora_lite.quant.linear import QuantLinear, frozen_weight, stands_for_conv1d
from qlora_lite.quant.merging import OFF
from qlora_lite.quant.packed import PackedWeight

from .checkpoint_names import outside
from .lora.inject import linear_layers
from .lora.layer import lora_scale
from .lora.qera import QERA
from .lora.start import base_of, first_sum_of
from .parts import TOKEN_ROWS, head_parameters, is_tied, projector_paths, tables_of
from .saved import Saved, checked, find_saved, read_method

WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
log = logging.getLogger("qlora_lite")
PREFIX = "base_model.model."
# Settings of peft that change what an adapter computes, and the starts of values that change the base model.
REFUSED_KEYS = (
    "layer_replication",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
REFUSED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What ``lora.start.base_of`` and ``first_sum_of`` say of a base, which peft refuses; earlier versions wrote no sum.
# Of qera it is the model's own 4-bit weights.
_OWN_BASE = re.compile(r"((?:loftq|pissa|olora):[0-9a-f]{16}|qera:(?:nf4|fp4))(?::([0-9a-f]{16})?)?")
# Of processor time, for all patterns of an adapter file on all paths: far more than honest ones take.
MATCH_SECONDS = 1.0
MAX_CONFIG_BYTES = 4 * 2**20
# A safetensors file names its tensors in a header, which reading takes 20 times its size of memory for: a million
# names take seconds and gigabytes. An entry is about 200 bytes, and a model's adapter has two for each layer.
HEADER_BYTES, HEADER_BYTES_PER_LAYER = 4 * 2**20, 2048
MAX_TOKEN = 2**24  # more than any model has
LISTED = 50  # problems of one file shown; a file may have a million


@dataclass(frozen=True, slots=True)
class Factors:
    """One layer's share of an adapter: ``weight + scale * lora_B @ lora_A`` is the adapted weight, of LoRA.

    Args:
        lora_A: [r, in], or [r E, in] of experts.
        lora_B: [out, r], or [out, r E].
        alpha: numerator of the scale.
        rslora: the scale divides by sqrt(r) instead of r.
        lora_magnitude_vector: [out], of DoRA: the norms that the rows of the adapted weight are scaled to.
        experts: E, the number of weights that the factors are for.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    alpha: float
    rslora: bool = False
    lora_magnitude_vector: torch.Tensor | None = None
    experts: int = 1

    @property
    def rank(self) -> int:
        """Return r."""
        return self.lora_A.shape[0] // self.experts

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what was trained, by its name in a layer."""
        named = {name: getattr(self, name) for name in ("lora_A", "lora_B", "lora_magnitude_vector")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def of_expert(self, number: int) -> "Factors":
        """Return those of one expert."""
        lora_a = self.lora_A.view(self.experts, self.rank, -1)[number]
        return Factors(lora_a, self.lora_B[:, number :: self.experts], self.alpha, self.rslora)

    @property
    def scale(self) -> float:
        """Return what the product of the factors is multiplied by."""
        return lora_scale(self.alpha, self.rank, self.rslora)

    def without(self, lora_a: torch.Tensor, lora_b: torch.Tensor) -> "Factors":
        """Return factors of rank 2 r whose product is that of these less that of others of the same rank and scale."""
        alpha = self.alpha * (2**0.5 if self.rslora else 2)
        both = torch.cat([self.lora_A, lora_a.to(self.lora_A.dtype)]), torch.cat([self.lora_B, -lora_b], 1)
        return replace(self, lora_A=both[0], lora_B=both[1].to(self.lora_B.dtype), alpha=alpha)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as read from its folder, checked against a model.

    Args:
        layers: the factors of each adapted layer by path.
        weights: those of the base model that were trained beside them, by their paths there; a tied table's is there
            for the embeddings and for the head. Rows of tokens are PATH.token_rows.
        tokens: those that have rows of their own, rising, by the path of the table's module.
        merge_aware: what it was trained to be merged into, see ``add_lora``; its run says it, not its files.
    """

    layers: dict[str, Factors]
    dropout: float
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    merge_aware: str = OFF

    @property
    def nbytes(self) -> int:
        """Return what its tensors take."""
        factors = (tensor for layer in self.layers.values() for tensor in layer.tensors.values())
        return sum(tensor.nbytes for tensor in (*factors, *self.weights.values()))

    @property
    def is_dora(self) -> bool:
        """Return whether it scales the adapted weights' rows; then it does so in every layer."""
        return any(factors.lora_magnitude_vector is not None for factors in self.layers.values())


def read_adapter(model: nn.Module, folder: str | Path) -> Adapter | Saved:
    """Read an adapter folder and check that it fits a model; the model stays as it is.

    Its peft_type says which method it is of: LoRA and DoRA give an ``Adapter``, the others a ``Saved``.

    Args:
        model: a base model without LoRA layers; shapes are enough (a meta model).
        folder: written by ``save_adapter`` or by peft.

    Raises:
        ModelError: files are missing or broken, the adapter uses what this package cannot compute, or its
            tensors do not fit this model.
    """
    folder = Path(folder)
    for path in (folder / CONFIG_NAME, folder / WEIGHTS_NAME):
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise ModelError(f"{path} is not an ordinary file")
    config = _read_config(folder)
    _require_base(model, config, folder)
    warn_of_other_split(folder, first_sum_of(model))
    if entry := find_saved(config["peft_type"]):
        method = read_method(entry, config, folder / CONFIG_NAME)
        return checked(model, folder, method, _read_tensors(folder / WEIGHTS_NAME, HEADER_BYTES))
    layers = {path: (1, *frozen_weight(layer)[0].shape) for path, layer in linear_layers(model).items()}
    experts, parameters = expert_weights(model), _target_parameters(model, config, folder / CONFIG_NAME)
    layers |= {path: experts[path].described[0].shape for path in experts.keys() & parameters.keys()}
    inside = {name: path for path, name in stored_names(model, layers).items()}
    layers = {name: layers[path] for name, path in inside.items()}
    tensors = _read_tensors(folder / WEIGHTS_NAME, HEADER_BYTES + HEADER_BYTES_PER_LAYER * len(layers))
    weights, problems = _take_weights(tensors, config, model)
    tokens, rows, of_rows = _take_rows(tensors, config, model)
    weights, problems = weights | rows, problems + of_rows
    ranks, of_layers = _check(tensors, layers, bool(config.get("use_dora")))
    if not tensors and not weights:
        of_layers = ["it has no LoRA weights"]
    problems += of_layers + _without_factors(config, layers, {n for n in layers if inside[n] in parameters}, ranks)
    if problems:
        more = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        shown = "; ".join(problems[:LISTED] + more)
        raise ModelError(f"the adapter {folder} does not fit this model: {shown}")
    # as patterns mean them
    paths = {name: parameters.get(inside[name], outside(model, inside[name])) for name in ranks}
    alphas = _from_patterns(config.get("alpha_pattern") or {}, list(paths.values()))
    factors: dict[str, Factors] = {}
    for name, full_path in paths.items():
        lora_a, lora_b, magnitude = map(tensors.get, tensor_names(name).values())
        alpha, rslora = alphas.get(full_path, config["lora_alpha"]), bool(config.get("use_rslora"))
        factors[inside[name]] = Factors(lora_a, lora_b, alpha, rslora, magnitude, layers[name][0])
    return Adapter(factors, config.get("lora_dropout", 0.0), weights, tokens)


def _require_base(model: nn.Module, config: dict, folder: Path) -> None:
    """Check that an adapter is of a base whose weights were split as the model's were, or not at all; of qera, that the
    model is in the 4 bits whose error the adapter makes up for."""
    (own, _), base = _own_base(config), base_of(model)
    if own and is_of_qera(config):
        types = {layer.quant_type for layer in linear_layers(model).values() if isinstance(layer, QuantLinear)}
        if types != {quant := own.removeprefix(f"{QERA}:")} or base:
            raise ModelError(
                f"the adapter {folder} began with lora.start qera, for the model in {quant.upper()}, and "
                f"this is not it: set model.quant to {quant}, or use `qlora-lite export --to peft`, "
                "whose adapter is for the model's 16-bit files"
            )
    elif own != base:
        made, here = (
            f"the base {name} of lora.start" if name else "the model as its files have it" for name in (own, base)
        )
        raise ModelError(
            f"the adapter {folder} belongs to {made}, and this is {here}: use the folder of the run that "
            "trained it, or `qlora-lite export --to peft`, which fits the model's files"
        )


def begins_with_qera(folder: str | Path) -> bool:
    """Return whether an adapter began as what makes up for the error of 4 bits, see ``adapters.lora.qera``.

    Raises:
        ModelError: the configuration is broken, or of what this package cannot compute.
    """
    return is_of_qera(_read_config(Path(folder)))


def is_of_qera(config: dict) -> bool:
    """Return what ``begins_with_qera`` does, by the content of ``adapter_config.json``."""
    own, _ = _own_base(config)
    return own is not None and own.startswith(QERA)


def _own_base(config: dict) -> tuple[str | None, str | None]:
    """Return the name of the base that an adapter was split from, and the sum of what it began as."""
    found = _OWN_BASE.fullmatch(str(config.get("init_lora_weights")))
    return (found[1], found[2]) if found else (None, None)


def warn_of_other_split(folder: str | Path, first_sum: str) -> None:
    """Warn where a base whose weights were split came out otherwise than when an adapter was trained on it.

    Args:
        first_sum: of the base here, see ``lora.start.sum_of``; "" where it is not known.

    Raises:
        ModelError: the configuration is broken, or of what this package cannot compute.
    """
    _, recorded = _own_base(_read_config(Path(folder)))
    if recorded and first_sum and recorded != first_sum:
        log.warning(
            "the adapter %s was trained on another split of these weights than this machine, type or version "
            "of torch makes: the base has a few other codes, and results differ slightly (bring the cache of "
            "the machine that trained it for the same base)",
            folder,
        )


def named_base(folder: str | Path) -> tuple[str | None, str | None]:
    """Return the base model that an adapter folder names, and its revision; None for what it does not name.

    Raises:
        ModelError: the configuration is broken, or of what this package cannot compute.
    """
    config = _read_config(Path(folder))
    named = (config.get(key) for key in ("base_model_name_or_path", "revision"))
    base, revision = (value if isinstance(value, str) and value else None for value in named)
    return base, revision


def stored_names(model: nn.Module, adapted: Collection[str]) -> dict[str, str]:
    """Return what adapter files call adapted layers, and adapted weights of experts, by path in the model.

    peft wraps the module of the experts once for each weight, so that the last one's factors are those of the module.
    """
    experts, names = expert_weights(model), {}
    for path in adapted:
        if projection := experts.get(path):
            both = [f"{projection.path}.{name}" for name in both_names(projection.experts)]
            is_inner = path == both[0] and both[1] in adapted
            names[path] = outside(model, projection.path) + ".base_layer" * is_inner
        else:
            names[path] = outside(model, path)
    return names


def _target_parameters(model: nn.Module, config: dict, path: Path) -> dict[str, str]:
    """Return the weights that ``target_parameters`` names, as peft finds them: what files call each, by the path in the
    model of its linear layer, or of the weight where it is that of experts.

    Raises:
        ModelError: it names something else.
    """
    names = config.get("target_parameters") or []
    if not names:
        return {}
    # a Conv1D has its weight as [in, out], and peft would adapt that the other way round
    weights = {
        f"{outside(model, name)}.weight": name
        for name, layer in linear_layers(model).items()
        if not stands_for_conv1d(layer)
    }
    weights |= {outside(model, name): name for name in expert_weights(model)}
    by_end: dict[str, list[str]] = {}
    for key in weights:
        for end in _ends(key):
            by_end.setdefault(end, []).append(key)
    found: set[str] = set()
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or name not in by_end:
            raise ModelError(
                f"{path}: target_parameters names {short(name)}, and only weights of linear layers and of "
                "fused experts are supported there; train without it or merge with peft"
            )
        found.add(name)
    return {weights[key]: key for name in found for key in by_end[name]}


def tensor_names(name: str) -> dict[str, str]:
    """Return the names in files of a layer's trained tensors by those in it; ``name`` is one of ``stored_names``."""
    leaves = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude_vector": "lora_magnitude_vector"}
    return {leaf: f"{PREFIX}{name}.{there}" for leaf, there in leaves.items()}


def weight_name(path: str, adapted: Container[str]) -> str:
    """Return the name in adapter files of a weight of the base model, by its path as files have it.

    Args:
        adapted: paths of the adapted layers, as files have them.
    """
    layer, _, leaf = path.rpartition(".")
    if leaf == TOKEN_ROWS:
        return f"{PREFIX}{layer}.token_adapter.trainable_tokens_delta"
    return f"{PREFIX}{layer}.{'base_layer.' if layer in adapted else ''}{leaf}"


def trained_tokens(folder: Path) -> set[int]:
    """Return the tokens that an adapter folder has rows for.

    Raises:
        ModelError: the configuration is broken, or of what this package cannot compute.
    """
    said = _read_config(folder).get("trainable_token_indices") or []
    lists = said.values() if isinstance(said, dict) else [said]
    return {number for numbers in lists if isinstance(numbers, list) for number in numbers if isinstance(number, int)}


def changes_base(folder: Path) -> bool:
    """Return whether an adapter folder has weights of the base model, in the place of that one's own.

    Raises:
        ModelError: the configuration is broken, or of what this package cannot compute.
    """
    config = _read_config(folder)
    keys = "modules_to_save", "trainable_token_indices"
    return any(config.get(key) for key in keys) or config.get("bias", "none") != "none"


def adapter_bytes(folder: Path) -> int:
    """Return what the factors of an adapter folder take in memory; 0 where ``read_adapter`` will say that they lack."""
    file = folder / WEIGHTS_NAME
    return file.stat().st_size if file.is_file() else 0


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG_NAME
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes, which no adapter's configuration is")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} is not an adapter folder: {CONFIG_NAME} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    if isinstance(config, dict) and find_saved(config.get("peft_type")):
        return config
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ModelError(f"{path} does not describe a LoRA adapter (peft_type is not LORA)")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ModelError(f"{path}: alpha_pattern must be an object, not {short(patterns)}")
    alphas = {"lora_alpha": config.get("lora_alpha")} | {
        f"alpha_pattern {short(key)}": v for key, v in patterns.items()
    }
    for name, alpha in alphas.items():
        if not _is_number(alpha) or not 0 < alpha < 1e9:
            raise ModelError(f"{path}: {name} must be a positive number, not {short(alpha)}")
    dropout = config.get("lora_dropout", 0.0)
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ModelError(f"{path}: lora_dropout must be from 0 to below 1, not {short(dropout)}")
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) and name for name in saved)):
        raise ModelError(f"{path}: modules_to_save must be a list of names, not {short(saved)}")
    _refuse_unsupported(config, path)
    return config


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_unsupported(config: dict, path: Path) -> None:
    refused = {key: config.get(key) for key in REFUSED_KEYS}
    start = config.get("init_lora_weights")
    refused["init_lora_weights"] = (
        start if str(start).startswith(REFUSED_INITS) and not _OWN_BASE.fullmatch(str(start)) else None
    )
    used = [f"{key}={short(value)}" for key, value in refused.items() if value]
    if used:
        raise ModelError(f"{path}: {', '.join(used)} is not supported; train without it or merge with peft")


def _read_tensors(path: Path, header_bytes: int) -> dict[str, torch.Tensor]:
    """Read a file whose header is at most so long."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if header_bytes < length < path.stat().st_size:  # a longer one is no header
            raise ModelError(
                f"{path} names more tensors than an adapter of this model can have (its header takes {length} bytes)"
            )
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        # of 8 bits torch has no arithmetic
        return {
            name: each.float() if each.is_floating_point() and each.itemsize == 1 else each
            for name, each in tensors.items()
        }
    except FileNotFoundError:
        pickled = path.with_suffix(".bin").exists()
        hint = "; pickled weights are not read, load and save the adapter with a peft of today" if pickled else ""
        raise ModelError(f"{path} is missing{hint}") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path}: {error}; it is cut short or not a safetensors file") from None


def _take_weights(tensors: dict, config: dict, model: nn.Module) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Take the base model's weights out of the tensors of a file; return them by path, and what is wrong with them.

    peft looks modules up by the ends of their paths, and saves all that is in them; with ``ensure_weight_tying`` also a
    head that is the embeddings. With a bias in such a module, and ``bias`` too, it saves that three times.
    """
    ends, has_biases = config.get("modules_to_save") or [], config.get("bias", "none") != "none"
    tables = [table.weight for table in tables_of(model) if table]
    own_head = head_parameters(model)
    tables += own_head.values()
    tables += [p for path in projector_paths(model) for p in model.get_submodule(path).parameters(recurse=False)]
    tied = model.get_input_embeddings().weight if config.get("ensure_weight_tying") and is_tied(model) else None
    weights: dict[str, torch.Tensor] = {}
    problems: list[str] = []
    for path, parameter in model.named_parameters(remove_duplicate=False):
        name = outside(model, path)
        layer, _, leaf = name.rpartition(".")
        is_saved = any(module.endswith(end) for module in _beginnings(layer) for end in ends)
        is_saved |= parameter is tied and f"{PREFIX}{name}" in tensors
        if not is_saved and not (leaf == "bias" and has_biases):
            continue
        stored = f"{PREFIX}{name}"
        for copied in ("original_module", "modules_to_save") if is_saved and has_biases else ():
            tensors.pop(f"{PREFIX}{layer}.{copied}.bias", None)
        if parameter.ndim > 1 and all(parameter is not table for table in tables):
            tensors.pop(stored, None)
            problems.append(
                f"{name} was trained whole; that can be embeddings, the head, norms, biases and a projector"
            )
            continue
        tensor = tensors.pop(stored, tensors.pop(weight_name(name, [layer]), None))
        if tensor is None:
            problems += [f"{stored} is missing"] if is_saved else []
        elif tensor.shape != parameter.shape or not parameter.is_floating_point():
            problems.append(f"{name} has shape {tuple(tensor.shape)}, the model's {tuple(parameter.shape)}")
        elif not tensor.is_floating_point() or not tensor.isfinite().all():
            problems.append(f"{stored} is not finite")
        else:
            weights[path] = tensor
    if own_head and own_head.keys().isdisjoint(weights):
        problems.append("it has no weights of a head for sequence classification (modules_to_save)")
    for path, module in model.named_modules():
        if isinstance(module, PackedWeight) and tensors.pop(f"{PREFIX}{outside(model, path)}.weight", None) is not None:
            problems.append(
                f"{outside(model, path)} was trained whole, and is in 4 bit here (a head with model.quant_head)"
            )
    return weights, problems + _tie(weights, model)


def _take_rows(
    tensors: dict, config: dict, model: nn.Module
) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.Tensor], list[str]]:
    """Take the rows of tokens out of the tensors of a file; return tokens by table, rows by path, and what is wrong.

    peft finds tables by the ends of their paths; of tied ones the embeddings' rows are the head's. What it saves of a
    table that was made longer for new tokens is left out: their rows are these.
    """
    said = config.get("trainable_token_indices")
    if not said:
        return {}, {}, []
    tables = {id(model.get_input_embeddings()): True, id(model.get_output_embeddings()): False}
    paths = {outside(model, path): path for path, module in model.named_modules() if id(module) in tables}
    first = next(name for name, path in paths.items() if tables[id(model.get_submodule(path))])
    tokens: dict[str, tuple[int, ...]] = {}
    rows: dict[str, torch.Tensor] = {}
    problems = []
    for end, numbers in (said if isinstance(said, dict) else {first: said}).items():
        name = next((name for name in paths if isinstance(end, str) and name.endswith(end)), None)
        good = isinstance(numbers, list) and all(isinstance(n, int) and 0 <= n < MAX_TOKEN for n in numbers)
        if name is None or not numbers or not good or len({*numbers}) < len(numbers):
            problems.append(f"trainable_token_indices {short(end)}: {short(numbers)} is no table's list of tokens")
            continue
        for other in ("base_layer.weight", "token_adapter.base_layer.weight"):
            tensors.pop(f"{PREFIX}{name}.{other}", None)
        stored = weight_name(f"{name}.{TOKEN_ROWS}", ())
        tensor = tensors.pop(stored, None)
        width = model.get_submodule(paths[name]).weight.shape[-1]
        if tensor is None and name != first and is_tied(model) and tokens.get(paths[first]) == tuple(sorted(numbers)):
            continue
        if tensor is None or tensor.shape != (len(numbers), width) or not tensor.isfinite().all():
            problems.append(
                f"{stored} is not there, not finite, or has not a row of {width} for each of {len(numbers)} tokens"
            )
            continue
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        tokens[paths[name]], rows[f"{paths[name]}.{TOKEN_ROWS}"] = tuple(sorted(numbers)), tensor[order]
    if is_tied(model) and tokens:
        if [*tokens] != [paths[first]]:
            return (
                tokens,
                rows,
                [
                    *problems,
                    "rows of the head were trained apart from those of the embeddings, and are one table in this model",
                ],
            )
        tokens = dict.fromkeys(paths.values(), tokens[paths[first]])
        rows = dict.fromkeys((f"{path}.{TOKEN_ROWS}" for path in tokens), next(iter(rows.values())))
    return tokens, rows, problems


def _beginnings(path: str) -> Iterator[str]:
    return accumulate(path.split("."), lambda before, part: f"{before}.{part}")


def _tie(weights: dict[str, torch.Tensor], model: nn.Module) -> list[str]:
    """Make the weights of a tied table one tensor; return what is wrong with them."""
    if not is_tied(model):
        return []
    names = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is model.get_input_embeddings().weight
    ]
    found = [weights[name] for name in names if name in weights]
    if not found or (len(found) == len(names) and all(torch.equal(found[0], each) for each in found)):
        weights |= dict.fromkeys(names, found[0]) if found else {}
        return []
    return [
        "embeddings and head were trained apart from each other, and are one table in this model; train with "
        "ensure_weight_tying, or merge with peft"
    ]


def _check(tensors, layers, is_dora: bool) -> tuple[dict[str, int], list[str]]:
    """Return the rank of each adapted layer, and everything that is wrong with the tensors."""
    ranks: dict[str, int] = {}
    problems: list[str] = []
    known: set[str] = set()
    adapted = {m[1] for name in tensors if (m := re.fullmatch(rf"{PREFIX}(.+)\.lora_[AB]\.weight", name))}
    for name in sorted(adapted & set(layers)):
        keys = list(tensor_names(name).values())[: 3 if is_dora else 2]
        known.update(keys)
        problems += [f"{key} is missing" for key in keys if key not in tensors]
        if any(key not in tensors for key in keys):
            continue
        lora_a, lora_b, *magnitudes = (tensors[key] for key in keys)
        experts, out_features, in_features = layers[name]
        rows = lora_a.shape[0] if lora_a.ndim == 2 else 0
        shapes = [tuple(lora_a.shape), tuple(lora_b.shape)]
        if rows < 1 or rows % experts or shapes != [(rows, in_features), (out_features, rows)]:
            of_each = f"{experts} x " * (experts > 1)
            problems.append(f"{name} has shapes {shapes}, its layer is {of_each}{out_features} x {in_features}")
        if not (lora_a.is_floating_point() and lora_b.is_floating_point()):
            problems.append(f"{name} has factors of {lora_a.dtype} and {lora_b.dtype}, which are no numbers to train")
        if any(m.shape != (out_features,) or not m.is_floating_point() for m in magnitudes):
            problems.append(f"{keys[2]} does not have a number for each of {out_features} outputs")
        problems += [f"{key} is not finite" for key in keys if not tensors[key].isfinite().all()]
        ranks[name] = rows // experts
    problems += [f"{name[:200]} belongs to no linear layer" for name in sorted(set(tensors) - known)]
    return ranks, problems


def _without_factors(config: dict, layers, by_weight: Container[str], ranks) -> list[str]:
    """List layers that the configuration adapts and the file says nothing about.

    Args:
        by_weight: those that ``target_parameters`` names.
    """
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return []
    ends = {target for target in targets if isinstance(target, str)}
    adapted = (name for name in layers if name in by_weight or not ends.isdisjoint(_ends(name)))
    return [f"{name} has no factors" for name in adapted if name not in ranks]


def _ends(name: str) -> Iterator[str]:
    return accumulate(reversed(name.split(".")), lambda end, before: f"{before}.{end}")


def _from_patterns(patterns: dict, names: list[str]) -> dict[str, float]:
    """Look up layers' values the way peft does: a pattern is a regular expression for the end of the path, and the
    first that matches counts. Layers that none matches are left out.

    ``regex`` and not ``re``, because only it can give up: a pattern from a foreign file may take for ever.
    """
    found, end = {}, time.process_time() + MATCH_SECONDS
    for pattern, value in patterns.items():
        try:
            compiled = regex.compile(rf"(.*\.)?({pattern})$")
            for name in names:
                left = end - time.process_time()
                if left <= 0:
                    raise TimeoutError
                if name not in found and (name == pattern or compiled.match(name, timeout=left)):
                    found[name] = value
        except (regex.error, TimeoutError) as error:
            raise ModelError(
                f"{CONFIG_NAME}: alpha_pattern {pattern[:80]!r} cannot be used: {str(error) or 'it takes too long'}"
            ) from None
    return found
