"""The workload that is a vision-language model: chats with pictures, packed; cross-entropy over the target tokens.

All of it is ``causal_lm``'s but for the pictures. Their pixels come with the batch, and the tokens that stand for them
are among the rows' and never targets. How many pictures a batch has is part of its shape, so that a plan knows what the
tower takes; where no row is known, a pack holds as many as there is room for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from qlora_lite.data.batch import IGNORED_LABEL, Batch, Extent
from qlora_lite.data.picture_reader import MADE_UP, PictureReader
from qlora_lite.data.storage import Example
from qlora_lite.errors import DataError
from qlora_lite.models.anatomy import decoder, device_of, head
from qlora_lite.models.vision_language import FAMILIES, arguments_of
from qlora_lite.ops.loss import head_logits

from .causal_lm import CausalLM
from .forward import Inputs, hidden_states
from .text_guards import check_forward, relative_error
from .workload import BatchShape, LossSum

NO_READER = PictureReader(0, 1, 1)


@dataclass(frozen=True)
class PictureChatLM(CausalLM):
    """A vision-language model.

    Args:
        reader: makes pixels of pictures.
    """

    reader: PictureReader = NO_READER

    has_large_inputs: ClassVar[bool] = True
    reads_pictures: ClassVar[bool] = True

    @property
    def beside_blocks(self) -> tuple[str, ...]:
        """The tower."""
        return (FAMILIES[self.spec.config.model_type].tower,)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pack rows into one sequence, with the pixels of their pictures.

        Raises:
            DataError: a picture is not what it was when the rows were read.
        """
        batch, pixels = super().collate(examples), self.reader.of_examples(examples)
        expected = 0 if pixels is None else len(pixels) * self.reader.tokens
        if (found := int((batch.input_ids == self.reader.token_id).sum())) != expected:
            raise DataError(f"the pictures of {', '.join(batch.where)} are {expected} tokens, and the rows have "
                            f"{found}; start again, if pictures were changed since the rows were read")  # fmt: skip
        labels = batch.labels.masked_fill(batch.labels == self.reader.token_id, IGNORED_LABEL)
        return replace(batch, labels=labels, pixels=None if pixels is None else torch.from_numpy(pixels))

    def expect(self, examples: Sequence[Example], seed: int, step: int) -> None:
        """See ``Workload.expect``."""
        self.reader.expect(examples)

    def shape(self, batch: Batch) -> BatchShape:
        """Return the tokens of each row, how many are labelled, and where pictures begin."""
        return replace(super().shape(batch), pictures=self._begins(batch))

    def _begins(self, batch: Batch) -> tuple[int, ...]:
        """Return the first token of each picture; one follows another without a gap."""
        return tuple((batch.input_ids[0] == self.reader.token_id).nonzero().squeeze(1)[:: self.reader.tokens].tolist())

    def full_pack(self, tokens: int, packing: bool) -> BatchShape:
        """Return the shape of a pack that is full of pictures."""
        pack = super().full_pack(tokens, packing)
        full = pack.lengths[0] // self.reader.tokens * self.reader.tokens
        return replace(pack, pictures=tuple(range(0, full, self.reader.tokens)))

    def inputs(self, batch: Batch, device: torch.device) -> Inputs:
        """Return the batch on the device, but for the pixels, which the tower takes there a few at a time."""
        inputs = super().inputs(batch, device)
        return inputs if batch.pixels is None else self._with_pictures(inputs, batch.pixels, self._begins(batch))

    def planned_inputs(self, shape: BatchShape, device: torch.device) -> Inputs:
        """Return inputs of zeros, with positions."""
        inputs, edge = super().planned_inputs(shape, device), self.reader.edge
        if not shape.pictures:
            return inputs
        pixels = torch.zeros(len(shape.pictures), 3, edge, edge, device=device)
        return self._with_pictures(inputs, pixels, shape.pictures)

    def _with_pictures(self, inputs: Inputs, pixels: torch.Tensor, begins: tuple[int, ...]) -> Inputs:
        device, tokens = inputs.input_ids.device, self.reader.tokens
        places = torch.cat([torch.arange(begin, begin + tokens) for begin in begins]).to(device)
        return inputs._replace(pixels=pixels, picture_tokens=places, pictures=begins)

    def loss(self, model: nn.Module, inputs: Inputs) -> LossSum:
        """Return the loss over a micro-batch's targets; without pictures, what learns of tower and projector gets
        gradients of zero."""
        found = super().loss(model, inputs)
        if inputs.pixels is not None or not torch.is_grad_enabled():
            return found
        read = {*decoder(model).parameters(), *model.get_output_embeddings().parameters()}
        unused = [p for p in model.parameters() if p.requires_grad and p not in read]
        return found._replace(sum=sum((0 * p.float().sum() for p in unused), found.sum))

    def picture_counts(self, examples: Sequence[Example]) -> Sequence[int]:
        """Return how many pictures the tower computes of each."""
        token, tokens = self.reader.token_id, self.reader.tokens
        return [int((example.token_ids == token).sum()) // tokens for example in examples]

    def enlarged(self, examples: Sequence[Example], most: Extent) -> Sequence[Example]:
        """See ``data.batch.enlarged``; tokens that are not learned stand for as many pictures as any batch has."""
        alike, token, tokens = super().enlarged(examples, most), self.reader.token_id, self.reader.tokens
        if list(map(id, alike)) == list(map(id, examples)) and sum(self.picture_counts(alike)) >= most.pictures:
            return alike
        left, found = most.pictures, []
        for example in alike:
            ids, places = example.token_ids.copy(), np.flatnonzero(~example.learned)
            count = min(left, len(places) // tokens)
            left -= count
            ids[ids == token] = int(token == 0)  # any other
            ids[places[: count * tokens]] = token
            found.append(replace(example, token_ids=ids, pictures=(MADE_UP,) * count))
        return found

    def runs_row_by_row(self, longest: int) -> bool:
        """Never, see ``check_model``."""
        return False

    def check_forward(self, model: nn.Module, longest: int) -> None:
        """See ``text_guards.check_forward``; rows with pictures are compared too, and have to be packed."""
        check_forward(model, longest, self._logits_error, must_pack=True)

    @torch.no_grad()
    def _logits_error(self, model: nn.Module) -> float:
        """Return the relative L2 error of the logits of packed rows, two of them with pictures."""
        r, generator = self.reader, torch.Generator().manual_seed(0)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        rows = []
        for pictures in (1, 0, 2):
            row = torch.randint(0, vocabulary, (5 + pictures * (r.tokens + 2),), generator=generator)
            row[row == r.token_id] = int(r.token_id == 0)
            for number in range(pictures):
                begin = 3 + number * (r.tokens + 2)
                row[begin : begin + r.tokens] = r.token_id
            rows.append(row)
        pixels = torch.rand(3, 3, r.edge, r.edge, generator=generator) * 2 - 1
        lengths, ids = tuple(map(len, rows)), torch.cat(rows)[None]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        batch = Batch(ids, positions, torch.full((ids.shape[1],), IGNORED_LABEL), lengths, ("",) * 3, pixels)
        was_training = model.training
        packed = head_logits(hidden_states(model.eval(), self.inputs(batch, device_of(model))), head(model))

        def alone() -> torch.Tensor:
            found = []
            for row, own in zip(rows, (pixels[:1], None, pixels[1:]), strict=True):
                ids = row[None].to(device_of(model))
                shown = {} if own is None else arguments_of(model, own, ids)
                found.append(model(input_ids=ids, use_cache=False, **shown).logits[0])
            return torch.cat(found)

        error = relative_error(packed, alone, model)
        model.train(was_training)
        return error

    def can_reach_every_layer(self, examples: Sequence[Example]) -> bool:
        """See ``text_guards.can_reach_every_layer``; a tower's layers need a picture."""
        return super().can_reach_every_layer(examples) and any(example.pictures for example in examples)
