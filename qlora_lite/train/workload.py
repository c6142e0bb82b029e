"""What is trained, as the loop, the planner, checkpoints and evaluation see it.

A workload turns examples into batches, batches into inputs, and inputs into a loss; it knows the model's blocks, and
the method that adapts them. An objective is the loss. Neither the loop nor the planner knows more of either: a kind of
model, an objective or an adapter method (``adapters.method``) that nobody here has heard of is planned, trained,
resumed and saved like ``causal_lm.CausalLM``.

A plan runs the same ``loss`` on a model and inputs without values, so what a workload's code does may depend on shapes,
and on nothing that a tensor holds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import nn

from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.data.tokens.batch import Extent
from qlora_lite.models.memory_options import MemoryOptions, set_memory_options

from .processes import ALONE, Processes
from .settings import TrainSettings


@dataclass(frozen=True, slots=True)
class BatchShape:
    """All of a micro-batch that memory depends on: the length of each sequence, and the number of targets in all.

    Of pictures of one size each is a sequence of length 1; of those in chats ``pictures`` has the positions of their
    first tokens, and ``grids`` height and width in tokens of each that keeps its shape.
    """

    lengths: tuple[int, ...]
    targets: int
    pictures: tuple[int, ...] = ()
    grids: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Length of all sequences together."""
        return sum(self.lengths)

    def times(self, count: int) -> "BatchShape":
        """Return the shape of so many such batches in one."""
        pictures = tuple(number * self.tokens + begin for number in range(count) for begin in self.pictures)
        return BatchShape(self.lengths * count, self.targets * count, pictures, self.grids * count)


TYPICAL_SEQUENCES = 8  # of a pack whose rows are not known: 2,048 tokens of instructions and answers of 256
# What only a model of tokens has, or is not known of any blocks: tiles, a loss in chunks, tables, compiled blocks.
ONLY_BLOCKS = {
    "tile_tokens": None,
    "loss_chunk_tokens": None,
    "host_embeddings": False,
    "host_head": False,
    "compile": False,
    "optimizer_in_backward": False,
}


class LossSum(NamedTuple):
    """A micro-batch's loss, float32 [], and other numbers to report: sums, each divided by a step's weight."""

    sum: torch.Tensor
    metrics: Mapping[str, torch.Tensor] = {}


