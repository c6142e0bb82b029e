"""Optimizers by name: bitsandbytes' 8-bit, 32-bit and paged ones, and torch's AdamW.

8-bit states are kept per block of 256 values with a dynamic code (8-bit optimizers, arXiv 2110.02861); factors under
4,096 values keep 32-bit states, bitsandbytes' own rule; on a CPU ``eight_bit`` updates them, to the same bits. Paged
states live in memory that CUDA moves to the host under pressure, each of 100,000 values and more; where that cannot be,
they are ordinary memory. They are not the default: LoRA's states are small (tens of MiB in 8 bit), and paged ones lie
outside torch's allocator, where neither a plan nor a limit counts them.
"""

import ctypes
import logging
import os
from collections.abc import Iterable, Sequence
from functools import cache

import torch

from qlora_lite.errors import TrainingError
from qlora_lite.memory.marks import category, phase

from .rounding import RoundingAdamW, rounding_by_chance

log = logging.getLogger(__name__)

CONCURRENT_MANAGED_ACCESS = 89  # an attribute of a device, in cuda.h
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
    parameters: Iterable[torch.nn.Parameter], name: str, learning_rate: float, weight_decay: float,
    stochastic_rounding: bool = True,
) -> torch.optim.Optimizer:  # fmt: skip
    """Build an optimizer over the LoRA factors, the only parameters that are trained or decayed.

    Args:
        name: a key of ``BITSANDBYTES_NAMES``, or ``adamw_torch``.
        weight_decay: decoupled decay per step, as a factor on the learning rate.
        stochastic_rounding: of bfloat16 factors; see ``rounding``.
    """
    parameters = list(parameters)
    if name == "adamw_torch":
        optimizer_class = RoundingAdamW if stochastic_rounding else torch.optim.AdamW
        # one factor after the other on a card too: all at once hold further values of each
        return optimizer_class(parameters, lr=learning_rate, weight_decay=weight_decay, foreach=False)
    from qlora_lite.quant import bnb

    from .eight_bit import CpuAdamW8bit, CpuLion8bit

    device = parameters[0].device
    if name.startswith("paged_") and not can_page(device):
        name = name.removeprefix("paged_")
        if device.type == "cuda":
            log.info("optimizer states cannot be paged on this card: %s it is", name)
    on_cpu = {} if device.type == "cuda" else {"adamw_8bit": CpuAdamW8bit, "lion_8bit": CpuLion8bit}
    optimizer_class = on_cpu.get(name) or _without_waits(getattr(bnb.optim, BITSANDBYTES_NAMES[name]))
    if stochastic_rounding:
        optimizer_class = rounding_by_chance(optimizer_class)
    return optimizer_class(parameters, lr=learning_rate, weight_decay=weight_decay)


class _WithoutWaits:
    """The step of a bitsandbytes optimizer, which itself has the host wait for the card after each parameter.

    Kernels run in their order on the card anyway, so only who looks at paged states from the host has to wait.
    """

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.init_state(group, p, gindex, pindex)
                self.prefetch_state(p)
                self.update_step(group, p, gindex, pindex)


@cache
def _without_waits(optimizer_class: type) -> type:
    return type(optimizer_class.__name__, (_WithoutWaits, optimizer_class), {})


def can_page(device: torch.device) -> bool:
    """Tell whether a device and its host may use the same managed memory at one time, as paged states do.

    A card on WSL or Windows, or a share of one, may not; bitsandbytes does not ask before it takes such memory, and
    ends the process where CUDA has none to give (``cget_managed_ptr``).
    """
    if device.type != "cuda":
        return False
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:  # the device is of another maker
        return False
    found = ctypes.c_int()
    number = torch.cuda.current_device() if device.index is None else device.index
    error = driver.cuDeviceGetAttribute(ctypes.byref(found), CONCURRENT_MANAGED_ACCESS, number)
    return error == 0 and found.value == 1


def clip_gradients(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients to a total L2 norm of at most ``max_norm`` (0: only measure); return their norms before it.

    Norms are accumulated in float32 whatever the gradients' type. If one is not finite, nothing is scaled, so that
    the gradient at fault can still be told from the others. No value is read back to the host.

    Returns:
        The norm of each parameter's gradient, float32 [n].

    Raises:
        TrainingError: a parameter has no gradient.
    """
    norms = _stacked([None if p.grad is None else _norm(p.grad) for p in parameters])
    if max_norm > 0:  # a norm of 0 scales by 1
        total = torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total.where(total.isfinite(), 0.0))
    return norms


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)


def _stacked(norms: Sequence[torch.Tensor | None]) -> torch.Tensor:
    missing = sum(norm is None for norm in norms)
    if missing:
        raise TrainingError(f"{missing} of {len(norms)} LoRA factors got no gradient")
    return torch.stack(norms)


class UpdatesInBackward:
    """Update each parameter as soon as its gradient is there, and drop the gradient: no two exist at one time.

    While it is entered, a backward pass is the step. What needs all gradients first cannot be had: clipping, several
    backward passes a step, leaving a step out. It costs a call of the optimizer a factor, each of which looks at all
    factors for the one with a gradient.

    Args:
        optimizer: any that leaves parameters without a gradient alone, as all of ``build_optimizer``'s do.
        rehearsing: let the optimizer see gradients of zero.

    Source: the idea of LOMO, arXiv 2306.09782, section 3.1.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rehearsing: bool = False):
        self.optimizer, self.rehearsing = optimizer, rehearsing
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._norms: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._handles: list = []

    def __enter__(self):
        self._norms.clear()
        self._handles = [p.register_post_accumulate_grad_hook(self._update) for p in self.parameters]
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()

    def _update(self, parameter: torch.nn.Parameter) -> None:
        if self.rehearsing:
            parameter.grad.zero_()
        self._norms[parameter] = _norm(parameter.grad)
        with phase("optimizer"), category("optimizer"):
            self.optimizer.step()
        parameter.grad = None

    def norms(self) -> torch.Tensor:
        """Return the norm of each parameter's gradient, float32 [n].

        Raises:
            TrainingError: a parameter got none.
        """
        return _stacked([self._norms.get(parameter) for parameter in self.parameters])
