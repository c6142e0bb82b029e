"""Bottleneck adapters: a small network behind the attention and the feed-forward part of each block.

    y = h + U act(D h + d) + u,      h what the part's last linear layer gives

U and u start at zero, so that the first forward equals the base model's; D starts Kaiming-uniform and d at zero. With
placement pfeiffer they stand behind the feed-forward part alone, with houlsby behind both, always before the residual
is added, and before a norm between (Gemma, OLMo 2). They wrap the part's last linear layer, since its output is the
part's, and since attention gives more than one tensor.

The update depends on h through a nonlinearity, so that no weight of the base can hold it: there is no merging, and each
token pays for two more products per adapter.

Shapes: h, y [..., H], D [w, H], d [w], U [H, w], u [H].
Source: Houlsby et al., arXiv 1902.00751, section 2.1; Pfeiffer et al., arXiv 2005.00247, section 3.2.2.
"""

import math
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from qlora_lite.errors import ModelError
from qlora_lite.quant.linear import frozen_weight

from .checkpoint_names import inside, outside
from .lora.inject import blocks_of, linear_layers, require_base
from .method import AdapterMethod
from .switch import Switch

PEFT_TYPE = "BOTTLENECK"  # in adapter_config.json; peft has no such adapters
# The last linear layer of a part, by its path in a block.
ATTENTION = (
    "self_attn.o_proj",
    "self_attn.dense",
    "self_attn.out_proj",
    "attn.c_proj",
    "attention.dense",
    "self_attention.dense",
)
FEED_FORWARD = "mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "fc2"
PLACEMENTS = {"pfeiffer": (FEED_FORWARD,), "houlsby": (ATTENTION, FEED_FORWARD)}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}
LEAVES = "down_weight", "down_bias", "up_weight", "up_bias"


def add_bottleneck(h: torch.Tensor, tensors: Sequence[torch.Tensor], activation: str) -> torch.Tensor:
    """Return ``h + U act(D h + d) + u``.

    Args:
        tensors: D, d, U and u, in the order of ``LEAVES``.
    """
    down, down_bias, up, up_bias = (tensor.to(h.dtype) for tensor in tensors)
    return h + functional.linear(ACTIVATIONS[activation](functional.linear(h, down, down_bias)), up, up_bias)


