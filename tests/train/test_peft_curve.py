"""Twenty steps give the loss curve of peft, bitsandbytes and transformers: same weights, factors and batches."""

import peft
import pytest
import torch
from tiny import build_tiny, random_batch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_lite.adapters.files import adapter_tensors
from qlora_lite.adapters.lora.inject import add_lora
from qlora_lite.models.load import load_model
from qlora_lite.models.memory_options import MemoryOptions, set_memory_options
from qlora_lite.train.causal_lm import CrossEntropy, causal_lm
from qlora_lite.train.optim import build_optimizer
from qlora_lite.train.step import train_step

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers
STEPS, RATE, CLIP = 20, 0.01, 1.0


def their_model(folder, quant):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora).train()


def their_curve(model, steps):
    """Rows one by one, each loss divided by the target tokens of the step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1)
    for batch in steps:
        rows = zip(batch.input_ids[0].split(batch.row_lengths), batch.labels.split(batch.row_lengths), strict=True)
        count, total = (batch.labels != -100).sum(), 0.0
        for ids, shifted in rows:
            labels = torch.cat([torch.tensor([-100]), shifted[:-1]])[None]
            loss = model(input_ids=ids[None], labels=labels, num_items_in_batch=count).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        yield total


def our_curve(model, steps):
    """The whole batch at once, packed, checkpointed and chunked."""
    set_memory_options(model.train(), MemoryOptions())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(parameters, "adamw_torch", RATE, weight_decay=0.1)
    for batch in steps:
        yield train_step(causal_lm(objective=CrossEntropy(5)), model, [batch], optimizer, CLIP).loss
        optimizer.zero_grad()


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_the_loss_curve_of_20_steps_is_that_of_peft_and_bitsandbytes(quant, tmp_path):
    # Rows of a multiple of 64: otherwise the CPU kernel of bitsandbytes 0.50 takes wrong block maxima (quant/nf4.py).
    build_tiny("llama", intermediate_size=128).save_pretrained(tmp_path)
    theirs = their_model(tmp_path, quant)
    ours = load_model(str(tmp_path), quant, compute_dtype=torch.float32, use_cache=False)
    add_lora(ours, rank=4, alpha=8, dtype=torch.float32)
    factors = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    for name, tensor in adapter_tensors(ours).items():
        tensor.copy_(factors.pop(name))
    assert not factors
    steps = [random_batch(seed=step % 4) for step in range(STEPS)]

    expected, losses = list(their_curve(theirs, steps)), list(our_curve(ours, steps))

    assert expected[-1] < 0.9 * expected[3]  # it learns, so the curves had every chance to part
    assert losses == pytest.approx(expected, rel=1e-4)
