"""Train a language model or an encoder with a head: one label, several, or a number for each text.

Rows are packed as those of a language model are, and their attention is kept apart, an encoder's in both directions;
where an architecture cannot tell them apart (DeBERTa, Mamba) they run one by one. (transformers pads the texts of a
batch; what it computes for each is the same, and the padding is computed for nothing.)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.data.labels import LABELS, ONE_LABEL, target_of
from qlora_lite.data.tokens.batch import Batch
from qlora_lite.data.tokens.storage import Example
from qlora_lite.memory.marks import category
from qlora_lite.models.heads import is_encoder, outputs_of
from qlora_lite.models.kernels import use_kernels
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.train.batches import Batches, BatchShape
from qlora_lite.train.causal_lm import TextBatches, TextSpec, planned_rows
from qlora_lite.train.forward import Inputs, hidden_states, prepare
from qlora_lite.train.model_spec import ModelSpec
from qlora_lite.train.text_guards import check_forward, relative_error
from qlora_lite.train.workload import Workload

from .loss import HeadLoss

WITHOUT_LOGITS = {"loss_chunk_tokens": None, "host_head": False, "compile": False}  # options that it has no use for
CHECKED_LENGTHS = 7, 12, 5


class Texts(NamedTuple):
    """Packed texts, and what is to be found for each: int64 [N], float32 [N, C] of several labels, [N] of a number."""

    batch: Batch
    targets: torch.Tensor


@dataclass(frozen=True)
class LabelledTexts(TextBatches):
    """Packed texts with what is to be found for each.

    Args:
        labels: the names of the head's outputs, in order.
        problem: ONE_LABEL, LABELS or NUMBER.
        text_types: how many texts the model tells apart by their type.
        separator: the token that ends the first text of a pair, of a model that does.
    """

    labels: tuple[str, ...] = ()
    problem: str = ONE_LABEL
    text_types: int = 0
    separator: int | None = None

    def read_by(self, reader: Any) -> Self:
        """Take the separator from the tokenizer that made the rows."""
        return replace(self, separator=reader.sep_token_id)

    def target_counts(self, examples: Sequence[Example]) -> Sequence[int]:
        """Return 1 for each."""
        return [1] * len(examples)

    def collate(self, examples: Sequence[Example]) -> Texts:
        """Pack texts into one sequence, with what is to be found for each."""
        numbers = {label: number for number, label in enumerate(self.labels)}
        found = [target_of(example, self.problem, numbers) for example in examples]
        dtype = torch.int64 if self.problem == ONE_LABEL else torch.float32
        return Texts(self.packed(examples), torch.tensor(found, dtype=dtype))

    def shape(self, batch: Texts) -> BatchShape:
        """Return the tokens of each text, and how many there are."""
        return BatchShape(batch.batch.row_lengths, len(batch.targets))

    def inputs(self, batch: Texts, device: torch.device) -> Inputs:
        """See ``forward.prepare``; targets are those of the texts."""
        inputs, targets = prepare(batch.batch, device), batch.targets.to(device)
        types = self._types(inputs.input_ids, inputs.row_lengths)
        return inputs._replace(
            target_positions=targets.new_empty(0, dtype=torch.int64), targets=targets, token_types=types
        )

    def _types(self, ids: torch.Tensor, row_lengths: Sequence[int]) -> torch.Tensor | None:
        """Return which text of a pair each token is of: the second one behind the first separator of a row."""
        if self.text_types < 2:
            return None
        if self.separator is None:
            return torch.zeros_like(ids)
        rest = ids.shape[1] - sum(row_lengths)
        rows = (ids[0] == self.separator).split([*row_lengths, rest])
        return torch.cat([(row.cumsum(0) - row.long() > 0).long() for row in rows])[None]

    def planned_inputs(self, shape: BatchShape, device: torch.device) -> Inputs:
        """Return inputs of zeros, with positions."""
        inputs, count = planned_rows(shape, device), len(shape.lengths)
        size = (count, len(self.labels)) if self.problem == LABELS else (count,)
        targets = torch.zeros(size, dtype=torch.int64 if self.problem == ONE_LABEL else torch.float32, device=device)
        types = self._types(inputs.input_ids, inputs.row_lengths)
        return inputs._replace(target_positions=inputs.target_positions[:0], targets=targets, token_types=types)


@dataclass(frozen=True, eq=False)
class TextHeadSpec(TextSpec):
    """A model with a head over packed texts. Its outputs are the head's for each text, float32 [N, C]."""

    def outputs(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        """See the class."""
        hidden = hidden_states(model, inputs)
        with category("logits"):
            return outputs_of(model, hidden, inputs.row_lengths).float()

    def fixed_options(self, method: AdapterMethod) -> Mapping[str, object]:
        """Those of logits, which it has none of, and of weights that are trained."""
        return {**WITHOUT_LOGITS, **super().fixed_options(method)}

    def movable_tables(self, method: AdapterMethod) -> tuple[str, ...]:
        """Return the embeddings, but for trained ones."""
        return tuple(table for table in super().movable_tables(method) if table == "host_embeddings")

    @property
    def tables_are_tied(self) -> bool:
        """Whether the embeddings are the head too: never."""
        return False

    def check_forward(self, model: nn.Module, longest: int, batches: Batches) -> None:
        """Compare the outputs for packed texts with the model's own, see ``text_guards.check_forward``."""
        check_forward(model, longest, outputs_error)

    def choose_kernels(
        self, model: nn.Module, largest: Callable[[], Inputs], options: MemoryOptions, recorded: Sequence[str] | None
    ) -> None:
        """See ``kernels``, which are those of decoders."""
        if is_encoder(model):
            use_kernels(model, ())
            return
        super().choose_kernels(model, largest, options, recorded)


def text_head(method: AdapterMethod, problem: str, labels: tuple[str, ...], spec: ModelSpec | None) -> Workload:
    """Return a model with a head over texts.

    Args:
        spec: of the model, for a plan.
    """
    spec = spec or TextHeadSpec()
    types = getattr(getattr(spec, "config", None), "type_vocab_size", None) or 0
    batches = LabelledTexts(method.virtual_tokens, labels, problem, types)
    return Workload(spec, batches, HeadLoss(problem), method)


@torch.no_grad()
def outputs_error(model: nn.Module) -> float:
    """Return the relative L2 error of a head's outputs for a few packed texts, beside the model's own for each.

    The tokens are of the vocabulary's second half, where no tokenizer has one that means padding.

    Raises:
        ModelError: the model's own are not finite.
    """
    generator, count = torch.Generator().manual_seed(0), model.get_input_embeddings().weight.shape[0]
    rows = [torch.randint(count // 2, count, (1, length), generator=generator) for length in CHECKED_LENGTHS]
    where, positions = list(model.parameters())[-1].device, [torch.arange(length)[None] for length in CHECKED_LENGTHS]
    ids = torch.cat(rows, dim=1)
    none = torch.full((ids.shape[1],), -100)
    inputs = prepare(Batch(ids, torch.cat(positions, dim=1), none, CHECKED_LENGTHS, ("",) * len(rows)), where)
    was_training = model.training
    model.eval()
    packed = outputs_of(model, hidden_states(model, inputs), CHECKED_LENGTHS).float()
    error = relative_error(packed, lambda: torch.cat([model(input_ids=row.to(where)).logits for row in rows]), model)
    model.train(was_training)
    return error
