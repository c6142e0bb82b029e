"""Adapter files in the PEFT format: ``adapter_model.safetensors`` and a small ``adapter_config.json``.

Only keys that every peft of the last years and vLLM understand are written. When reading, whatever this
package cannot compute (DoRA, trained biases, ``modules_to_save``) is refused, and all tensors that are
missing, unexpected, of a wrong shape or not finite are listed in one error: an adapter that loads and does
nothing is the worst fault of this kind.

Tensor names: ``base_model.model.PATH.lora_A.weight`` [r, in] and ``...lora_B.weight`` [out, r].
"""

import json
import re
from pathlib import Path

import regex
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from qlora_lite.errors import ModelError
from qlora_lite.files import replacing_folder, sha256
from qlora_lite.quant.linear import frozen_weight, is_conv1d
from qlora_lite.quant.tensor_file import write_tensors

from .inject import Target, add_lora, linear_layers, lora_layers

WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# Settings of peft that change what an adapter computes, and the starts of values that change the base model.
REFUSED_KEYS = (
    "use_dora", "modules_to_save", "trainable_token_indices", "layer_replication", "lora_bias", "use_qalora",
    "use_bdlora", "alora_invocation_tokens", "target_parameters", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
REFUSED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
MATCH_SECONDS = 0.2  # for one pattern of an adapter file on one path; an honest one takes microseconds


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the factors of a model under the names of the PEFT format."""
    tensors = {}
    for name, layer in lora_layers(model):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach()
    return tensors


def adapter_config(model: nn.Module, base_model: str) -> dict:
    """Return the content of ``adapter_config.json``: the commonest rank and alpha, patterns for the rest."""
    layers = dict(lora_layers(model))
    first = next(iter(layers.values()))
    ranks, alphas = [layer.rank for layer in layers.values()], [layer.alpha for layer in layers.values()]
    rank, alpha = max(set(ranks), key=ranks.count), max(set(alphas), key=alphas.count)
    every = {n for n, m in model.named_modules() if n in layers or (isinstance(m, nn.Linear) or is_conv1d(m))}
    leaves = {name.rpartition(".")[2] for name in layers}
    by_leaf = {name for name in every | set(linear_layers(model)) if name.rpartition(".")[2] in leaves}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "target_modules": sorted(leaves if by_leaf == set(layers) else layers),
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
        "use_rslora": first.rslora,
        "fan_in_fan_out": any(_was_conv1d(layer.base) for layer in layers.values()),
        "bias": "none",
        "inference_mode": True,
    }


def _was_conv1d(base: nn.Module) -> bool:
    return is_conv1d(base) or getattr(base, "replaces", "") == "Conv1D"


def save_adapter(model: nn.Module, folder: str | Path, base_model: str = "", tokenizer=None) -> str:
    """Write the adapter, and the tokenizer with its chat template if given; return the weights' SHA-256.

    Raises:
        ModelError: the model has no adapter, or a factor is not finite.
        OutputError: the folder cannot be written.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter_tensors(model).items()}
    if not tensors:
        raise ModelError("the model has no LoRA layers; call add_lora first")
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ModelError(f"the adapter is not saved: {len(broken)} tensors are not finite, first {broken[0]}")
    folder = Path(folder)
    with replacing_folder(folder) as new:
        write_tensors(new / WEIGHTS_NAME, tensors)
        config = adapter_config(model, base_model)
        (new / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
    return sha256(folder / WEIGHTS_NAME)


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Add the LoRA layers that an adapter folder describes and fill them; return the model.

    Args:
        model: a base model without LoRA layers.
        folder: written by ``save_adapter`` or by peft.

    Raises:
        ModelError: files are missing or broken, the adapter uses what this package cannot compute, or its
            tensors do not fit this model.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder / WEIGHTS_NAME)
    layers = linear_layers(model)
    ranks, problems = _check(tensors, layers)
    problems += _without_factors(config, layers, ranks)
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ModelError(f"the adapter {folder} does not fit this model: {shown}")
    targets = [
        Target(name, rank, _from_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
        for name, rank in ranks.items()
    ]
    dtype = next(iter(tensors.values())).dtype
    dropout = config.get("lora_dropout", 0.0)
    add_lora(model, targets, dropout=dropout, rslora=bool(config.get("use_rslora")), dtype=dtype)
    fill_adapter(model, tensors)
    return model


def fill_adapter(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy factors named as in the PEFT format into a model's LoRA layers of the same shapes."""
    with torch.no_grad():
        for name, parameter in adapter_tensors(model).items():
            parameter.copy_(tensors[name])


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} is not an adapter folder: {CONFIG_NAME} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ModelError(f"{path} does not describe a LoRA adapter (peft_type is not LORA)")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ModelError(f"{path}: alpha_pattern must be an object, not {patterns!r}")
    alphas = {"lora_alpha": config.get("lora_alpha")} | {f"alpha_pattern {key!r}": v for key, v in patterns.items()}
    for name, alpha in alphas.items():
        if not _is_number(alpha) or not 0 < alpha < 1e9:
            raise ModelError(f"{path}: {name} must be a positive number, not {alpha!r}")
    dropout = config.get("lora_dropout", 0.0)
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ModelError(f"{path}: lora_dropout must be from 0 to below 1, not {dropout!r}")
    _refuse_unsupported(config, path)
    return config


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_unsupported(config: dict, path: Path) -> None:
    refused = {key: config.get(key) for key in REFUSED_KEYS}
    refused["bias"] = None if config.get("bias", "none") == "none" else config["bias"]
    start = config.get("init_lora_weights")
    refused["init_lora_weights"] = start if str(start).startswith(REFUSED_INITS) else None
    used = [f"{key}={value!r}" for key, value in refused.items() if value]
    if used:
        raise ModelError(f"{path}: {', '.join(used)} is not supported; train without it or merge with peft")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path}: {error}; it is cut short or not a safetensors file") from None


