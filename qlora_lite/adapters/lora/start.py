"""Starts that give the LoRA weights a part of the model, and the base what is left: LoftQ, PiSSA, OLoRA.

    W ~ Q + scale * B A,      Q what is stored in place of W, in 4 bit or in 16

- ``loftq``: Q and B A are found in turn, each as the nearest to what the other one leaves of W: Q = quantize(W - B A),
  B A = the largest singular triplets of W - Q. So the first forward is nearer to the 16-bit model's than that of a
  quantised model alone. None at all is Q = quantize(W), and one leaves that Q and only begins with its error.
- ``pissa``: B A are the largest singular triplets of W, and Q = W - scale * B A, quantised if the model is.
- ``olora``: likewise, with the first columns of W's orthonormal basis: W = B R, A the first rows of R.

Singular triplets come from a few steps of subspace iteration, which begin with those of the alternation before
(a whole decomposition of a weight takes seconds; torch.svd_lowrank begins afresh each time). Random numbers have a seed
of their own, so that Q depends on the weight and these settings, not on the seed of a training, and can be cached. A
and B are rounded to their type before Q is taken, which makes up for it. What the weights of a run began as is found
again from the same weight, or from the cache.

Such a Q belongs to its LoRA weights and to no others: models are marked with the name of their base (``set_base``), and
``adapters.read`` compares it. The name is one of content and settings, and decompositions round otherwise on another
machine or in another version of torch, so that Q has a few other codes there; a sum over what the LoRA weights began
as, which is beside the name, shows it.

Shapes: W, Q [out, in], A [r, in], B [out, r].
Source: LoftQ, arXiv 2310.08659, algorithm 1; PiSSA, arXiv 2404.02948; OLoRA, arXiv 2406.01775; subspace iteration,
arXiv 0909.4061, algorithm 4.4.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from qlora_lite.errors import ModelError
from qlora_lite.experts.packing import expert_weights
from qlora_lite.quant.nf4 import Packed, dequantize, quantize
from qlora_lite.quant.tensor_file import bit_sums, write_tensors

from .inject import Target, choose_layers, in_blocks, linear_layers, matching, sharing_layers, usually_adapted
from .layer import lora_scale

KAIMING, LOFTQ, PISSA, OLORA = "kaiming", "loftq", "pissa", "olora"
STEPS = {LOFTQ: 1, PISSA: 4}  # of subspace iteration for a weight, of LoftQ for each alternation
FIRST_NAME = "first_lora_weights.safetensors"
First = dict[str, tuple[torch.Tensor, torch.Tensor]]  # A and B by the path of the layer


class _Base(NamedTuple):
    name: str
    first: First
    first_sum: str


_bases: WeakKeyDictionary[nn.Module, _Base] = WeakKeyDictionary()  # by model, see ``set_base``


def chosen_layers(
    model: nn.Module, targets: Sequence[Target], rank: int, alpha: float, start: str
) -> dict[str, tuple[int, float]]:
    """Return rank and alpha of each layer that a start is for, by path; a skeleton is enough.

    Args:
        start: whose layers these are, for the error.

    Raises:
        ModelError: a target matches no layer, or names experts.
    """
    experts = expert_weights(model)
    chosen = choose_layers(linear_layers(model), experts, targets, usually_adapted(model))
    if adapted := experts.keys() & chosen.keys():
        raise ModelError(
            f"lora.start {start} is for linear layers, and lora.targets name experts too, such as "
            f"{min(adapted)}: set it to kaiming, or leave the experts out"
        )
    return {path: (target.rank or rank, target.alpha or alpha) for path, target in chosen.items()}


@dataclass(frozen=True, slots=True)
class Start:
    """How the weights of a model's layers are split; arguments are those of ``add_lora``.

    Args:
        kind: "loftq", "pissa" or "olora".
        alternations: of LoftQ, at least 1.
        kept: patterns of layers that are not split, being in 16 bit beside 4-bit ones; their LoRA weights begin as
            without a start.
    """

    kind: str
    alternations: int = 5
    targets: tuple[Target, ...] = (Target("all-linear"),)
    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dtype: torch.dtype = torch.bfloat16
    kept: tuple[str, ...] = ()

    def settings(self) -> dict:
        """Return all that decides about the result, for JSON."""
        said = asdict(self) | {"dtype": str(self.dtype)}
        return said if self.kind == LOFTQ else said | {"alternations": None}

    def ranks(self, model: nn.Module) -> dict[str, tuple[int, float]]:
        """Return rank and scale by the path of each layer that is split; a skeleton is enough.

        Raises:
            ModelError: see ``chosen_layers``; or layers share a weight.
        """
        chosen = chosen_layers(model, self.targets, self.rank, self.alpha, self.kind)
        if shared := chosen.keys() & sharing_layers(model):
            raise ModelError(
                f"lora.start {self.kind} splits each weight by itself, and {min(shared)} has one that is "
                "another layer's too: set it to kaiming, or leave these layers out"
            )
        layers, experts = linear_layers(model), expert_weights(model)
        kept = matching(layers, experts, [Target(pattern) for pattern in self.kept], in_blocks(model))
        return {
            path: (rank, lora_scale(alpha, rank, self.rslora))
            for path, (rank, alpha) in chosen.items()
            if not kept[path]
        }

    @torch.no_grad()
    def split(
        self, weight: torch.Tensor, rank: int, scale: float, quant_type: str | None = None, double_quant: bool = True
    ) -> "Started":
        """Split a weight; beside it that takes memory for two of its shape in float32.

        Args:
            weight: [out, in], any float type; left as it is.
            rank: of A and B, whose last rows and columns are zeros where the weight is smaller.
            scale: that ``B A`` will be multiplied by.
            quant_type, double_quant: how what is left is packed; None leaves it in float32.

        Raises:
            ModelError: the weight is not finite.
        """
        if not torch.stack(torch.aminmax(weight)).isfinite().all():
            raise ModelError("lora.start: a weight holds NaN or infinity: the checkpoint is damaged")
        if self.kind == LOFTQ and quant_type is None:
            raise ModelError("lora.start loftq begins with the error of 4 bits, and the weights are in 16: take pissa")
        found, packed = min(rank, *weight.shape), None
        if self.kind == LOFTQ:
            lora_a, lora_b, packed = self._alternate(weight, found, quant_type, double_quant)
        elif self.kind == PISSA:
            weight = weight.float()
            lora_a, lora_b = _balanced(*_largest(weight, _random(weight, found), STEPS[PISSA]))
        else:
            weight = weight.float()
            lora_b = torch.linalg.qr(weight[:, :found]).Q
            lora_a = lora_b.t() @ weight
        share = 1.0 if self.kind == OLORA else scale**0.5  # an orthonormal B stays so
        lora_a = padded(lora_a * (share / scale), rank, 0).to(self.dtype)
        lora_b = padded(lora_b / share, rank, 1).to(self.dtype)
        if not (lora_a.any() and lora_b.any()):  # nothing to begin with: from two zeros no gradient would come
            lora_a, lora_b = _new_factors(lora_a, lora_b)
        if packed is not None:
            return Started(lora_a, lora_b, packed)
        left = without_update(weight, lora_a, lora_b, scale)
        return Started(lora_a, lora_b, left if quant_type is None else quantize(left, quant_type, double_quant))

    def _alternate(self, weight, rank, quant_type, double_quant):
        left, right, rest = None, _random(weight, rank), weight.to(torch.float32, copy=True)
        for number in range(self.alternations):
            if left is not None:
                rest.copy_(weight).addmm_(left, right.t(), alpha=-1)
            is_last = number == self.alternations - 1
            packed = quantize(rest, quant_type, double_quant and is_last)  # which takes its time
            torch.sub(weight, dequantize(packed, weight.shape, torch.float32, quant_type), out=rest)
            left, right = _largest(rest, right, STEPS[LOFTQ] + (number == 0))
        return *_balanced(left, right), packed


class Started(NamedTuple):
    """A weight that was split: the first LoRA weights, and what is left, packed or in float32."""

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    left: Packed | torch.Tensor


def without_update(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``weight - scale * B A`` in float32."""
    return torch.addmm(weight.float(), lora_b.float(), lora_a.float(), alpha=-scale)


