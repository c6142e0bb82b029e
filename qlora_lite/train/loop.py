"""The training loop as an iterator: each turn is one optimizer step, and the caller does the rest.

    for metrics in Trainer(model, examples, settings):
        print(metrics.step, metrics.loss)

Evaluating, saving and printing stay with the caller, so that the loop has no callbacks to learn.
The order of the data is a pure function of the seed and the epoch, so ``epoch`` and ``epoch_step`` are the place in
it. Between steps a trainer's state can be taken out and put back (``train.state``).
"""

import logging
import math
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import torch
from torch import nn

from qlora_lite.data.batch import Batch, collate, enlarged, extent_of, plan_epoch
from qlora_lite.data.stored import Example, Examples, learned_counts, row_lengths
from qlora_lite.data.stream import stream_batches
from qlora_lite.errors import DataError, ModelError, TrainingError
from qlora_lite.lora.inject import lora_layers, lora_parameters, require_model
from qlora_lite.lora.shared import forget_begun
from qlora_lite.memory.meter import PeakMeter
from qlora_lite.models.anatomy import device_of, head
from qlora_lite.models.kernels import use_kernels
from qlora_lite.models.levers import set_levers
from qlora_lite.ops.fused_loss import candidates, choose_loss
from qlora_lite.ops.loss import AUTO_CHUNK_TOKENS
from qlora_lite.quant.product import float32_partial_sums
from qlora_lite.quant.tensor_file import bit_sums

from .epochs import Epochs
from .generators import generator_states, restore_generators
from .guards import (
    can_reach_every_layer,
    check_adapters_took_part,
    check_compilable,
    check_embeddings,
    check_forward,
    check_trainable,
    check_updates_in_backward,
    explain_not_finite,
)
from .kernels import check_kernels, choose_kernels
from .loss_scale import LossScale
from .optim import build_optimizer
from .out_of_memory import cut, first_line, free_cached_memory, is_out_of_memory, lower_limit, no_retry
from .rehearsal import rehearse_step
from .schedule import lr_factor
from .settings import TrainSettings
from .step import (
    Evaluation,
    StepResult,
    evaluate_loss,
    hidden_states,
    prepare,
    train_step,
    train_step_in_backward,
)

log = logging.getLogger("qlora_lite")
T = TypeVar("T")
CHECKED_TILE_TOKENS = 5


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One line of ``metrics.jsonl``; ``seconds`` is the step's, ``peak_bytes`` the run's so far."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    labelled_tokens: int
    tokens_per_second: float
    peak_bytes: int
    seconds: float


