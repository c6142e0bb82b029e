"""One training step and one evaluation: the arithmetic, without files, clocks or printing.

A step runs its micro-batches one after the other and divides every loss by the weight (of a language model: the
target tokens) of the *whole* step, so that gradient accumulation equals one large batch exactly. (Averaging per
micro-batch first weights a token by how few its batch had: transformers issues 34191 and 37766.)
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from qlora_lite.adapters.lora.inject import merged_once
from qlora_lite.memory.marks import category, phase
from qlora_lite.models.memory_options import stream_of
from qlora_lite.models.packing import passes
from qlora_lite.offload.compiled import in_words
from qlora_lite.quant.small_batch import plain_products

from .divided_weights import norms_of_all, parts_of
from .gradients import clip_scale, fill_gradients, gradient_norms, parameters_of
from .loss_scale import unscale
from .optim import UpdatesInBackward
from .out_of_memory import no_retry
from .processes import ALONE, Processes
from .workload import Workload


class StepResult(NamedTuple):
    """What one optimizer step saw: mean loss per target, gradient norms before clipping, counts.

    ``norms`` are those of the single parameters, float32 [n] in the optimizer's order; ``metrics`` the objective's
    own, as means like the loss.
    """

    loss: float
    grad_norm: float
    norms: torch.Tensor
    tokens: int
    target_tokens: int
    metrics: Mapping[str, float]


class Evaluation(NamedTuple):
    """Mean loss per target, its exponential, how many targets it is over, and the objective's own metrics."""

    loss: float
    perplexity: float
    target_tokens: int
    metrics: Mapping[str, float] = {}


