"""What of a recipe's lora section says which layers LoRA weights are on, and how they are initialized."""

import torch

from qlora_lite.adapters.lora.eva import EVA
from qlora_lite.adapters.lora.inject import Target
from qlora_lite.adapters.lora.qera import QERA
from qlora_lite.adapters.lora.start import KAIMING, LOFTQ, Start, chosen_layers
from qlora_lite.errors import ModelError
from qlora_lite.models.load import refuse_stored, stored_quantization
from qlora_lite.models.nested import without_weights
from qlora_lite.models.skeleton import read_config
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.recipe.schema import Recipe
from qlora_lite.train.settings import START_SHARES


def lora_targets(recipe: Recipe) -> tuple[Target, ...]:
    """Return what lora.targets names."""
    return tuple(Target(t.pattern, t.rank, t.alpha) for t in recipe.lora.targets)


def resolve_start(recipe: Recipe) -> Start | None:
    """Return what splits a recipe's weights between base and LoRA weights; None if nothing does."""
    x = recipe.lora
    if x.start in (KAIMING, EVA, QERA) or (x.start == LOFTQ and not x.start_alternations):
        return None
    return Start(
        kind=x.start,
        alternations=x.start_alternations,
        targets=lora_targets(recipe),
        rank=x.rank,
        alpha=x.alpha,
        rslora=x.rslora,
        dtype=getattr(torch, x.dtype),
        kept=recipe.model.keep_16bit,
    )


def keeps_initial(recipe: Recipe) -> bool:
    """Return whether files have to say what LoRA weights began as, since the adapter is for those alone."""
    return recipe.lora.start == QERA


def rate_share(recipe: Recipe) -> float:
    """Return the learning rate that auto means for how LoRA weights begin, as a share of their usual one."""
    x = recipe.lora
    return START_SHARES.get(x.start, 1.0) if x.start_alternations else 1.0  # none is the plain start


def check_start(recipe: Recipe, config) -> None:
    """Check that LoRA weights can begin as a recipe says.

    Args:
        config: transformers' configuration of the model.

    Raises:
        ModelError: the model has no 16-bit weights, or a layer that this is not for.
    """
    x, start = recipe.lora, resolve_start(recipe)
    needs_16_bit = start.kind if start else QERA if keeps_initial(recipe) else None
    refuse_stored(needs_16_bit, stored_quantization(config.to_dict()))
    if x.start in (EVA, QERA):
        chosen_layers(without_weights(config), lora_targets(recipe), x.rank, x.alpha, x.start)


def without_start(recipe: Recipe) -> Recipe:
    """Return a recipe whose base is the model as its files have it."""
    unset = {name: Recipe.model_fields["lora"].default.model_dump()[name] for name in ("start", "start_alternations")}
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update=unset)})


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
