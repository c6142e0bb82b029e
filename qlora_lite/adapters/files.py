"""Adapter files in the PEFT format: ``adapter_model.safetensors`` and a small ``adapter_config.json``.

Only keys that every peft of the last years and vLLM understand are written. Reading and its checks are in ``read``.
The files fit what ``AutoModelForCausalLM`` makes of the base model's files: see ``outside`` for models with a tower.
"""

import json
import logging
from collections.abc import Collection, Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from qlora_lite.errors import ModelError, OutputError
from qlora_lite.experts.packing import LORA, expert_weights
from qlora_lite.files import replacing_folder, sha256
from qlora_lite.offload.own_blocks import OwnBlocks
from qlora_lite.quant.linear import QuantLinear, stands_for_conv1d
from qlora_lite.quant.merging import OFF
from qlora_lite.quant.tensor_file import bit_sums, write_tensors

from .checkpoint_names import outside
from .diffusers_files import WEIGHTS_NAME as OF_DIFFUSERS
from .fused_names import taken_for_experts, why_no_dora
from .lora.dora import DoraLinear
from .lora.inject import (
    ALL_LINEAR,
    Target,
    add_lora,
    in_blocks,
    linear_layers,
    lora_layers,
    lora_parameters,
    matching,
    require_base,
    require_lora,
    require_model,
)
from .lora.layer import LoraLinear, LoraWeights
from .lora.qera import QERA
from .lora.shared import forget_begun
from .lora.start import FIRST_NAME, First, Start, base_of, first_sum_of, load_first, take_first, write_first
from .method import AdapterMethod
from .parts import (
    EMBEDDINGS,
    HEAD,
    TOKEN_ROWS,
    freeze_weights,
    head_paths,
    is_headed,
    is_of_head,
    is_tied,
    put_rows,
    reads_pictures,
    train_head,
    train_parts,
    train_tokens,
    train_weights,
    trained_weights,
)
from .read import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Adapter,
    Factors,
    begins_with_qera,
    read_adapter,
    stored_names,
    tensor_names,
    weight_name,
)
from .saved import Saved

log = logging.getLogger("qlora_lite")
MODEL_CONFIG_NAME = "config.json"
_SHOWN = 3  # names of layers in an error

_SUFFIXES = ".json", ".jinja", ".model", ".txt"  # of an adapter's files, a tokenizer's and an image processor's
_WEIGHTS = WEIGHTS_NAME, FIRST_NAME, OF_DIFFUSERS  # all others are a model's
_TEMPLATES = "additional_chat_templates"  # the folder that a tokenizer with several has for all but the first


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what is trained of a model under the names of the PEFT format, a tied table under both of its names."""
    layers, trained = dict(lora_layers(model)), _stored_paths(model)
    adapted = {outside(model, name) for name in layers}
    tensors = {weight_name(outside(model, path), adapted): parameter.detach() for path, parameter in trained.items()}
    stored = stored_names(model, layers)
    for name, layer in layers.items():
        names = tensor_names(stored[name])
        tensors |= {names[leaf]: parameter.detach() for leaf, parameter in layer.named_parameters(recurse=False)}
    return tensors


def trained_paths(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained of the base model by the paths that it has there; of a tied table both."""
    layers, trained = {name for name, _ in lora_layers(model)}, {id(p) for _, p in trained_weights(model)}
    found: dict[str, nn.Parameter] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        layer, _, leaf = path.rpartition(".")
        if id(parameter) in trained:
            outer = layer.removesuffix(".base")
            found[f"{outer}.{leaf}" if outer in layers else path] = parameter
    return found


