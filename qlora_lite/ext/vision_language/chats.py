"""Train a vision-language model: chats with pictures, packed; cross-entropy over the target tokens.

All of it is ``causal_lm``'s but for the pictures. Their pixels come with the batch, and the tokens that stand for them
are among the rows' and never targets. How many pictures a batch has, and of which shapes where each keeps its own, is
part of its shape, so that a plan knows what the tower takes; where no row is known, a pack holds as many as there is
room for, as large as they can be.

A unit is what pixels are counted in: a picture of one size, or a token of one that keeps its shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import prod
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.data.picture_grids import grids_of, positions_of
from qlora_lite.data.picture_reader import PictureReader
from qlora_lite.data.tokens.batch import IGNORED_LABEL, Batch, Extent
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import DataError
from qlora_lite.kernels.loss import head_logits
from qlora_lite.models.anatomy import decoder, device_of, head
from qlora_lite.models.vision_language import FAMILIES, Grids, arguments_of, sees_whole
from qlora_lite.train.batches import Batches, BatchShape
from qlora_lite.train.causal_lm import CrossEntropy, TextBatches, TextSpec, planned_rows
from qlora_lite.train.forward import Inputs, hidden_states, prepare
from qlora_lite.train.model_spec import ModelSpec
from qlora_lite.train.text_guards import check_forward, relative_error
from qlora_lite.train.workload import Workload

NO_READER = PictureReader(0, 1, 1)


@dataclass(frozen=True)
class PictureChats(TextBatches):
    """Chats with pictures, packed.

    Args:
        reader: makes pixels of pictures.
    """

    reader: PictureReader = NO_READER

    has_large_inputs: ClassVar[bool] = True
    reads_pictures: ClassVar[bool] = True

    def picture_counts(self, examples: Sequence[Example]) -> np.ndarray:
        """Return how many units the tower computes of each, and how many of its largest picture."""
        token, tokens = self.reader.token_id, self.reader.tokens
        found: np.ndarray = np.zeros((len(examples), 2), np.int64)
        for number, example in enumerate(examples):
            largest = max((prod(picture.grid) for picture in example.pictures), default=0)
            found[number] = (example.token_ids == token).sum() // tokens, largest
        return found

    def enlarged(self, examples: Sequence[Example], most: Extent) -> Sequence[Example]:
        """See ``tokens.batch.enlarged``; tokens that are not learned stand for as many units of pictures as any batch
        has, and for pictures as large as any. Those that keep their shapes are always made up: of another batch with
        fewer, more may be computed together."""
        alike, token, tokens = super().enlarged(examples, most), self.reader.token_id, self.reader.tokens
        is_same = [*map(id, alike)] == [*map(id, examples)] and not self.reader.keeps_shape
        if is_same and self.picture_counts(alike)[:, 0].sum() >= most.pictures:
            return alike
        left, found = most.pictures, []
        for example in alike:
            ids, places = example.token_ids.copy(), np.flatnonzero(~example.is_target)
            count = min(left, len(places) // tokens)
            left -= count
            ids[ids == token] = int(token == 0)  # any other
            ids[places[: count * tokens]] = token
            found.append(replace(example, token_ids=ids, pictures=self.reader.made_up(count, most.largest_picture)))
        return found

    def can_reach_every_layer(self, examples: Sequence[Example]) -> bool:
        """See ``text_guards.can_reach_every_layer``; a tower's layers need a picture."""
        return super().can_reach_every_layer(examples) and any(example.pictures for example in examples)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pack rows into one sequence, with the pixels of their pictures.

        Raises:
            DataError: a picture is not what it was when the rows were read.
        """
        batch, pixels = self.packed(examples), self.reader.of_examples(examples)
        expected = 0 if pixels is None else len(pixels) * self.reader.tokens
        if (found := int((batch.input_ids == self.reader.token_id).sum())) != expected:
            raise DataError(
                f"the pictures of {', '.join(batch.where)} are {expected} tokens, and the rows have "
                f"{found}; start again, if pictures were changed since the rows were read"
            )
        labels = batch.labels.masked_fill(batch.labels == self.reader.token_id, IGNORED_LABEL)
        batch = replace(batch, labels=labels)
        if pixels is None:
            return batch
        grids = grids_of(picture for example in examples for picture in example.pictures)
        return self.with_pixels(batch, torch.from_numpy(pixels), grids)

    def with_pixels(self, batch: Batch, pixels: torch.Tensor, grids: Grids) -> Batch:
        """Return a batch with pixels and, with grids, the positions of their tokens."""
        batch = replace(batch, pixels=pixels, grids=tuple(grids))
        if not grids or not self.reader.three_axes:
            return batch
        positions = positions_of(batch.row_lengths, self._begins(batch), grids)
        return replace(batch, position_ids=torch.from_numpy(positions))

    def expect(self, examples: Sequence[Example], seed: int, step: int) -> None:
        """See ``Batches.expect``."""
        self.reader.expect(examples)

    def shape(self, batch: Batch) -> BatchShape:
        """Return the tokens of each row, how many are labelled, and where pictures begin, with their grids."""
        return replace(super().shape(batch), pictures=self._begins(batch), grids=batch.grids)

    def _begins(self, batch: Batch) -> tuple[int, ...]:
        """Return the first token of each picture; one may follow another without a gap."""
        places = (batch.input_ids[0] == self.reader.token_id).nonzero().squeeze(1).tolist()
        sizes = self.sizes(batch.grids, len(places) // self.reader.tokens)
        return tuple(places[first] for first in _starts(sizes))

    def sizes(self, grids: Sequence[tuple[int, int]], count: int) -> list[int]:
        """Return the tokens of each picture.

        Args:
            count: how many there are where none has a grid.
        """
        return [*map(prod, grids)] or [self.reader.tokens] * count

    def full_pack(self, tokens: int, packing: bool) -> BatchShape:
        """Return the shape of a pack that is full of pictures."""
        pack = super().full_pack(tokens, packing)
        units = pack.lengths[0] // self.reader.tokens
        pictures = self.reader.made_up(units, self.reader.largest_of(units))
        grids = grids_of(pictures)
        return replace(pack, pictures=_starts(self.sizes(grids, len(pictures))), grids=grids)

    def inputs(self, batch: Batch, device: torch.device) -> Inputs:
        """Return the batch on the device, but for the pixels, which the tower takes there a few at a time."""
        inputs = prepare(batch, device)
        if batch.pixels is None:
            return inputs
        return self._with_pictures(inputs, batch.pixels, self._begins(batch), batch.grids)

    def planned_inputs(self, shape: BatchShape, device: torch.device) -> Inputs:
        """Return inputs of zeros, with positions."""
        inputs = planned_rows(shape, device)
        if not shape.pictures:
            return inputs
        if shape.grids and self.reader.three_axes:
            inputs = inputs._replace(position_ids=inputs.position_ids.repeat(3, 1, 1))
        units = sum(self.sizes(shape.grids, len(shape.pictures))) // self.reader.tokens
        pixels = torch.zeros(units, *self.reader.unit, device=device)
        return self._with_pictures(inputs, pixels, shape.pictures, shape.grids)

    def _with_pictures(
        self, inputs: Inputs, pixels: torch.Tensor, begins: tuple[int, ...], grids: tuple[tuple[int, int], ...]
    ) -> Inputs:
        device, found = inputs.input_ids.device, torch.cat(self.places_of(begins, grids))
        return inputs._replace(pixels=pixels, picture_tokens=found.to(device), pictures=begins, grids=grids)

    def places_of(self, begins: Sequence[int], grids: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Return where the tokens of each picture are; of some, another token stands behind each of its rows."""
        found = [torch.arange(size) for size in self.sizes(grids, len(begins))]
        if self.reader.ends_rows:
            found = [each + each // width for each, (_, width) in zip(found, grids, strict=True)]
        return [begin + each for begin, each in zip(begins, found, strict=True)]


@dataclass(frozen=True, eq=False)
class VisionLanguageSpec(TextSpec):
    """A vision-language model."""

    @property
    def beside_blocks(self) -> tuple[str, ...]:
        """The tower."""
        return (FAMILIES[self.config.model_type].tower,)

    def unused_parameters(self, model: nn.Module, inputs: Inputs) -> list[nn.Parameter]:
        """Return what learns of tower and projector, where there are no pictures."""
        if inputs.pixels is not None or not torch.is_grad_enabled():
            return []
        read = {*decoder(model).parameters(), *model.get_output_embeddings().parameters()}
        return [p for p in model.parameters() if p.requires_grad and p not in read]

    def pattern(self, method: AdapterMethod) -> tuple[int, int]:
        """See ``ModelSpec.pattern``; blocks that features of pictures are added behind are of a kind of their own."""
        (unlike, pattern), first = super().pattern(method), _blocks_with_features(self.config)
        return max(unlike, first + (self.depth - first) % pattern), pattern

    def check_forward(self, model: nn.Module, longest: int, batches: Batches) -> None:
        """See ``text_guards.check_forward``; rows with pictures are compared too, and have to be packed where pictures
        change more than embeddings."""
        must_pack = bool(_blocks_with_features(model.config)) or sees_whole(model)
        assert isinstance(batches, PictureChats)
        check_forward(model, longest, partial(logits_error, batches), must_pack)


def picture_chat_lm(method: AdapterMethod, reader: PictureReader, spec: ModelSpec | None) -> Workload:
    """Return a vision-language model that learns from chats with pictures.

    Args:
        spec: of the model, for a plan.
    """
    batches = PictureChats(method.virtual_tokens, reader)
    return Workload(spec or VisionLanguageSpec(), batches, CrossEntropy(), method)


@torch.no_grad()
def logits_error(chats: PictureChats, model: nn.Module) -> float:
    """Return the relative L2 error of the logits of packed rows, two of them with pictures."""
    r, generator = chats.reader, torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    shapes: Grids = ((2, 3), (3, 1), (1, 2)) if r.keeps_shape else ()
    sizes, rows, owns = chats.sizes(shapes, 3), [], (slice(0, 1), slice(1, 1), slice(1, 3))
    places = chats.places_of((0,) * 3, shapes)
    for own in owns:
        length = 5 + sum(int(each[-1]) + 3 for each in places[own])
        row = torch.randint(0, vocabulary, (length,), generator=generator)
        row[row == r.token_id] = int(r.token_id == 0)
        begin = 3
        for each in places[own]:
            row[begin + each] = r.token_id
            begin += int(each[-1]) + 3
        rows.append(row)
    units = [size // r.tokens for size in sizes]
    pixels = torch.rand(sum(units), *r.unit, generator=generator) * 2 - 1
    lengths, ids = tuple(map(len, rows)), torch.cat(rows)[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    batch = Batch(ids, positions, torch.full((ids.shape[1],), IGNORED_LABEL), lengths, ("",) * 3)
    batch = chats.with_pixels(batch, pixels, shapes)
    was_training = model.training
    packed = head_logits(hidden_states(model.eval(), chats.inputs(batch, device_of(model))), head(model))
    parts = pixels.split(units)

    def alone() -> torch.Tensor:
        found = []
        for row, own in zip(rows, owns, strict=True):
            ids = row[None].to(device_of(model))
            shown = arguments_of(model, torch.cat(parts[own]), ids, shapes[own]) if parts[own] else {}
            found.append(model(input_ids=ids, use_cache=False, **shown).logits[0])
        return torch.cat(found)

    error = relative_error(packed, alone, model)
    model.train(was_training)
    return error


def _blocks_with_features(config) -> int:
    """Return how many blocks of the language model features of pictures are added behind."""
    return len(getattr(config.vision_config, "deepstack_visual_indexes", ()))


def _starts(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return where each of some lengths begins that follow one another."""
    return tuple(accumulate(sizes, initial=0))[: len(sizes)]
