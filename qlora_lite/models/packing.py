"""Models whose rows must be run one by one: packed, each would be computed otherwise than by itself.

A configuration says it (``why_unpacked``), so that a plan knows before anything is loaded. Architectures that
nobody has looked at may show it only when logits are compared (``train.text_guards.check_forward``).
"""

import inspect
from collections.abc import Sequence
from weakref import WeakSet

from torch import nn

from qlora_lite.errors import ModelError
from qlora_lite.memory.shapes import CPU_MULTIPLE, kernel_rows

from .anatomy import decoder, device_of
from .heads import is_encoder
from .load import uses_row_attention

_run_alone: WeakSet[nn.Module] = WeakSet()  # models
WITHOUT_LENGTHS = ("nemotron",)  # whose blocks do not hand their attention the lengths of rows (transformers 5.24)


def run_unpacked(model: nn.Module) -> None:
    """Make training run the rows of a batch one by one."""
    _run_alone.add(model)


def use_own_attention(model: nn.Module) -> None:
    """Attend as transformers does for this model, and not row by row."""
    if uses_row_attention(model):
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")


def runs_unpacked(model: nn.Module) -> bool:
    """Return whether the rows of a batch must be run one by one."""
    return model in _run_alone


def passes(model: nn.Module, lengths: Sequence[int]) -> int:
    """Return how often the blocks run for sequences of these lengths: once for all, or for each that runs alone."""
    return len(lengths) if runs_unpacked(model) else 1


def longest_possible(config) -> int | None:
    """Return the most tokens that a model can compute at once, None where nothing limits them.

    GPT-Neo looks up who sees whom in a table that has so many.
    """
    return config.max_position_embeddings if config.model_type == "gpt_neo" else None


def why_unpacked(model: nn.Module, longest: int) -> str:
    """Say what tells without a computation that rows must run one by one; "" if nothing does.

    A state runs on from row to row (Mamba, Qwen3.5, RecurrentGemma), as transformers marks it; a convolution reaches
    into the row before (LFM2); several rows may be more tokens than the model can compute (GPT-Neo); nothing tells
    attention where a row begins (Bloom, MPT, Nemotron); or the longest row of a batch decides how all are rotated
    (longrope), where rows can be longer than those of the first training.

    Args:
        longest: tokens of the longest row that there may be.

    Raises:
        ModelError: the model cannot compute so many, or rotates them by the longest row that it ever saw (dynamic).
    """
    exact = "exact, but packing saves no time"
    if (most := longest_possible(model.config)) is not None:
        if kernel_rows(longest, device_of(model)) > most:
            raise ModelError(
                f"{type(model).__name__} computes at most {most} tokens at once: set data.max_tokens to "
                f"{most // CPU_MULTIPLE * CPU_MULTIPLE}"
            )
        return f"together they may be more than the {most} tokens that it can compute: {exact}"
    if model._is_stateful:
        return f"a state would run on from one to the next: {exact}"
    if any(isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1 for module in model.modules()):
        return f"a convolution would reach into the one before: {exact}"
    if not _can_tell_rows_apart(model):
        return f"its attention would see the ones before: {exact}"
    grown = [_first_length(module.config) for module in model.modules() if _has_rope(module, "dynamic")]
    if grown and kernel_rows(longest, device_of(model)) > min(grown):
        raise ModelError(
            f"{type(model).__name__} rotates rows of more than {min(grown)} tokens by the longest that it "
            "ever saw (rope_type dynamic), so that none is computed twice alike: set data.max_tokens to "
            f"{min(grown) // CPU_MULTIPLE * CPU_MULTIPLE}"
        )
    limits = [_first_length(module.config) for module in model.modules() if _has_rope(module, "longrope")]
    if limits and longest > min(limits):
        return (
            f"those of more than {min(limits)} tokens are rotated otherwise than shorter ones; a data.max_tokens "
            "of no more spares that"
        )
    return ""


def _can_tell_rows_apart(model: nn.Module) -> bool:
    """Return whether attention learns where rows begin: from their lengths, or from positions that begin anew, which
    tell an encoder's nothing."""
    if uses_row_attention(model):
        return model.config.model_type not in WITHOUT_LENGTHS
    if is_encoder(model):
        return False
    return "position_ids" in inspect.signature(decoder(model).forward).parameters


def _has_rope(module: nn.Module, name: str) -> bool:
    kinds = getattr(module, "rope_type", None)
    return any(name in str(kind) for kind in (kinds.values() if isinstance(kinds, dict) else [kinds]))


def _first_length(config) -> int:
    """Return the tokens of the rows that a model was trained on before its rotary embedding was stretched."""
    rope = config.rope_parameters
    settings = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    key = "original_max_position_embeddings"
    return min((each[key] for each in settings if key in each), default=config.max_position_embeddings)
