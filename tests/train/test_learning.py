"""The package learns: a real model gets better at held-out GSM8K answers in a few small steps."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny import DEMO_MODEL

from qlora_lite.adapters.lora.inject import add_lora
from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens.examples import build_examples
from qlora_lite.models.load import load_model, resolve_compute_dtype, resolve_device
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.train.loop import Trainer
from qlora_lite.train.settings import TrainSettings

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k_train.jsonl"
ROWS_PER_STEP = 2


@pytest.mark.model
@pytest.mark.timeout(1800)  # of 40 steps two minutes on two quiet cores; nine were seen on busy ones
@pytest.mark.skipif(not GSM8K.is_file(), reason="the GSM8K rows of ../shared/data are not here")
@pytest.mark.parametrize(
    ("held_out_rows", "steps", "loss"),
    [
        (8, 6, 1.4),
        pytest.param(40, 40, 1.30, marks=pytest.mark.slow),
    ],
)
def test_smollm2_learns_held_out_gsm8k_answers(tmp_path, held_out_rows, steps, loss):
    examples = _examples(tmp_path / "rows.jsonl", held_out_rows + steps * ROWS_PER_STEP)
    held_out, rows = examples[:held_out_rows], examples[held_out_rows:]
    device = resolve_device()
    model = load_model(DEMO_MODEL, compute_dtype=resolve_compute_dtype("auto", device), device=device)
    torch.manual_seed(0)
    add_lora(model, rank=8, alpha=16.0)
    trainer = Trainer(model, rows, _settings(steps))

    before = trainer.evaluate(held_out).loss
    assert before == pytest.approx(1.75, abs=0.1)
    for _ in trainer:
        pass
    assert trainer.step == steps
    assert trainer.evaluate(held_out).loss < loss


def _examples(path: Path, count: int):
    with GSM8K.open(encoding="utf-8") as lines:
        path.write_text("".join(islice(lines, count)), encoding="utf-8")
    source = Source(str(path), "table", prompt="{question}", completion="{answer}")
    return build_examples([source], load_tokenizer(DEMO_MODEL)).examples


def _settings(steps: int) -> TrainSettings:
    return TrainSettings(
        max_steps=steps,
        epochs=1.0,
        learning_rate=1e-3,
        micro_batch_size=ROWS_PER_STEP,
        gradient_accumulation_steps=1,
        optimizer="adamw_torch",
        lr_scheduler="cosine",
        warmup_ratio=0.03,
        max_grad_norm=1.0,
        weight_decay=0.0,
        loraplus_lr_ratio=1.0,
        seed=0,
        max_tokens=1024,
        packing=False,
        order="shuffle",
        on_not_finite="stop",
        max_skipped_steps=0,
        stochastic_rounding=True,
        fused_loss="off",
    )
