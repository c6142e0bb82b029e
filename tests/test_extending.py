"""A kind of model, batches, an objective and a method of one's own, made of public names, in all that the package does.

Each is planned within a budget, trained, killed, resumed to the bit, saved, loaded and evaluated.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from methods import Case, assert_as_planned, of_text, plan
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lite import (
    AdapterMethod,
    Batches,
    BatchShape,
    CrossEntropy,
    LossSum,
    ModelSpec,
    Objective,
    Workload,
    save_adapter,
)
from qlora_lite.adapters.lora.inject import in_blocks, linear_layers
from qlora_lite.adapters.read import WEIGHTS_NAME
from qlora_lite.kernels.loss import head_logits
from qlora_lite.models.anatomy import head
from qlora_lite.models.memory_options import place, set_memory_options
from qlora_lite.train.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from qlora_lite.train.state import STATE, capture, restore

Z_WEIGHT = 0.1


class Scaled(nn.Module):
    """A linear layer whose outputs are scaled, each by a number that is learned."""

    def __init__(self, base: nn.Module, outputs: int, device: torch.device):
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.ones(outputs, device=device))

    def forward(self, x):
        return self.base(x) * self.scale


@dataclass(frozen=True)
class OutputScales(AdapterMethod):
    """An adapter method: learned scales of the outputs of a language model's layers."""

    def apply(self, model):
        model.requires_grad_(False)
        inside = in_blocks(model)
        for name, layer in linear_layers(model).items():
            if name in inside:
                weight = next(iter((*layer.parameters(), *layer.buffers())))
                model.set_submodule(name, Scaled(layer, layer.out_features, weight.device))

    def config(self, model, base_model):
        return {"peft_type": "OUTPUT_SCALES", "base_model_name_or_path": base_model}

    def does_nothing(self, model):
        return all((scale == 1).all() for _, scale in self.parameters(model))


@dataclass(frozen=True)
class WithZLoss(Objective):
    """An objective of two terms: cross-entropy, and the square of the logarithm of the softmax's sum."""

    def __call__(self, model, outputs, inputs):
        logits = head_logits(outputs, head(model))
        z = logits.logsumexp(-1).square().sum()
        loss = functional.cross_entropy(logits, inputs.targets, reduction="sum")
        return LossSum(loss + Z_WEIGHT * z, {"z": z})


class Block(GradientCheckpointingLayer):
    """A residual block of a picture classifier."""

    def __init__(self, size: int):
        super().__init__()
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return x + self.drop(self.down(functional.gelu(self.up(x))))


class Classifier(nn.Module):
    """Classify pictures [N, 8, 8], each pixel by itself up to the mean over all."""

    def __init__(self, depth: int, size: int = 48):
        super().__init__()
        self.embed, self.blocks = nn.Linear(1, size), nn.ModuleList(Block(size) for _ in range(depth))
        self.head = nn.Linear(size, 10)

    def forward(self, pictures):
        x = self.embed(pictures.flatten(1)[..., None])
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@dataclass(frozen=True)
class Biases(AdapterMethod):
    """An adapter method for any model: its biases are learned."""

    def apply(self, model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(".bias"))

    def config(self, model, base_model):
        return {"peft_type": "BIASES", "base_model_name_or_path": base_model}


@dataclass(frozen=True)
class Classes(Objective):
    """Cross-entropy over classes, and how many were the most probable one."""

    def __call__(self, model, outputs, inputs):
        right = (outputs.argmax(-1) == inputs[1]).sum()
        return LossSum(functional.cross_entropy(outputs, inputs[1], reduction="sum"), {"accuracy": right.float()})

    def weight(self, inputs):
        return len(inputs[1])