def _stored_paths(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what files have of ``trained_paths``: of a tied table both, and of rows of tokens in one once."""
    head, tied = model.get_output_embeddings(), is_tied(model)
    return {
        path: parameter
        for path, parameter in trained_paths(model).items()
        if not (tied and path.endswith(TOKEN_ROWS) and model.get_submodule(path.rpartition(".")[0]) is head)
    }


def adapter_config(model: nn.Module, base_model: str) -> dict:
    """Return the content of ``adapter_config.json``: the commonest rank and alpha, patterns for the rest."""
    layers = {outside(model, name): layer for name, layer in lora_layers(model)}
    first = next(iter(layers.values()), None)
    if first is None:  # weights of the base alone were trained; the name stands for no layer, to peft too
        return {
            "peft_type": "LORA",
            "task_type": _task_type(model),
            "base_model_name_or_path": base_model,
            "r": 1,
            "lora_alpha": 1,
            "lora_dropout": 0.0,
            "target_modules": "dummy-target-modules",
            **_trained_beside(model, ()),
            "inference_mode": True,
        }
    ranks, alphas = [layer.rank for layer in layers.values()], [layer.alpha for layer in layers.values()]
    rank, alpha = max(set(ranks), key=ranks.count), max(set(alphas), key=alphas.count)
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, LoraLinear)}
    by_weight = taken_for_experts(model, linear)
    keys = {name: f"{name}.weight" if name in by_weight else name for name in layers}  # as peft's patterns see them
    experts = [outside(model, name) for name in expert_weights(model)]
    parameters = _by_leaf(layers.keys() - linear, experts)
    parameters += [f"{name}.weight" for name in _target_modules(model, by_weight)]
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if by_weight else first.dropout,  # peft refuses dropout there; only training has any
        "target_modules": _target_modules(model, linear.keys() - by_weight),
        **({"target_parameters": parameters} if parameters else {}),
        "rank_pattern": {keys[name]: layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {keys[name]: layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
        "use_rslora": first.rslora,
        **({"use_dora": True} if _is_dora(layers) else {}),
        "fan_in_fan_out": any(stands_for_conv1d(layer.base) for layer in linear.values()),
        **_trained_beside(model, linear),
        **({"init_lora_weights": start} if (start := _start(model, linear)) else {}),
        "inference_mode": True,
    }


def _start(model: nn.Module, layers: Mapping[str, LoraLinear]) -> str:
    """Return what peft refuses to load, where LoRA weights fit no model but the one that they began with."""
    if model in _corrected:
        quantized = next(layer.base for layer in layers.values() if isinstance(layer.base, QuantLinear))
        return f"{QERA}:{quantized.quant_type}"
    return f"{base_of(model)}:{first_sum_of(model)}" if base_of(model) else ""


def _task_type(model: nn.Module) -> str | None:
    """Return peft's word for what a model is for; it has none for pictures, which None leaves to the model itself."""
    if reads_pictures(model) or isinstance(model, OwnBlocks):
        return None
    return "SEQ_CLS" if is_headed(model) else "CAUSAL_LM"


def _trained_beside(model: nn.Module, layers: Collection[str]) -> dict:
    """Return what says which weights of the base are trained, of adapted layers' paths as files have them.

    Modules have their whole paths, of which peft compares the ends: "norm" would be every norm. Of a head for sequence
    classification they are the outermost ones, as peft itself would have "classifier" and "score".
    """
    paths = {outside(model, path) for path in trained_paths(model)}
    modules = {path.removesuffix(".weight") for path in paths if path.endswith(".weight")}
    with_bias = {path.rpartition(".")[0] for path in paths if path.endswith(".bias")} - modules
    inside = head_paths(model)
    outermost = [path for path in inside if path.rpartition(".")[0] not in inside]
    modules = {next((path for path in outermost if f"{module}.".startswith(f"{path}.")), module) for module in modules}
    found: dict = {"bias": "none" if not with_bias else "lora_only" if with_bias <= {*layers} else "all"}
    if modules:
        found["modules_to_save"] = sorted(modules)
    if is_tied(model) and model.get_input_embeddings().weight.requires_grad:
        found["ensure_weight_tying"] = True
    tables = [path.removesuffix(f".{TOKEN_ROWS}") for path in _stored_paths(model) if path.endswith(TOKEN_ROWS)]
    if tables:
        found["trainable_token_indices"] = {
            outside(model, path): list(model.get_submodule(path).tokens) for path in tables
        }
    return found


def _target_modules(model: nn.Module, layers: Collection[str]) -> list[str]:
    """Return the last parts of the adapted layers' paths, or whole paths where other modules have the same, which peft
    would adapt too or refuse (those of Gemma 4's tower that have a linear layer inside).

    Whole paths too where files have other names than the model (``outside``): a tower's layers may end alike.
    """
    return _by_leaf(layers, {*layers, *linear_layers(model), *(name for name, _ in model.named_modules())})


def _by_leaf(chosen: Collection[str], every: Collection[str]) -> list[str]:
    """Return the last parts of the chosen paths, or whole paths where others of all there are have the same."""
    leaves = {name.rpartition(".")[2] for name in chosen}
    by_leaf = {name for name in every if name.rpartition(".")[2] in leaves}
    return sorted(leaves if by_leaf == set(chosen) else chosen)


@dataclass(frozen=True)
class Lora(AdapterMethod):
    """Low-rank adapters beside linear layers, LoRA's or DoRA's, and experts; arguments are those of ``add_lora``.

    Args:
        also: what is trained of the base model beside them; see ``parts``.
        also_lr_ratio: how many times the LoRA weights' learning rate that of ``also`` is.
        tokens: whose rows of embeddings and head are trained, rising; see ``parts.train_tokens``.
        known_tokens: how many the tokenizer had without new ones.
        split: what the weights of the model were split by when it was loaded; None if they were not.
        merge_aware: see ``add_lora``.
        head: train the head of a model for sequence classification too, at the LoRA weights' learning rate.
    """

    targets: tuple[Target, ...] = (Target(ALL_LINEAR),)
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    dtype: torch.dtype = torch.bfloat16
    dora: bool = False
    also: tuple[str, ...] = ()
    also_lr_ratio: float = 0.1
    tokens: tuple[int, ...] = ()
    known_tokens: int = 0
    split: Start | None = None
    merge_aware: str = OFF
    head: bool = False

    why_not_merged = ""

    @property
    def trained_tables(self) -> frozenset[str]:
        """Return which of embeddings and head are trained."""
        return frozenset({EMBEDDINGS, HEAD} if self.tokens else self.also) & {EMBEDDINGS, HEAD}

    def apply(self, model: nn.Module) -> None:
        """See ``add_lora`` and ``train_parts``; the LoRA weights begin as the model's weights were split for.

        Raises:
            ModelError: see ``add_lora``; the weights were not split, or are to be those of experts.
        """
        if self.split:
            self.split.ranks(model)
            if base_of(model) is None and model.device.type != "meta":
                raise ModelError(f"the model was loaded without the start {self.split.kind}")
        if self.targets:
            how = self.rank, self.alpha, self.dropout, self.rslora, self.dtype, self.dora, self.merge_aware
            add_lora(model, self.targets, *how)
        else:
            require_base(model)
            model.requires_grad_(False)
        begin_at(model, take_first(model))
        train_parts(model, self.also)
        train_tokens(model, self.tokens, self.known_tokens, self.dtype)
        if self.head:
            train_head(model)

    def config(self, model: nn.Module, base_model: str) -> dict:
        """See ``adapter_config``."""
        return adapter_config(model, base_model)

    def parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what is trained of the base model outside of blocks, and then, layer by layer, A, B and DoRA's
        magnitudes with what is trained there: so a deeper model's begin alike.

        Raises:
            ModelError: the model has no LoRA layers.
        """
        if not (self.also or self.tokens or self.head):
            require_lora(model)
            yield from lora_parameters(model)
            return
        inside, added = in_blocks(model), {parameter: name for name, parameter in lora_parameters(model)}
        first = {name: p for name, p in trained_weights(model) if name.rpartition(".")[0] not in inside}
        yield from first.items()
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        yield from ((added.get(p, name), p) for name, p in trained if name not in first)

    def trained_base(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """Yield what is trained beside the LoRA weights."""
        return (parameter for _, parameter in trained_weights(model) if self.also or self.tokens or self.head)

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return the weights under the names of the PEFT format.

        Raises:
            ModelError: the model has no LoRA layers, and nothing else is trained.
        """
        if not any(trained_weights(require_model(model))):
            require_lora(model)
        return adapter_tensors(model)

    def layers_not_reached(self, model: nn.Module, norms: Mapping[str, float]) -> list[str]:
        """B begins at zero, so A's first gradient is zero by construction and B's is the one to look at.

        What a bias adds to all keys changes no attention, so that a bias may have no gradient; tokens may not occur.
        """
        others = [name for name, _ in trained_weights(model) if not name.endswith((".bias", TOKEN_ROWS))]
        return [name for name, _ in lora_layers(model) if not norms[f"{name}.lora_B"]] + [
            name for name in others if not norms[name]
        ]

    def lr_ratios(self, names: Sequence[str], loraplus: float) -> list[float]:
        """Return the ratio of LoRA+ for each B, 1 for the head and others beside layers, and that of ``also``."""
        added = {".lora_A": 1.0, ".lora_B": loraplus, ".lora_magnitude_vector": 1.0, TOKEN_ROWS: 1.0}
        others = [1.0 if self.head and is_of_head(name) else self.also_lr_ratio for name in names]
        return [
            next((r for end, r in added.items() if name.endswith(end)), other)
            for name, other in zip(names, others, strict=True)
        ]

    def does_nothing(self, model: nn.Module) -> bool:
        """Return whether every B is still as it began; False where no layer has one."""
        if model in _begun:
            return _begun[model] == _sums_of_b(model)
        return bool(self.targets) and not any(layer.lora_B.any() for _, layer in lora_layers(model))

    def layer_kinds(
        self, linear: Sequence[str], experts: Sequence[str], in_blocks: Container[str]
    ) -> Mapping[str, Hashable]:
        """Return which targets match each layer, and each weight of experts."""
        return matching(linear, experts, self.targets, in_blocks)

    def forget_pass(self, model: nn.Module) -> None:
        """Drop products that layers with one input had begun together."""
        forget_begun(model)


_begun: WeakKeyDictionary[nn.Module, list] = WeakKeyDictionary()  # ``_sums_of_b`` by model, of a start
_corrected: WeakKeyDictionary[nn.Module, First | None] = WeakKeyDictionary()  # by model, see ``keep_first``
_warned: WeakSet[nn.Module] = WeakSet()  # of whose adapter was said once that peft does not load it


def keep_first(model: nn.Module, first: First | None) -> None:
    """Say what LoRA weights were at first that make up for the error of 4 bits: the adapter is for these alone, and for
    the model's 16-bit files that is written beside it. None if it is not known."""
    _corrected[model] = first


def begin_at(model: nn.Module, first: First) -> None:
    """Copy what LoRA weights begin as into those of a model; DoRA's magnitudes are the norms with them."""
    with torch.no_grad():
        for path, (lora_a, lora_b) in first.items():
            layer = model.get_submodule(path)
            layer.lora_A.copy_(lora_a)
            layer.lora_B.copy_(lora_b)
            if isinstance(layer, DoraLinear):
                layer.lora_magnitude_vector.copy_(layer.norms(torch.float32))
    if first:
        _begun[model] = _sums_of_b(model)


def _sums_of_b(model: nn.Module) -> list:
    return [bit_sums(layer.lora_B.detach()) for _, layer in lora_layers(model)]


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    base_model: str | Path = "",
    tokenizer=None,
    method: AdapterMethod = Lora(),
) -> str:
    """Write the adapter, and the tokenizer with its chat template if given; return the weights' SHA-256.

    One that peft does not load is written with a warning, once for a model: this package reads and merges it.

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
    layers = dict(lora_layers(model))
    if model not in _warned and _is_dora(layers) and (why := why_no_dora(model, layers)):
        log.warning("the adapter is DoRA, and %s", why)
        _warned.add(model)
    with_head = _model_config(model) if is_headed(model) else None
    config, first = method.config(model, str(base_model)), _corrected.get(model)
    write_adapter(Path(folder), tensors, config, tokenizer, with_head, first)
    return sha256(Path(folder) / WEIGHTS_NAME)


def _model_config(model: nn.Module) -> str:
    """Return ``config.json`` of a model with a head: peft does not say how many labels there are, or their names."""
    config = {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}
    config.pop("use_cache", None)
    return json.dumps(config, indent=2, default=str) + "\n"


def write_adapter(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    config: dict,
    tokenizer=None,
    model_config: str | None = None,
    began_as: First | None = None,
) -> None:
    """Write an adapter folder in one step; one that is there is replaced, if it holds nothing else.

    Args:
        tensors: contiguous, on the host, under the names of the PEFT format.
        config: content of ``adapter_config.json``.
        tokenizer: written beside with its chat template, if given.
        model_config: of a model with a head, as JSON: transformers takes the number and names of labels from it.
        began_as: what the LoRA weights were at first, see ``keep_first``.

    Raises:
        OutputError: the folder cannot be written, or holds something else than an adapter.
    """
    there = [folder] if folder.is_file() else list(folder.iterdir()) if folder.is_dir() else []
    other = [path.name for path in there if path == folder or not _is_part(path)]
    if there and (other or not (folder / CONFIG_NAME).is_file()):
        what = f"{other[0]}, which is no part of an adapter" if other else "something else than an adapter"
        raise OutputError(f"{folder} holds {what} and would be gone; choose another folder")
    first = {tensor.data_ptr(): name for name, tensor in reversed(tensors.items())}
    apart = {name: t if first[t.data_ptr()] == name else t.clone() for name, t in tensors.items()}  # of a tied table
    with replacing_folder(folder) as new:
        write_tensors(new / WEIGHTS_NAME, apart)
        (new / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if model_config is not None:
            (new / MODEL_CONFIG_NAME).write_text(model_config, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if began_as is not None:
            write_first(new, began_as)


def _is_part(path: Path) -> bool:
    """Check whether something in a folder is what an adapter's folder holds."""
    is_own = path.suffix in _SUFFIXES or path.name in _WEIGHTS
    return is_own if path.is_file() else path.name == _TEMPLATES


