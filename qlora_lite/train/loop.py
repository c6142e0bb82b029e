"""The training loop as an iterator: each turn is one optimizer step, and the caller does the rest.

    for metrics in Trainer(model, examples, settings):
        print(metrics.step, metrics.loss)

Evaluating, saving and printing stay with the caller, so that the loop has no callbacks to learn.
The order of the data is a pure function of the seed and the epoch.
"""

import math
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice

import torch
from torch import nn

from qlora_lite.data.batch import Batch, collate, plan_epoch
from qlora_lite.data.stored import Example, row_lengths
from qlora_lite.data.stream import stream_batches
from qlora_lite.errors import TrainingError
from qlora_lite.lora.inject import lora_parameters
from qlora_lite.memory.meter import PeakMeter
from qlora_lite.models.anatomy import device_of
from qlora_lite.models.levers import set_levers

from .epochs import Epochs
from .guards import check_adapters_took_part, check_forward, check_trainable, explain_not_finite
from .optim import build_optimizer
from .rehearsal import rehearse_step
from .schedule import lr_factor
from .settings import TrainSettings
from .step import Evaluation, evaluate_loss, prepare, train_step

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
        ModelError: rows trained together would not give the model's own logits.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        settings: TrainSettings,
        stream: Iterable[Example] | None = None,
    ):
        self.model, self.examples, self.settings, self.stream = model, examples, settings, stream
        self.epochs = Epochs(row_lengths(examples), settings)
        self.parameters = [parameter for _, parameter in lora_parameters(model)]
        self.optimizer = build_optimizer(
            self.parameters, settings.optimizer, settings.learning_rate, settings.weight_decay
        )
        self.total_steps = self.epochs.total_steps()
        self.step = 0
        check_trainable(model, sum(parameter.numel() for parameter in self.parameters))
        tiny_tiles = settings.levers.tile_tokens and CHECKED_TILE_TOKENS  # so that the check's few tokens are cut
        set_levers(model, replace(settings.levers, tile_tokens=tiny_tiles))
        check_forward(model)
        set_levers(model, settings.levers)
        self.meter = PeakMeter(device_of(model))
        weakref.finalize(self, self.meter.close)  # its thread would outlive the trainer

    def rehearse(self, eval_examples: Sequence[Example] = ()) -> None:
        """Run a step on the largest micro-batch and the largest evaluation batch, and leave no trace of it.

        Raises:
            TrainingError: a factor is not what it was.
        """
        s, device = self.settings, device_of(self.model)
        largest, evaluation = largest_batches(self.examples, eval_examples, s)
        optimizer = build_optimizer(self.parameters, s.optimizer, 0.0, 0.0)
        before, was_training = [torch.hash_tensor(p.detach()) for p in self.parameters], self.model.training
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            rehearse_step(
                self.model, self.parameters, optimizer, prepare(largest, device),
                evaluation and prepare(evaluation, device), s.max_grad_norm, s.levers.loss_chunk_tokens,
                s.gradient_accumulation_steps > 1,
            )  # fmt: skip
        self.model.train(was_training)
        if any(torch.hash_tensor(p.detach()) != h for p, h in zip(self.parameters, before, strict=True)):
            raise TrainingError("the rehearsal before training changed a LoRA factor; please report this")

    def _batches(self) -> Iterator[list[Batch]]:
        s = self.settings
        while self.stream is not None:
            micro_batches = stream_batches(self.stream, s.max_tokens, s.packing, s.micro_batch_size)
            while step := list(islice(micro_batches, s.gradient_accumulation_steps)):
                yield [collate(rows) for rows in step]
        for epoch in count():
            for step in self.epochs.steps(epoch):
                yield [collate([self.examples[row] for row in rows]) for rows in step]

    def __iter__(self) -> Iterator[StepMetrics]:
        self.model.train()
        for batches in self._batches():
            if self.step == self.total_steps:
                return
            yield self._train(batches)

    def _train(self, batches: list[Batch]) -> StepMetrics:
        started, s = time.perf_counter(), self.settings
        self.step += 1
        rate = s.learning_rate * lr_factor(self.step, self.total_steps, s.lr_scheduler, s.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        result = train_step(self.model, batches, self.optimizer, s.max_grad_norm, s.levers.loss_chunk_tokens)
        if not math.isfinite(result.loss + result.grad_norm):
            raise explain_not_finite(self.model, batches, self.step)
        if self.step == 1:
            check_adapters_took_part(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        return StepMetrics(
            self.step, result.loss, rate, result.grad_norm, result.tokens, result.labelled_tokens,
            result.tokens / seconds, self.meter.peak_bytes(), seconds,
        )  # fmt: skip

    def evaluate(self, examples: Sequence[Example]) -> Evaluation:
        """Return the loss over other examples, in batches of the training shape, with dropout off."""
        return evaluate_loss(self.model, eval_batches(examples, self.settings), self.settings.levers.loss_chunk_tokens)


def eval_batches(examples: Sequence[Example], settings: TrainSettings) -> Iterator[Batch]:
    """Lay evaluation rows end to end up to ``max_tokens`` per batch, in their own order."""
    lengths = row_lengths(examples)
    for rows in plan_epoch(lengths, settings.max_tokens, True, 1, "as-is", settings.seed, 0):
        yield collate([examples[row] for row in rows])


def largest_batches(
    examples: Sequence[Example], eval_examples: Sequence[Example], settings: TrainSettings
) -> tuple[Batch, Batch | None]:  # fmt: skip
    """Return the micro-batch and the evaluation batch with the most tokens; None without evaluation rows."""
    rows = Epochs(row_lengths(examples), settings).largest()
    evaluation = max(eval_batches(eval_examples, settings), key=lambda b: sum(b.row_lengths), default=None)
    return collate([examples[row] for row in rows]), evaluation
