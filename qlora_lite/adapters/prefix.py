"""Prefix tuning: keys and values of virtual tokens are trained, in every layer, and nothing in the model.

The virtual tokens are those of ``prompt``: ids before every row, which lengths, packs, positions and caches count. What
the layers compute at their places is thrown away but for keys and values, in whose place the trained ones stand, behind
the layers ``k_proj`` and ``v_proj`` (``PrefixLinear``). So attention, its kernels and its caches know nothing of it.

Keys are trained as they are before the rotation by their positions 0 to k - 1; in peft's files they are rotated:

    key_file = key * cos + half_turn(key) * sin,      half_turn((a, b)) = (-b, a)

which an orthogonal rotation undoes. Families that normalise keys, rotate a part of them, other pairs of numbers or not
in all layers, or have one layer for queries, keys and values are refused.

Shapes: k virtual tokens, L layers, F = heads x head size of keys; keys and values [k, F] a layer, in float32.
Source: prefix tuning, arXiv 2101.00190, without its reparametrisation.
"""

import sys
from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from qlora_lite.errors import ModelError
from qlora_lite.quant.linear import frozen_weight

from .lora.inject import linear_layers
from .method import AdapterMethod
from .prompt import (
    TENSOR,
    SwitchedTokens,
    VirtualPlaces,
    add_part,
    count_in,
    first_tokens,
    switched_tokens,
    virtual_tokens,
)
from .switch import Switch

_KEY, _VALUE = "k_proj", "v_proj"
_ENDS = f".{_KEY}", f".{_VALUE}"  # of paths


