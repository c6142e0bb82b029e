"""One training step and one evaluation: the arithmetic, without files, clocks or printing.

A step runs its micro-batches one after the other and divides every loss by the labelled tokens of the
*whole* step, so that gradient accumulation equals one large batch exactly. (Averaging per micro-batch
first weights a token by how few its batch had: transformers issues 34191 and 37766.)
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from qlora_lite.data.batch import Batch
from qlora_lite.models.anatomy import decoder, head
from qlora_lite.models.load import rows_run_alone, uses_row_attention
from qlora_lite.ops.loss import AUTO_CHUNK_TOKENS, chunked_cross_entropy
from qlora_lite.ops.shapes import kernel_rows

from .optim import clip_gradients


class StepResult(NamedTuple):
    """What one optimizer step saw: mean loss per labelled token, gradient norm before clipping, counts."""

    loss: float
    grad_norm: float
    tokens: int
    labelled_tokens: int


class Evaluation(NamedTuple):
    """Mean loss per labelled token, its exponential, and how many tokens it is over."""

    loss: float
    perplexity: float
    labelled_tokens: int


def hidden_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the last hidden states [T, D] of a batch of rows laid end to end.

    Where the device's kernels want rounder counts (see ``ops.shapes``), filler tokens go through the blocks
    behind the rows and are cut off again: enough to round up the last row, and then the whole batch.
    """
    if rows_run_alone(model) and len(batch.row_lengths) > 1:
        return torch.cat([hidden_states(model, row) for row in _single_rows(batch)])
    tokens, last = batch.input_ids.shape[1], batch.row_lengths[-1]
    filler = kernel_rows(tokens - last + kernel_rows(last, model.device), model.device) - tokens
    input_ids = torch.nn.functional.pad(batch.input_ids, (0, filler)).to(model.device)
    position_ids = torch.cat([batch.position_ids, torch.arange(filler)[None]], dim=1).to(model.device)
    rows = {"row_lengths": batch.row_lengths} if uses_row_attention(model) else {}
    output = decoder(model)(input_ids=input_ids, position_ids=position_ids, use_cache=False, **rows)
    return output.last_hidden_state[0, :tokens]


def _single_rows(batch: Batch) -> Iterator[Batch]:
    start = 0
    for length, where in zip(batch.row_lengths, batch.where, strict=True):
        row = slice(start, start + length)
        yield Batch(batch.input_ids[:, row], batch.position_ids[:, row], batch.labels[row], (length,), (where,))
        start += length


def summed_loss(model: nn.Module, batch: Batch, chunk_tokens: int | None = None) -> torch.Tensor:
    """Return the float32 sum of the losses of a batch's labelled tokens.

    Args:
        chunk_tokens: tokens whose logits exist at once; None takes the default.
    """
    labelled = (batch.labels != -100).nonzero().squeeze(1)
    targets = batch.labels[labelled].to(model.device)
    hidden = hidden_states(model, batch)[labelled.to(model.device)]
    return chunked_cross_entropy(hidden, targets, head(model), chunk_tokens or AUTO_CHUNK_TOKENS)


def labelled_count(batch: Batch) -> int:
    """Return how many tokens of a batch are targets."""
    return int((batch.labels != -100).sum())


def accumulate_gradients(model: nn.Module, batches: Sequence[Batch], chunk_tokens: int | None = None) -> float:
    """Add the gradients of the mean loss over all labelled tokens of the batches; return that mean."""
    total = sum(labelled_count(batch) for batch in batches)
    mean = 0.0
    for batch in batches:
        loss = summed_loss(model, batch, chunk_tokens) / total
        loss.backward()
        mean += loss.item()
    return mean


def train_step(
    model: nn.Module, batches: Sequence[Batch], optimizer: torch.optim.Optimizer, max_grad_norm: float,
    chunk_tokens: int | None = None,
) -> StepResult:  # fmt: skip
    """Run one optimizer step over micro-batches; a step that is not finite leaves the weights alone.

    Returns:
        The step's numbers; ``loss`` or ``grad_norm`` is not finite if the update was skipped.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loss = accumulate_gradients(model, batches, chunk_tokens)
    grad_norm = clip_gradients(parameters, max_grad_norm).item()
    if math.isfinite(loss) and math.isfinite(grad_norm):
        optimizer.step()
    tokens = sum(batch.input_ids.shape[1] for batch in batches)
    return StepResult(loss, grad_norm, tokens, sum(labelled_count(batch) for batch in batches))


@torch.no_grad()
def evaluate_loss(model: nn.Module, batches: Iterable[Batch], chunk_tokens: int | None = None) -> Evaluation:
    """Return the mean loss over every labelled token of the batches, with dropout off."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        total += summed_loss(model, batch, chunk_tokens).item()
        count += labelled_count(batch)
    model.train(was_training)
    loss = total / max(1, count)
    return Evaluation(loss, math.exp(min(loss, 700.0)), count)