def shapes_of(layer: nn.Module, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter behind a linear layer, by its names in the module."""
    hidden = frozen_weight(layer)[0].shape[0]
    return dict(zip(LEAVES, ((width, hidden), (width,), (hidden, width), (hidden,)), strict=True))


class BottleneckLinear(nn.Module):
    """Wrap a frozen linear layer with an adapter behind it.

    Args:
        base: ``QuantLinear``, ``nn.Linear`` or ``Conv1D``; its parameters are frozen here.
        width: w, at least 1.
        activation: a key of ``ACTIVATIONS``.
        dtype: of the adapter's weights.
    """

    def __init__(self, base: nn.Module, width: int, activation: str, dtype: torch.dtype):
        super().__init__()
        self.base, self.activation = base.requires_grad_(False), activation
        for leaf, shape in shapes_of(base, width).items():
            setattr(self, leaf, nn.Parameter(torch.zeros(shape, dtype=dtype, device=base.weight.device)))
        if not self.down_weight.is_meta:  # drawn in host memory: a seed gives the same wherever the layer lies
            drawn = torch.empty(self.down_weight.shape, dtype=dtype)
            self.down_weight.data.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tensors = self.down_weight, self.down_bias, self.up_weight, self.up_bias
        return add_bottleneck(self.base(x), tensors, self.activation)


class SwitchBottleneck(nn.Module):
    """A layer with one adapter behind it for the rows that use it; see ``switch``. Only for inference.

    Args:
        tensors: D, d, U and u.
    """

    def __init__(self, base: nn.Module, switch: Switch, name: str, tensors: list[torch.Tensor], activation: str):
        super().__init__()
        self.base, self.switch, self.name, self.tensors, self.activation = base, switch, name, tensors, activation

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, rows = self.base(x), self.switch.rows
        if rows == self.name:
            return add_bottleneck(h, self.tensors, self.activation)
        if isinstance(rows, tuple) and self.name in rows:
            places = self.switch.places_in(h, self.name)
            return h.index_copy(0, places, add_bottleneck(h.index_select(0, places), self.tensors, self.activation))
        return h


@dataclass(frozen=True)
class Bottleneck(AdapterMethod):
    """Bottleneck adapters of one width; see the module's text.

    Args:
        width: w.
        placement: a key of ``PLACEMENTS``.
        activation: a key of ``ACTIVATIONS``.
        dtype: of the weights.
    """

    width: int = 64
    placement: str = "pfeiffer"
    activation: str = "relu"
    dtype: torch.dtype = torch.bfloat16

    size_setting = "bottleneck.width"
    why_not_merged = (
        "it is a bottleneck adapter, whose update depends on its input through a nonlinearity, so that no weight can "
        "hold it; evaluate, generate, chat and serve use it as it is"
    )

    def apply(self, model: nn.Module) -> None:
        """Freeze a model and put an adapter behind each part of the placement.

        Raises:
            ModelError: see ``places``; or the model has LoRA layers.
        """
        require_base(model)
        model.requires_grad_(False)
        for path in self.places(model):
            layer = BottleneckLinear(model.get_submodule(path), self.width, self.activation, self.dtype)
            model.set_submodule(path, layer.train(model.training))

    def places(self, model: nn.Module) -> list[str]:
        """Return the paths of the layers that an adapter stands behind, of a base model.

        Raises:
            ModelError: a block has not exactly one layer for a part of the placement, or there are adapters already.
        """
        if any(bottleneck_layers(model)):
            raise ModelError("the model has bottleneck adapters already; load the base model again")
        layers, found = linear_layers(model), []
        for block in blocks_of(model):
            for names in PLACEMENTS[self.placement]:
                here = [f"{block}.{name}" for name in names if f"{block}.{name}" in layers]
                if len(here) != 1:
                    raise ModelError(
                        f"adapter.method bottleneck with bottleneck.placement {self.placement} has no "
                        f"place in {block} of {type(model).__name__}, which has none of "
                        f"{', '.join(names)}; take adapter.method lora"
                    )
                found += here
        if not found:
            raise ModelError(f"adapter.method bottleneck: {type(model).__name__} does not mark its blocks")
        return found

    def config(self, model: nn.Module, base_model: str) -> dict:
        """Return the content of ``adapter_config.json``."""
        return {
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "width": self.width,
            "placement": self.placement,
            "activation": self.activation,
            "dtype": str(self.dtype).removeprefix("torch."),
            "inference_mode": True,
        }

    @classmethod
    def described_by(cls, config: Mapping) -> "Bottleneck":
        """Return the method that an adapter's configuration describes.

        Raises:
            ModelError: it describes none.
        """
        width = config.get("width")
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ModelError(f"width must be a whole number of at least 1, not {width!r:.80}")
        for name, known in (("placement", PLACEMENTS), ("activation", ACTIVATIONS), ("dtype", _DTYPES)):
            if not isinstance(value := config.get(name), str) or value not in known:
                raise ModelError(f"{name} must be one of {', '.join(known)}, not {value!r:.80}")
        return cls(width, config["placement"], config["activation"], _DTYPES[config["dtype"]])

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return the weights by the names of their layers in files."""
        return {
            f"{outside(model, path)}.{leaf}": layer.get_parameter(leaf).detach()
            for path, layer in bottleneck_layers(model)
            for leaf in LEAVES
        }

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """See ``AdapterMethod``."""
        return {
            f"{outside(model, path)}.{leaf}": shape
            for path in self.places(model)
            for leaf, shape in shapes_of(model.get_submodule(path), self.width).items()
        }

    def add_switched(self, model: nn.Module, switch: Switch, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """See ``AdapterMethod``."""
        device: torch.device = model.device
        for path in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
            inner = inside(model, path)
            own = [tensors[f"{path}.{leaf}"].to(device, model.dtype) for leaf in LEAVES]
            wrapped = SwitchBottleneck(model.get_submodule(inner), switch, name, own, self.activation)
            model.set_submodule(inner, wrapped.train(model.training))

    def layers_not_reached(self, model: nn.Module, norms: Mapping[str, float]) -> list[str]:
        """U begins at zero, so that D's first gradient is zero by construction and U's is the one to look at."""
        return [path for path, _ in bottleneck_layers(model) if not norms[f"{path}.up_weight"]]

    def does_nothing(self, model: nn.Module) -> bool:
        """Return whether every U and u is still zero."""
        return not any(layer.up_weight.any() or layer.up_bias.any() for _, layer in bottleneck_layers(model))

    def layer_kinds(
        self, linear: Sequence[str], experts: Sequence[str], in_blocks: Container[str]
    ) -> Mapping[str, Hashable]:
        """Return whether an adapter stands behind each layer."""
        ends = tuple(f".{name}" for part in PLACEMENTS[self.placement] for name in part)
        return {name: name in in_blocks and name.endswith(ends) for name in (*linear, *experts)}


_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def bottleneck_layers(model: nn.Module) -> Iterator[tuple[str, BottleneckLinear]]:
    """Yield the wrapped layers of a model with their paths."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BottleneckLinear))
