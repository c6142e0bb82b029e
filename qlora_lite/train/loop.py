"""The training loop as an iterator: each turn is one optimizer step, and the caller does the rest.

    for metrics in Trainer(model, examples, settings):
        print(metrics.step, metrics.loss)

Evaluating, saving and printing stay with the caller, so that the loop has no callbacks to learn.
The order of the data is a pure function of the seed and the epoch.
"""

import math
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qlora_lite.data.batch import Batch, collate, plan_epoch
from qlora_lite.data.examples import Example
from qlora_lite.lora.inject import lora_parameters
from qlora_lite.memory.meter import PeakMeter
from qlora_lite.models.anatomy import set_checkpointing

from .guards import check_adapters_took_part, check_forward, check_trainable, explain_not_finite
from .optim import build_optimizer
from .schedule import lr_factor
from .step import Evaluation, accumulate_gradients, evaluate_loss, train_step


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What the loop needs to know; the names, meanings and defaults are those of the recipe.

    ``loss_chunk_tokens`` None takes the default; ``max_steps`` None trains for ``epochs``.
    """

    max_steps: int | None
    epochs: float
    learning_rate: float
    micro_batch_size: int
    gradient_accumulation_steps: int
    optimizer: str
    lr_scheduler: str
    warmup_ratio: float
    max_grad_norm: float
    weight_decay: float
    seed: int
    max_tokens: int
    packing: bool
    order: str
    checkpointing: str
    loss_chunk_tokens: int | None
    kept_blocks: int = 0


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
        examples: tokenised rows.
        settings: see ``TrainSettings``.

    Raises:
        ModelError: rows trained together would not give the model's own logits.
    """

    def __init__(self, model: nn.Module, examples: Sequence[Example], settings: TrainSettings):
        self.model, self.examples, self.settings = model, examples, settings
        self.lengths = [len(example.token_ids) for example in examples]
        self.parameters = [parameter for _, parameter in lora_parameters(model)]
        self.optimizer = build_optimizer(
            self.parameters, settings.optimizer, settings.learning_rate, settings.weight_decay
        )
        self.total_steps = settings.max_steps or self._steps_of_epochs()
        self.step = 0
        check_trainable(model, sum(parameter.numel() for parameter in self.parameters))
        check_forward(model)
        set_checkpointing(model, settings.checkpointing == "block", settings.kept_blocks)
        self.meter = PeakMeter(model.device)
        weakref.finalize(self, self.meter.close)  # its thread would outlive the trainer

    def rehearse(self) -> None:
        """Run forward and backward of the micro-batch with the most tokens, and leave no trace of it."""
        plan = [rows for group in self._epoch(0) for rows in group]
        largest = max(plan, key=lambda rows: sum(self.lengths[row] for row in rows))
        self.model.train()
        with torch.random.fork_rng(devices=[self.model.device] if self.model.device.type == "cuda" else []):
            accumulate_gradients(
                self.model,
                [collate([self.examples[row] for row in largest])],
                self.settings.loss_chunk_tokens,
            )
        self.optimizer.zero_grad(set_to_none=True)

    def _epoch(self, epoch: int) -> list[list[list[int]]]:
        """Return the rows of each micro-batch of each step of an epoch."""
        s = self.settings
        plan = plan_epoch(self.lengths, s.max_tokens, s.packing, s.micro_batch_size, s.order, s.seed, epoch)
        group = s.gradient_accumulation_steps
        return [plan[start : start + group] for start in range(0, len(plan), group)]

    def _steps_of_epochs(self) -> int:
        whole = math.floor(self.settings.epochs)
        steps = sum(len(self._epoch(epoch)) for epoch in range(whole))
        part = self.settings.epochs - whole
        return max(1, steps + (math.ceil(part * len(self._epoch(whole))) if part else 0))

    def _batches(self) -> Iterator[list[Batch]]:
        epoch = 0
        while True:
            for group in self._epoch(epoch):
                yield [collate([self.examples[row] for row in rows]) for rows in group]
            epoch += 1

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
        result = train_step(self.model, batches, self.optimizer, s.max_grad_norm, s.loss_chunk_tokens)
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
        return evaluate_loss(self.model, eval_batches(examples, self.settings), self.settings.loss_chunk_tokens)


def eval_batches(examples: Sequence[Example], settings: TrainSettings) -> Iterator[Batch]:
    """Lay evaluation rows end to end up to ``max_tokens`` per batch, in their own order."""
    lengths = [len(example.token_ids) for example in examples]
    for rows in plan_epoch(lengths, settings.max_tokens, True, 1, "as-is", settings.seed, 0):
        yield collate([examples[row] for row in rows])