@dataclass(frozen=True)
class Pictures(Batches):
    """Examples that are pairs of a picture and its class."""

    def collate(self, examples):
        pictures, classes = zip(*examples, strict=True)
        return torch.stack(pictures), torch.tensor(classes)

    def shape(self, batch):
        return BatchShape((1,) * len(batch[1]), len(batch[1]))

    def inputs(self, batch, device):
        return tuple(tensor.to(device) for tensor in batch)

    def planned_inputs(self, shape, device):
        count = len(shape.lengths)
        return torch.zeros(count, 8, 8, device=device), torch.zeros(count, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class ClassifierSpec(ModelSpec):
    """A classifier of pictures."""

    depth: int = 3

    def planned_model(self, method, device, options, shape):
        with device:
            model = Classifier(self.depth)
        method.apply(model)
        set_memory_options(place(model, device, options, self.blocks(model)), options, self.blocks(model))
        return model.train()

    def blocks(self, model):
        return list(model.blocks)

    def outputs(self, model, inputs):
        return model(inputs[0])


def pictures():
    chance = torch.Generator().manual_seed(0)
    found = [(torch.rand(8, 8, generator=chance), int(torch.randint(10, (), generator=chance))) for _ in range(40)]
    work = Workload(ClassifierSpec(), Pictures(), Classes(), Biases())
    return Case(work, lambda: Classifier(3), found, {"max_tokens": 4, "packing": False, "micro_batch_size": 4})


CASES = {
    "method": of_text(method=OutputScales()),
    "objective": of_text(objective=WithZLoss()),
    "workload": pictures(),
}
METRICS = {"method": set(), "objective": {"z"}, "workload": {"accuracy"}}


@pytest.fixture(params=CASES)
def name(request):
    return request.param


def test_it_is_planned_and_holds_to_the_plan(name):
    case = CASES[name]
    fastest, least = plan(case, 2**40)
    assert fastest.peak_bytes > least.peak_bytes
    chosen, _ = plan(case, (fastest.peak_bytes + least.peak_bytes) // 2)
    assert chosen.options != fastest.options
    assert_as_planned(case, (fastest, chosen, least))


def test_it_learns_and_reports_its_own_metrics(name):
    trainer = CASES[name].trainer()
    before = trainer.evaluate(trainer.examples)
    steps = list(trainer)
    after = trainer.evaluate(trainer.examples)
    assert after.loss < before.loss
    assert all(step.metrics.keys() == METRICS[name] <= step.line.keys() for step in steps)
    assert before.metrics.keys() == METRICS[name]


def test_metrics_are_means_over_the_step_however_it_is_cut():
    whole = next(
        iter(replace(CASES["objective"], changes={"gradient_accumulation_steps": 1, "micro_batch_size": 2}).trainer())
    )
    cut = next(iter(CASES["objective"].trainer()))
    plain = next(iter(of_text(objective=CrossEntropy()).trainer()))
    assert whole.metrics["z"] == pytest.approx(cut.metrics["z"], rel=1e-5)
    assert whole.loss == pytest.approx(plain.loss + Z_WEIGHT * whole.metrics["z"], rel=1e-5)


def test_killed_and_resumed_it_goes_on_to_the_bit(name, tmp_path):
    case = CASES[name]
    whole = case.trainer()
    steps = list(whole)
    first = case.trainer()
    metrics = iter(first)
    next(metrics), next(metrics)
    tensors, state = capture(first)
    folder = write_checkpoint(tmp_path / "checkpoints", Checkpoint(first.step, tensors, {STATE: state}), {}, "")
    del first, metrics
    torch.manual_seed(1)
    resumed = case.trainer()
    restore(resumed, read_checkpoint(folder))
    assert [step.loss for step in resumed] == [step.loss for step in steps[2:]]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))


def test_saved_and_loaded_it_evaluates_the_same(name, tmp_path):
    case = CASES[name]
    trainer, method = case.trainer(), case.workload.method
    list(trainer)
    save_adapter(trainer.model, tmp_path / "adapter", "base", method=method)
    again = case.trainer()
    assert again.evaluate(case.examples) != trainer.evaluate(case.examples)
    method.fill(again.model, load_file(tmp_path / "adapter" / WEIGHTS_NAME))
    assert again.evaluate(case.examples) == trainer.evaluate(case.examples)
