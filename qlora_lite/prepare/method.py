"""The adapter method that a recipe describes."""

import torch

from qlora_lite.adapters.bottleneck import Bottleneck
from qlora_lite.adapters.files import Lora
from qlora_lite.adapters.full import Full
from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.adapters.prefix import PrefixTuning
from qlora_lite.adapters.prompt import PromptTuning
from qlora_lite.errors import ModelError
from qlora_lite.models.skeleton import read_config
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.recipe.schema import WITH_VIRTUAL_TOKENS, Recipe

from .start import lora_targets, resolve_start
from .task import find_task


def build_method(recipe: Recipe) -> AdapterMethod:
    """Return the adapter method that a recipe describes."""
    if recipe.adapter.method == "bottleneck":
        b = recipe.bottleneck
        return Bottleneck(b.width, b.placement, b.activation, getattr(torch, b.dtype))
    if recipe.adapter.method in WITH_VIRTUAL_TOKENS:
        p = recipe.prompt
        begin = p.virtual_tokens, _prompt_tokens(recipe)
        return PrefixTuning(*begin) if recipe.adapter.method == "prefix" else PromptTuning(*begin, p.encoder_width)
    if recipe.adapter.method == "full":
        return Full(recipe.adapter.switch_every)
    x, (tokens, known_tokens) = recipe.lora, trained_tokens(recipe)
    return Lora(
        targets=lora_targets(recipe),
        rank=x.rank,
        alpha=x.alpha,
        dropout=x.dropout,
        rslora=x.rslora,
        dtype=getattr(torch, x.dtype),
        dora=recipe.adapter.method == "dora",
        also=recipe.adapter.train_also,
        also_lr_ratio=recipe.adapter.train_also_lr_ratio,
        tokens=tokens,
        known_tokens=known_tokens,
        split=resolve_start(recipe),
        merge_aware=recipe.train.merge_aware,
        head=find_task(recipe).head(recipe) is not None,
    )


def trained_tokens(recipe: Recipe) -> tuple[tuple[int, ...], int]:
    """Return the ids of ``adapter.train_tokens``, rising, and how many tokens the tokenizer has without new ones.

    Without a tokenizer, in a plan of what is not there yet, they are those behind the model's vocabulary.
    """
    wanted, m = recipe.adapter.train_tokens, recipe.model
    if not wanted:
        return (), 0
    try:
        known = len(load_tokenizer(m.path, m.revision))
        found = load_tokenizer(m.path, m.revision, wanted).convert_tokens_to_ids(list(wanted))
    except ModelError:
        known = read_config(m.path, m.revision).get_text_config(decoder=True).vocab_size
        found = range(known, known + len(wanted))
    return tuple(sorted({*found})), known


def _prompt_tokens(recipe: Recipe) -> tuple[int, ...]:
    """Return the tokens of ``prompt.init_text``; none without a tokenizer, in a plan of what is not there yet."""
    text, m = recipe.prompt.init_text, recipe.model
    if not text:
        return ()
    try:
        return tuple(load_tokenizer(m.path, m.revision)(text, add_special_tokens=False).input_ids)
    except ModelError:
        return ()