class PrefixLinear(nn.Module):
    """A frozen layer of keys or values, whose outputs at the places of virtual tokens are trained instead.

    Args:
        base: the layer.
        tokens: knows the places.
        count: k. The trained outputs [k, F], float32, are zeros until ``PrefixTuning.begin``.
    """

    def __init__(self, base: nn.Module, tokens: VirtualPlaces, count: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        self._tokens = (tokens,)  # a tuple hides it from registration
        weight, _ = frozen_weight(base)
        self.prefix = nn.Parameter(torch.zeros(count, weight.shape[0], device=base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._tokens[0].replaced(self.base(x), self.prefix)


class SwitchPrefix(nn.Module):
    """A layer of keys or values with the prefixes of several adapters. Only for inference.

    Args:
        prefixes: [k, F] by adapter.
    """

    def __init__(self, base: nn.Module, tokens: SwitchedTokens, prefixes: dict[str, torch.Tensor]):
        super().__init__()
        self.base, self._tokens, self.prefixes = base, (tokens,), prefixes

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self._tokens[0]
        own = self.prefixes.get(tokens.name_in_use() or "")
        return self.base(x) if own is None else tokens.replaced(self.base(x), own)


@dataclass(frozen=True)
class PrefixTuning(AdapterMethod):
    """Trained keys and values before every row.

    Args:
        virtual_tokens: k.
        init_ids: tokens whose keys and values in the model they begin as, repeated as often as it takes; none draws
            from the vocabulary.
    """

    virtual_tokens: int = 20
    init_ids: tuple[int, ...] = ()

    size_setting = "prompt.virtual_tokens"
    why_not_merged = (
        "it is a prefix of keys and values, which no weight of the model holds; evaluate, generate, chat and serve use "
        "it as it is"
    )
    trains_unpacked = False  # recomputed rows would find the virtual tokens of another one

    def apply(self, model: nn.Module) -> None:
        """Freeze the model and put trained keys and values before every row.

        Raises:
            ModelError: the model's keys cannot be had so, or it has virtual tokens already.
        """
        layers = _layers_of(model)
        model.requires_grad_(False)
        part = VirtualPlaces(self.virtual_tokens, first_tokens(model, self.virtual_tokens, self.init_ids))
        add_part(model, part)
        for path, layer in layers.items():
            model.set_submodule(path, PrefixLinear(layer, part, self.virtual_tokens).train(model.training))

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        """Take keys and values of the first tokens from the model: training begins with what those tokens do."""
        handles, was_training = [], model.training
        for _, layer in prefix_layers(model):

            def take(_base: nn.Module, _x: tuple, found: torch.Tensor, prefix: nn.Parameter = layer.prefix) -> None:
                prefix.copy_(found[0, : self.virtual_tokens])

            handles.append(layer.base.register_forward_hook(take))
        part = virtual_tokens(model)
        assert part is not None and part.first is not None
        try:
            model.eval().base_model(input_ids=part.first[None].to(_device(model)), use_cache=False)
        finally:
            model.train(was_training)
            for handle in handles:
                handle.remove()

    def config(self, model: nn.Module, base_model: str) -> dict:
        """Return peft's configuration of prefix tuning."""
        text = model.config.get_text_config(decoder=True)
        size, heads = _head_size(model), text.num_key_value_heads
        return {
            "peft_type": "PREFIX_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "num_virtual_tokens": self.virtual_tokens,
            "token_dim": size * heads,
            "num_transformer_submodules": 1,
            "num_attention_heads": heads,
            "num_layers": text.num_hidden_layers,
            "encoder_hidden_size": size * heads,
            "prefix_projection": False,
            "inference_mode": True,
        }

    @classmethod
    def described_by(cls, config: Mapping) -> "PrefixTuning":
        """Return the method that a configuration describes, peft's too.

        Raises:
            ModelError: it describes none.
        """
        return cls(count_in(config))

    def files(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return all keys, rotated, and values as peft has them, [k, 2 L F]: of one layer behind those of another."""
        with torch.no_grad():
            parts = [
                _rotated(model, layer.prefix.detach()) if path.endswith(_KEY) else layer.prefix.detach()
                for path, layer in prefix_layers(model)
            ]
        return {TENSOR: torch.cat([part.cpu() for part in parts], 1)}

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """See ``AdapterMethod``."""
        config = model.config.get_text_config(decoder=True)
        return {TENSOR: (self.virtual_tokens, len(_layers_of(model)) * _head_size(model) * config.num_key_value_heads)}

    def fill(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy what a file or a checkpoint holds."""
        if TENSOR not in tensors:
            super().fill(model, tensors)
            return
        found = dict(prefix_layers(model))
        with torch.no_grad():
            for path, prefix in _by_layer(model, list(found), tensors[TENSOR]):
                found[path].prefix.copy_(prefix)

    def add_switched(self, model: nn.Module, switch: Switch, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """See ``AdapterMethod``."""
        part = switched_tokens(model, switch)
        part.counts[name] = self.virtual_tokens
        # by their names, since the layers of another adapter may stand around them; ``shapes`` has checked the family
        layers = {path: module for path, module in model.named_modules() if path.endswith(_ENDS)}
        for path, prefix in _by_layer(model, list(layers), tensors[TENSOR]):
            layer = layers[path]
            if not isinstance(layer, SwitchPrefix):
                layer = SwitchPrefix(layer, part, {})
                model.set_submodule(path, layer)
            layer.prefixes[name] = prefix.to(model.device)

    def layer_kinds(
        self, linear: Sequence[str], experts: Sequence[str], in_blocks: Container[str]
    ) -> Mapping[str, Hashable]:
        """Say which layers have trained outputs."""
        return {name: name.endswith((_KEY, _VALUE)) for name in (*linear, *experts)}


def prefix_layers(model: nn.Module) -> Iterator[tuple[str, PrefixLinear]]:
    """Yield the wrapped layers of a model with their paths: keys and values of one layer behind those of another."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, PrefixLinear))


def _layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of keys and values by path.

    Raises:
        ModelError: the family computes its keys otherwise.
    """
    layers = {path: layer for path, layer in linear_layers(model).items() if path.endswith(_ENDS)}
    attentions = [model.get_submodule(path) for path in dict.fromkeys(path.rpartition(".")[0] for path in layers)]
    normalised = any("norm" in name for attention in attentions for name, _ in attention.named_children())
    count = 2 * model.config.get_text_config(decoder=True).num_hidden_layers
    if normalised or len(layers) != count or not _rotates_whole_heads(model) or not _rotates_halves(model, attentions):
        raise ModelError(
            "adapter.method prefix is for models with layers k_proj and v_proj whose keys are rotated as "
            f"they are, and not for {type(model).__name__}; take adapter.method prompt"
        )
    return layers


def _rotates_whole_heads(model: nn.Module) -> bool:
    rotary = getattr(model.base_model, "rotary_emb", None)
    return rotary is not None and 2 * len(getattr(rotary, "inv_freq", ())) == _head_size(model)


def _rotates_halves(model: nn.Module, attentions: Sequence[nn.Module]) -> bool:
    """Return whether the family's own function turns keys as ``_turned`` does, in all layers."""
    rotate = getattr(sys.modules[type(attentions[0]).__module__], "apply_rotary_pos_emb", None)
    if rotate is None or not all(getattr(attention, "use_rope", True) for attention in attentions):
        return False
    chance, size = torch.Generator().manual_seed(0), _head_size(model)
    keys, angles = torch.randn(1, 1, 3, size, generator=chance), torch.rand(1, 3, size // 2, generator=chance)
    expected = _turned(keys, *(part.repeat(1, 1, 2)[:, None] for part in (angles.cos(), angles.sin())))
    for count in (2, 1):  # angles for both halves of a head, or once
        with suppress(TypeError, RuntimeError):  # it takes other arguments
            found = rotate(keys, keys, angles.cos().repeat(1, 1, count), angles.sin().repeat(1, 1, count))[1]
            return torch.allclose(found, expected, atol=1e-5)
    return False


def _head_size(model: nn.Module) -> int:
    text = model.config.get_text_config(decoder=True)
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _device(model: nn.Module) -> torch.device:
    """Return where a model computes, wherever its weights wait."""
    return next(model.base_model.rotary_emb.buffers()).device


def _rotated(model: nn.Module, keys: torch.Tensor, back: bool = False) -> torch.Tensor:
    """Return keys [k, F] as their positions rotate them, or turned back."""
    k, heads = len(keys), keys.view(len(keys), -1, _head_size(model))
    positions = torch.arange(k, device=keys.device)[None]
    cos, sin = (part[0][:, None].to(keys) for part in model.base_model.rotary_emb(keys[None], positions))
    if 2 * cos.shape[-1] == heads.shape[-1]:  # gpt-oss has the angles once for both halves of a head
        cos, sin = (torch.cat([part, part], -1) for part in (cos, sin))
    if back:
        return (_turned(heads, cos, -sin) / (cos.square() + sin.square())).reshape(k, -1)
    return _turned(heads, cos, sin).reshape(k, -1)


def _turned(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = keys.chunk(2, dim=-1)
    return keys * cos + torch.cat([-second, first], -1) * sin


def _by_layer(model: nn.Module, paths: Sequence[str], tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield paths with their keys, turned back, or values, of a file's tensor."""
    tensor = tensor.float().to(_device(model))
    for path, part in zip(paths, tensor.chunk(len(paths), dim=1), strict=True):
        yield path, _rotated(model, part, back=True) if path.endswith(_KEY) else part
