"""A trainer over a tiny quantised model and a dozen rows."""

import numpy as np
import torch
from tiny import quantized_pair

from qlora_lite.adapters.lora.inject import add_lora
from qlora_lite.data.tokens.storage import Example
from qlora_lite.models.memory_options import MemoryOptions, place
from qlora_lite.train.loop import Trainer
from qlora_lite.train.processes import ALONE
from qlora_lite.train.settings import TrainSettings

SETTINGS = dict(
    max_steps=4,
    epochs=1.0,
    learning_rate=0.01,
    micro_batch_size=1,
    gradient_accumulation_steps=2,
    optimizer="adamw_torch",
    lr_scheduler="constant",
    warmup_ratio=0.0,
    max_grad_norm=1.0,
    weight_decay=0.0,
    loraplus_lr_ratio=1.0,
    seed=0,
    max_tokens=32,
    packing=True,
    order="shuffle",
    on_not_finite="stop",
    max_skipped_steps=0,
    stochastic_rounding=True,
    fused_loss="off",
)

# a row whose one target token is predicted where only the first is seen
TWO_TOKENS = Example(np.array([5, 2], np.int32), np.array([False, True]), "", "", "short.txt:1")


def examples(count=12):
    """Rows of random tokens, all but the first two of each to be learned."""
    chance = np.random.default_rng(0)
    rows = []
    for i in range(count):
        length = int(chance.integers(4, 15))
        is_target = np.ones(length, dtype=bool)
        is_target[:2] = False
        rows.append(Example(chance.integers(3, 160, length).astype(np.int32), is_target, "", "", f"rows.jsonl:{i + 1}"))
    return rows


def trainer(
    model_type="llama",
    dropout=0.0,
    dtype=torch.float32,
    targets="all-linear",
    rows=None,
    rank=4,
    stream=None,
    device="cpu",
    compute_dtype=torch.float32,
    dora=False,
    merge_aware="off",
    processes=ALONE,
    **changes,
):
    """A trainer of a tiny quantised model; equal arguments give equal ones."""
    model, _ = quantized_pair(model_type, dtype=compute_dtype)
    torch.manual_seed(0)
    add_lora(model, targets, rank=rank, alpha=8, dropout=dropout, dtype=dtype, dora=dora, merge_aware=merge_aware)
    place(model, torch.device(device), changes.get("options", MemoryOptions()), ranks=processes.shards)
    settings = TrainSettings(**(SETTINGS | changes))
    training = Trainer(model, examples() if rows is None else rows, settings, stream, processes=processes)
    training.check()
    return training