class Trainer:
    """Train the LoRA factors of a model on examples, one optimizer step per iteration.

    Args:
        model: a frozen model with LoRA layers.
        examples: tokenised rows; with a stream, rows as large as any that it can give.
        settings: see ``TrainSettings``; a stream needs ``max_steps``.
        stream: gives the rows of an epoch each time it is iterated, to be used in place of ``examples``.

    Raises:
        DataError: the model has no embedding for a token, or the examples are none.
        TrainingError: the settings are none.
        ModelError: the model has no LoRA layers, or rows trained together would not give the model's own logits.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        settings: TrainSettings,
        stream: Iterable[Example] | None = None,
    ):
        _check_arguments(model, examples, settings)
        self.model, self.examples, self.settings, self.stream = model, examples, settings, stream
        self.epochs = Epochs(row_lengths(examples), learned_counts(examples), settings)
        self.parameters = [parameter for _, parameter in lora_parameters(model)]
        self.optimizer = build_optimizer(
            self.parameters, settings.optimizer, settings.learning_rate, settings.weight_decay,
            settings.stochastic_rounding,
        )  # fmt: skip
        self.total_steps = self.epochs.total_steps()
        self.step = self.skipped = 0
        self.epoch = self.epoch_step = 0  # the next step's: its epoch, and the steps before it in that epoch
        self.optimizer_bytes = 0  # of its states, known after a rehearsal
        self.took_part = False  # every wrapped layer, which a step has shown
        self._has_retried = False  # the allocator, which has been said
        self._is_still = False  # its gradients are zero, which has been said
        self.fused_loss: str | None = None  # in place of the chunked one; see ``choose_loss``
        self.loss_scale = LossScale() if model.dtype == torch.float16 else None
        self.most_tokens: int | None = None  # at once through the model, since memory ran out with more
        check_embeddings(model, examples)
        check_trainable(model, sum(parameter.numel() for parameter in self.parameters))
        tiny_tiles = settings.levers.tile_tokens and CHECKED_TILE_TOKENS  # so that the check's few tokens are cut
        plain = replace(settings.levers, kernels="plain")  # until ``choose_kernels`` has tried others
        set_levers(model, replace(plain, tile_tokens=tiny_tiles))
        check_forward(model, settings.max_tokens)
        set_levers(model, plain)
        check_updates_in_backward(model, settings)
        check_compilable(model, settings.levers)
        self.meter = PeakMeter(device_of(model))
        weakref.finalize(self, self.meter.close)  # its thread would outlive the trainer

    @float32_partial_sums()
    def rehearse(self, eval_examples: Sequence[Example] = ()) -> None:
        """Run a step on the largest micro-batch and the largest evaluation batch, and leave no trace of it.

        Raises:
            DataError: the model has no embedding for a token.
            TrainingError: a factor is not what it was.
        """
        s, device = self.settings, device_of(self.model)
        check_embeddings(self.model, eval_examples)
        largest, evaluation = largest_batches(self.examples, eval_examples, self.epochs, self.most_tokens)
        # bitsandbytes never gives paged states back; others of the same size are freed after the rehearsal
        name = s.optimizer.removeprefix("paged_")
        optimizer = build_optimizer(self.parameters, name, 0.0, 0.0, s.stochastic_rounding)
        before, was_training = list(map(bit_sums, self.parameters)), self.model.training
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            rehearse_step(
                self.model, self.parameters, optimizer, prepare(largest, device),
                evaluation and prepare(evaluation, device), s.max_grad_norm, s.levers.loss_chunk_tokens,
                s.gradient_accumulation_steps > 1, s.levers.optimizer_in_backward, self.fused_loss,
            )  # fmt: skip
        self.optimizer_bytes = sum(
            value.nbytes for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        )  # fmt: skip
        del optimizer
        if getattr(self.optimizer, "is_paged", False):
            free_cached_memory(device)  # room for the run's own states, which torch's allocator does not take
        self.model.train(was_training)
        if list(map(bit_sums, self.parameters)) != before:
            raise TrainingError("the rehearsal before training changed a LoRA factor; please report this")

    @float32_partial_sums()
    def choose_kernels(self, recorded: Collection[str] | None = None) -> None:
        """Find out which fused kernels the steps compute with, on the largest micro-batch; see ``train.kernels``.

        Without this call there are none.

        Args:
            recorded: those of a run that goes on, which are kept.

        Raises:
            TrainingError: one of those does not run here any more.
        """
        device, allowed = device_of(self.model), {*self.settings.levers.allowed_kernels}
        names = allowed if recorded is None else allowed & {*recorded}
        if recorded is not None or device.type == "cuda":
            use_kernels(self.model, names)
        if device.type == "cuda" and names:
            largest, _ = largest_batches(self.examples, (), self.epochs, self.most_tokens)
            inputs = prepare(largest, device)
            if recorded is None:
                choose_kernels(self.model, inputs)
            else:
                check_kernels(self.model, names, inputs)
            free_cached_memory(device)
            self.meter.restart()

    @float32_partial_sums()
    def choose_loss(self, recorded: str | None = None) -> None:
        """Find out which loss the steps compute, on the hidden states of the largest micro-batch.

        See ``ops.fused_loss``; without this call it is the chunked one.

        Args:
            recorded: the loss of a run that goes on, which is kept where it can be.
        """
        s, device, its_head = self.settings, device_of(self.model), head(self.model)
        names = candidates(s.fused_loss, its_head, device)
        if recorded is not None:
            self.fused_loss = recorded if recorded in names else None
        elif names:
            largest, _ = largest_batches(self.examples, (), self.epochs, self.most_tokens)
            inputs, was_training = prepare(largest, device), self.model.training
            with torch.no_grad():
                hidden = hidden_states(self.model.eval(), inputs)[inputs.learned]
            self.model.train(was_training)
            chunk_tokens = s.levers.loss_chunk_tokens or AUTO_CHUNK_TOKENS
            self.fused_loss = choose_loss(names, hidden, inputs.targets, its_head, chunk_tokens)
            free_cached_memory(device)
            self.meter.restart()

    def __iter__(self) -> Iterator[StepMetrics]:
        self.model.train()
        steps = self._steps()
        while self.step < self.total_steps:
            micro_batches = next(steps)
            self.epoch_step += 1
            yield self._train(micro_batches)

    def _steps(self) -> Iterator[list[list[Example]]]:
        """Yield the rows of each micro-batch of each step, from the present place in the data on."""
        while True:
            yield from islice(self._steps_of_epoch(), self.epoch_step, None)
            if self.epoch_step == 0:
                raise TrainingError("the stream of rows has none to train on")
            self.epoch, self.epoch_step = self.epoch + 1, 0

    def _steps_of_epoch(self) -> Iterator[list[list[Example]]]:
        if self.stream is None:
            for step in self.epochs.steps(self.epoch):
                yield [[self.examples[row] for row in rows] for rows in step]
            return
        s = self.settings
        micro_batches = stream_batches(self.stream, s.max_tokens, s.packing, s.micro_batch_size)
        while step := list(islice(micro_batches, s.gradient_accumulation_steps)):
            yield step

    @float32_partial_sums()
    def _train(self, micro_batches: list[list[Example]]) -> StepMetrics:
        started, s = time.perf_counter(), self.settings
        retries = self.meter.allocation_retries()
        self.step += 1
        rate = s.learning_rate * lr_factor(self.step, self.total_steps, s.lr_scheduler, s.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        whole = s.levers.optimizer_in_backward
        result = self._whole_step(micro_batches) if whole else self._within_memory(micro_batches, self._step)
        if not math.isfinite(result.loss + result.grad_norm):
            self._skip_or_stop(micro_batches, updated=whole and math.isfinite(result.loss))
        elif not self.took_part:
            if can_reach_every_layer(row for rows in micro_batches for row in rows):
                check_adapters_took_part(self.model, result.norms.tolist())
                self.took_part = True
        elif result.grad_norm == 0 and not self._is_still:
            self._is_still = True
            log.warning("step %d: every gradient is zero, so that nothing is learned any more; a lower "
                        "train.learning_rate may have kept the model from breaking", self.step)  # fmt: skip
        self.optimizer.zero_grad(set_to_none=True)
        self._tell_of_retries(self.meter.allocation_retries() - retries)
        seconds = time.perf_counter() - started
        return StepMetrics(
            self.step, result.loss, rate, result.grad_norm, result.tokens, result.labelled_tokens,
            result.tokens / seconds, self.meter.peak_bytes(), seconds,
        )  # fmt: skip

    def _tell_of_retries(self, count: int) -> None:
        """Log that the allocator was at its limit in a step, as a warning the first time."""
        if count:
            log.log(
                logging.INFO if self._has_retried else logging.WARNING,
                "step %d: the GPU had no free piece of memory for a tensor, %d times, until cached memory was given "
                "back, which takes time and changes no number: the run is at its limit, or its free memory lies in "
                "small pieces; more room (memory.budget, other programs on this GPU) or a lower data.max_tokens help",
                self.step, count,
            )  # fmt: skip
            self._has_retried = True

    def _step(self, batches: Iterator[Batch]) -> StepResult:
        s, whole = self.settings, list(batches)

        def attempt(scale: float) -> StepResult:
            self.optimizer.zero_grad(set_to_none=True)  # of an attempt at a larger scale
            return train_step(
                self.model, whole, self.optimizer, s.max_grad_norm, s.levers.loss_chunk_tokens, self.fused_loss, scale
            )

        if self.loss_scale is None:
            return attempt(1.0)
        before, result = self.loss_scale.value, self.loss_scale.step(attempt)
        if self.loss_scale.value != before:
            log.info("step %d: the loss scale of float16 is %g from now on, after %g", self.step,
                     self.loss_scale.value, before)  # fmt: skip
        return result

    def _whole_step(self, micro_batches: Sequence[Sequence[Example]]) -> StepResult:
        """Run a step whose backward pass updates the factors, so that it cannot be cut.

        Raises:
            DoesNotFitError: memory ran out.
        """
        (rows,) = micro_batches
        with no_retry("in a step that memory.optimizer_in_backward keeps whole"):
            return train_step_in_backward(
                self.model, collate(rows), self.optimizer, self.settings.levers.loss_chunk_tokens, self.fused_loss
            )

    def _within_memory(self, groups: Sequence[Sequence[Example]], compute: Callable[[Iterator[Batch]], T]) -> T:
        """Return what ``compute`` makes of the batches; where memory runs out, do it again with smaller ones.

        Raises:
            DoesNotFitError: one row alone is too large.
        """
        device = device_of(self.model)
        random_states = generator_states(device)
        while True:
            parts = cut(groups, self.most_tokens)
            try:
                return compute(collate(rows) for rows in parts)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)  # and not the error, whose trace holds the tensors of the attempt
            self.optimizer.zero_grad(set_to_none=True)
            forget_begun(self.model)
            free_cached_memory(device)
            restore_generators(random_states, device)
            self.most_tokens = lower_limit(parts, reason)
            log.warning("step %d: memory ran out (%s); from now on at most %d tokens go through the model at once, "
                        "with the same rows per step", self.step, reason, self.most_tokens)  # fmt: skip

    def _skip_or_stop(self, micro_batches: list[list[Example]], updated: bool) -> None:
        """Count a step that was not finite, and end the run if it may not be left out."""
        batches = [collate(rows) for rows in cut(micro_batches, self.most_tokens)]
        error = explain_not_finite(self.model, batches, self.step, updated)
        if self.fused_loss:
            error = TrainingError(f"{error}. The step's loss was {self.fused_loss}'s, and what was looked at is the "
                                  "chunked one, which memory.fused_loss off computes")  # fmt: skip
        if self.settings.on_not_finite == "stop":
            raise error
        if self.skipped == self.settings.max_skipped_steps:
            raise TrainingError(f"{error}; {self.skipped} steps were skipped before, train.max_skipped_steps")
        self.skipped += 1
        log.warning("%s; this step is skipped", error)

    @float32_partial_sums()
    def evaluate(self, examples: Sequence[Example], done: Callable[[int], None] | None = None) -> Evaluation:
        """Return the loss over other examples, in batches of the training shape, with dropout off.

        Args:
            done: called after each batch with the number of examples so far.
        """
        chunk = self.settings.levers.loss_chunk_tokens
        return self._within_memory(
            list(_eval_rows(examples, self.settings)),
            lambda batches: evaluate_loss(self.model, _counted(batches, done), chunk),
        )


def _check_arguments(model: object, examples: object, settings: object) -> None:
    require_model(model)
    if not any(lora_layers(model)):
        raise ModelError("the model has no LoRA layers; call add_lora first")
    if not isinstance(examples, Examples | Sequence) or not isinstance(next(iter(examples), None), Example | None):
        raise DataError(f"examples is {type(examples).__name__}; give build_examples(...).examples")
    if not isinstance(settings, TrainSettings):
        raise TrainingError(f"settings is {type(settings).__name__}; give qlora_lite.train_settings(RECIPE)")


def _eval_plan(examples: Sequence[Example], settings: TrainSettings) -> list[list[int]]:
    return plan_epoch(row_lengths(examples), settings.max_tokens, True, 1, "as-is", settings.seed, 0)


def _eval_rows(examples: Sequence[Example], settings: TrainSettings) -> Iterator[Sequence[Example]]:
    """Yield the rows of each evaluation batch: slices, which copy nothing, because the rows keep their order."""
    for rows in _eval_plan(examples, settings):
        yield examples[rows[0] : rows[-1] + 1]


def eval_batches(
    examples: Sequence[Example], settings: TrainSettings, done: Callable[[int], None] | None = None
) -> Iterator[Batch]:
    """Lay evaluation rows end to end up to ``max_tokens`` per batch, in their own order.

    Args:
        done: called with the number of examples so far whenever another batch is asked for.
    """
    return _counted(map(collate, _eval_rows(examples, settings)), done)


def _counted(batches: Iterable[Batch], done: Callable[[int], None] | None) -> Iterator[Batch]:
    count = 0
    for batch in batches:
        yield batch
        count += len(batch.row_lengths)
        if done:
            done(count)


def largest_batches(
    examples: Sequence[Example], eval_examples: Sequence[Example], epochs: Epochs, most_tokens: int | None = None
) -> tuple[Batch, Batch | None]:
    """Return a micro-batch and an evaluation batch that need as much memory as any; None without evaluation rows.

    See ``batch.enlarged``: what a batch needs follows its tokens, its rows, the longest one and what is learned.

    Args:
        epochs: of the examples.
        most_tokens: see ``out_of_memory.cut``.
    """
    whole = epochs.settings.levers.optimizer_in_backward
    rows, most = epochs.largest()
    largest = _fullest(enlarged([examples[row] for row in rows], most), None if whole else most_tokens)
    if not len(eval_examples):
        return largest, None
    lengths, batches = row_lengths(eval_examples), _eval_plan(eval_examples, epochs.settings)
    rows = max(batches, key=lambda rows: sum(lengths[row] for row in rows))
    most = extent_of(lengths, learned_counts(eval_examples), batches)
    return largest, _fullest(enlarged([eval_examples[row] for row in rows], most), most_tokens)


def _fullest(rows: Sequence[Example], most_tokens: int | None) -> Batch:
    """Return that part of a batch with the most tokens which would go through the model at once."""
    parts = cut([rows], most_tokens)
    return collate(max(parts, key=lambda part: sum(row_lengths(part))))
