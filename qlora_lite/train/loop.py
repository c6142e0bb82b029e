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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from qlora_lite.adapters.lora.inject import merged_once
from qlora_lite.data.tokens.batch import extent_of, plan_epoch, stream_batches
from qlora_lite.errors import ModelError, TrainingError, first_line
from qlora_lite.memory.meter import PeakMeter, use_device
from qlora_lite.models.memory_options import settle, stream_of, trained_on_host
from qlora_lite.quant.product import float32_partial_sums
from qlora_lite.quant.tensor_file import bit_sums
from qlora_lite.units import counted

from .causal_lm import answer_losses, causal_lm
from .divided_weights import names_of_norms, parts_of, trained_here
from .epochs import Epochs
from .generators import generator_states, restore_generators
from .gradients import parameters_of
from .guards import check_choice, check_shareable, check_trainable, explain_not_finite
from .loss_scale import LossScale
from .memory_probe import probe_step
from .optim import build_optimizer, set_learning_rate
from .out_of_memory import cut, free_cached_memory, is_out_of_memory, lower_limit, no_retry
from .processes import ALONE, OtherRankError, Processes
from .settings import TrainSettings, lr_factor
from .shares import Share, own_micro_batches
from .step import Evaluation, StepResult, evaluate_loss, evaluating, train_step, train_step_in_backward
from .workload import Workload

