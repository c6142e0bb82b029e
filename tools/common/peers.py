"""The other side of the comparisons: peft, bitsandbytes and transformers, used as their documentation shows.

Imports torch and the peers inside the functions, because the tools count memory from their imports on.
"""

from __future__ import annotations

RANK, ALPHA, LEARNING_RATE, MAX_NORM, SEED = 16, 32, 2e-4, 1.0, 0
IGNORED = -100


def dressed(model):
    """Prepare a 4-bit transformers model for training with peft; return it and its optimizer, an 8-bit AdamW."""
    import bitsandbytes
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(
        model,
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    start_alike([p for name, p in model.named_parameters() if "lora_A" in name])
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, bitsandbytes.optim.AdamW8bit(trained, lr=LEARNING_RATE, weight_decay=0.0)


def peers_step(model, optimizer, rows: list[dict], rows_at_once: int, device) -> float:
    """Train one step on rows of "ids" and "learned", padded batch by padded batch; return the loss."""
    import torch

    from common.models import dtype_of

    labelled = torch.tensor(sum(sum(row["learned"]) for row in rows), device=device)
    total = 0.0
    for start in range(0, len(rows), rows_at_once):
        batch = padded(rows[start : start + rows_at_once], model.config.pad_token_id or 0)
        with torch.autocast(device.type, dtype=dtype_of(model.config)):
            loss = model(**{k: v.to(device) for k, v in batch.items()}, num_items_in_batch=labelled).loss
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], MAX_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def start_alike(factors) -> None:
    """Give the A factors, in the order of the layers, the usual random start; B starts at zero anyway."""
    import torch

    random = torch.Generator().manual_seed(SEED)
    for factor in factors:
        bound = factor.shape[1] ** -0.5
        factor.data.copy_(torch.empty(factor.shape).uniform_(-bound, bound, generator=random))


def padded(rows: list[dict], pad: int) -> dict:
    """Return the rows as one batch, filled up on the right to the longest."""
    import torch

    width = max(len(row["ids"]) for row in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        spare, pairs = width - len(row["ids"]), zip(row["ids"], row["learned"], strict=True)
        batch["input_ids"].append(row["ids"] + [pad] * spare)
        batch["attention_mask"].append([1] * len(row["ids"]) + [0] * spare)
        batch["labels"].append([token if is_target else IGNORED for token, is_target in pairs] + [IGNORED] * spare)
    return {name: torch.tensor(values) for name, values in batch.items()}


def stock_model(name: str, device):
    """Return transformers' own model of a random shape with bitsandbytes' layers, its weights ``models.build``'s."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import AutoModelForCausalLM

    from common.models import build, config_of, dtype_of
    from qlora_lite.quant.linear import QuantLinear
    from qlora_lite.quant.nf4 import to_bnb_state

    source, dtype = build(name, device), dtype_of(config_of(name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=dtype)
    for path, module in source.named_modules():
        if isinstance(module, QuantLinear):
            layer = Linear4bit(module.in_features, module.out_features, False, dtype, device="meta")
            stored = to_bnb_state(module.packed, (module.out_features, module.in_features), dtype)
            layer.weight = Params4bit.from_prequantized(stored.pop(""), stored, device=device)
            model.set_submodule(path, layer)
            continue
        target = model.get_submodule(path)
        for registry in ("_parameters", "_buffers"):
            getattr(target, registry).update(getattr(module, registry))
    model.is_loaded_in_4bit = True  # as from_pretrained says it to peft
    model.config.use_cache = False
    return model