def set_base(model: nn.Module, name: str | None, first: First | None = None) -> nn.Module:
    """Say that a model's weights were split, and what the LoRA weights begin as; return the model.

    Args:
        name: of the base, see ``base_of``; None of a model whose weights are the files'.
    """
    _bases.pop(model, None)
    if name is not None:
        _bases[model] = _Base(name, first or {}, sum_of(first) if first else "")
    return model


def base_of(model: nn.Module) -> str | None:
    """Return the name of a model whose weights were split, START:FINGERPRINT; None of any other."""
    return _bases[model].name if model in _bases else None


def first_sum_of(model: nn.Module) -> str:
    """Return ``sum_of`` what the LoRA weights of a model began as; "" where that is not known, as of a skeleton."""
    return _bases[model].first_sum if model in _bases else ""


def sum_of(first: First) -> str:
    """Return 16 hexadecimal digits that change with any bit of what LoRA weights begin as."""
    sums = [(path, *map(bit_sums, pair)) for path, pair in sorted(first.items())]
    return hashlib.sha256(str(sums).encode()).hexdigest()[:16]


def take_first(model: nn.Module) -> First:
    """Return what the LoRA weights of a model begin as, and let go of it."""
    if model not in _bases:
        return {}
    base = _bases[model]
    _bases[model] = base._replace(first={})
    return base.first