class Means(NamedTuple):
    """A loss divided by its weight, float32 [], and the objective's metrics likewise."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def accumulate_gradients(
    workload: Workload,
    model: nn.Module,
    batches: Sequence,
    scale: float = 1.0,
    total: float | None = None,
    counted: int | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> Means:
    """Add the gradients of the mean loss over all targets of the batches, times a scale; return the means.

    Args:
        batches: inputs of the workload.
        total: the weight that losses are divided by, where the step has other batches too.
        counted: how many of the batches, the first ones, count; the others are run for nothing. None counts all.
        watch: called after each batch with how many are done (of a GPU: given to it), and of how many.
    """
    if total is None:
        total = sum(workload.objective.weight(batch) for batch in batches)
    mean = torch.zeros((), dtype=torch.float32, device=workload.spec.device(model))
    metrics: dict[str, torch.Tensor] = {}
    with phase("forward"), merged_once(model):
        for number, batch in enumerate(batches):
            weight = total if counted is None or number < counted else math.inf
            found = workload.loss(model, batch)
            loss = found.sum / weight
            with phase("backward"):
                _backward(model, loss, scale)
            mean += loss.detach()
            _add(metrics, found.metrics, weight)
            if watch:
                watch(number + 1, len(batches))
    return Means(mean, metrics)


def _add(metrics: dict[str, torch.Tensor], found: Mapping[str, torch.Tensor], total: float) -> None:
    for name, value in found.items():
        metrics[name] = metrics.get(name, 0) + value.detach() / total


def train_step(
    workload: Workload,
    model: nn.Module,
    batches: Sequence,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    scale: float = 1.0,
    processes: Processes = ALONE,
    counted: int | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> StepResult:
    """Run one optimizer step over micro-batches; a step that is not finite leaves the weights alone.

    A GPU begins to update before the host knows what the step has found; see ``flat``.

    Args:
        batches: the workload's; of several ranks, this one's share.
        optimizer: one of ``build_optimizer``'s.
        scale: power of two that the backward pass is run at; see ``loss_scale``.
        processes: those that the step is shared with.
        counted: see ``accumulate_gradients``; 0 for a rank that there is no micro-batch left for.
        watch: see ``accumulate_gradients``.

    Returns:
        The step's numbers; ``loss`` or ``grad_norm`` is not finite if the update was skipped.

    Raises:
        DoesNotFitError: memory ran out in the update, when some weights may have been changed already.
        OtherRankError: it ran out on another rank.
    """
    parameters, parts = parameters_of(optimizer), parts_of(model).values
    with phase("forward"):
        batches = workload.prepare_step(model, batches, processes, counted)
    inputs = [workload.batches.inputs(batch, workload.spec.device(model)) for batch in batches]
    shapes = [workload.batches.shape(batch) for batch in batches[:counted]]
    own = (
        sum(map(workload.objective.weight, inputs[:counted])),
        sum(s.tokens for s in shapes),
        sum(s.targets for s in shapes),
    )
    total, tokens, targets = processes.exchange(*own)
    mean, metrics = accumulate_gradients(workload, model, inputs, scale, total, counted, watch)
    processes.wait()  # until it is known that no rank's memory ran out
    with phase("optimizer"):
        with no_retry("while the ranks added up their gradients"):
            fill_gradients(parameters)
            processes.add_up_gradients([p for p in parameters if p not in parts])
            processes.add_up_parts([p for p in parameters if p in parts])
            processes.add_up([mean, *metrics.values()])
            unscale(parameters, scale)
            norms = norms_of_all(model, parameters, gradient_norms(parameters), processes)
        numbers = torch.stack([mean, torch.linalg.vector_norm(norms), *metrics.values()])
        read = _begin_reading(numbers)
        with category("optimizer"), no_retry("while the weights were updated"):
            optimizer.step(if_finite=numbers[:2], scale=clip_scale(numbers[1], max_grad_norm))
        loss, grad_norm, *values = read()
        if not math.isfinite(loss + grad_norm):
            optimizer.forget_step()
    return StepResult(loss, grad_norm, norms, int(tokens), int(targets), dict(zip(metrics, values, strict=True)))


def train_step_in_backward(
    workload: Workload,
    model: nn.Module,
    batch,
    optimizer: torch.optim.Optimizer,
    processes: Processes = ALONE,
    counts: bool = True,
) -> StepResult:
    """Run one optimizer step whose backward pass updates each parameter; equals ``train_step`` without clipping.

    A loss that is not finite leaves the weights alone; a gradient that is not finite is seen too late for that, and so
    is memory that runs out. Several ranks have divided the weights, and each updates its parts when their gradients
    have come; whole ones are updated at the end.

    Args:
        batch: the workload's; of several ranks, this one's.
        processes: those that the step is shared with.
        counts: False for a rank that there is no batch left for.
    """
    parts = parts_of(model)
    (batch,) = workload.prepare_step(model, [batch], processes, int(counts))
    inputs, shape = workload.batches.inputs(batch, workload.spec.device(model)), workload.batches.shape(batch)
    own = (workload.objective.weight(inputs), shape.tokens, shape.targets) if counts else (0.0, 0.0, 0.0)
    total, tokens, targets = processes.exchange(*own)
    weight = total if counts else math.inf
    metrics: dict[str, torch.Tensor] = {}
    with phase("forward"), merged_once(model):
        found = workload.loss(model, inputs)
        loss = found.sum / weight
        _add(metrics, found.metrics, weight)
        sums = [loss.detach().clone(), *metrics.values()]
        processes.add_up(sums)
        value, *values = (each.item() for each in sums)
        about = int(tokens), int(targets), dict(zip(metrics, values, strict=True))
        if not math.isfinite(value):
            return StepResult(value, value, sums[0][None], *about)
        with phase("backward"), UpdatesInBackward(optimizer, False, parts, passes(model, shape.lengths)) as updates:
            _backward(model, loss)
    updates.update_rest(processes)
    norms = norms_of_all(model, updates.parameters, updates.norms(), processes)
    return StepResult(value, torch.linalg.vector_norm(norms).item(), norms, *about)


def _backward(model: nn.Module, loss: torch.Tensor, scale: float = 1.0) -> None:
    with in_words():  # where compiled blocks are kept, their gradients are compiled here
        loss.backward(torch.full_like(loss, scale))
    if stream := stream_of(model):
        stream.end_backward()


def _begin_reading(numbers: torch.Tensor) -> Callable[[], list[float]]:
    """Return a function that waits for numbers, and not for what a GPU is given to do from here on."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    on_host, there = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
    there.record(torch.cuda.current_stream(numbers.device))

    def read() -> list[float]:
        there.synchronize()
        return on_host.tolist()

    return read


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout off, and compute the losses of short batches too as training does."""
    was_training = model.training
    try:
        model.eval()
        with phase("evaluation"), plain_products():
            yield
    finally:
        model.train(was_training)


def _evaluated(
    workload: Workload, model: nn.Module, batches: Iterable, processes: Processes, counted: int | None
) -> Iterator[tuple]:
    """Yield each batch with its inputs: one after the other, or all where a loss has to know of the others."""
    device = workload.spec.device(model)
    if workload.objective.prepares_steps:
        batches = workload.objective.prepare_step(
            model, workload.spec, workload.batches, list(batches), processes, counted
        )
    yield from ((batch, workload.batches.inputs(batch, device)) for batch in batches)


@torch.no_grad()
def evaluate_loss(
    workload: Workload, model: nn.Module, batches: Iterable, processes: Processes = ALONE, counted: int | None = None
) -> Evaluation:
    """Return the mean loss over every target of the batches, with dropout off.

    Args:
        batches: the workload's; of several ranks, this one's share.
        processes, counted: see ``train_step``.
    """
    device = workload.spec.device(model)
    total, weight, targets = torch.zeros((), dtype=torch.float64, device=device), 0.0, 0
    metrics: dict[str, torch.Tensor] = {}
    with evaluating(model), merged_once(model):
        for number, (batch, inputs) in enumerate(_evaluated(workload, model, batches, processes, counted)):
            counts = counted is None or number < counted
            found = workload.loss(model, inputs)
            total += found.sum if counts else 0
            _add(metrics, found.metrics, 1 if counts else math.inf)
            weight += workload.objective.weight(inputs) if counts else 0
            targets += workload.batches.shape(batch).targets if counts else 0
    whole, of_all, counted_targets = processes.exchange(total.item(), weight, targets)
    values = [processes.exchange(value.item())[0] for value in metrics.values()]
    loss, *means = (value / (of_all or 1) for value in (whole, *values))
    return Evaluation(loss, math.exp(min(loss, 700.0)), int(counted_targets), dict(zip(metrics, means, strict=True)))
