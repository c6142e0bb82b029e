"""The forward pass of a language model or an encoder over packed sequences, up to the last hidden states."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from qlora_lite.data.tokens.batch import IGNORED_LABEL, Batch
from qlora_lite.kernels.packed_attention import sequence_ends
from qlora_lite.memory.shapes import device_type, kernel_rows
from qlora_lite.models.anatomy import decoder, first_position
from qlora_lite.models.heads import is_encoder
from qlora_lite.models.kernels import FLEX, kernels_of
from qlora_lite.models.load import uses_row_attention
from qlora_lite.models.packing import runs_unpacked
from qlora_lite.models.vision_language import decoded, embedded, family_of, of_each_block, sees_whole
from qlora_lite.offload.checkpoint import sequence_alone
from qlora_lite.offload.transfer import part, remembered, sent


class Inputs(NamedTuple):
    """A micro-batch as the model computes on it; no shape in the step depends on its values.

    input_ids, position_ids: int64 [1, T + filler], on the model's device; positions [3, 1, T + filler] with grids.
    row_lengths: tokens of each row, T in all.
    target_positions: int64 [N], the places whose next token is a target.
    targets: int64 [N].
    row_ends: of a GPU, where rows end (``kernels.packed_attention.sequence_ends``).
    token_types: int64 [1, T + filler], which text of a pair each token is of; None where the model does not ask.
    pixels: float32 [N, ...], in host memory, of a vision-language model's pictures; None without any.
    picture_tokens: int64 [P], the positions of the tokens that stand for them.
    pictures: the position of the first token of each.
    grids: height and width in tokens of each that keeps its shape.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    row_lengths: tuple[int, ...]
    target_positions: torch.Tensor
    targets: torch.Tensor
    row_ends: torch.Tensor | None = None
    token_types: torch.Tensor | None = None
    pixels: torch.Tensor | None = None
    picture_tokens: torch.Tensor | None = None
    pictures: tuple[int, ...] = ()
    grids: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> "Inputs":
        """What of a micro-batch the model computes on: all of it; others hold such inputs."""
        return self


def prepare(batch: Batch, device: torch.device) -> Inputs:
    """Move a batch to the device and find its targets.

    Where the device's kernels want rounder counts (see ``memory.shapes``), filler tokens go through the blocks
    behind the rows and are cut off again: enough to round up the last row, and then the whole batch.
    """
    filler = filler_tokens(batch.row_lengths, device)
    input_ids = torch.nn.functional.pad(batch.input_ids, (0, filler))
    behind = torch.arange(filler).expand(*batch.position_ids.shape[:-1], filler)
    position_ids = torch.cat([batch.position_ids, behind], dim=-1)
    target_positions = (batch.labels != IGNORED_LABEL).nonzero().squeeze(1)
    here = [
        remembered(sent(t, device), t)
        for t in (input_ids, position_ids, target_positions, batch.labels[target_positions])
    ]
    return Inputs(here[0], here[1], batch.row_lengths, here[2], here[3], row_ends(batch.row_lengths, device))


def row_ends(row_lengths: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """Return where rows end for a GPU's attention, None for a CPU's."""
    return sequence_ends(row_lengths, device) if device_type(device) == "cuda" else None


def filler_tokens(row_lengths: Sequence[int], device: torch.device) -> int:
    """Return how many tokens ``prepare`` adds behind the rows."""
    tokens, last = sum(row_lengths), row_lengths[-1]
    return kernel_rows(tokens - last + kernel_rows(last, device), device) - tokens


def hidden_states(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Return the last hidden states [T, D] of packed sequences."""
    places, shown, features = inputs.picture_tokens, {}, ()
    if inputs.pixels is not None:
        shown["inputs_embeds"], features = embedded(model, inputs.input_ids, inputs.pixels, places, inputs.grids)
        shown |= of_each_block(model, inputs.input_ids, places)
    if runs_unpacked(model):
        return _hidden_states_row_by_row(model, inputs, **shown)
    kernels = kernels_of(model)
    at_once = {"row_ends": inputs.row_ends} if "sequences" in kernels and inputs.row_ends is not None else {}
    at_once |= {"row_flex": True} if FLEX in kernels else {}
    at_once |= {} if inputs.token_types is None else {"token_type_ids": inputs.token_types}
    at_once |= shown | ({"features": features, "places": places} if features else {})
    if places is not None and shown and sees_whole(model):
        sizes = (*map(prod, inputs.grids),) or (len(places) // len(inputs.pictures),) * len(inputs.pictures)
        at_once["row_pictures"] = inputs.pictures, sizes, family_of(model).in_windows
    return _decoded(model, inputs.input_ids, inputs.position_ids, inputs.row_lengths, **at_once)


def _decoded(
    model: nn.Module, ids: torch.Tensor, positions: torch.Tensor, row_lengths: tuple[int, ...], **at_once
) -> torch.Tensor:
    """Return the last hidden states of the rows that the tokens begin with.

    Args:
        at_once: ``row_attention``'s further arguments, embeddings in place of those of the tokens, and pictures'
            features with their places (``vision_language.decoded``).
    """
    rows = {}
    if uses_row_attention(model):
        # row_attention needs no mask. Without one, transformers looks at the positions for packed rows, and a GPU
        # waits for the answer; one of four dimensions it passes on as it is.
        rows = {"row_lengths": row_lengths, "attention_mask": ids.new_empty((1, 1, 0, 0))}
    if not is_encoder(model):
        rows["use_cache"] = False
    elif not rows:  # the filler behind a row that is alone is hidden from it
        rows["attention_mask"] = (torch.arange(ids.shape[1], device=ids.device) < row_lengths[0]).long()[None]
    if is_encoder(model) and (first := first_position(model)):
        positions = positions + first
    tokens = {} if "inputs_embeds" in at_once else {"input_ids": ids}
    given = {"position_ids": positions, **tokens, **rows, **at_once}
    if "features" in at_once:
        return decoded(decoder(model), **given)[0, : sum(row_lengths)]
    return decoder(model)(**given).last_hidden_state[0, : sum(row_lengths)]


def _hidden_states_row_by_row(model: nn.Module, inputs: Inputs, **shown: torch.Tensor) -> torch.Tensor:
    """Run each row by itself; the tokens behind it, up to the kernel's length, change nothing of it.

    Args:
        shown: what the decoder is given beside tokens or in their place, [1, T, ...].
    """
    outs, start, device = [], 0, inputs.input_ids.device
    for number, length in enumerate(inputs.row_lengths):
        place = slice(None), slice(start, start + kernel_rows(length, device))
        ids = part(inputs.input_ids, place)
        positions = torch.arange(ids.shape[1], device=device)[None]
        if inputs.position_ids.ndim == 3:
            positions = inputs.position_ids[:, *place]
        given = {} if inputs.token_types is None else {"token_type_ids": part(inputs.token_types, place)}
        given |= {name: each[place] for name, each in shown.items()}
        with sequence_alone(number):
            outs.append(_decoded(model, ids, positions, (length,), **given))
        start += length
    return torch.cat(outs)


def labelled_count(batch: Batch) -> int:
    """Return how many tokens of a batch are targets."""
    return int((batch.labels != IGNORED_LABEL).sum())