class Objective:
    """What is minimised. Subclasses are frozen dataclasses: a plan compares them.

    ``is_likelihood`` says whether its mean is minus the logarithm of a target's probability, whose exponential is the
    perplexity; ``needs_reference`` whether examples have to hold what the model gives them before training.
    """

    is_likelihood: ClassVar[bool] = True

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
            outputs: what the workload says that it hands over.
            inputs: the workload's.
        """
        raise NotImplementedError

    def with_options(self, options: MemoryOptions) -> Self:
        """Return the objective as it computes with memory options."""
        return self

    def plain(self) -> Self:
        """Return the objective as this package computes it itself, which evaluations do."""
        return self


class Workload:
    """A kind of model with what it learns. What raises here is a workload's own; the rest has defaults.

    Subclasses are frozen: a plan looks them up, and ``dataclasses.replace`` changes them.
    """

    method: AdapterMethod
    objective: Objective
    name: str = ""  # what a plan calls the kind of model
    depth: int = 1  # blocks, for a plan
    most_tokens: int | None = None  # that the model can compute at once, where anything limits them
    most_positions: int | None = None  # that the model was made for, so that a plan warns of longer examples
    compute_dtype: torch.dtype = torch.bfloat16  # of a planned model
    is_quantized: bool = False  # whether any weight is packed
    sequences: int = 1  # of an example, in the shape of a batch
    untimed: str = ""  # what a step does beside what a plan knows the time of
    always_learns: bool = True  # so that a step without any gradient is a fault
    keeps_codes: bool = False  # whether packed weights are those of the model's files, so that nothing is prepared
    stacked_bytes: int = 0  # of packed weights that are put together of several in the files, each time they are loaded
    has_tokenwise_parts: bool = True  # that tiles can be made of, where they may be
    fixed_options: Mapping[str, object] = MappingProxyType(ONLY_BLOCKS)  # memory options that it has no choice of
    movable_tables: tuple[str, ...] = ()  # fields of ``MemoryOptions`` for tables that can lie in host memory
    tables_are_tied: bool = False  # so that they lie in one place
    blocks_before: Mapping[str, int] = MappingProxyType({})  # by the path of each list of blocks but the first
    has_large_inputs: bool = False  # pictures, beside which another batch's inputs count too; token ids do not
    beside_blocks: tuple[str, ...] = ()  # paths of modules that have blocks of their own, such as a vision tower

    # Examples and batches.

    def lengths(self, examples: Sequence) -> Sequence[int]:
        """Return the length of each example, which ``max_tokens`` counts: 1 where all have one size."""
        return [1] * len(examples)

    def target_counts(self, examples: Sequence) -> Sequence[int]:
        """Return how many targets each example has."""
        return [1] * len(examples)

    def picture_counts(self, examples: Sequence) -> np.ndarray | None:
        """Return how many pictures each example has beside its tokens, and how large the largest is, int64 [N, 2]; None
        where none has any. They are counted in pictures of one size or, where each has its own, in their tokens."""
        return None

    def places(self, examples: Sequence) -> list[str]:
        """Return where each example came from, for errors."""
        return ["an example"] * len(examples)

    def enlarged(self, examples: Sequence, most: Extent) -> Sequence:
        """Return examples that need as much memory as any micro-batch of the run.

        Args:
            examples: of the longest micro-batch.
            most: the most of each count that any micro-batch has.
        """
        return examples

    def collate(self, examples: Sequence):
        """Return a batch of examples, in host memory."""
        raise NotImplementedError

    def training_batch(self, examples: Sequence, seed: int, step: int):
        """Return a batch of examples to be trained on, which may be drawn anew for each step, as augmentations are.

        It has the shape of ``collate``'s, and depends on the arguments alone, whatever else the step's batches hold.

        Args:
            seed: of the run.
            step: counted from 1.
        """
        return self.collate(examples)

    def expect(self, examples: Sequence, seed: int, step: int) -> None:
        """Begin to make the examples of a later step ready, beside what is computed until then."""

    def shape(self, batch) -> BatchShape:
        """Return a batch's shape."""
        raise NotImplementedError

    def inputs(self, batch, device: torch.device):
        """Return what ``loss`` takes, on the device."""
        raise NotImplementedError

    def full_pack(self, tokens: int, packing: bool) -> BatchShape:
        """Return the shape of a pack of so many tokens, all learned, for a plan where no row is known.

        It needs as much as any of ``TYPICAL_SEQUENCES`` or fewer: what runs once for each takes its time, and one has
        nearly all tokens, since attention needs most for a long one. Each more takes up to 128 tokens' more inside of a
        GPU's attention (``kernels.packed_attention``); a run is planned with its own rows.
        """
        others = min(TYPICAL_SEQUENCES - 1, (tokens - 1) // 2) if packing else 0
        return BatchShape((tokens - others, *(1,) * others), tokens - 1)

    def planned_inputs(self, shape: BatchShape, device: torch.device):
        """Return inputs of a shape, whose values mean nothing; on the meta device they have none."""
        raise NotImplementedError

    # The loss.

    def weight(self, inputs) -> float:
        """Return what a step divides the sum of losses by; known before the loss is computed."""
        raise NotImplementedError

    @property
    def prepares_steps(self) -> bool:
        """Whether the loss of a micro-batch has to know of the others of its step; see ``prepare_step``."""
        return False

    def probe_preparation(self, model: nn.Module, inputs) -> None:
        """Take the memory that ``prepare_step`` does, where that is more than the step's own: for a plan, too."""

    def prepare_step(
        self, model: nn.Module, batches: Sequence, processes: Processes = ALONE, counted: int | None = None
    ) -> Sequence:
        """Return a step's micro-batches with what the loss of each has to know of all, or of the model now.

        Args:
            batches: of ``collate``.
            processes: those that share the step; all call this.
            counted: see ``step.accumulate_gradients``.
        """
        return batches

    def loss(self, model: nn.Module, inputs) -> LossSum:
        """Return the sum of the losses of a micro-batch."""
        raise NotImplementedError

    def why_no_gradient(self, metrics: Mapping[str, float]) -> str:
        """Return why every gradient of a step may be zero, and the cure.

        Args:
            metrics: the objective's own, of the step.
        """
        return "every gradient is zero; a lower train.learning_rate may have kept the model from breaking"

    def with_options(self, options: MemoryOptions) -> Self:
        """Return the workload as it computes with memory options."""
        return self

    def of_tokenizer(self, tokenizer) -> Self:
        """Return the workload for rows that a tokenizer made."""
        return self

    def plain(self) -> Self:
        """Return the workload with the plain objective."""
        return self

    # The model.

    def planned_model(self, device: torch.device, options: MemoryOptions, shape: BatchShape) -> nn.Module:
        """Return the model for a plan, adapted and its weights placed, its blocks run as training would run them.

        Args:
            device: the meta device, or the CPU where an operator needs storage.
            options: ``models.memory_options.place`` and ``set_memory_options`` apply them.
            shape: of the micro-batch that it is for.
        """
        raise NotImplementedError

    def runs_row_by_row(self, longest: int) -> bool:
        """Whether models of this kind run the rows of a batch one by one, where they may have so many tokens."""
        return False

    def needs_values(self, model: nn.Module) -> bool:
        """Return whether a result's shape may follow from values that a plan has: positions, masks."""
        return False

    def pattern(self) -> tuple[int, int]:
        """Return how many of the first blocks are of kinds of their own, and after how many the others repeat.

        The default says that no two are known to be alike: then a plan runs all of them.
        """
        return self.depth, 1

    def at_depth(self, depth: int) -> Self:
        """Return the workload with fewer blocks, of the same kinds."""
        if depth == self.depth:
            return self
        raise NotImplementedError

    def device(self, model: nn.Module) -> torch.device:
        """Return the device that a model computes on, wherever its weights lie: where what it learns does."""
        parameters = list(model.parameters())
        return next((p for p in parameters if p.requires_grad), parameters[0]).device

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return what is checkpointed, streamed and compiled one by one, in order: of transformers' class
        ``GradientCheckpointingLayer``.
        """
        raise NotImplementedError

    def tables(self, model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
        """Return the modules of embeddings and of the head, None where a model has none."""
        return None, None

    def needs_loss_scale(self, model: nn.Module) -> bool:
        """Return whether the model computes in float16, whose gradients would underflow."""
        return False

    # What is checked and found out before the first step.

    def check_examples(self, model: object, examples: object) -> None:
        """Check that model and examples are of the kind that the workload is for, and that one can compute the other.

        Raises:
            ModelError, DataError: they are not, or it cannot.
        """

    def check_model(self, model: nn.Module, settings: TrainSettings) -> None:
        """Set the memory options, and check that training computes what the model computes, and with the settings.

        Raises:
            ModelError, TrainingError: it would not.
        """
        set_memory_options(model, replace(settings.options, kernels="plain"), self.blocks(model))

    def check_forward(self, model: nn.Module, longest: int) -> None:
        """Check that a model computes what its own code does, in examples of at most so many tokens.

        Raises:
            ModelError: it does not.
        """

    def choose_kernels(
        self, model: nn.Module, largest: Callable[[], object], options: MemoryOptions, recorded: Sequence[str] | None
    ) -> None:
        """Try fused kernels on a GPU, or take those that are recorded.

        Args:
            largest: makes the inputs of the largest micro-batch.

        Raises:
            TrainingError: one of those that are recorded does not run here any more.
        """

    def choose_loss(self, model: nn.Module, largest: Callable[[], object], setting: str, recorded: str | None) -> Self:
        """Return the workload with the loss that is fastest, or with the one that is recorded."""
        return self

    def can_reach_every_layer(self, examples: Sequence) -> bool:
        """Return whether a step of these examples gives every adapted layer a gradient."""
        return True
