"""Optimizers by name: bitsandbytes' 8-bit, 32-bit and paged ones, and torch's AdamW.

8-bit states are kept per block of 256 values with a dynamic code (8-bit optimizers, arXiv 2110.02861); factors under
4,096 values keep 32-bit states, bitsandbytes' own rule. ``flat`` updates many factors at a time, and ``eight_bit`` does
it for 8-bit states on a CPU, to the same bits. Paged states live in memory that CUDA moves to the host under pressure,
each of 100,000 values and more; where that cannot be, they are ordinary memory. They are not the default: LoRA's states
are small (tens of MiB in 8 bit), and paged ones lie outside torch's allocator, where neither a plan nor a limit counts
them.
"""

import ctypes
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from qlora_lite.errors import TrainingError
from qlora_lite.memory.marks import category, phase
from qlora_lite.memory.shapes import is_planned, planning_for

from . import flat
from .divided_weights import Parts
from .gradients import are_finite, fill_gradients, gradient_norms, parameters_of
from .processes import ALONE, Processes
from .rounding import in_float32, places_of

log = logging.getLogger(__name__)

CONCURRENT_MANAGED_ACCESS = 89  # an attribute of a device, in cuda.h
LR_RATIO = "lr_ratio"  # key of a parameter group: what its learning rate is multiplied by
BITSANDBYTES_NAMES = {  # of its classes, and of those in ``flat``
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "adamw_8bit": "AdamW8bit",
    "adamw_32bit": "AdamW32bit",
    "paged_lion_8bit": "PagedLion8bit",
    "lion_8bit": "Lion8bit",
    "lion_32bit": "Lion32bit",
}


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    name: str,
    learning_rate: float,
    weight_decay: float,
    stochastic_rounding: bool = True,
    lr_ratios: Iterable[float] | None = None,
    on_host: Collection[torch.nn.Parameter] = (),
    steps_before: int = 0,
    parts: Parts | None = None,
) -> torch.optim.Optimizer:
    """Build an optimizer over what an adapter method trains; nothing else is decayed.

    Args:
        name: a key of ``BITSANDBYTES_NAMES``, or ``adamw_torch``.
        weight_decay: decoupled decay per step, as a factor on the learning rate.
        stochastic_rounding: of bfloat16 factors; see ``rounding``.
        lr_ratios: what the learning rate of each parameter is multiplied by, as in LoRA+ (arXiv 2402.12354); None is 1.
            Parameters of one ratio are a group.
        on_host: parameters in host memory beside a GPU, which are updated there, each where it lies.
        steps_before: of the run: stochastic rounding draws by the run's step, and never twice alike.
        parts: which parameters are parts of weights that ranks have divided; each is updated where it lies.

    Returns:
        One that may lay the factors end to end, and whose step can scale gradients and be left out; see ``flat``.
    """
    parameters = list(parameters)
    by_ratio: dict[float, list[torch.nn.Parameter]] = {}
    for parameter, ratio in zip(parameters, lr_ratios or [1.0] * len(parameters), strict=True):
        by_ratio.setdefault(ratio, []).append(parameter)
    groups = [{"params": some, LR_RATIO: ratio, "lr": learning_rate * ratio} for ratio, some in by_ratio.items()]
    if name == "adamw_torch":
        optimizer = TorchAdamW(
            groups, stochastic_rounding, steps_before, parts, lr=learning_rate, weight_decay=weight_decay
        )
        optimizer.on_host = frozenset(on_host)
        return optimizer
    device = parameters[0].device
    if name.startswith("paged_") and (on_host or not can_page(device)):
        name = name.removeprefix("paged_")
        if not on_host and device.type == "cuda":
            log.info("optimizer states cannot be paged on this GPU: %s it is", name)
    optimizer_class = getattr(flat, BITSANDBYTES_NAMES[name])
    if device.type != "cuda" or on_host:
        optimizer_class = flat.ON_CPU.get(optimizer_class, optimizer_class)
    return optimizer_class(
        groups,
        lr=learning_rate,
        weight_decay=weight_decay,
        stochastic_rounding=stochastic_rounding,
        on_host=frozenset(on_host),
        steps_before=steps_before,
        parts=parts,
    )


def is_updated_on_host(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]) -> bool:
    """Return whether these are one parameter, and lie in host memory beside a GPU."""
    return len(parameters) == 1 and parameters[0] in getattr(optimizer, "on_host", ())


