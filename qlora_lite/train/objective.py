"""What is minimised, as the loop, the planner and evaluation see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import nn

from qlora_lite.models.memory_options import MemoryOptions

from .processes import ALONE, Processes

if TYPE_CHECKING:
    from .batches import Batches
    from .model_spec import ModelSpec


class LossSum(NamedTuple):
    """A micro-batch's loss, float32 [], and other numbers to report: sums, each divided by a step's weight."""

    sum: torch.Tensor
    metrics: Mapping[str, torch.Tensor] = {}


class Objective:
    """What is minimised. Subclasses are frozen dataclasses: a plan compares them.

    ``is_likelihood`` says whether its mean is minus the logarithm of a target's probability, whose exponential is the
    perplexity; ``needs_reference`` whether examples have to hold what the model gives them before training.

    A plan runs the same ``loss`` on a model and inputs without values, so what it does may depend on shapes, and on
    nothing that a tensor holds.
    """

    is_likelihood: ClassVar[bool] = True
    untimed: ClassVar[str] = ""  # what a step does beside what a plan knows the time of
    always_learns: ClassVar[bool] = True  # so that a step without any gradient is a fault

    @property
    def needs_reference(self) -> bool:
        """See above."""
        return False

    @property
    def name(self) -> str:
        """What a run's record calls it."""
        return type(self).__name__

    def __call__(self, model: nn.Module, outputs: torch.Tensor, inputs) -> LossSum:
        """Return the sum of the losses of a micro-batch.

        Args:
            outputs: of ``ModelSpec.outputs``.
            inputs: of ``Batches.inputs``.
        """
        raise NotImplementedError

    def loss(self, model: nn.Module, spec: ModelSpec, inputs) -> LossSum:
        """Compute a micro-batch and return the sum of its losses."""
        return self(model, spec.outputs(model, inputs), inputs)

    def weight(self, inputs) -> float:
        """Return what a step divides the sum of losses by, known before the loss is computed: how many targets."""
        return len(inputs.targets)

    def with_options(self, options: MemoryOptions) -> Self:
        """Return the objective as it computes with memory options."""
        return self

    def plain(self) -> Self:
        """Return the objective as this package computes it itself, which evaluations do."""
        return self

    def choose(
        self, model: nn.Module, spec: ModelSpec, largest: Callable[[], Any], setting: str, recorded: str | None
    ) -> Self:
        """Return the objective as it is computed fastest, or as it is recorded.

        Args:
            largest: makes the inputs of the largest micro-batch.
            setting: ``memory.fused_loss``.
        """
        return self

    def check(self, model: nn.Module) -> None:
        """Check that a model can learn by it.

        Raises:
            ModelError: it cannot.
        """

    def why_no_gradient(self, metrics: Mapping[str, float]) -> str:
        """Return why every gradient of a step may be zero, and the cure.

        Args:
            metrics: its own, of the step.
        """
        return "every gradient is zero; a lower train.learning_rate may have kept the model from breaking"

    # What the loss of a micro-batch has to know beside it.

    def references(self, model: nn.Module, spec: ModelSpec, inputs) -> torch.Tensor:
        """Return what the model gives each example before training, float32 [P, 2]; see ``needs_reference``."""
        raise NotImplementedError

    @property
    def prepares_steps(self) -> bool:
        """Whether the loss of a micro-batch has to know of the others of its step; see ``prepare_step``."""
        return False

    def prepare_step(
        self,
        model: nn.Module,
        spec: ModelSpec,
        maker: Batches,
        batches: Sequence,
        processes: Processes = ALONE,
        counted: int | None = None,
    ) -> Sequence:
        """Return a step's micro-batches with what the loss of each has to know of all, or of the model now.

        Args:
            maker: of the batches.
            batches: of ``Batches.collate``.
            processes: those that share the step; all call this.
            counted: see ``step.accumulate_gradients``.
        """
        return batches

    def probe_preparation(self, model: nn.Module, inputs) -> None:
        """Take the memory that ``prepare_step`` does, where that is more than the step's own: for a plan, too."""