def load_adapter(model: nn.Module, folder: str | Path, merge_aware: str = OFF) -> nn.Module:
    """Add the layers that an adapter folder describes and fill them; return the model.

    Args:
        model: a base model without LoRA layers.
        folder: written by ``save_adapter`` or by peft.
        merge_aware: what it was trained to be merged into, see ``add_lora``.

    Raises:
        ModelError: see ``read_adapter``; the model has LoRA layers already; or what the adapter began as is damaged.
    """
    require_base(model)
    adapter = read_adapter(model, folder)
    attach_adapter(model, adapter if isinstance(adapter, Saved) else replace(adapter, merge_aware=merge_aware))
    if begins_with_qera(folder):
        keep_first(model, load_first(Path(folder)) if (Path(folder) / FIRST_NAME).is_file() else None)
    return model


def attach_adapter(model: nn.Module, adapter: Adapter | Saved) -> nn.Module:
    """Add an adapter to a base model: LoRA layers with its factors, and its weights in the place of the model's, or the
    layers of its method; return the model."""
    if isinstance(adapter, Saved):
        return adapter.attach(model)
    targets = [Target(name, factors.rank, factors.alpha) for name, factors in adapter.layers.items()]
    model.requires_grad_(False)
    if adapter.layers:  # else weights of the base alone were trained
        first = next(iter(adapter.layers.values()))
        dtypes = {tensor.dtype for factors in adapter.layers.values() for tensor in factors.tensors.values()}
        # which holds all values
        dtype = torch.float32 if len(dtypes) > 1 or dtypes == {torch.float16} else first.lora_A.dtype
        add_lora(
            model,
            targets,
            dropout=adapter.dropout,
            rslora=first.rslora,
            dtype=dtype,
            dora=adapter.is_dora,
            merge_aware=adapter.merge_aware,
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
    new: dict[int, nn.Parameter] = {}  # rows of a tied table are one parameter
    own = {path: adapter.weights[f"{path}.{TOKEN_ROWS}"] for path in adapter.tokens}
    put_rows(
        model,
        {
            path: (adapter.tokens[path], new.setdefault(id(rows), nn.Parameter(rows.to(device))))
            for path, rows in own.items()
        },
    )
    if not head_paths(model).isdisjoint(path.rpartition(".")[0] for path in adapter.weights):
        train_head(model)
    _put(model, {_inside(path, layers): weight for path, weight in adapter.weights.items()}, device)
    return model


def _put(model: nn.Module, weights: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put weights into the place of a model's own, to be trained; where the model has none yet, on a device."""
    new: dict[int, nn.Parameter] = {}  # of one tensor one
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        registry = model.get_submodule(path)._parameters
        if registry[leaf].is_meta:
            registry[leaf] = new.setdefault(id(weight), nn.Parameter(weight.to(device, registry[leaf].dtype)))
    train_weights(model, weights)
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)


def _inside(path: str, adapted: Container[str]) -> str:
    """Return where a weight of the base is in an adapted model."""
    layer, _, leaf = path.rpartition(".")
    return f"{layer}.base.{leaf}" if layer in adapted else path


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
    trained, weights = trained_paths(model), adapter.weights
    if any(getattr(model.get_submodule(path), "tokens", ()) != tokens for path, tokens in adapter.tokens.items()):
        differences.append("its rows are of other tokens than adapter.train_tokens")
    differences += [
        f"{what} {_some(names)}"
        for what, names in (
            ("it has no trained", trained.keys() - weights.keys()),
            ("adapter.train_also lacks", weights.keys() - trained.keys()),
        )
        if names
    ]
    if differences:
        raise ModelError(f"lora.init_from: the adapter has other factors than this recipe: {'; '.join(differences)}")
    _fill(own, given)
    with torch.no_grad():
        for path, parameter in trained.items():
            parameter.copy_(weights[path])
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


def weights_before(model: nn.Module, adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return copies of what an adapter will replace in a base model, for ``detach_adapter``."""
    weights = (path for path in adapter.weights if not path.endswith(TOKEN_ROWS))
    return {path: model.get_parameter(path).detach().clone() for path in weights}


def detach_adapter(model: nn.Module, before: Mapping[str, torch.Tensor] = MappingProxyType({})) -> nn.Module:
    """Take an adapter out of a model again; return the base model.

    Args:
        before: see ``weights_before``.
    """
    freeze_weights(model)
    _corrected.pop(model, None)
    with torch.no_grad():
        for path, weight in before.items():
            inside, _, leaf = _inside(path, dict(lora_layers(model))).rpartition(".")
            if weight.is_meta:  # of a streamed model, where ``_put`` replaced it
                model.get_submodule(inside)._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
            else:
                model.get_parameter(f"{inside}.{leaf}").copy_(weight)
    for name, layer in list(lora_layers(model)):
        if isinstance(layer, LoraLinear):
            model.set_submodule(name, layer.base)
        else:
            path, _, leaf = name.rpartition(".")
            delattr(model.get_submodule(path), LORA + leaf)
    return model
