"""Tiny random encoders and decoders whose files a head is put on, their tokenizer, and rows with labels."""

import json
from pathlib import Path

import torch
from tiny import ARCHITECTURES
from tiny_files import byte_tokenizer, save_recipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 264
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=128,
    pad_token_id=0,
)
_STILL = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
# name -> (model_type, settings, transformers' class whose files a user has)
ENCODERS = {
    "bert": ("bert", _COMMON | _STILL, AutoModel),
    "roberta": (
        "roberta",
        _COMMON | _STILL | dict(type_vocab_size=1, max_position_embeddings=129),
        AutoModelForMaskedLM,
    ),
    "modernbert": (
        "modernbert",
        _COMMON
        | dict(
            num_hidden_layers=4,
            global_attn_every_n_layers=2,
            local_attention=8,
            classifier_pooling="mean",
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
        AutoModelForMaskedLM,
    ),
    "deberta-v2": (
        "deberta-v2",
        _COMMON
        | _STILL
        | dict(
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=16,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            position_biased_input=False,
            type_vocab_size=0,
            pooler_dropout=0.0,
            pooler_hidden_size=64,
            max_relative_positions=-1,
        ),
        AutoModel,
    ),
}
DECODERS = {"llama": ("llama", ARCHITECTURES["llama"] | dict(vocab_size=VOCABULARY), AutoModelForCausalLM)}
FAMILIES = ENCODERS | DECODERS


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte that writes [CLS] a [SEP], and [CLS] a [SEP] b [SEP]."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 1), ("[SEP]", 2)]
    )
    names = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def save_headless(folder: Path, name: str, seed: int = 0, **changes) -> Path:
    """Write a tiny model of a family as it is published, without a head, and its tokenizer."""
    model_type, settings, auto = FAMILIES[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(settings | changes))
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    (byte_tokenizer(None) if name in DECODERS else encoder_tokenizer()).save_pretrained(folder)
    return folder


def labelled_rows(count: int, mark: str = "") -> list[dict]:
    """Rows of a text of one word, some times, and a label that says which."""
    words = "bad ", "GOOD "
    return [
        {"sentence": f"{mark}{number} {words[number % 2] * (1 + number % 5)}", "label": number % 2}
        for number in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def head_recipe(
    folder: Path, base: Path | str, kind: str = "classification", rows=None, eval_rows=None, **sections
) -> Path:
    """Write rows and a recipe of a run of a head that takes a second; ``sections`` are merged over its own."""
    folder.mkdir(parents=True, exist_ok=True)
    train = write_jsonl(folder / "train.jsonl", rows or labelled_rows(24))
    held_out = write_jsonl(folder / "eval.jsonl", eval_rows or labelled_rows(8, "e"))
    recipe = {
        "model": {"path": str(base), "compute_dtype": "float32", "device": "cpu"},
        "task": {"kind": kind},
        "lora": {"rank": 4, "alpha": 8, "dtype": "float32"},
        "data": {"train": str(train), "eval": str(held_out), "max_tokens": 96},
        "train": {"max_steps": 6, "learning_rate": 0.01, "optimizer": "adamw_torch"},
        "memory": {"checkpointing": "block", "micro_batches": "as-given"},
        "output": {"dir": str(folder / "out")},
    }
    return save_recipe(folder, recipe, sections)
