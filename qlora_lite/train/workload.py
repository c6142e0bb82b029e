"""What is trained: a kind of model, batches of examples, a loss, and the method that adapts the model.

Neither the loop nor the planner knows more of any of the four than its interface: a kind of model, an objective or an
adapter method that nobody here has heard of is planned, trained, resumed and saved like ``causal_lm``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, final

from torch import nn

from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.models.memory_options import MemoryOptions

from .batches import Batches
from .model_spec import ModelSpec
from .objective import LossSum, Objective
from .processes import ALONE, Processes
from .settings import TrainSettings


@final
@dataclass(frozen=True)
class Workload:
    """What is trained; ``dataclasses.replace`` changes it."""

    spec: ModelSpec
    batches: Batches
    objective: Objective
    method: AdapterMethod

    def loss(self, model: nn.Module, inputs: Any) -> LossSum:
        """Return the sum of the losses of a micro-batch."""
        found = self.objective.loss(model, self.spec, inputs)
        unused = self.spec.unused_parameters(model, inputs)
        return found._replace(sum=sum((0 * p.float().sum() for p in unused), found.sum))

    def prepare_step(
        self, model: nn.Module, batches: Sequence, processes: Processes = ALONE, counted: int | None = None
    ) -> Sequence:
        """Return a step's micro-batches with what the loss of each has to know, see ``Objective.prepare_step``."""
        return self.objective.prepare_step(model, self.spec, self.batches, batches, processes, counted)

    def with_method(self, method: AdapterMethod) -> Self:
        """Return the workload with another adapter method."""
        return replace(self, method=method, batches=self.batches.behind(method.virtual_tokens))

    def with_options(self, options: MemoryOptions) -> Self:
        """Return the workload as it computes with memory options."""
        return replace(self, objective=self.objective.with_options(options))

    def plain(self) -> Self:
        """Return the workload with the plain objective."""
        return replace(self, objective=self.objective.plain())

    def read_by(self, reader: Any) -> Self:
        """Return the workload for rows that were read by a tokenizer or a picture processor."""
        return replace(self, spec=self.spec.read_by(reader), batches=self.batches.read_by(reader))

    def at_depth(self, depth: int) -> Self:
        """Return the workload with fewer blocks, of the same kinds."""
        return replace(self, spec=self.spec.at_depth(depth))

    def check_examples(self, model: object, examples: object) -> None:
        """Check that model and examples are of the kind that the workload is for, and that one can compute the other.

        Raises:
            ModelError, DataError: they are not, or it cannot.
        """
        self.spec.check(model)
        self.batches.check(model, examples)

    def check_model(self, model: nn.Module, settings: TrainSettings) -> None:
        """Set the memory options, and check that training computes what the model computes, and with the settings.

        Raises:
            ModelError, TrainingError: it would not.
        """
        self.objective.check(model)
        self.spec.check_model(model, self.method, settings, self.batches)
