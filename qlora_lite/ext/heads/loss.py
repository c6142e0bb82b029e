"""What all models with a head have in common, which gives each text or picture a label, several, or a number.

The loss is that of transformers' ``ForSequenceClassification`` models, a mean over a step's examples: cross-entropy
of one label, binary cross-entropy of each of several, the squared error of a number.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from qlora_lite.data.labels import LABELS, ONE_LABEL
from qlora_lite.train.objective import LossSum, Objective
from qlora_lite.train.step import evaluating
from qlora_lite.train.workload import Workload


@dataclass(frozen=True)
class HeadLoss(Objective):
    """The loss of a head's outputs [N, C], float32, as transformers defines it for a kind of problem.

    Args:
        problem: ONE_LABEL, LABELS or NUMBER.
    """

    is_likelihood: ClassVar[bool] = False  # of tokens, whose perplexity could be told
    problem: str = ONE_LABEL

    def __call__(self, model: nn.Module, outputs: torch.Tensor, inputs) -> LossSum:
        """Return the sum of the losses of the examples, and how many have the label that is likeliest."""
        targets = inputs.targets.to(outputs.device)
        if self.problem == ONE_LABEL:
            right = (outputs.detach().argmax(-1) == targets).sum(dtype=torch.float32)
            return LossSum(functional.cross_entropy(outputs, targets, reduction="sum"), {"accuracy": right})
        if self.problem == LABELS:
            each = functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
            return LossSum(each / outputs.shape[1])
        return LossSum(functional.mse_loss(outputs.squeeze(-1), targets, reduction="sum"))

    @property
    def name(self) -> str:
        """The problem's."""
        return self.problem


@torch.no_grad()
def outputs_for(work: Workload, model: nn.Module, batches: Iterable) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the head's outputs for every example of the batches, float32 [N, C], and the targets, with dropout off.

    Both are in host memory.
    """
    device, found, targets = work.spec.device(model), [], []
    with evaluating(model):
        for batch in batches:
            found.append(work.spec.outputs(model, work.batches.inputs(batch, device)).cpu())
            targets.append(batch.targets)
    return torch.cat(found), torch.cat(targets)
