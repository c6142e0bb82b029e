"""What the training loop needs to know, apart from the model and the rows; what follows for its learning rate."""

import math
from dataclasses import dataclass, field
from fractions import Fraction

from qlora_lite.models.memory_options import MemoryOptions

from .shares import Share


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Settings of the training loop; names, meanings and defaults are those of a recipe.

    ``max_steps`` None trains for ``epochs``. ``shares`` are the ranks' parts of a step, none where all are equal.
    """

    learning_rate: float
    max_steps: int | None = None
    epochs: float = 1.0
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    optimizer: str = "adamw_8bit"
    lr_scheduler: str = "cosine"
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    loraplus_lr_ratio: float = 1.0
    seed: int = 0
    max_tokens: int = 1024
    packing: bool = True
    order: str = "shuffle"
    on_not_finite: str = "stop"
    max_skipped_steps: int = 10
    stochastic_rounding: bool = True
    fused_loss: str = "auto"
    options: MemoryOptions = field(default_factory=MemoryOptions)
    shares: tuple[Share, ...] = ()


# Of LoRA with alpha 32, by the beginning of transformers' ``model_type``: the rate at a hidden size of 2,000, and the
# exponent of 2,000 / hidden size. Llama's and Qwen's are the rule of Thinking Machines' tinker-cookbook
# (``hyperparam_utils``); Gemma's rate is from a sweep of its smallest model, with Llama's exponent, which errs on the
# low side (tools/experiments/learning_rates). Other families have no published sweep, and take Llama's.
LEARNING_RATES = {"qwen": (5e-4, 0.0775), "gemma": (2.25e-4, 0.781), "": (5e-4, 0.781)}


# Of that of LoRA weights that begin as kaiming has them, by ``lora.start``: of others B has a part in the first updates
# of their product, or A is larger. SmolLM2-135M on GSM8K, 40 steps, at a quarter of auto, half, and auto: qera 0.936,
# 0.925 and 0.959, loftq 0.963, 0.934 and 0.943, pissa 0.943, 0.983 and 1.119, olora 0.971, 1.060 and 1.219, eva 0.953,
# 0.981 and 1.068 (first seed; tools/experiments/starts).
START_SHARES = {"qera": 0.5, "loftq": 0.5, "pissa": 0.25, "olora": 0.25, "eva": 0.25}


def auto_learning_rate(family: str, width: int, rank: int, scale: float) -> float:
    """Return the peak learning rate for LoRA of a model, to two digits, by ``LEARNING_RATES``.

    It holds for any rank. An update of Adam's size moves a weight by about learning rate x scale x rank, so that other
    scales take as much more or less.

    Args:
        family: transformers' ``model_type``.
        width: the hidden size.
        rank: of the LoRA weights.
        scale: of their product; alpha / rank, or alpha / sqrt(rank) with rank-stabilized LoRA.
    """
    return float(f"{_rule(family, width) * 32 / (rank * scale):.1e}")


def method_learning_rate(family: str, width: int, share: float) -> float:
    """Return the peak learning rate of a method for a model, to two digits.

    Args:
        family, width: as for ``auto_learning_rate``.
        share: of LoRA's rate with alpha 32.
    """
    return float(f"{_rule(family, width) * share:.1e}")


def _rule(family: str, width: int) -> float:
    rate, exponent = next(rule for name, rule in LEARNING_RATES.items() if family.startswith(name))
    return rate * (2000 / width) ** exponent


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
