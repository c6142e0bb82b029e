"""What a GPU's arithmetic and allocator do to a run's numbers: gradients, rates, and memory that is asked for again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch

from common.cases import OUT_OF_MEMORY, RANK, free_memory, model_of, seconds_of, trainer_of
from common.models import config_of
from qlora_lite.adapters.lora.layer import LoraLinear
from qlora_lite.memory.meter import set_memory_limit
from qlora_lite.quant.linear import QuantLinear, frozen_weight
from qlora_lite.quant.product import float32_partial_sums, materialize
from qlora_lite.train.loss_scale import LossScale

SUMS = {"torch's default": nullcontext, "float32 partial sums": float32_partial_sums}  # the second is a run's
GRADIENT_ERROR = 0.01  # beyond which gradients of adapter weights count as wrong: 16-bit rounding gives about 0.003
SMALL_GRADIENT = 1e-6  # of a layer's output, as a mean over thousands of tokens gives: float16 has steps of 6e-8 there
TRIES = 3


def gradient_rows(name: str, tokens: int, device: torch.device, types: tuple[torch.dtype, ...]) -> Iterator[dict]:
    """Yield the relative errors of one layer's adapter gradients against float64, for ways to add partial sums.

    Args:
        name: a key of ``models.MODELS``, of which a layer with the shape of down_proj is made.
        tokens: that the gradients are sums over.
        types: to compute in; of float16 with the loss scale that a run begins with, and without one.
    """
    config = config_of(name)
    for dtype in types:
        layer, x = _layer(config.intermediate_size, config.hidden_size, tokens, device, dtype)
        upstream = torch.randn(tokens, config.hidden_size, device=device) * SMALL_GRADIENT
        expected = _exact_gradients(layer, x, upstream)
        scales = (LossScale().value, 1.0) if dtype == torch.float16 else (1.0,)
        for scale in scales:
            for sums, context in SUMS.items():
                with context():
                    found = _gradients(layer, x, (upstream * scale).to(dtype))
                errors = {key: _error(found[key] / scale, expected[key]) for key in expected}
                row = {
                    "kind": "gradients",
                    "dtype": _name(dtype),
                    "sums": sums,
                    "loss_scale": scale,
                    "tokens": tokens,
                    "rank": RANK,
                    **{f"{key}_error": error for key, error in errors.items()},
                }
                wrong = context is float32_partial_sums and scale == scales[0] and max(errors.values()) > GRADIENT_ERROR
                yield row | ({"problem": f"gradients in {_name(dtype)} are off"} if wrong else {})


def _layer(in_features: int, out_features: int, tokens: int, device, dtype) -> tuple[LoraLinear, torch.Tensor]:
    """Return a 4-bit layer with adapter weights that change its results, and an input."""
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features, device=device, dtype=dtype) * 0.02
    frozen = QuantLinear.from_weight(weight, None, "nf4", True)
    layer = LoraLinear(frozen, RANK, 2 * RANK, 0.0, False, torch.float32).train()
    torch.nn.init.normal_(layer.lora_B, std=0.01)
    return layer, torch.randn(tokens, in_features, device=device, dtype=dtype).requires_grad_()


def _gradients(layer: LoraLinear, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    wanted = {"A": layer.lora_A, "B": layer.lora_B, "input": x}
    found = torch.autograd.grad(layer(x), list(wanted.values()), upstream)
    return {key: gradient.double() for key, gradient in zip(wanted, found, strict=True)}


def _exact_gradients(layer: LoraLinear, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of the formula in float64."""
    spec, tensors = frozen_weight(layer.base)
    a, b, inputs, upstream = (each.detach().double() for each in (layer.lora_A, layer.lora_B, x, upstream))
    of_low = layer.scale * upstream @ b
    of_input = upstream @ materialize(spec, tensors, x.dtype).double() + of_low @ a
    return {"A": of_low.t() @ inputs, "B": layer.scale * upstream.t() @ (inputs @ a.t()), "input": of_input}


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)).item()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rate_rows(name: str, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[dict]:
    """Yield FLOPs and copied bytes a second, of zeros and of random numbers, with which a GPU takes more power."""
    config = config_of(name)
    for operands in ("zeros", "random"):
        x, weight = (
            torch.empty(rows, config.hidden_size, device=device, dtype=dtype).normal_(std=float(operands == "random"))
            for rows in (tokens, config.intermediate_size)
        )
        target, flops = torch.empty_like(weight), 2 * tokens * weight.numel()
        yield {
            "kind": "rate",
            "operands": operands,
            "dtype": _name(dtype),
            "flops_per_second": flops / _fastest(lambda x=x, weight=weight: x @ weight.t(), device),
            "bytes_per_second": 2
            * weight.nbytes
            / _fastest(lambda target=target, weight=weight: target.copy_(weight), device),
        }


def _fastest(action, device: torch.device) -> float:
    return min(seconds_of(lambda: [action() for _ in range(10)], device) for _ in range(TRIES)) / 10


def lengths_row(name: str, longest: int, steps: int, budget_bytes: int, device: torch.device) -> dict:
    """Train steps of random lengths within a budget; return how often the allocator had to give back and ask again.

    Args:
        name: a key of ``models.MODELS``.
        longest: tokens of the longest step; the others have fewer.
        budget_bytes: what was planned for the longest.
    """
    lengths = (longest, *np.random.default_rng(0).integers(longest // 32, longest, steps - 1).tolist())
    case = {"model": name, "tokens": longest, "lengths": lengths, "checkpointing": "block"}
    row = {"kind": "random lengths", "model": name, "longest": longest, "steps": steps, "budget_bytes": budget_bytes}
    model = model_of(case, device)
    free_memory(device)
    set_memory_limit(device, budget_bytes)
    before = _retries(device)
    trainer = trainer_of(case, model, steps)
    try:
        trainer.probe_memory()
        metrics = list(trainer)
    except OUT_OF_MEMORY as error:
        return row | {"problem": str(error).partition(".")[0]}
    finally:
        trainer.meter.close()
        set_memory_limit(device, None)
    row |= {
        "dtype": _name(model.dtype),
        "first_loss": metrics[0].loss,
        "last_loss": metrics[-1].loss,
        "peak_bytes": metrics[-1].peak_bytes,
    }
    row |= {"loss_scale": trainer.loss_scale.value} if trainer.loss_scale else {}
    return row | {key: value - before[key] for key, value in _retries(device).items()}


def _retries(device: torch.device) -> dict[str, int]:
    """Return torch's own counts of a GPU's allocator."""
    statistics = torch.cuda.memory_stats(device) if device.type == "cuda" else {}
    return {key: statistics[key] for key in ("num_alloc_retries", "num_ooms") if key in statistics}