def write_first(folder: Path, first: First) -> None:
    """Write what LoRA weights begin as into a folder."""
    named = {
        f"{path}.{leaf}": tensor.contiguous()
        for path, pair in first.items()
        for leaf, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    write_tensors(folder / FIRST_NAME, named)


def load_first(folder: Path) -> First:
    """Read what LoRA weights begin as from a folder.

    Raises:
        ModelError: the file is not there, or damaged.
    """
    try:
        tensors = load_file(folder / FIRST_NAME)
        paths = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        return {path: (tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"]) for path in paths}
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(
            f"{folder / FIRST_NAME} cannot be read, and what is not for the model in 4 bit needs it: "
            f"{error}; use the folder `adapter` of a run that has ended"
        ) from None


def _new_factors(lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random A and zero B, as new LoRA weights are, in place of those given; A is always the same."""
    drawn = torch.empty(lora_a.shape)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
    return drawn.to(lora_a), torch.zeros_like(lora_b)


def _random(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """Return an orthonormal basis [in, rank], drawn in host memory and always the same."""
    drawn = torch.randn(weight.shape[1], rank, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(drawn.to(weight.device)).Q


def _largest(matrix: torch.Tensor, right: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left [out, r] and an orthonormal right [in, r] whose product is near to the matrix's best of rank r.

    Args:
        matrix: float32 [out, in].
        right: orthonormal, where the iteration begins.
    """
    for _ in range(steps):
        right = torch.linalg.qr(((matrix @ right).t() @ matrix).t()).Q
    return matrix @ right, right


def _balanced(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B whose product is ``left right^T``, with singular vectors times roots of singular values."""
    u, s, v = torch.linalg.svd(left, full_matrices=False)
    root = s.sqrt()
    return root[:, None] * (v @ right.t()), u * root


def padded(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Return a tensor of a size along a dimension, with zeros for what it lacks."""
    missing = [*tensor.shape]
    missing[dim] = size - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim) if missing[dim] else tensor
