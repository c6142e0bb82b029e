"""Many adapters over one base model: each row of a batch uses the adapter it is given, changed between two calls.

    y_i = x_i W^T + bias + scale_j (x_i A_j^T) B_j^T,     j the adapter of row i; nothing is added for the bare base

Merging into the base and out again, the other way to swap, costs a pass over all weights each time, needs 16-bit
weights, and leaves rounding errors behind. Here a swap sets one name: no weight moves. The adapters lie in memory
beside the base, a thousandth of it each.

Only for inference: no gradients. As in training (``layer``) the base product accumulates onto the low-rank part. The
norms of a DoRA adapter's weights (``dora``) are those of its base once and for all, so they are computed when it is
added. Where an adapter has weights of the base of its own (``parts``), rows that use it go through a module with those.

Shapes: x [rows, ..., in], or [rows T, in] where the tokens of all rows are joined; A [r, in], B [out, r].
Source: LoRA, arXiv 2106.09685, section 4.1, third advantage; batches of several adapters: Punica, arXiv 2310.18547.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import nn
from torch.nn import functional

from qlora_lite.adapters.parts import TOKEN_ROWS
from qlora_lite.adapters.read import Adapter, Factors
from qlora_lite.adapters.saved import Saved
from qlora_lite.adapters.switch import Switch
from qlora_lite.errors import ModelError
from qlora_lite.experts.packing import both_names, compute_experts, expert_weights
from qlora_lite.kernels.token_rows import EmbeddingWithRows, HeadWithRows
from qlora_lite.offload.around import Around
from qlora_lite.quant.linear import QuantLinear, arrange_layer, frozen_weight, small_batch_product, squared_row_norms
from qlora_lite.quant.merging import Merging
from qlora_lite.quant.product import WeightSpec, add_product, materialize, merged

from .dora import adapted_norms, excess_of
from .inject import linear_layers
from .layer import add_update, merging_of, no_weight


def _only(biases: Iterable[torch.Tensor | None], path: str) -> torch.Tensor | None:
    """Return the bias that all rows use, for an architecture that reads it itself, past ``forward``.

    Args:
        biases: one for each adapter in use.
        path: of their layer.

    Raises:
        ModelError: they use several.
    """
    found = {id(bias): bias for bias in biases}
    if len(found) > 1:
        raise ModelError(
            f"this architecture reads the bias of {path} itself, so that rows with biases of their own "
            "cannot go through it together; answer them separately"
        )
    return next(iter(found.values()))


class SwitchLinear(nn.Module):
    """A frozen linear layer with the factors of every adapter that adapts it.

    ``path`` is its name in the model. Mamba reads ``weight`` and ``bias`` of a layer itself: those in use.

    Args:
        dtype: that the model computes in.
        biases: of the adapters that have one of their own, by adapter.
        merging: of the adapters whose updates are merged into the weight, by adapter.
        in_place: the merged weight of the adapter that all rows use takes the place of the base's, which waits in host
            memory; else it is computed anew for each product.
    """

    path = "a layer"

    def __init__(
        self,
        base: nn.Module,
        switch: Switch,
        factors: Mapping[str, Factors],
        device: torch.device,
        dtype: torch.dtype,
        biases: Mapping[str, torch.Tensor],
        merging: Mapping[str, Merging] = MappingProxyType({}),
        in_place: bool = False,
    ):
        super().__init__()
        self.base, self.switch, self.merging = base.requires_grad_(False), switch, merging
        self.in_place: str | None = None  # the adapter that is merged into the base
        self._frozen: list[nn.Module] = [base] if in_place and merging else []  # in a list: no submodule of this one
        self._is_arranged = False  # for products of few rows
        self.factors = {
            name: (each.lora_A.to(device), each.lora_B.to(device), each.scale) for name, each in factors.items()
        }
        self.biases = {name: bias.to(device, dtype) for name, bias in biases.items()}
        magnitudes = {name: m for name, each in factors.items() if (m := each.lora_magnitude_vector) is not None}
        squares, here = squared_row_norms(base) if magnitudes else None, base.weight.device
        self.excess: dict[str, torch.Tensor] = {}  # by DoRA adapter: m / |V| - 1
        for name, magnitude in magnitudes.items():
            each = factors[name]
            pair = each.lora_A.to(here), each.lora_B.to(here)
            norms = adapted_norms(base, squares, *pair, each.scale, dtype)
            self.excess[name] = excess_of(magnitude.to(here), norms, dtype).to(device)

    @property
    def weight(self) -> torch.Tensor:
        """The base's.

        Raises:
            ModelError: an adapter in use has factors here, which are not in it.
        """
        if self.factors.keys() & self.switch.used:
            raise no_weight(self.path)
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """That of all rows; see ``_only``."""
        return _only((self.biases.get(name or "", self.base.bias) for name in self.switch.used), self.path)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._frozen:
            rows = self.switch.rows
            self._put_in_place(rows if isinstance(rows, str) and rows in self.merging else None)
        return self._product(x)

    def _put_in_place(self, name: str | None) -> None:
        """Let the base be what an adapter is merged into; None is the frozen weight, as is where this breaks off."""
        if name == self.in_place:
            return
        (frozen,), device = self._frozen, self.base.weight.device
        if self.in_place is None:
            self._is_arranged = getattr(frozen, "arranged", None) is not None
        self.base, self.in_place = frozen.to(device).train(self.training), None
        if self._is_arranged and name is None:
            arrange_layer(frozen)
        if name is None:
            return
        spec, tensors = merged(*self._described(frozen, name))
        base = QuantLinear.from_packed(tensors, spec.shape, frozen.bias, spec.quant_type, frozen.weight.dtype)
        if self._is_arranged:
            frozen.arranged = None
            arrange_layer(base)
        self.base, self.in_place = base.requires_grad_(False).train(self.training), name
        frozen.to("cpu")

    def _described(self, base: nn.Module, name: str) -> tuple[WeightSpec, tuple[torch.Tensor, ...]]:
        """Return the weight that an adapter is merged into, as spec and tensors."""
        spec, frozen = frozen_weight(base)
        return spec._replace(merging=self.merging[name]), (*frozen, *self.factors[name][:2])

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        spec, frozen = frozen_weight(self.base)
        rows, used, bias = self.switch.rows, self.switch.used, self.base.bias
        if isinstance(rows, tuple) and self.merging.keys() & used:
            return self._apart(x, used)
        scaled, own_bias = self.excess.keys() & used, self.biases.keys() & used
        is_late = scaled or own_bias
        if isinstance(rows, str) and rows in self.merging:
            y = None
            if self.in_place is None:
                spec, frozen = self._described(self.base, rows)
            else:
                y = small_batch_product(self.base, x, with_bias=not is_late)
            if y is None:
                y = functional.linear(x, materialize(spec, frozen, x.dtype), None if is_late else bias)
            return y.add_(self.biases[rows]) if is_late else y
        y = small_batch_product(self.base, x, with_bias=not is_late)
        if y is not None and not isinstance(rows, tuple):
            y = add_update(y, x, *self.factors[rows]) if rows in self.factors else y
        elif (update := self._update(x, spec.shape[0])) is None:
            y = functional.linear(x, materialize(spec, frozen, x.dtype), None if is_late else bias)
        elif y is None:
            y = add_product(update, x, spec, frozen, None if is_late else bias)
        else:
            y.add_(update)
        for name in scaled:
            self._scale(y, name)
        if own_bias:
            names = rows if isinstance(rows, tuple) else [rows]
            each = torch.stack([self.biases.get(name or "", bias) for name in names])
            if isinstance(rows, tuple):
                each = each.repeat_interleave(self.switch.per_row(y), 0)
            bias = each.view(len(each), *(1,) * (y.ndim - 2), -1)
        return y.add_(bias) if is_late and bias is not None else y

    def _apart(self, x: torch.Tensor, names: Iterable[str | None]) -> torch.Tensor:
        """Return y of rows that use several adapters, each adapter's computed by itself."""
        y = x.new_empty(*x.shape[:-1], frozen_weight(self.base)[0].shape[0])
        for name, places in [(name, self.switch.places_in(x, name)) for name in names]:
            with self.switch.using(name):
                y.index_copy_(0, places, self._product(x.index_select(0, places)))
        return y

    def _scale(self, y: torch.Tensor, name: str) -> None:
        """Multiply what an adapter's rows have by ``m / |V|``, in place."""
        if not isinstance(self.switch.rows, tuple):
            y.addcmul_(y, self.excess[name])
            return
        places = self.switch.places_in(y, name)
        part = y.index_select(0, places)
        y.index_copy_(0, places, part.addcmul_(part, self.excess[name]))

    def _update(self, x: torch.Tensor, out_features: int) -> torch.Tensor | None:
        rows = self.switch.rows
        if not isinstance(rows, tuple):
            return self._low_rank(x, rows) if rows in self.factors else None
        update = x.new_zeros(*x.shape[:-1], out_features)
        for name in self.factors.keys() & set(rows):
            places = self.switch.places_in(x, name)
            update.index_copy_(0, places, self._low_rank(x.index_select(0, places), name))
        return update

    def _low_rank(self, x: torch.Tensor, name: str) -> torch.Tensor:
        lora_a, lora_b, scale = self.factors[name]
        low = functional.linear(x, lora_a.to(x.dtype)).mul_(scale)
        return functional.linear(low, lora_b.to(x.dtype))