@contextmanager
def updating(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Mark what is born in an update of one parameter or of all: on the device, or in host memory for one there."""
    is_on_host = is_updated_on_host(optimizer, parameters)
    kernels = planning_for("cpu") if is_on_host and is_planned() else nullcontext()
    with category("offloaded" if is_on_host else "optimizer"), kernels:
        yield


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of each group of one of ``build_optimizer``'s, its ratio times ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[LR_RATIO]


class TorchAdamW(torch.optim.AdamW):
    """torch's AdamW with the step of ``flat``'s optimizers.

    Args:
        stochastic: float32 states for bfloat16 parameters, which are updated in float32 and rounded stochastically.
        steps_before: see ``build_optimizer``, as is the next.
    """

    def __init__(
        self, groups: Sequence[dict], stochastic: bool, steps_before: int, parts: Parts | None = None, **settings
    ):
        # one factor after the other on a GPU too: all at once hold further values of each
        super().__init__(groups, foreach=False, **settings)
        parameters = parameters_of(self)
        places = places_of(parameters, [1] * len(parameters), parts or Parts())
        self._rounded = {place: p for p, place in places.items()} if stochastic else {}
        self._steps_before = steps_before

    def step(self, if_finite: torch.Tensor | None = None, scale: torch.Tensor | None = None) -> None:
        """Update every parameter that has a gradient, which is scaled first; see ``flat``. The host looks at once."""
        if not are_finite(if_finite):
            return
        if scale is not None:
            torch._foreach_mul_([p.grad for p in parameters_of(self)], scale)
        with in_float32(self._rounded, lambda p: self._steps_before + int(self.state[p]["step"])):
            super().step()

    def forget_step(self) -> None:
        """Do nothing: a step that was left out was not counted."""


def can_page(device: torch.device) -> bool:
    """Return whether a device and its host may use the same managed memory at one time, as paged states do.

    A GPU on WSL or Windows, or a share of one, may not; bitsandbytes does not ask before it takes such memory, and
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


class UpdatesInBackward:
    """Update each parameter as soon as its gradient is there, and drop the gradient: no two exist at one time.

    While it is entered, a backward pass is the step. What needs all gradients first cannot be had: clipping, several
    backward passes a step, leaving a step out. It costs a call of the optimizer a factor, each of which looks at all
    factors for the one with a gradient.

    A checkpointed block brings its part of a gradient each time that it is recomputed. Where sequences run one by one,
    that is once for each: parts are added up until the last one has come, and what comes in fewer (of an uncheckpointed
    block, or of an expert that not every sequence reaches) is updated by ``update_rest``.

    Where ranks have divided weights, those that are whole have gradients that are still to be added up: these are kept
    until then too.

    Args:
        optimizer: any that leaves parameters without a gradient alone, as all of ``build_optimizer``'s do.
        probing: let the optimizer see gradients of zero.
        parts: see ``build_optimizer``.
        passes: how often blocks run in a step: ``models.packing.passes``.

    Source: the idea of LOMO, arXiv 2306.09782, section 3.1.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, probing: bool = False, parts: Parts | None = None, passes: int = 1
    ):
        self.optimizer, self.probing, self.passes = optimizer, probing, passes
        self.parameters = parameters_of(optimizer)
        is_divided = parts is not None and parts.count > 1
        self._whole = [p for p in self.parameters if parts and p not in parts.values] if is_divided else []
        self._kept: dict[torch.nn.Parameter, torch.Tensor] = {}  # gradients of these, and parts of others'
        self._come: Counter[torch.nn.Parameter] = Counter()  # parts of each gradient
        self._norms: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._handles: list = []

    def __enter__(self):
        self._norms.clear()
        self._come.clear()
        whole = {*self._whole}
        self._handles = [
            p.register_post_accumulate_grad_hook(self._keep if p in whole else self._take) for p in self.parameters
        ]
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()

    def _take(self, parameter: torch.nn.Parameter) -> None:
        self._come[parameter] += 1
        if self._come[parameter] > self.passes:
            raise TrainingError(
                "memory.optimizer_in_backward: a weight got its gradient in two parts, as one that "
                "blocks share does; set it to false"
            )
        if self.passes > 1:
            self._keep(parameter)
        if self._come[parameter] == self.passes:
            parameter.grad = self._kept.pop(parameter, parameter.grad)
            self._update(parameter)

    def _update(self, parameter: torch.nn.Parameter) -> None:
        if self.probing:
            parameter.grad.zero_()
        self._norms[parameter] = gradient_norms([parameter])
        with phase("optimizer"), updating(self.optimizer, [parameter]):
            self.optimizer.step()
        parameter.grad = None

    def _keep(self, parameter: torch.nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        self._kept[parameter] = self._kept[parameter].add_(gradient) if parameter in self._kept else gradient

    def update_rest(self, processes: Processes = ALONE) -> None:
        """Update the whole weights with the sums of all ranks' gradients, and others that have not been updated with
        the parts of their gradients that came, with zeros where none did."""
        whole = {*self._whole}
        for parameter in self.parameters:
            if parameter not in whole and parameter not in self._norms:
                parameter.grad = self._kept.pop(parameter, None)
                fill_gradients([parameter])
                self._update(parameter)
        for parameter, gradient in self._kept.items():
            parameter.grad = gradient
        self._kept.clear()
        fill_gradients(self._whole)
        processes.add_up_gradients(self._whole)
        gradients = [(parameter, parameter.grad) for parameter in self._whole]
        for parameter, _ in gradients:
            parameter.grad = None  # an update is of all that have one
        while gradients:
            parameter, parameter.grad = gradients.pop(0)
            self._update(parameter)

    def norms(self) -> torch.Tensor:
        """Return the norm of each parameter's gradient, float32 [n]."""
        device = self.parameters[0].device
        return torch.cat([self._norms[parameter].to(device) for parameter in self.parameters])
