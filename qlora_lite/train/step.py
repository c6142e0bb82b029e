"""One training step and one evaluation: the arithmetic, without files, clocks or printing.

A step runs its micro-batches one after the other and divides every loss by the labelled tokens of the
*whole* step, so that gradient accumulation equals one large batch exactly. (Averaging per micro-batch
first weights a token by how few its batch had: transformers issues 34191 and 37766.)
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from qlora_lite.data.batch import IGNORED_LABEL, Batch
from qlora_lite.memory.marks import category, phase
from qlora_lite.models.anatomy import decoder, device_of, head
from qlora_lite.models.kernels import FLEX, kernels_of
from qlora_lite.models.load import uses_row_attention
from qlora_lite.models.rows_alone import rows_run_alone
from qlora_lite.ops.checkpoint import row_alone
from qlora_lite.ops.compiled import in_words
from qlora_lite.ops.fused_loss import FUSED
from qlora_lite.ops.loss import AUTO_CHUNK_TOKENS, chunked_cross_entropy
from qlora_lite.ops.packed_attention import sequence_ends
from qlora_lite.ops.shapes import device_type, kernel_rows
from qlora_lite.ops.transfer import part, remembered, sent
from qlora_lite.quant.few_rows import plain_products

from .loss_scale import unscale
from .optim import UpdatesInBackward, clip_scale, gradient_norms
from .out_of_memory import no_retry


class StepResult(NamedTuple):
    """What one optimizer step saw: mean loss per labelled token, gradient norms before clipping, counts.

    ``norms`` are those of the single parameters, float32 [n] in the optimizer's order.
    """

    loss: float
    grad_norm: float
    norms: torch.Tensor
    tokens: int
    labelled_tokens: int


class Evaluation(NamedTuple):
    """Mean loss per labelled token, its exponential, and how many tokens it is over."""

    loss: float
    perplexity: float
    labelled_tokens: int


class Inputs(NamedTuple):
    """A micro-batch as the model computes on it; no shape in the step depends on its values.

    input_ids, position_ids: int64 [1, T + filler], on the model's device.
    row_lengths: tokens of each row, T in all.
    learned: int64 [N], the places whose next token is a target.
    targets: int64 [N].
    row_ends: of a card, where rows end (``ops.packed_attention.sequence_ends``).
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    row_lengths: tuple[int, ...]
    learned: torch.Tensor
    targets: torch.Tensor
    row_ends: torch.Tensor | None = None


def prepare(batch: Batch, device: torch.device) -> Inputs:
    """Move a batch to the device and find its targets.

    Where the device's kernels want rounder counts (see ``ops.shapes``), filler tokens go through the blocks
    behind the rows and are cut off again: enough to round up the last row, and then the whole batch.
    """
    filler = filler_tokens(batch.row_lengths, device)
    input_ids = torch.nn.functional.pad(batch.input_ids, (0, filler))
    position_ids = torch.cat([batch.position_ids, torch.arange(filler)[None]], dim=1)
    learned = (batch.labels != IGNORED_LABEL).nonzero().squeeze(1)
    tensors = [remembered(sent(t, device), t) for t in (input_ids, position_ids, learned, batch.labels[learned])]
    return Inputs(*tensors[:2], batch.row_lengths, *tensors[2:], row_ends(batch.row_lengths, device))