def _check(tensors, layers) -> tuple[dict[str, int], list[str]]:
    """Return the rank of each adapted layer, and everything that is wrong with the tensors."""
    ranks, problems, known = {}, [], set()
    adapted = {m[1] for name in tensors if (m := re.fullmatch(rf"{PREFIX}(.+)\.lora_[AB]\.weight", name))}
    for name in sorted(adapted & set(layers)):
        keys = [f"{PREFIX}{name}.lora_{side}.weight" for side in "AB"]
        known.update(keys)
        problems += [f"{key} is missing" for key in keys if key not in tensors]
        if any(key not in tensors for key in keys):
            continue
        lora_a, lora_b = (tensors[key] for key in keys)
        out_features, in_features = frozen_weight(layers[name])[0].shape
        rank = lora_a.shape[0] if lora_a.ndim == 2 else 0
        shapes = [tuple(lora_a.shape), tuple(lora_b.shape)]
        if rank < 1 or shapes != [(rank, in_features), (out_features, rank)]:
            problems.append(f"{name} has shapes {shapes}, its layer is {out_features} x {in_features}")
        if not (lora_a.is_floating_point() and lora_b.is_floating_point()):
            problems.append(f"{name} has factors of {lora_a.dtype} and {lora_b.dtype}, which are no numbers to train")
        problems += [f"{key} is not finite" for key in keys if not tensors[key].isfinite().all()]
        ranks[name] = rank
    problems += [f"{name} belongs to no linear layer" for name in sorted(set(tensors) - known)]
    return ranks, problems if tensors else ["it has no tensors"]


def _without_factors(config: dict, layers, ranks) -> list[str]:
    """List layers that the configuration adapts and the file says nothing about."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return []
    adapted = (name for name in layers if any(f".{name}".endswith(f".{target}") for target in targets))
    return [f"{name} has no factors" for name in adapted if name not in ranks]


def _from_pattern(patterns: dict | None, name: str, default: float) -> float:
    """Look up a layer's value the way peft does: a pattern is a regular expression for the end of the path.

    ``regex`` and not ``re``, because only it can give up: a pattern from a foreign file may take for ever.
    """
    for pattern, value in (patterns or {}).items():
        try:
            found = name == pattern or regex.match(rf"(.*\.)?({pattern})$", name, timeout=MATCH_SECONDS)
        except (regex.error, TimeoutError) as error:
            raise ModelError(
                f"{CONFIG_NAME}: alpha_pattern {pattern[:80]!r} cannot be used: {error or 'it takes too long'}"
            ) from None
        if found:
            return value
    return default
