"""What a GGUF file says about a tokenizer, so that llama.cpp makes the tokens that training saw.

Two kinds of byte-pair encoding are known there:

- ``gpt2``: over byte symbols, merges in order. How text is cut into words first is not in the file; it is named
  (``tokenizer.ggml.pre``), and the name is found here by comparing the tokenizer's own rule with those of the names.
- ``llama``: SentencePiece, over characters with a fallback to bytes. llama.cpp joins the pair whose result has the
  highest score, transformers the pair that is first in its merges: the score is minus the place of the merge.

Token types: 1 ordinary, 2 unknown, 3 control (special), 4 added as text, 5 unused, 6 a byte.
"""

import json
from dataclasses import dataclass

from qlora_lite.data.chat.template import begin_of_text
from qlora_lite.errors import ModelError

ORDINARY, UNKNOWN, CONTROL, ADDED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # what SentencePiece writes for a space

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"  # one character that may stick to the front of a word
_SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _BEFORE + r"\p{L}+|"
_SIGNS, _BLANKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|", r"\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names of the rules that cut text into words, by the rules themselves, as the tokenizer.json of each
# family has them. "bytes" is the ByteLevel step with its own rule (GPT-2's), "digits" a cut at every digit.
PRE_TOKENIZERS = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_SHORT_FORMS + r"\p{N}{1,3}" + _SIGNS + _BLANKS,): "llama-bpe",
    (_SHORT_FORMS + r"\p{N}" + _SIGNS + _BLANKS,): "qwen2",
    (
        f"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _BLANKS,
    ): "tekken",
}


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """A tokenizer as GGUF describes it: ``merges`` for the kind "gpt2", ``scores`` for the kind "llama"."""

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    adds_space: bool


def describe_tokenizer(tokenizer, size: int) -> GgufTokenizer:
    """Describe a fast tokenizer.

    Args:
        size: of the model's vocabulary; places without a token are marked unused.

    Raises:
        ModelError: llama.cpp has no tokenizer of this kind.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ModelError(f"llama.cpp has no tokenizer of the kind {model['type']} that is exported here")
    merges = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    pairs: list[tuple[str, ...]] = [tuple(merge) for merge in merges]
    is_sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = _tokens(tokenizer, model, size, is_sentencepiece)
    if not pairs:
        raise ModelError("llama.cpp reads no tokenizer without merges")
    if not is_sentencepiece:
        return GgufTokenizer("gpt2", _pre_tokenizer(backend), tokens, types, [" ".join(p) for p in pairs], [], False)
    first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0]
    return GgufTokenizer("llama", "default", tokens, types, [], _scores(tokens, types, pairs), first.startswith(SPACE))


def _tokens(tokenizer, model: dict, size: int, is_sentencepiece: bool) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    if len(model["vocab"]) > size:
        raise ModelError(f"the tokenizer has {len(model['vocab'])} tokens, the model's vocabulary {size}")
    for token, number in model["vocab"].items():
        is_byte = is_sentencepiece and len(token) == 6 and token.startswith("<0x")
        tokens[number], types[number] = token, BYTE if is_byte else ORDINARY
    for number, added in tokenizer.added_tokens_decoder.items():
        text = added.content
        if number >= size:  # transformers adds some by habit; without an embedding, no row can have held them
            continue
        if is_sentencepiece and not added.special:
            text = text.replace(SPACE, " ")  # llama.cpp looks for these in the text as it is written
        tokens[number], types[number] = text, CONTROL if added.special else ADDED
    if is_sentencepiece and (unknown := tokenizer.unk_token_id) is not None:
        types[unknown] = UNKNOWN
    return tokens, types


def _scores(tokens: list[str], types: list[int], pairs: list[tuple[str, ...]]) -> list[float]:
    places: dict[str, int] = {}
    for place, (left, right) in enumerate(pairs):
        places.setdefault(left + right, place)
    last = len(pairs)  # of single characters, which no merge makes
    return [
        -float(places.get(token, last)) if kind == ORDINARY else 0.0 for token, kind in zip(tokens, types, strict=True)
    ]


def _pre_tokenizer(backend: dict) -> str:
    """Return llama.cpp's name for the rule that cuts text into words."""
    if (normalizer := backend.get("normalizer")) and normalizer["type"] != "NFC":
        raise ModelError(f"llama.cpp does not normalise text as this tokenizer does ({normalizer['type']})")
    steps = backend.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    rules = tuple(rule for step in steps if (rule := _rule(step)))
    if (name := PRE_TOKENIZERS.get(rules)) is None:
        raise ModelError(f"no llama.cpp pre-tokenizer is known here for the way this tokenizer splits words: {rules}")
    return name


def _rule(step: dict) -> str:
    kind = step.get("type")
    if kind == "ByteLevel":
        return "bytes" if step.get("use_regex", True) else ""
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return step["pattern"].get("Regex", "")
    return str(kind)


def write_tokenizer(writer, tokenizer, size: int, end_token_ids: tuple[int, ...], adds_begin: bool | None) -> None:
    """Write a tokenizer, its special tokens and its chat template.

    Args:
        writer: a ``gguf.GGUFWriter``.
        size: of the model's vocabulary.
        end_token_ids: tokens that training taught as ends of an answer.
        adds_begin: whether begin-of-text goes before every text; None does as the tokenizer does.

    Raises:
        ModelError: see ``describe_tokenizer``.
    """
    described = describe_tokenizer(tokenizer, size)
    writer.add_tokenizer_model(described.kind)
    writer.add_tokenizer_pre(described.pre)
    writer.add_token_list(described.tokens)
    writer.add_token_types(described.types)
    if described.kind == "gpt2":
        writer.add_token_merges(described.merges)
    else:
        writer.add_token_scores(described.scores)
        writer.add_add_space_prefix(described.adds_space)
    ends = [token for token in end_token_ids if token != tokenizer.eos_token_id]
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_eot_token_id, ends[0] if ends else None),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(bool(begin_of_text(tokenizer)) if adds_begin is None else adds_begin)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
