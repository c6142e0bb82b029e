"""The matrix products of a step: which they are, how long each takes alone, and what everything else takes.

A step is watched with a dispatch mode, as the ledger and the planner watch it. It sees every operator below autograd,
in forward, in a block's recomputation and in backward, with the strides and types that the kernel gets. An operator's
place is the innermost function of the package that called it; operators that autograd itself calls in backward have
none, and those of a model's own code (norms, activations, rotary embeddings, sums) neither.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter, defaultdict
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.cases import seconds_of
from qlora_lite.memory.marks import marks
from qlora_lite.memory.work import FLOP_FORMULAS

PLACES = {
    "quant/nf4.py": "dequantising 4-bit weights",
    "kernels/block_attention.py": "attention",
    "kernels/attention.py": "attention",
    "kernels/loss.py": "loss",
    "adapters/lora/layer.py": "LoRA layers",
    "quant/product.py": "LoRA layers",
}  # the module of an operator -> what it belongs to
OPTIMIZER, ELSEWHERE = "optimizer and clipping", "norms, activations, rotary, sums"
LOW_RANK, BASE = "low-rank factors", "base weights"  # the two kinds of products in LoRA layers
BATCH_SECONDS, BATCHES = 0.02, 5  # a product alone: the best mean of so many batches that take so long


class Layout(NamedTuple):
    """What a kernel can tell of a tensor beside its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self, device: torch.device) -> torch.Tensor:
        """Return a tensor of small random values that looks so."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return torch.empty(span, dtype=self.dtype, device=device).normal_(0, 0.02).as_strided(self.shape, self.stride)


class Product(NamedTuple):
    """One kind of product: its operator, its arguments' layouts, and where in the step it stands."""

    place: str
    function: torch._ops.OpOverload
    arguments: tuple
    settings: tuple[tuple[str, object], ...]
    flops: int

    def seconds_alone(self, device: torch.device) -> float:
        """Time it on tensors of its layouts, over and over: what is in a cache stays there."""
        arguments = [a.tensor(device) if isinstance(a, Layout) else a for a in self.arguments]

        def repeat(times: int) -> float:
            return seconds_of(lambda: [self.function(*arguments, **dict(self.settings)) for _ in range(times)], device)

        repeat(1)  # the first call compiles the kernel
        times = math.ceil(BATCH_SECONDS / repeat(1))
        return min(repeat(times) for _ in range(BATCHES)) / times

    def described(self) -> str:
        """Return the operator and the shapes, a "t" behind those whose columns lie together."""
        shapes = [
            "x".join(map(str, a.shape)) + "t" * (a.stride[-1] != 1) for a in self.arguments if isinstance(a, Layout)
        ]
        return f"{self.function._overloadpacket.__name__} {' '.join(shapes)}"


class StepClock(TorchDispatchMode):
    """Note every product, and time every operator, while it is the active mode.

    ``products`` counts each kind; ``product_seconds`` and ``seconds`` hold what products, and everything else, took by
    place. Views are left out: they move nothing, and count with Python.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.products: Counter[Product] = Counter()
        self.product_seconds: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        started = time.perf_counter()
        result = func(*args, **kwargs)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - started
        formula, place = FLOP_FORMULAS.get(func._overloadpacket), place_of_caller()
        if formula is None or place == ELSEWHERE:  # the rotary angles, which are a product in transformers 5.17
            self.seconds[place] += seconds
            return result
        layouts = tuple(layout_of(argument) for argument in args)
        flops = formula(*args, **kwargs, out_val=result)
        product = Product(kind_of(func, place), func, layouts, tuple(sorted(kwargs.items())), flops)
        self.products[product] += 1
        self.product_seconds[product.place] += seconds
        return result


def layout_of(argument: object) -> object:
    """Return a tensor's layout; anything else as it is."""
    if not isinstance(argument, torch.Tensor):
        return argument
    return Layout(tuple(argument.shape), argument.stride(), argument.dtype)


def kind_of(func: torch._ops.OpOverload, place: str) -> str:
    """Return the place of a product, those of LoRA layers told apart: frozen weights' add to the factors'."""
    if place != PLACES["adapters/lora/layer.py"]:
        return place
    return BASE if func is torch.ops.aten.addmm_.default else LOW_RANK


def place_of_caller() -> str:
    """Return what the operator that is being dispatched belongs to."""
    if marks.phase == "optimizer":
        return OPTIMIZER
    frame = sys._getframe(2)
    while frame is not None:
        package, _, module = frame.f_code.co_filename.rpartition("/qlora_lite/")
        if package and module in PLACES:
            return PLACES[module]
        frame = frame.f_back
    return ELSEWHERE
