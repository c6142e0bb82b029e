"""LoRA and DoRA: adapter.method lora and dora."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.prepare.method import MethodEntry
from qlora_lite.prepare.task import Task, find_task
from qlora_lite.recipe.part import USUAL, Found, Value, find_part
from qlora_lite.recipe.reference import written
from qlora_lite.recipe.schema import Recipe

if TYPE_CHECKING:
    from qlora_lite.adapters.method import AdapterMethod


class LoraEntry(MethodEntry):
    """Low-rank weights beside linear layers and experts.

    Args:
        is_dora: whether the norms of the adapted weights are trained too.
    """

    settings = "lora", "adapter.train_also", "adapter.train_also_lr_ratio", "adapter.train_tokens"
    has_targets = True

    def __init__(self, is_dora: bool) -> None:
        self.is_dora, self.label = is_dora, "DoRA" if is_dora else "LoRA"

    def build(self, recipe: Recipe) -> AdapterMethod:
        """See ``adapters.files.Lora``."""
        import torch

        from qlora_lite.adapters.files import Lora
        from qlora_lite.prepare.start import lora_targets, resolve_start, trained_tokens

        x, (tokens, known_tokens) = recipe.lora, trained_tokens(recipe)
        return Lora(
            targets=lora_targets(recipe),
            rank=x.rank,
            alpha=x.alpha,
            dropout=x.dropout,
            rslora=x.rslora,
            dtype=getattr(torch, x.dtype),
            dora=self.is_dora,
            also=recipe.adapter.train_also,
            also_lr_ratio=recipe.adapter.train_also_lr_ratio,
            tokens=tokens,
            known_tokens=known_tokens,
            split=resolve_start(recipe),
            merge_aware=recipe.train.merge_aware,
            head=find_task(recipe).has_head,
        )

    def auto_learning_rate(self, recipe: Recipe, family: str, width: int) -> float:
        """Return the rate for the rank and the scale of the recipe."""
        from qlora_lite.adapters.lora.layer import lora_scale
        from qlora_lite.train.settings import auto_learning_rate

        x = recipe.lora
        return auto_learning_rate(family, width, x.rank, lora_scale(x.alpha, x.rank, x.rslora))

    def size(self, recipe: Recipe) -> str:
        """Return the rank, or what is trained without any layer."""
        if recipe.lora.targets:
            return f"rank {recipe.lora.rank}"
        return f"{', '.join(recipe.adapter.train_also) or 'rows of tokens'} alone"

    def conflicts(self, value: Value) -> Found:
        """Yield what keeps anything from being trained, where no layer is adapted."""
        task = find_part("tasks", value("task", "kind") or USUAL["tasks"])
        if value("lora", "targets") != [] or (isinstance(task, Task) and not task.writes_text):
            return
        plain = {("adapter", "method"): "lora", ("lora", "start"): "kaiming", ("train", "merge_aware"): "off"}
        for (section, name), usual in plain.items():
            if (given := value(section, name)) not in (None, usual):
                yield (section, name), f"{section}.{name} = {written(given)}: needs layers, and lora.targets is []"
        if not value("adapter", "train_also") and not value("adapter", "train_tokens"):
            yield (
                ("lora", "targets"),
                "lora.targets = []: nothing is trained; write adapter.train_also, or train_tokens",
            )


LORA, DORA = LoraEntry(is_dora=False), LoraEntry(is_dora=True)
