"""Models whose rows must be run one by one: laid end to end, each would be computed otherwise than by itself.

Some say so (``why_rows_run_alone``), others show it when their logits are compared (``train.guards.check_forward``).
"""

from torch import nn

from .load import uses_row_attention


def run_rows_alone(model: nn.Module) -> None:
    """Make training run the rows of a batch one by one."""
    model.qlora_lite_rows_run_alone = True


def use_own_attention(model: nn.Module) -> None:
    """Attend as transformers does for this model, and not row by row."""
    if uses_row_attention(model):
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")


def rows_run_alone(model: nn.Module) -> bool:
    """Tell whether the rows of a batch must be run one by one."""
    return getattr(model, "qlora_lite_rows_run_alone", False)


def why_rows_run_alone(model: nn.Module, longest: int) -> str:
    """Say what tells without a computation that rows must run one by one; "" if nothing does.

    A state runs on from row to row (Mamba, Qwen3.5, RecurrentGemma), as transformers marks it; a convolution reaches
    into the row before (LFM2); or the longest row of a batch decides how all are rotated (dynamic, longrope), where
    rows can be longer than those of the first training.

    Args:
        longest: tokens of the longest row that there may be.
    """
    exact = "exact, but packing saves no time"
    if model._is_stateful:
        return f"a state would run on from one to the next: {exact}"
    if any(isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1 for module in model.modules()):
        return f"a convolution would reach into the one before: {exact}"
    limits = [_first_length(module.config) for module in model.modules() if _follows_longest_row(module)]
    if limits and longest > min(limits):
        return (f"those of more than {min(limits)} tokens are rotated otherwise than shorter ones; a data.max_tokens "
                "of no more spares that")  # fmt: skip
    return ""


def _follows_longest_row(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(kind == "longrope" or "dynamic" in str(kind) for kind in kinds)


def _first_length(config) -> int:
    """Return the tokens of the rows that a model was trained on before its rotary embedding was stretched."""
    rope = config.rope_parameters
    settings = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    key = "original_max_position_embeddings"
    return min((each[key] for each in settings if key in each), default=config.max_position_embeddings)
