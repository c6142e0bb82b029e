"""Checks that stop a run which would end well and mean nothing, whatever is trained.

At the end: the frozen weights are the ones that were loaded. At a loss that is not finite: which examples, which
module. (The adapter method says whether every layer took part; ``text_guards`` are those of a language model.)
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from qlora_lite.errors import TrainingError
from qlora_lite.models.memory_options import MemoryOptions, divided_weights
from qlora_lite.quant.tensor_file import bit_sums

from .processes import Processes
from .workload import Workload

FLOAT16_ENDS = "float16 ends at 65,504: set model.compute_dtype to float32"


def check_trainable(model: nn.Module, announced: int) -> None:
    """Check that exactly what the adapter method says is trainable.

    Raises:
        TrainingError: another number of weights requires gradients.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trainable != announced:
        raise TrainingError(f"{trainable} weights are trainable, {announced} were announced")


def check_choice(workload: Workload, options: MemoryOptions) -> None:
    """Check that no memory option is set that the workload has no choice of.

    Raises:
        TrainingError: naming those.
    """
    wrong = [
        name for name, only in workload.spec.fixed_options(workload.method).items() if getattr(options, name) != only
    ]
    if wrong:
        raise TrainingError(f"this kind of model has no {', '.join(wrong)} to set")


def check_shareable(processes: Processes, options: MemoryOptions, divided: bool = False) -> None:
    """Check that a step's gradients are all there when several ranks add them up.

    Args:
        divided: ranks have divided the weights, and add up each gradient in the backward pass.

    Raises:
        TrainingError: each is used and dropped in the backward pass.
    """
    if processes.world_size > 1 and options.optimizer_in_backward and not divided:
        raise TrainingError(
            "memory.optimizer_in_backward updates each weight before the ranks have added up its "
            "gradient: it is for one process, or for weights that ranks have divided"
        )


def frozen_checksum(model: nn.Module, in_turn: Iterable[nn.Parameter] = ()) -> str:
    """Return a checksum over the bits of every frozen weight, computed where they lie.

    Not of tables that are made from the configuration: a forward pass may change those (rotary frequencies that
    follow the longest row).
    """
    weights = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}  # shared ones once
    trained = {id(parameter) for parameter in in_turn}
    tensors = [t for key, t in weights.items() if not t.requires_grad and key not in trained and t.numel()]
    sums = [f"{tuple(tensor.shape)} {bit_sums(tensor)}" for tensor in tensors]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()


def check_frozen(model: nn.Module, checksum: str, in_turn: Iterable[nn.Parameter] = ()) -> None:
    """Check that the frozen weights still have the checksum they had.

    Raises:
        TrainingError: a bit has changed.
    """
    if frozen_checksum(model, in_turn) != checksum:
        raise TrainingError("a frozen weight changed during training; the adapter does not belong to the base model")


def explain_not_finite(
    workload: Workload, model: nn.Module, groups: Sequence[Sequence], step: int, updated: bool = False
) -> TrainingError:
    """Run the step's forward again with every module watched, and say where the first bad value stood.

    Args:
        groups: the examples of each micro-batch.
        updated: some parameters have been changed by the step already.
    """
    divided = divided_weights(model)  # which others may have bad parts of, so that all look at what comes of them
    trained = [(name, p) for name, p in workload.method.parameters(model) if p not in divided]
    bad_weights = [name for name, p in trained if not p.isfinite().all()]
    for examples in groups:
        place = f"the adapter weight {bad_weights[0]}" if bad_weights else _first_bad_place(workload, model, examples)
        if place:
            break
    else:
        bad = [name for name, p in trained if p.grad is not None and not p.grad.isfinite().all()]
        examples, place = groups[0], f"the gradient of {bad[0]}" if bad else "the norm of the gradients"
    where = workload.batches.places(examples)
    rows = ", ".join(where[:4]) + (f" and {len(where) - 4} more" if len(where) > 4 else "")
    weights = (
        "the backward pass has changed weights already: resume from the last checkpoint with train --resume"
        if updated
        else "the weights were left as they were before this step"
    )
    cures = f"{FLOAT16_ENDS}, lower" if workload.spec.needs_loss_scale(model) else "Lower"
    return TrainingError(
        f"step {step}: {place} is not finite (rows {rows}); {weights}. "
        f"{cures} train.learning_rate, or look at these rows"
    )


@torch.no_grad()
def _first_bad_place(workload: Workload, model: nn.Module, examples: Sequence) -> str | None:
    """Name the first module whose output is not finite, or the loss where all modules are well."""
    bad: list[str] = []

    def watch(name):
        def hook(_module, _inputs, output):
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor) and first.is_floating_point() and not first.isfinite().all():
                bad.append(name)

        return hook

    def is_watched(module: nn.Module) -> bool:
        return not any(module.children()) or any(p.requires_grad for p in module.parameters(recurse=False))

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if is_watched(m)]
    try:
        loss = workload.loss(
            model, workload.batches.inputs(workload.batches.collate(examples), workload.spec.device(model))
        ).sum
    finally:
        for handle in handles:
            handle.remove()
    if bad:
        return f"the output of {bad[0]}"
    return None if loss.isfinite() else "the loss"
