"""A byte-level tokenizer, and the files of a tiny run: model folder, rows, recipe."""

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import build_nested, build_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_lite.data.chat.template import NAMED_TEMPLATES

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 264  # 256 bytes and the special tokens, rounded up to a multiple of 8


MERGES = (("t", "h"), ("th", "e"))  # for readers that take no tokenizer without any


def byte_tokenizer(template: str | None = "chatml", merges=()) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte, and one for each merge (at most three)."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = NAMED_TEMPLATES[template] if template else None
    return tokenizer


def save_tiny(
    folder: Path, model_type: str = "llama", template: str | None = "chatml", shard=None, merges=(), **options
):
    """Write a tiny random model with its tokenizer as a model folder; return the model."""
    model = build_tiny(model_type, vocab_size=VOCABULARY, **options)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    byte_tokenizer(template, merges).save_pretrained(folder)
    return model


def save_nested(folder: Path, name: str = "gemma3", merges=(), **options):
    """Write a tiny random model that holds a language model among other parts, as the hub has it; return it."""
    model = build_nested(name, vocab_size=VOCABULARY, **options)
    model.save_pretrained(folder)
    byte_tokenizer(merges=merges).save_pretrained(folder)
    return model


def write_rows(path: Path, count: int, mark: str = "?") -> Path:
    """Write chat rows whose answer is the question's digit, spelled; files with another mark share no row."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    pairs = [(f"{i % 10}{mark}", names[i % 10]) for i in range(count)]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_recipe(folder: Path, recipe: dict, sections: dict[str, dict | None]) -> Path:
    """Write a recipe with sections merged over its own; None leaves one out."""
    for name, values in sections.items():
        recipe[name] = recipe.get(name, {}) | (values or {})
    recipe = {name: values for name, values in recipe.items() if sections.get(name, values) is not None}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def write_recipe(folder: Path, model: Path | str, rows: int = 24, **sections) -> Path:
    """Write rows and a recipe for a run of a few seconds; ``sections`` are merged over its own."""
    recipe = {
        "model": {"path": str(model), "compute_dtype": "float32", "device": "cpu"},
        "lora": {"rank": 4, "alpha": 8},
        "data": {
            "train": str(write_rows(folder / "train.jsonl", rows)),
            "eval": str(write_rows(folder / "eval.jsonl", 6, "!")),
            "max_tokens": 128,
        },
        "train": {"max_steps": 6, "learning_rate": 0.01, "optimizer": "adamw_torch", "metrics_examples": 2},
        "memory": {"checkpointing": "block", "loss_chunk_tokens": 64, "micro_batches": "as-given"},
        "output": {"dir": str(folder / "out")},
    }
    return save_recipe(folder, recipe, sections)


def as_if_packed(folder: Path) -> None:
    """Let a model folder look like a 4-bit checkpoint of bitsandbytes, by its configuration and its tensors' names."""
    path, weights = folder / "config.json", folder / "model.safetensors"
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": packed}))
    state = {"layer.weight.quant_state.bitsandbytes__nf4": torch.zeros(1, dtype=torch.uint8)}
    save_file(load_file(weights) | state, weights, {"format": "pt"})
