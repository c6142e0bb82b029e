"""One step in the steady state that changes nothing: what a run needs at most, before it starts.

On real tensors it is the measured proof that a run fits; on ones without memory (``planning.simulate``) it is the
plan. Both call this function, and it calls what training calls.
"""

from collections.abc import Sequence

import torch
from torch import nn

from qlora_lite.adapters.lora.inject import merged_once
from qlora_lite.memory.marks import category, phase
from qlora_lite.models.packing import passes

from .divided_weights import parts_of
from .gradients import clip_scale, fill_gradients, gradient_norms
from .optim import UpdatesInBackward, is_updated_on_host, updating
from .step import accumulate_gradients
from .workload import Workload


def probe_step(
    workload: Workload,
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    inputs,
    eval_inputs,
    max_grad_norm: float,
    accumulating: bool,
    updates_in_backward: bool = False,
    lengths: Sequence[int] = (),
) -> None:
    """Go through forward, backward, optimizer and evaluation as any later step would, and forget the results.

    The optimizer makes its states first, and sees gradients of zero only: with a learning rate of zero no factor
    changes, whatever the loss was.

    Args:
        optimizer: one for the memory probe alone; its states are left in it.
        inputs: those of the largest micro-batch.
        eval_inputs: those of the largest evaluation batch; None if there is none.
        accumulating: the micro-batch is not the first of its step, so that gradients are there already.
        updates_in_backward: see ``optim.UpdatesInBackward``; it needs the next.
        lengths: of the sequences of ``inputs``.
    """
    for together in [[parameter] for parameter in parameters] if updates_in_backward else [parameters]:
        with category("offloaded" if is_updated_on_host(optimizer, together) else "gradients"):
            for parameter in together:
                parameter.grad = torch.zeros_like(parameter)
        with phase("load"), updating(optimizer, together):
            optimizer.step()
        if not accumulating:
            optimizer.zero_grad(set_to_none=True)
    with torch.no_grad(), phase("forward"):
        workload.objective.probe_preparation(model, inputs)
    if updates_in_backward:
        with UpdatesInBackward(optimizer, True, parts_of(model), passes(model, lengths)) as updates:
            accumulate_gradients(workload, model.train(), [inputs])
        updates.update_rest()
    else:
        accumulate_gradients(workload, model.train(), [inputs])
        probe_update(parameters, optimizer, max_grad_norm)
    optimizer.zero_grad(set_to_none=True)
    if eval_inputs is not None:
        with torch.no_grad(), phase("evaluation"), merged_once(model):
            workload.plain().loss(model.eval(), eval_inputs)


def probe_update(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """Clip and update as a step does, with gradients of zero."""
    with phase("optimizer"):
        fill_gradients(parameters)
        torch._foreach_zero_([parameter.grad for parameter in parameters])
        norm = torch.linalg.vector_norm(gradient_norms(parameters))
        with category("optimizer"):
            optimizer.step(if_finite=norm.view(1), scale=clip_scale(norm, max_grad_norm))
