"""Measure how an adapter that learned from preferences judges evaluation rows: rewards, as training reports them.

A reward compares with the model that training began with: the base, or the base with the adapter of lora.init_from. It
is the same model with other factors, so it is computed first, and the adapter's own factors come in afterwards.
"""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qlora_lite.adapters.files import attach_adapter, begin_with
from qlora_lite.adapters.lora.inject import lora_layers
from qlora_lite.adapters.lora.start import KAIMING
from qlora_lite.adapters.read import Adapter, read_adapter
from qlora_lite.artifacts.trained_run import adapter_to_begin_with
from qlora_lite.data.tokens.storage import Examples
from qlora_lite.errors import ModelError
from qlora_lite.prepare.datasets import build_data, told_by
from qlora_lite.prepare.job import build_workload
from qlora_lite.prepare.task import find_preference
from qlora_lite.recipe.schema import Recipe
from qlora_lite.train.loop import eval_batches
from qlora_lite.train.settings import TrainSettings
from qlora_lite.train.step import evaluate_loss, evaluating
from qlora_lite.train.workload import Workload

from .objective import Preference

log = logging.getLogger("qlora_lite")


def attach_and_judge(
    recipe: Recipe, model: nn.Module, adapter: Path, tokenizer, settings: TrainSettings
) -> dict[str, float]:
    """Add an adapter to a base model; return the loss and the metrics of its objective on evaluation rows.

    Nothing is returned for rows that are no preferences, and where the model that training began with is not the base
    with LoRA weights: of DoRA, of weights of the base, and of a lora.start that splits them.
    """
    trained, first, work = read_adapter(model, adapter), None, build_workload(recipe).with_options(settings.options)
    if can_judge := recipe.lora.start == KAIMING and _is_lora(trained) and find_preference(recipe) is not None:
        can_judge = told_by(recipe, "eval") == find_preference(recipe)
    if can_judge and work.objective.needs_reference:
        try:
            folder = adapter_to_begin_with(recipe)
            first = read_adapter(model, folder) if folder else None
        except ModelError as error:
            log.warning("rewards are not measured: %s", error)
            can_judge = False
        can_judge = can_judge and (first is None or _is_lora(first))
    attach_adapter(
        model, replace(trained, merge_aware=recipe.train.merge_aware) if isinstance(trained, Adapter) else trained
    )
    if not can_judge:
        return {}
    data = build_data(recipe, tokenizer, "eval", compares=True)
    assert data is not None
    examples = data.examples
    settings = replace(settings, max_tokens=max(settings.max_tokens, *work.batches.lengths(examples)))
    if work.objective.needs_reference:
        if first is None:
            for _, layer in lora_layers(model):
                nn.init.zeros_(layer.lora_B)
        else:
            begin_with(model, first)
        examples = _with_references(work, model, examples, settings)
        begin_with(model, trained)
    result = evaluate_loss(work, model, eval_batches(work, examples, settings))
    return {"loss": result.loss, **result.metrics}


def _is_lora(adapter) -> bool:
    return isinstance(adapter, Adapter) and not adapter.is_dora and not adapter.weights


def _with_references(work: Workload, model: nn.Module, examples: Examples, settings: TrainSettings) -> Examples:
    objective, device, found = work.objective, work.spec.device(model), []
    assert isinstance(objective, Preference)
    with torch.no_grad(), evaluating(model):
        for batch in eval_batches(work, examples, settings):
            inputs = work.batches.inputs(batch, device)
            found.append(objective.references(model, work.spec, inputs))
    references: np.ndarray = np.zeros((len(examples.rows) - 1, 2), np.float32)
    references[examples.order] = torch.cat(found).cpu().numpy()
    return replace(examples, references=references)
