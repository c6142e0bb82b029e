"""Whatever is trained in tests, as a case that is built, planned and measured by the same few functions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from jobs import new_job
from tiny import config_of, quantized_pair
from tiny_trainer import SETTINGS, examples

from qlora_lite.adapters.lora.inject import lora_layers
from qlora_lite.memory.ledger import Ledger
from qlora_lite.planning.candidate import Step, choose
from qlora_lite.planning.machine import Machine
from qlora_lite.planning.plan_ledger import ALLOCATION_BYTES
from qlora_lite.planning.search import search
from qlora_lite.planning.simulate import Job
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.inventory import categorised
from qlora_lite.train.loop import Trainer, largest_batches
from qlora_lite.train.settings import TrainSettings
from qlora_lite.train.workload import Workload

MACHINE = Machine("a CPU", "cpu", 2**34, 0, 1e11, 1e10, 1e10, dtype=torch.float32)


@dataclass(frozen=True)
class Case:
    """What is trained, how its model is made, and how it is trained."""

    workload: Workload
    build: object
    examples: list
    changes: Mapping[str, object]

    def trainer(self, options=None):
        """A trainer of a new model; equal arguments give equal ones."""
        torch.manual_seed(0)
        model = self.build()
        self.workload.method.apply(model)
        settings = SETTINGS | self.changes | ({} if options is None else {"options": options})
        training = Trainer(model, self.examples, TrainSettings(**settings), workload=self.workload)
        training.check()
        return training


def language_model():
    return quantized_pair("llama")[0]


def of_text(**parts):
    config = config_of("llama")
    work = new_job(config, BatchShape((1,), 1), compute_dtype=torch.float32, factor_dtype=torch.float32).workload
    work = work.with_method(parts.pop("method", work.method))
    return Case(replace(work, **parts), language_model, examples(), {})


def plan(case, limit_bytes):
    """Return the fastest way below a limit, and the one that needs least."""
    trainer = case.trainer()
    s, work = trainer.settings, case.workload
    largest, evaluation = largest_batches(work, case.examples, case.examples, trainer.epochs)
    job = Job(
        work, BatchShape((1,), 1), work.batches.shape(evaluation), optimizer=s.optimizer, max_grad_norm=s.max_grad_norm
    )
    step = Step(job, work.batches.shape(largest), 1, s.gradient_accumulation_steps, may_split=False)
    found = search(step, MACHINE, limit_bytes)
    return choose(found, limit_bytes), min(found, key=lambda candidate: candidate.peak_bytes)


def ledger_of(trainer, timeline=False):
    ledger = Ledger(timeline, allocation_bytes=ALLOCATION_BYTES["cpu"])
    with ledger:
        for tensor, category, _ in categorised(trainer.workload, trainer.model):
            ledger.claim([tensor], category)
        ledger.watch(trainer.model)
        trainer.probe_memory(trainer.examples)
    return ledger


def assert_as_planned(case, candidates):
    """Check that each candidate's predicted peak is the ledger's, and train by it."""
    for candidate in candidates:
        trainer = case.trainer(candidate.options)
        assert ledger_of(trainer).peak.total == pytest.approx(candidate.prediction.simulation.peak().total, rel=0.01)
        assert len(list(trainer)) == trainer.total_steps


def with_factors(model):
    """Let the LoRA weights be no longer those that do nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_(0, 0.1, generator=generator)
    return model


def gradients(method, model):
    """The gradients by the names of the files."""
    named = {parameter.data_ptr(): parameter for parameter in model.parameters() if parameter.requires_grad}
    return {name: named[tensor.data_ptr()].grad for name, tensor in method.tensors(model).items()}


def assert_gradients_of_peft(found, theirs, weight=1):
    """Compare gradients by the names of the files with those of a model of peft, divided by a weight."""
    expected = {
        name.replace(".modules_to_save.default", "").replace(".default", ""): parameter.grad / weight
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values()).item()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * largest, msg=name)