log = logging.getLogger("qlora_lite")
T = TypeVar("T")
MAX_STEPS_WITHOUT_GRADIENT = 10  # of a run that has not learned anything yet


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """A step's numbers; ``seconds`` is the step's, ``peak_bytes`` the run's so far, ``metrics`` the objective's own."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    target_tokens: int
    tokens_per_second: float
    peak_bytes: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if taken := self.metrics.keys() & {each.name for each in fields(self)}:
            raise TrainingError(f"an objective's metrics may not be called {', '.join(sorted(taken))}")

    @property
    def line(self) -> dict[str, float]:
        """What stands in ``metrics.jsonl``."""
        values = asdict(self)
        return values | values.pop("metrics")


class Trainer:
    """Train what an adapter method added to a model on examples, one optimizer step per iteration.

    Args:
        model: a frozen model, adapted: with LoRA layers, if no workload says otherwise.
        examples: the workload's, such as tokenised rows; with a stream, rows as large as any that it can give.
        settings: see ``TrainSettings``; a stream needs ``max_steps``.
        stream: gives the rows of an epoch each time it is iterated, to be used in place of ``examples``.
        workload: what is trained; None is a causal language model with LoRA.
        processes: processes that train the same model on the same examples, each its share of every step.

    Raises:
        DataError: the model has no embedding for a token, or the examples are invalid.
        TrainingError: the settings are not a ``TrainSettings``.
        ModelError: the model has no LoRA layers.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence,
        settings: TrainSettings,
        stream: Iterable | None = None,
        workload: Workload | None = None,
        processes: Processes = ALONE,
    ):
        if not isinstance(settings, TrainSettings):
            raise TrainingError(
                f"settings is {type(settings).__name__}; give qlora_lite.train_settings(RECIPE), or "
                "qlora_lite.TrainSettings(learning_rate=...)"
            )
        workload = workload or causal_lm()
        workload.check_examples(model, examples)
        self.workload = workload.with_options(settings.options)
        self.model, self.examples, self.settings, self.stream = model, examples, settings, stream
        self.processes = processes
        counts = workload.batches.lengths(examples), workload.batches.target_counts(examples)
        self.epochs = Epochs(*counts, settings, processes.rank, workload.batches.picture_counts(examples))
        self.device = workload.spec.device(model)
        self._take_parameters()
        self._turn = 0  # the first step of the turn that is trained, where weights are trained in turn
        self.total_steps = self.epochs.total_steps()
        self.step = self.skipped = 0
        self._order: list[list[list[int]]] = []  # the rows of each micro-batch of each step of the epoch
        self.epoch = self.epoch_step = 0  # the next step's: its epoch, and the steps before it in that epoch
        self.optimizer_bytes = 0  # of its states, known after a memory probe
        self.took_part = False  # every wrapped layer, which a step has shown
        self._has_retried = False  # the allocator, which has been said
        self.steps_without_gradient = 0
        self.is_sharded = (blocks := stream_of(model)) is not None and blocks.placement.gathers
        self.loss_scale = LossScale() if workload.spec.needs_loss_scale(model) else None
        self.watch: Callable[[int, int], None] | None = None  # of the step's micro-batches, see ``train_step``
        self.most_tokens: int | None = None  # at once through the model, since memory ran out with more
        check_trainable(model, sum(parameter.numel() for _, parameter in self.workload.method.parameters(model)))
        check_shareable(processes, settings.options, parts_of(model).count > 1)
        self._is_checked = False
        self.meter = PeakMeter(self.device)
        weakref.finalize(self, self.meter.close)  # its thread would outlive the trainer

    def _take_parameters(self, steps_before: int = 0) -> None:
        """Take what the adapter method trains now, with an optimizer that begins afresh after some steps."""
        s, method = self.settings, self.workload.method
        trained = trained_here(method, self.model)
        if not trained:
            raise ModelError("there is nothing to train: the adapter method gives no parameter of this model")
        self.lr_ratios = method.lr_ratios(list(trained), s.loraplus_lr_ratio)
        self.optimizer = build_optimizer(
            trained.values(),
            s.optimizer,
            s.learning_rate,
            s.weight_decay,
            s.stochastic_rounding,
            self.lr_ratios,
            trained_on_host(self.model),
            steps_before,
            parts_of(self.model),
        )
        self.parameters = parameters_of(self.optimizer)
        names = {parameter: name for name, parameter in trained.items()}
        self.names = [names[parameter] for parameter in self.parameters]
        is_divided = parts_of(self.model).count > 1
        self._names_of_norms = names_of_norms(method, self.model) if is_divided else self.names

    def take_turn(self, step: int) -> None:
        """Train what a step trains, where the adapter method trains weights in turn (``AdapterMethod.take_turn``)."""
        method = self.workload.method
        if method.in_turn and self._turn != (begins := method.turn_begins(step)):
            settle(self.model)
            method.take_turn(self.model, step)
            self._take_parameters(steps_before=begins - 1)
            self._turn = begins

    def check(self) -> None:
        """Set the memory options, and check that training computes what the model computes; all else does it first.

        Its GPU is the current one from then on.

        Raises:
            ModelError: packed sequences would not give the model's own logits.
            TrainingError: the settings are not for this model.
        """
        use_device(self.device)  # each time: between two steps the caller may have used another GPU
        if not self._is_checked:
            check_choice(self.workload, self.settings.options)
            self.workload.check_model(self.model, self.settings)
            self._is_checked = True
            self.meter.restart()  # what the check held is no step's

    @float32_partial_sums()
    def probe_memory(self, eval_examples: Sequence = ()) -> None:
        """Run a step on the largest micro-batch and the largest evaluation batch, and leave no trace of it.

        Raises:
            DataError: the model cannot compute on an example.
            TrainingError: a factor is not what it was.
        """
        self.check()
        s, device, work = self.settings, self.device, self.workload
        work.check_examples(self.model, eval_examples)
        largest, evaluation = largest_batches(work, self.examples, eval_examples, self.epochs, self.most_tokens)
        # bitsandbytes never gives paged states back; others of the same size are freed after the memory probe
        name = s.optimizer.removeprefix("paged_")
        settle(self.model)
        trained, on_host = trained_here(work.method, self.model).values(), trained_on_host(self.model)
        optimizer = build_optimizer(
            trained, name, 0.0, 0.0, s.stochastic_rounding, self.lr_ratios, on_host, parts=parts_of(self.model)
        )
        before, was_training = list(map(bit_sums, self.parameters)), self.model.training
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            probe_step(
                work,
                self.model,
                self.parameters,
                optimizer,
                work.batches.inputs(largest, device),
                evaluation and work.batches.inputs(evaluation, device),
                s.max_grad_norm,
                self._accumulates,
                s.options.optimizer_in_backward,
                work.batches.shape(largest).lengths,
            )
        self.optimizer_bytes = sum(
            value.nbytes for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        )
        del optimizer
        if getattr(self.optimizer, "is_paged", False):
            free_cached_memory(device)  # room for the run's own states, which torch's allocator does not take
        self.model.train(was_training)
        if list(map(bit_sums, self.parameters)) != before:
            raise TrainingError("the memory probe before training changed a LoRA factor; please report this")

    @property
    def _accumulates(self) -> bool:
        """Whether this rank has several micro-batches in a step."""
        if shares := self.settings.shares:
            return shares[self.processes.rank].runs > 1
        return self.settings.gradient_accumulation_steps > self.processes.world_size

    @float32_partial_sums()
    def choose_kernels(self, recorded: Sequence[str] | None = None) -> None:
        """Find out which fused kernels the steps compute with, on the largest micro-batch; see ``train.kernels``.

        Without this call there are none.

        Args:
            recorded: those of a resumed run, which are kept.

        Raises:
            TrainingError: one of those does not run here any more.
        """
        self.check()
        self.workload.spec.choose_kernels(self.model, self._largest_inputs, self.settings.options, recorded)
        self._forget_trials()

    def _forget_trials(self) -> None:
        if self.device.type == "cuda":
            free_cached_memory(self.device)
            self.meter.restart()

    def _largest_inputs(self) -> object:
        largest, _ = largest_batches(self.workload, self.examples, (), self.epochs, self.most_tokens)
        return self.workload.batches.inputs(largest, self.device)

    @float32_partial_sums()
    def choose_loss(self, recorded: str | None = None) -> None:
        """Find out which loss the steps compute, on the hidden states of the largest micro-batch.

        See ``kernels.fused_loss``; without this call it is the chunked one.

        Args:
            recorded: the loss of a resumed run, which is kept where it can be.
        """
        self.check()
        setting = self.settings.fused_loss
        work = self.workload
        objective = work.objective.choose(self.model, work.spec, self._largest_inputs, setting, recorded)
        self.workload = replace(work, objective=objective)
        self._forget_trials()

    def __iter__(self) -> Iterator[StepMetrics]:
        self.check()
        self.model.train()
        steps = self._steps()
        while self.step < self.total_steps:
            micro_batches = next(steps)
            self.epoch_step += 1
            yield self._train(micro_batches)

    def _expect_next(self) -> None:
        """Let the workload make the next step's examples ready, as far as this rank computes them."""
        if self.stream is not None or self.step >= self.total_steps:
            return
        following = self._order[self.epoch_step] if self.epoch_step < len(self._order) else []
        groups = [[self.examples[row] for row in rows] for rows in following]
        own = self._own(groups, self.settings.shares)
        self.workload.batches.expect([each for rows in own for each in rows], self.settings.seed, self.step + 1)

    def _steps(self) -> Iterator[Sequence[Sequence]]:
        """Yield the rows of each micro-batch of each step, from the present place in the data on."""
        while True:
            yield from islice(self._steps_of_epoch(), self.epoch_step, None)
            if self.epoch_step == 0:
                raise TrainingError("the stream of rows has none to train on")
            self.epoch, self.epoch_step = self.epoch + 1, 0

    def _steps_of_epoch(self) -> Iterator[Sequence[Sequence]]:
        if self.stream is None:
            self._order = self.epochs.steps(self.epoch)
            for step in self._order:
                yield [[self.examples[row] for row in rows] for rows in step]
            return
        s = self.settings
        lengths = self.workload.batches.lengths
        micro_batches = stream_batches(self.stream, s.max_tokens, s.packing, s.micro_batch_size, lengths)
        while found := list(islice(micro_batches, s.gradient_accumulation_steps)):
            yield found

    @float32_partial_sums()
    def _train(self, micro_batches: Sequence[Sequence]) -> StepMetrics:
        self.check()
        started, s = time.perf_counter(), self.settings
        retries = self.meter.allocation_retries()
        self.step += 1
        self.take_turn(self.step)
        rate = s.learning_rate * lr_factor(self.step, self.total_steps, s.lr_scheduler, s.warmup_ratio)
        set_learning_rate(self.optimizer, rate)
        whole = s.options.optimizer_in_backward
        self.processes.seed(s.seed, self.step, self.device)
        collate = partial(self.workload.batches.training_batch, seed=s.seed, step=self.step)
        shared = partial(self._shared, compute=self._step, shares=s.shares, collate=collate)
        result = self._whole_step(micro_batches) if whole else shared(micro_batches)
        if not math.isfinite(result.loss + result.grad_norm):
            self._skip_or_stop(micro_batches, updated=whole and math.isfinite(result.loss))
        elif not self.took_part and (result.grad_norm or self.workload.objective.always_learns):
            if self.workload.batches.can_reach_every_layer([row for rows in micro_batches for row in rows]):
                norms = dict(zip(self._names_of_norms, result.norms.tolist(), strict=True))
                self.workload.method.check_reached(self.model, norms)
                self.took_part = True
        elif result.grad_norm == 0:
            self._note_no_gradient(self.workload.objective.why_no_gradient(result.metrics))
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cpu":  # or malloc keeps more holes with each step of another length, beyond the plan
            free_cached_memory(self.device)
        self._tell_of_retries(self.meter.allocation_retries() - retries)
        seconds = time.perf_counter() - started
        return StepMetrics(
            self.step,
            result.loss,
            rate,
            result.grad_norm,
            result.tokens,
            result.target_tokens,
            result.tokens / seconds,
            self.meter.peak_bytes(),
            seconds,
            result.metrics,
        )

    def _note_no_gradient(self, why: str) -> None:
        """Warn of the first step that learned nothing; end a run of which none has learned.

        Raises:
            TrainingError: the first ``MAX_STEPS_WITHOUT_GRADIENT`` steps learned nothing.
        """
        self.steps_without_gradient += 1
        if not self.took_part and self.steps_without_gradient >= MAX_STEPS_WITHOUT_GRADIENT:
            raise TrainingError(f"none of {self.steps_without_gradient} steps learned anything: {why}")
        if self.steps_without_gradient == 1:
            log.warning("step %d learned nothing: %s", self.step, why)

    def _tell_of_retries(self, count: int) -> None:
        """Log that the allocator was at its limit in a step, as a warning the first time."""
        if count:
            log.log(
                logging.INFO if self._has_retried else logging.WARNING,
                "step %d: the GPU had no free piece of memory for a tensor, %d times, until cached memory was given "
                "back, which takes time and changes no number: the run is at its limit, or its free memory lies in "
                "small pieces; more room (memory.budget, other programs on this GPU) or a lower data.max_tokens help",
                self.step,
                count,
            )
            self._has_retried = True

    def _step(self, batches: Iterator, counted: int) -> StepResult:
        s, whole = self.settings, list(batches)
        self._expect_next()

        def attempt(scale: float) -> StepResult:
            self.optimizer.zero_grad(set_to_none=True)  # of an attempt at a larger scale
            return train_step(
                self.workload,
                self.model,
                whole,
                self.optimizer,
                s.max_grad_norm,
                scale,
                self.processes,
                counted,
                self.watch,
            )

        if self.loss_scale is None:
            return attempt(1.0)
        before, result = self.loss_scale.value, self.loss_scale.step(attempt)
        if self.loss_scale.value != before:
            log.info(
                "step %d: the loss scale of float16 is %g from now on, after %g",
                self.step,
                self.loss_scale.value,
                before,
            )
        return result

    def _whole_step(self, micro_batches: Sequence[Sequence]) -> StepResult:
        """Run a step whose backward pass updates the factors, so that it cannot be cut.

        Raises:
            DoesNotFitError: memory ran out.
        """
        own = self.processes.share(micro_batches)
        (rows,) = own or micro_batches[:1]
        with no_retry("in a step that memory.optimizer_in_backward keeps whole"):
            batch = self.workload.batches.training_batch(rows, self.settings.seed, self.step)
            self._expect_next()
            return train_step_in_backward(self.workload, self.model, batch, self.optimizer, self.processes, bool(own))

    def _shared(
        self,
        groups: Sequence[Sequence],
        compute: Callable[[Iterator, int], T],
        shares: Sequence[Share] = (),
        collate: Callable | None = None,
    ) -> T:
        """Return what the ranks' ``compute`` makes of their shares of the batches; it is told how many of them count.

        A rank for which there is none computes the first for nothing. Ranks that get weights from each other run as
        many as the one with the most, since each block is put together by all at one time.

        Args:
            shares: of the ranks; none where all are equal.
            collate: makes a batch of examples; None is the workload's for evaluation.
        """
        own = self._own(groups, shares)

        def alike(batches: list[Sequence]) -> tuple[list[Sequence], int]:
            most = int(self.processes.largest(len(batches))) if self.is_sharded else len(batches)
            return batches + batches[:1] * (most - len(batches)), len(batches) if own else 0

        return self._within_memory(own or groups[:1], compute, self.processes, alike, collate)

    def _own(self, groups: Sequence[Sequence], shares: Sequence[Share]) -> Sequence[Sequence]:
        """Return the batches that this rank computes."""
        return own_micro_batches(groups, shares, self.processes.rank) if shares else self.processes.share(groups)

    def _within_memory(
        self,
        groups: Sequence[Sequence],
        compute: Callable[[Iterator, int], T],
        processes: Processes = ALONE,
        alike: Callable[[list[Sequence]], tuple[list[Sequence], int]] = lambda parts: (parts, len(parts)),
        collate: Callable | None = None,
    ) -> T:
        """Return what ``compute`` makes of the batches; where memory runs out, do it again with smaller ones.

        Args:
            processes: those that compute together, and do it again together.
            alike: returns the batches that are run, and how many of them count.
            collate: see ``_shared``.

        Raises:
            DoesNotFitError: a single row is too large, or other ranks are in the middle of a block.
        """
        random_states = generator_states(self.device)
        while True:
            parts, ran_out, reason = cut(self.workload, groups, self.most_tokens), False, ""
            run, counted = alike(parts)
            try:
                with no_retry("between ranks that wait for each other's weights") if self.is_sharded else nullcontext():
                    return compute(map(collate or self.workload.batches.collate, run), counted)
            except OtherRankError:
                pass
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                # and not the error, whose trace holds the tensors of the attempt
                ran_out, reason = True, first_line(error)
            self.optimizer.zero_grad(set_to_none=True)
            self.workload.method.forget_pass(self.model)
            if stream := stream_of(self.model):
                stream.forget()
            free_cached_memory(self.device)
            restore_generators(random_states, self.device)
            limit: float = self.most_tokens or math.inf
            if ran_out:
                limit = lower_limit(self.workload, parts, reason)
                processes.exchange(failed=True)
            self.most_tokens = int(min(processes.gather(limit)))
            if ran_out:
                log.warning(
                    "step %d: memory ran out (%s); from now on at most %d tokens go through the model at once, "
                    "with the same rows per step",
                    self.step,
                    reason,
                    self.most_tokens,
                )

    def _skip_or_stop(self, micro_batches: Sequence[Sequence], updated: bool) -> None:
        """Count a step that was not finite, and end the run if it may not be left out."""
        parts, plain = cut(self.workload, micro_batches, self.most_tokens), self.workload.plain()
        error = explain_not_finite(plain, self.model, parts, self.step, updated)
        used, looked_at = self.workload.objective, plain.objective
        if used != looked_at:
            error = TrainingError(
                f"{error}. The step's loss was {used.name}'s, and what was looked at is the "
                f"{looked_at.name} one, which memory.fused_loss off computes"
            )
        if self.settings.on_not_finite == "stop":
            raise error
        if self.skipped >= self.settings.max_skipped_steps:
            raise TrainingError(f"{error}; {counted(self.skipped, 'step')} skipped before, train.max_skipped_steps")
        self.skipped += 1
        log.warning("%s; this step is skipped", error)

    @float32_partial_sums()
    def evaluate(self, examples: Sequence, done: Callable[[int], None] | None = None) -> Evaluation:
        """Return the loss over other examples, in batches of the training shape, with dropout off.

        Args:
            done: called after each batch with the number of examples so far.
        """
        self.check()
        work = self.workload.plain()

        def of_all(count: int) -> None:
            if done:
                done(min(count * self.processes.world_size, len(examples)))

        def compute(batches: Iterator, counted: int) -> Evaluation:
            return evaluate_loss(work, self.model, _counted(work, batches, of_all), self.processes, counted)

        groups = list(_eval_rows(work, examples, self.settings))
        # joined they would take more memory, and apart they all take the slowest rank's time where each waits for all
        shares = () if self.is_sharded else [Share(each.micro_batches) for each in self.settings.shares]
        return self._shared(groups, compute, shares)

    @float32_partial_sums()
    def reference_log_probabilities(self, examples: Sequence) -> np.ndarray:
        """Return what the model gives the sequences of each example now, float32 [N, 2]."""
        self.check()
        work, groups = self.workload.plain(), list(_eval_rows(self.workload, examples, self.settings))

        def compute(batches: Iterator, counted: int) -> list[torch.Tensor]:
            with evaluating(self.model), merged_once(self.model):
                inputs = (work.batches.inputs(batch, self.device) for batch in batches)
                found = [work.objective.references(self.model, work.spec, each) for each in inputs]
            self.processes.wait()  # for one whose memory may have run out
            return found[:counted]

        own = self._shared(groups, compute)
        whole = torch.zeros(len(examples), 2, device=self.device)
        before = sum(map(len, groups[: self.processes.rank * len(groups) // self.processes.world_size]))
        if own:
            values = torch.cat(own)
            whole[before : before + len(values)] = values
        self.processes.add_up([whole])
        return whole.cpu().numpy()

    def answer_losses(self, examples: Sequence) -> list[list[float]]:
        """Return the losses of each example's target tokens, computed like ``evaluate``'s."""
        return self.computed(examples, lambda work, batches: answer_losses(work, self.model, batches))

    @float32_partial_sums()
    def computed(self, examples: Sequence, compute: Callable[[Workload, Iterator], T]) -> T:
        """Return what ``compute`` makes of ``evaluate``'s batches of examples, in order, on each rank of all of them.

        Args:
            compute: is given the workload with the plain objective, and the batches; again where memory ran out.
        """
        self.check()
        work = self.workload.plain()
        groups = list(_eval_rows(work, examples, self.settings))
        return self._within_memory(groups, lambda batches, _: compute(work, batches))


def _eval_plan(lengths: Sequence[int], settings: TrainSettings) -> list[list[int]]:
    return plan_epoch(lengths, settings.max_tokens, True, 1, "as-is", settings.seed, 0)


def _eval_rows(workload: Workload, examples: Sequence, settings: TrainSettings) -> Iterator[Sequence]:
    """Yield the rows of each evaluation batch: slices, which copy nothing, because the rows keep their order."""
    for rows in _eval_plan(workload.batches.lengths(examples), settings):
        yield examples[rows[0] : rows[-1] + 1]


def eval_batches(
    workload: Workload, examples: Sequence, settings: TrainSettings, done: Callable[[int], None] | None = None
) -> Iterator:
    """Pack evaluation rows up to ``max_tokens`` per batch, in their own order.

    Args:
        done: called with the number of examples so far whenever another batch is asked for.
    """
    return _counted(workload, map(workload.batches.collate, _eval_rows(workload, examples, settings)), done)


def _counted(workload: Workload, batches: Iterable, done: Callable[[int], None] | None) -> Iterator:
    count = 0
    for batch in batches:
        yield batch
        count += len(workload.batches.shape(batch).lengths) // workload.batches.sequences
        if done:
            done(count)


def largest_batches(
    workload: Workload, examples: Sequence, eval_examples: Sequence, epochs: Epochs, most_tokens: int | None = None
) -> tuple:
    """Return a micro-batch and an evaluation batch that need as much memory as any; None without evaluation rows.

    See ``batch.enlarged``: what a batch needs follows its tokens, its rows, the longest one and what is learned.

    Args:
        epochs: of the examples.
        most_tokens: see ``out_of_memory.cut``.
    """
    whole = epochs.settings.options.optimizer_in_backward
    numbers, most = epochs.largest()
    rows = workload.batches.enlarged([examples[row] for row in numbers], most)
    largest = _fullest(workload, rows, None if whole else most_tokens)
    if not len(eval_examples):
        return largest, None
    kind = workload.batches
    lengths = kind.lengths(eval_examples)
    batches = _eval_plan(lengths, epochs.settings)
    numbers = max(batches, key=lambda rows: sum(lengths[row] for row in rows))
    most = extent_of(lengths, kind.target_counts(eval_examples), batches, kind.picture_counts(eval_examples))
    rows = kind.enlarged([eval_examples[row] for row in numbers], most)
    return largest, _fullest(workload, rows, most_tokens)


def _fullest(workload: Workload, rows: Sequence, most_tokens: int | None):
    """Return that part of a batch with the most tokens which would go through the model at once."""
    parts = cut(workload, [rows], most_tokens)
    return workload.batches.collate(max(parts, key=lambda part: sum(workload.batches.lengths(part))))
