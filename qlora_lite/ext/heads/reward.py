"""Train a reward model: a head with one output, whose score is higher for a chosen answer.

Of a pair of chats, packed as two sequences (see ``preferences``), the loss is -log sigmoid(score of chosen - score of
rejected): the model of Bradley and Terry (1952), as InstructGPT trains it (arXiv 2203.02155) and trl. A score is the
head's output for a sequence, an offset of which means nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.data.labels import NUMBER
from qlora_lite.data.tokens.batch import Extent
from qlora_lite.data.tokens.storage import Example, sequences_of
from qlora_lite.errors import ModelError
from qlora_lite.ext.preferences.objective import enlarged_in_two, halved
from qlora_lite.models.heads import is_encoder
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.forward import Inputs
from qlora_lite.train.model_spec import ModelSpec
from qlora_lite.train.objective import LossSum, Objective
from qlora_lite.train.workload import Workload

from .text import LabelledTexts, Texts, text_head


@dataclass(frozen=True)
class PairLoss(Objective):
    """The loss of scores [2 P, 1], float32, of a chosen and a rejected answer in turn."""

    is_likelihood: ClassVar[bool] = False

    def __call__(self, model: nn.Module, outputs: torch.Tensor, inputs: Inputs) -> LossSum:
        """Return the sum of the losses of the pairs, and how their scores compare."""
        chosen, rejected = outputs[::2, 0], outputs[1::2, 0]
        with torch.no_grad():
            metrics = {
                "rewards/chosen": chosen.sum(),
                "rewards/rejected": rejected.sum(),
                "rewards/margins": (chosen - rejected).sum(),
                "rewards/accuracies": (chosen > rejected).float().sum(),
            }
        return LossSum(-logsigmoid(chosen - rejected).sum(), metrics)

    def weight(self, inputs: Inputs) -> int:
        """Return the number of pairs."""
        return len(inputs.targets) // 2

    @property
    def name(self) -> str:
        """The problem's, in transformers' words."""
        return "regression"


@dataclass(frozen=True)
class ChatPairs(LabelledTexts):
    """Packed chats, two of each example; examples of one sequence are scored alone."""

    @property
    def sequences(self) -> int:
        """Two."""
        return 2

    def check(self, model: nn.Module, examples: object) -> None:
        """Check that the model is a decoder, whose last token has seen the whole chat, and see ``TextBatches``."""
        super().check(model, examples)
        if is_encoder(model):
            why = "is an encoder, whose head reads a token that no chat template writes"
            raise ModelError(
                f"{type(model).__name__} {why}; rewards are for decoders (task.kind regression scores the "
                "texts of an encoder)"
            )

    def enlarged(self, examples: Sequence[Example], most: Extent) -> Sequence[Example]:
        """See ``data.tokens.batch.enlarged``; each example gets two sequences again."""
        return enlarged_in_two(super().enlarged, examples, most)

    def collate(self, examples: Sequence[Example]) -> Texts:
        """Pack the sequences of examples; their targets are of no use."""
        sequences = [each for example in examples for each in sequences_of(example)]
        return Texts(self.packed(sequences), torch.zeros(len(sequences)))

    def full_pack(self, tokens: int, packing: bool) -> BatchShape:
        """Return the shape of a pack of so many tokens, whose longest example is two sequences of one length."""
        return halved(super().full_pack(tokens, packing))


def reward_model(method: AdapterMethod, label: str, spec: ModelSpec | None) -> Workload:
    """Return a model with a head that scores answers.

    Args:
        label: the name of the score.
        spec: of the model, for a plan.
    """
    work, loss = text_head(method, NUMBER, (label,), spec), PairLoss()
    assert isinstance(work.batches, LabelledTexts)
    batches = ChatPairs(work.batches.virtual, (label,), NUMBER, work.batches.text_types)
    return replace(work, batches=batches, objective=loss)
