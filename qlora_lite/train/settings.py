"""What the training loop needs to know, apart from the model and the rows."""

from dataclasses import dataclass, field

from qlora_lite.models.levers import Levers


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What the loop needs to know; the names and meanings are those of the recipe.

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
    seed: int
    max_tokens: int
    packing: bool
    order: str
    levers: Levers = field(default_factory=Levers)
    on_not_finite: str = "stop"
    max_skipped_steps: int = 0
    stochastic_rounding: bool = True
    fused_loss: str = "off"