class SwitchExperts(nn.Module):
    """The experts of a block with the factors of every adapter that adapts them.

    Args:
        factors: of the block's two projections, by adapter and name of the projection.
    """

    def __init__(
        self, experts: nn.Module, switch: Switch, factors: Mapping[str, Mapping[str, Factors]], device: torch.device
    ):
        super().__init__()
        self.experts, self.switch = experts, switch
        self.lora = {
            name: {leaf: (f.lora_A.to(device), f.lora_B.to(device), f.scale) for leaf, f in both.items()}
            for name, both in factors.items()
        }

    @torch.no_grad()
    def forward(self, hidden_TD: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        rows, given = self.switch.rows, (hidden_TD, chosen_TK, weights_TK)
        if not isinstance(rows, tuple):
            return self._computed(rows, *given)
        out_TD = torch.empty_like(hidden_TD)
        for name in set(rows):
            tokens = self.switch.places_in(hidden_TD, name)
            out_TD[tokens] = self._computed(name, *(tensor[tokens] for tensor in given))
        return out_TD

    def _computed(self, name: str | None, *given: torch.Tensor) -> torch.Tensor:
        hidden_TD, chosen_TK, weights_TK = given
        return compute_experts(self.experts, hidden_TD, chosen_TK, weights_TK, lora=self.lora.get(name or "", {}))


class SwitchModule(Around):
    """A module of the base, and in its place for some adapters one with weights of their own.

    ``path`` is its name in the model. Whoever reads ``weight`` and ``bias`` past ``forward``, as Mamba does those of
    its convolutions, gets those in use.

    Args:
        own: those by adapter.
        others: what the base and all other adapters use.
    """

    path = "a module"

    def __init__(self, inner: nn.Module, switch: Switch, own: Mapping[str, nn.Module], others: nn.Module):
        super().__init__(inner)
        self.switch, self.own, self._others = switch, dict(own), (others,)
        self.tokens: tuple[int, ...] = getattr(others, "tokens", ())  # behind the table's end

    @property
    def in_use(self) -> nn.Module:
        """What all rows use.

        Raises:
            ModelError: they use several adapters.
        """
        rows = self.switch.rows
        if isinstance(rows, tuple):
            raise ModelError(f"rows with different adapters have no {self.path} in common; answer them separately")
        return self._of(rows)

    @property
    def weight(self) -> torch.Tensor:
        """That in use; where rows use several adapters the base's, of which norms and heads show type and device."""
        return (self._others[0] if isinstance(self.switch.rows, tuple) else self.in_use).weight

    @property
    def bias(self) -> torch.Tensor | None:
        """That of all rows; see ``_only``."""
        return _only((self._of(name).bias for name in self.switch.used), self.path)

    def forward(self, x: torch.Tensor, *others) -> torch.Tensor:
        rows = self.switch.rows
        if not isinstance(rows, tuple):
            return self._of(rows)(x, *others)
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name in dict.fromkeys(rows):
            places = self.switch.places_in(x, name)
            found = self._of(name)(*(each.index_select(0, places) for each in (x, *others)))
            if not isinstance(found, torch.Tensor):
                raise ModelError(
                    f"{type(self.inner).__name__} gives more than one tensor, so that rows with different "
                    "adapters cannot go through it together; answer them separately"
                )
            parts.append((places, found))
        widest = max(part.shape[-1] for _, part in parts)  # the head of an adapter with new tokens has more
        y = parts[0][1].new_full((x.shape[0], *parts[0][1].shape[1:-1], widest), -torch.inf)
        for places, part in parts:
            y[..., : part.shape[-1]].index_copy_(0, places, part)
        return y

    def _of(self, name: str | None) -> nn.Module:
        return self.own.get(name or "", *self._others)


def _with_weights(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a module that shares everything with another one but some weights, by name."""
    twin = copy.copy(module)
    if isinstance(module, Around):
        inner = _with_weights(module.inner, weights)
        twin._inner, twin._parameters, twin._buffers = (inner,), inner._parameters, inner._buffers
    else:
        own = {name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()}
        twin._parameters, twin._buffers = {**module._parameters, **own}, dict(module._buffers)
    return twin


def add_switch(model: nn.Module, adapters: Mapping[str, Adapter | Saved], in_place: bool = False) -> Switch:
    """Wrap every layer and all experts of a block that an adapter adapts, and every module of which one has weights;
    return the switch, set to the bare base.

    Args:
        model: a base model without LoRA layers.
        adapters: read for this model (``adapters.read.read_adapter``), by name.
        in_place: see ``SwitchLinear``; for a model whose weights stay where they are.
    """
    switch, others = Switch(adapters), {name: each for name, each in adapters.items() if isinstance(each, Saved)}
    of_lora = {name: each for name, each in adapters.items() if isinstance(each, Adapter)}
    device: torch.device = model.device
    weights: dict[str, dict[str, dict[str, torch.Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, adapter in of_lora.items():
        for path, weight in adapter.weights.items():
            module, _, leaf = path.rpartition(".")
            weights[module][name][leaf] = weight
    whole = {path for path, of_adapters in weights.items() if any("weight" in each for each in of_adapters.values())}
    for path, layer in linear_layers(model).items():
        if path in whole:  # a projector's
            continue
        factors = {name: adapter.layers[path] for name, adapter in of_lora.items() if path in adapter.layers}
        biases = {name: leaves["bias"] for name, leaves in weights.pop(path, {}).items()}
        if factors or biases:
            merging = {
                name: merged
                for name, each in factors.items()
                if (merged := merging_of(layer, of_lora[name].merge_aware, each.scale, path))
            }
            wrapped = SwitchLinear(layer, switch, factors, device, model.dtype, biases, merging, in_place)
            wrapped.path = path
            model.set_submodule(path, wrapped)
    for path, of_adapters in weights.items():
        module = model.get_submodule(path)
        own = {}
        for name, leaves in of_adapters.items():
            here = {leaf: weight.to(device, model.dtype) for leaf, weight in leaves.items()}
            rows = here.pop(TOKEN_ROWS, None)
            own[name] = _with_weights(module, here)
            if rows is not None:
                kind = EmbeddingWithRows if module is model.get_input_embeddings() else HeadWithRows
                own[name] = kind(own[name], of_lora[name].tokens[path], nn.Parameter(rows, requires_grad=False))
        every = {token for name in of_adapters for token in of_lora[name].tokens.get(path, ())}
        base = module
        if new := sorted(token for token in every if token >= module.weight.shape[0]):  # as before training
            mean = module.weight.mean(0, dtype=torch.float32).to(device, model.dtype)
            rows = nn.Parameter(mean.repeat(len(new), 1), requires_grad=False)
            kind = EmbeddingWithRows if module is model.get_input_embeddings() else HeadWithRows
            base = kind(_with_weights(module, {}), new, rows)
        module = SwitchModule(module, switch, own, base)
        module.path = path
        model.set_submodule(path, module)
    for path, experts in {weight.path: weight.experts for weight in expert_weights(model).values()}.items():
        both = {
            name: {leaf: found for leaf in both_names(experts) if (found := adapter.layers.get(f"{path}.{leaf}"))}
            for name, adapter in of_lora.items()
        }
        if any(both.values()):
            model.set_submodule(path, SwitchExperts(experts, switch, both, device))
    for name, saved in others.items():
        saved.method.add_switched(model, switch, name, saved.tensors)
    return switch
