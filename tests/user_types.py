"""A user's file as a type checker reads it: `mypy` checks it with the package, and it is never run."""

from pathlib import Path
from typing import assert_type

from torch import nn

import qlora_lite
from qlora_lite import AdapterMethod, Full, LossSum, Objective, Trainer, TrainSettings, causal_lm


class Plain(Objective):
    def __call__(self, model: nn.Module, outputs, inputs) -> LossSum:
        return LossSum(outputs.sum())


class Nothing(AdapterMethod):
    def apply(self, model: nn.Module) -> None:
        model.requires_grad_(False)


def use(model: nn.Module) -> None:
    settings = TrainSettings(learning_rate=1e-3, max_steps=2)
    assert_type(settings.max_steps, int | None)
    trainer = Trainer(model, [], settings, workload=causal_lm(Full(), Plain()))
    assert_type(trainer, Trainer)
    for metrics in trainer:
        assert_type(metrics.loss, float)
    assert_type(qlora_lite.save_adapter(model, "folder", method=Nothing()), str)
    assert_type(qlora_lite.run_recipe(qlora_lite.load_recipe("recipe.yaml")), Path)


def mistaken(model: nn.Module) -> None:
    qlora_lite.add_lora(model, r=8)  # type: ignore[arg-type]
    qlora_lite.add_lora(model, rank="8")  # type: ignore[arg-type]
    TrainSettings()  # type: ignore[call-arg]
    qlora_lite.Trainr  # type: ignore[attr-defined]  # noqa: B018