def row_ends(row_lengths: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """Return where rows end for a card's attention, None for a CPU's."""
    return sequence_ends(row_lengths, device) if device_type(device) == "cuda" else None


def filler_tokens(row_lengths: Sequence[int], device: torch.device) -> int:
    """Return how many tokens ``prepare`` adds behind the rows."""
    tokens, last = sum(row_lengths), row_lengths[-1]
    return kernel_rows(tokens - last + kernel_rows(last, device), device) - tokens


def hidden_states(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Return the last hidden states [T, D] of rows laid end to end."""
    if rows_run_alone(model):
        return _hidden_states_row_by_row(model, inputs)
    kernels = kernels_of(model)
    at_once = {"row_ends": inputs.row_ends} if "sequences" in kernels and inputs.row_ends is not None else {}
    at_once |= {"row_flex": True} if FLEX in kernels else {}
    return _decoded(model, inputs.input_ids, inputs.position_ids, inputs.row_lengths, **at_once)


def _decoded(
    model: nn.Module, ids: torch.Tensor, positions: torch.Tensor, row_lengths: tuple[int, ...], **at_once
) -> torch.Tensor:  # fmt: skip
    """Return the last hidden states of the rows that the tokens begin with.

    Args:
        at_once: ``row_attention``'s further arguments.
    """
    rows = {}
    if uses_row_attention(model):
        # row_attention needs no mask. Without one, transformers looks at the positions for packed rows, and a card
        # waits for the answer; one of four dimensions it passes on as it is.
        rows = {"row_lengths": row_lengths, "attention_mask": ids.new_empty((1, 1, 0, 0)), **at_once}
    output = decoder(model)(input_ids=ids, position_ids=positions, use_cache=False, **rows)
    return output.last_hidden_state[0, : sum(row_lengths)]


def _hidden_states_row_by_row(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Run each row by itself; the tokens behind it, up to the kernel's length, cannot change what came before."""
    outs, start, device = [], 0, inputs.input_ids.device
    for number, length in enumerate(inputs.row_lengths):
        ids = part(inputs.input_ids, (slice(None), slice(start, start + kernel_rows(length, device))))
        positions = torch.arange(ids.shape[1], device=device)[None]
        with row_alone(number):
            outs.append(_decoded(model, ids, positions, (length,)))
        start += length
    return torch.cat(outs)


def summed_loss(
    model: nn.Module, inputs: Inputs, chunk_tokens: int | None = None, fused: str | None = None
) -> torch.Tensor:  # fmt: skip
    """Return the float32 sum of the losses of a batch's labelled tokens.

    Args:
        chunk_tokens: tokens whose logits exist at once; None takes the default.
        fused: name of the loss in ``ops.fused_loss`` that takes the place of the chunked one.
    """
    hidden = hidden_states(model, inputs)[inputs.learned]
    with category("logits"):
        if fused:
            return FUSED[fused][1](hidden, inputs.targets, head(model))
        return chunked_cross_entropy(hidden, inputs.targets, head(model), chunk_tokens or AUTO_CHUNK_TOKENS)


def labelled_count(batch: Batch) -> int:
    """Return how many tokens of a batch are targets."""
    return int((batch.labels != IGNORED_LABEL).sum())


def accumulate_gradients(
    model: nn.Module, batches: Sequence[Inputs], chunk_tokens: int | None = None, fused: str | None = None,
    scale: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """Add the gradients of the mean loss over all labelled tokens of the batches, times a scale; return that mean."""
    total = sum(len(batch.targets) for batch in batches)
    mean = torch.zeros((), dtype=torch.float32, device=device_of(model))
    for batch in batches:
        with phase("forward"):
            loss = summed_loss(model, batch, chunk_tokens, fused) / total
        with phase("backward"):
            _backward(loss, scale)
        mean += loss.detach()
    return mean


def train_step(
    model: nn.Module, batches: Sequence[Batch], optimizer: torch.optim.Optimizer, max_grad_norm: float,
    chunk_tokens: int | None = None, fused: str | None = None, scale: float = 1.0,
) -> StepResult:  # fmt: skip
    """Run one optimizer step over micro-batches; a step that is not finite leaves the weights alone.

    A card begins to update before the host knows what the step has found; see ``flat``.

    Args:
        optimizer: one of ``build_optimizer``'s.
        scale: power of two that the backward pass is run at; see ``loss_scale``.

    Returns:
        The step's numbers; ``loss`` or ``grad_norm`` is not finite if the update was skipped.

    Raises:
        DoesNotFitError: memory ran out in the update, when some weights may have been changed already.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    inputs = [prepare(batch, device_of(model)) for batch in batches]
    mean = accumulate_gradients(model, inputs, chunk_tokens, fused, scale)
    with phase("optimizer"):
        unscale(parameters, scale)
        norms = gradient_norms(parameters)
        numbers = torch.stack([mean, torch.linalg.vector_norm(norms)])
        read = _begin_reading(numbers)
        with category("optimizer"), no_retry("while the weights were updated"):
            optimizer.step(if_finite=numbers, scale=clip_scale(numbers[1], max_grad_norm))
        loss, grad_norm = read()
        if not math.isfinite(loss + grad_norm):
            optimizer.forget_step()
    return _result(batches, loss, grad_norm, norms)


def train_step_in_backward(
    model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, chunk_tokens: int | None = None,
    fused: str | None = None,
) -> StepResult:  # fmt: skip
    """Run one optimizer step whose backward pass updates each factor; equals ``train_step`` without clipping.

    A loss that is not finite leaves the weights alone; a gradient that is not finite is seen too late for that, and so
    is memory that runs out.
    """
    inputs = prepare(batch, device_of(model))
    with phase("forward"):
        loss = summed_loss(model, inputs, chunk_tokens, fused) / len(inputs.targets)
    value = loss.item()
    if not math.isfinite(value):
        return _result([batch], value, value, loss.detach()[None])
    with phase("backward"), UpdatesInBackward(optimizer) as updates:
        _backward(loss)
    norms = updates.norms()
    return _result([batch], value, torch.linalg.vector_norm(norms).item(), norms)


def _backward(loss: torch.Tensor, scale: float = 1.0) -> None:
    with in_words():  # where compiled blocks are kept, their gradients are compiled here
        loss.backward(torch.full_like(loss, scale))


def _begin_reading(numbers: torch.Tensor) -> Callable[[], list[float]]:
    """Return a function that waits for numbers, and not for what a card is given to do from here on."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    on_host, there = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
    there.record()

    def read() -> list[float]:
        there.synchronize()
        return on_host.tolist()

    return read


def _result(batches: Sequence[Batch], loss: float, grad_norm: float, norms: torch.Tensor) -> StepResult:
    tokens = sum(batch.input_ids.shape[1] for batch in batches)
    return StepResult(loss, grad_norm, norms, tokens, sum(labelled_count(batch) for batch in batches))


@torch.no_grad()
def evaluate_loss(model: nn.Module, batches: Iterable[Batch], chunk_tokens: int | None = None) -> Evaluation:
    """Return the mean loss over every labelled token of the batches, with dropout off."""
    was_training = model.training
    total, count = torch.zeros((), dtype=torch.float64, device=device_of(model)), 0
    try:
        model.eval()
        with phase("evaluation"), plain_products():  # the loss of short batches too is that of training
            for batch in batches:
                total += summed_loss(model, prepare(batch, device_of(model)), chunk_tokens)
                count += labelled_count(batch)
    finally:
        model.train(was_training)
    loss = total.item() / max(1, count)
    return Evaluation(loss, math.exp(min(loss, 700.0)), count)
