"""Turn the sections of a recipe into the arguments of the lower layers: data, model, loop settings."""

from pathlib import Path

import torch

from .data.examples import Dataset, build_examples
from .data.read import Source
from .lora.adapter import load_adapter
from .lora.inject import Target, add_lora
from .models.load import load_model, resolve_compute_dtype, resolve_device
from .recipe.schema import Recipe
from .train.loop import TrainSettings


def train_settings(recipe: Recipe) -> TrainSettings:
    """Return the loop's settings from a recipe."""
    t, d, m = recipe.train, recipe.data, recipe.memory
    return TrainSettings(
        max_steps=t.max_steps, epochs=t.epochs, learning_rate=t.learning_rate,
        micro_batch_size=t.micro_batch_size, gradient_accumulation_steps=t.gradient_accumulation_steps,
        optimizer=t.optimizer, lr_scheduler=t.lr_scheduler, warmup_ratio=t.warmup_ratio,
        max_grad_norm=t.max_grad_norm, weight_decay=t.weight_decay, seed=t.seed,
        max_tokens=d.max_tokens, packing=d.packing, order=d.order, checkpointing=m.checkpointing,
        loss_chunk_tokens=None if m.loss_chunk_tokens == "auto" else m.loss_chunk_tokens,
        kept_blocks=m.kept_blocks,
    )  # fmt: skip


def build_data(recipe: Recipe, tokenizer, which: str = "train") -> Dataset | None:
    """Read, render and tokenise a recipe's training or evaluation rows; None if it names none.

    Raises:
        DataError: a row cannot be used.
    """
    listed = getattr(recipe.data, which)
    if listed is None:
        return None
    sources = [Source(s.path, s.format, s.weight, s.prompt, s.completion) for s in listed]
    d = recipe.data
    return build_examples(sources, tokenizer, d.template, d.train_on, d.max_tokens, d.overflow)


def build_model(recipe: Recipe, adapter: Path | None = None, lora: bool = True):
    """Load a recipe's base model on its device, with new LoRA factors or those of an adapter folder.

    Args:
        adapter: folder to load factors from; None for new ones.
        lora: False leaves the base model bare.
    """
    m = recipe.model
    device = resolve_device(m.device)
    dtype = resolve_compute_dtype(m.compute_dtype, device)
    model = load_model(m.path, m.quant, m.double_quant, dtype, device, m.revision)
    if adapter is not None:
        return load_adapter(model, adapter)
    if not lora:
        return model
    torch.manual_seed(recipe.train.seed)
    targets = [Target(t.pattern, t.rank, t.alpha) for t in recipe.lora.targets]
    x = recipe.lora
    return add_lora(model, targets, x.rank, x.alpha, x.dropout, x.rslora, getattr(torch, x.dtype))
