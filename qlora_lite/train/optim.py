"""Optimizers by name: bitsandbytes' 8-bit, 32-bit and paged ones, and torch's AdamW.

8-bit states are kept per block of 256 values with a dynamic code (8-bit optimizers, arXiv 2110.02861); factors under
4,096 values keep 32-bit states, bitsandbytes' own rule; on a CPU ``eight_bit`` updates them, to the same bits. Paged
states live in memory that CUDA moves to the host under pressure; without CUDA they are ordinary memory.
"""

from collections.abc import Iterable

import torch

from qlora_lite.errors import TrainingError

BITSANDBYTES_NAMES = {
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "adamw_8bit": "AdamW8bit",
    "adamw_32bit": "AdamW32bit",
    "paged_lion_8bit": "PagedLion8bit",
    "lion_8bit": "Lion8bit",
    "lion_32bit": "Lion32bit",
}


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], name: str, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Build an optimizer over the LoRA factors, the only parameters that are trained or decayed.

    Args:
        name: a key of ``BITSANDBYTES_NAMES``, or ``adamw_torch``.
        weight_decay: decoupled decay per step, as a factor on the learning rate.
    """
    parameters = list(parameters)
    if name == "adamw_torch":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    import bitsandbytes.optim

    if parameters[0].device.type == "cuda":
        optimizer_class = getattr(bitsandbytes.optim, BITSANDBYTES_NAMES[name])
    else:
        from .eight_bit import CpuAdamW8bit, CpuLion8bit

        key = name.removeprefix("paged_")
        faster = {"adamw_8bit": CpuAdamW8bit, "lion_8bit": CpuLion8bit}
        optimizer_class = faster.get(key) or getattr(bitsandbytes.optim, BITSANDBYTES_NAMES[key])
    return optimizer_class(parameters, lr=learning_rate, weight_decay=weight_decay)


def clip_gradients(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients to a total L2 norm of at most ``max_norm`` (0: only measure); return the norm.

    The norm is accumulated in float32 whatever the gradients' type. If it is not finite, nothing is scaled, so
    that the gradient at fault can still be told from the others. No value is read back to the host.

    Raises:
        TrainingError: a parameter has no gradient.
    """
    missing = sum(parameter.grad is None for parameter in parameters)
    if missing:
        raise TrainingError(f"{missing} of {len(parameters)} LoRA factors got no gradient")
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters]
    total = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:  # a norm of 0 scales by 1
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total.where(total.isfinite(), 0.0))
    return total
