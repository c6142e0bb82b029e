"""What the training loop needs to know, apart from the model and the rows; what follows for its learning rate."""

import math
from dataclasses import dataclass, field
from fractions import Fraction

from qlora_lite.models.memory_options import MemoryOptions


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What the loop needs to know; the names and meanings are those of the recipe, which has the defaults.

    ``max_steps`` None trains for ``epochs``.
    """

    max_steps: int | None
    epochs: float
    learning_rate: float
    micro_batch_size: int
    gradient_accumulation_steps: int
    optimizer: str
    lr_scheduler: str
    warmup_ratio: float
    max_grad_norm: float
    weight_decay: float
    loraplus_lr_ratio: float
    seed: int
    max_tokens: int
    packing: bool
    order: str
    on_not_finite: str
    max_skipped_steps: int
    stochastic_rounding: bool
    fused_loss: str
    options: MemoryOptions = field(default_factory=MemoryOptions)


def auto_learning_rate(family: str, width: int, rank: int, scale: float) -> float:
    """Return the peak learning rate for LoRA of a model, to two digits: what sweeps of models of other widths found.

    The rule is that of Thinking Machines' tinker-cookbook (``hyperparam_utils``), which holds for alpha 32 and any
    rank. An update of Adam's size moves a weight by about learning rate x scale x rank, so that other scales take as
    much more or less. Families without sweeps take the exponent of Llama (tools/results/learning_rate.md).

    Args:
        family: transformers' ``model_type``.
        width: the hidden size.
        rank: of the LoRA weights.
        scale: of their product; alpha / rank, or alpha / sqrt(rank) with rank-stabilized LoRA.
    """
    exponent = 0.0775 if family.startswith("qwen") else 0.781
    return float(f"{5e-4 * (2000 / width) ** exponent * 32 / (rank * scale):.1e}")


def lr_factor(step: int, total_steps: int, schedule: str, warmup_ratio: float) -> float:
    """Return the factor on the peak learning rate for one step, so that a resumed run needs no scheduler state.

    Args:
        step: optimizer step, counted from 1 to ``total_steps``.
        schedule: ``constant``, ``linear`` or ``cosine`` (both reach 0 after the last step).
        warmup_ratio: share of the steps, rounded up, that rise linearly to the peak.
    """
    warmup = math.ceil(total_steps * Fraction(warmup_ratio).limit_denominator(1_000_000))
    if step <= warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    done = (step - 1 - warmup) / max(1, total_steps - warmup)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
