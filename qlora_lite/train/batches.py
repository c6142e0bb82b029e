"""How examples become batches, and batches what a model computes on, as the loop and the planner see it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch

from qlora_lite.data.tokens.batch import Extent


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


class Batches:
    """Examples of one kind. What raises here is a kind's own; the rest has defaults for examples of one size.

    Subclasses are frozen dataclasses: a plan compares them.
    """

    labels: tuple[str, ...] = ()  # the names of a head's outputs, in order
    has_large_inputs: ClassVar[bool] = False  # pictures, beside which another batch's inputs count too; ids do not

    @property
    def sequences(self) -> int:
        """How many sequences of a batch's shape an example is."""
        return 1

    def read_by(self, reader: Any) -> Self:
        """Return the batches of rows that were read by a tokenizer or a picture processor."""
        return self

    def behind(self, virtual_tokens: int) -> Self:
        """Return the batches of a model that puts so many virtual tokens before each row."""
        return self

    def check(self, model: object, examples: object) -> None:
        """Check that examples are of this kind, and that a model can compute them.

        Raises:
            ModelError, DataError: they are not, or it cannot.
        """

    # Examples, before they are a batch.

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

    def can_reach_every_layer(self, examples: Sequence) -> bool:
        """Return whether a step of these examples gives every adapted layer a gradient."""
        return True

    # Batches.

    def collate(self, examples: Sequence) -> Any:
        """Return a batch of examples, in host memory."""
        raise NotImplementedError

    def training_batch(self, examples: Sequence, seed: int, step: int) -> Any:
        """Return a batch of examples to be trained on, which may be drawn anew for each step, as augmentations are.

        It has the shape of ``collate``'s, and depends on the arguments alone, whatever else the step's batches hold.

        Args:
            seed: of the run.
            step: counted from 1.
        """
        return self.collate(examples)

    def expect(self, examples: Sequence, seed: int, step: int) -> None:
        """Begin to make the examples of a later step ready, beside what is computed until then."""

    def shape(self, batch: Any) -> BatchShape:
        """Return a batch's shape."""
        raise NotImplementedError

    def inputs(self, batch: Any, device: torch.device) -> Any:
        """Return what a loss is computed of, on the device, or in host memory where the model takes it from there."""
        raise NotImplementedError

    def full_pack(self, tokens: int, packing: bool) -> BatchShape:
        """Return the shape of a pack of so many tokens, for a plan where no row is known; by default each example is
        one, and a batch that is not packed is one example."""
        count = tokens if packing else 1
        return BatchShape((1,) * count, count)

    def planned_inputs(self, shape: BatchShape, device: torch.device) -> Any:
        """Return inputs of a shape, whose values mean nothing; on the meta device they have none."""
        raise NotImplementedError
