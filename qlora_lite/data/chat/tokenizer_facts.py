"""Find where texts of a tokenizer may be cut, and how many characters its tokens cover, for ``tokenise``."""

import json
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import models

if TYPE_CHECKING:  # transformers takes seconds to import, and a check of a recipe needs none of it
    from transformers import PreTrainedTokenizerFast

_KEEPING = ("NFC", "NFKC", "Prepend", "ByteLevel", "Metaspace", "Split", "Digits")
_MANY = 1 << 32  # more than any text has


def can_be_cut(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Return whether texts may be cut before each special token without changing their tokens."""
    tokens = list(tokenizer.added_tokens_decoder.values())
    special = [token for token in tokens if token.special]
    if tokenizer.split_special_tokens or any(token.lstrip or token.normalized for token in special):
        return False
    texts = {token.content for token in special}
    beginnings = {text[:end] for text in texts for end in range(1, len(text) + 1)}
    # Tokens that are found after normalising lie between two special ones.
    return not any(
        token.single_word or _reaches_into(token.content, texts, beginnings) for token in tokens if not token.normalized
    )


def _reaches_into(text: str, special: set[str], beginnings: set[str]) -> bool:
    """Return whether a token can begin before a special token and take a part of it away."""
    return any(
        text[start:] in beginnings or any(text[start:end] in special for end in range(start + 1, len(text)))
        for start in range(1, len(text))
    )


def lengths_of_tokens(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray | None:
    """Return how many characters of an ASCII text each token covers: int64 [tokens]; None if that cannot be said.

    It is as many as the token has letters, in byte-level BPE and in that of SentencePiece. Where a token has more than
    it covers (a space put before the text, "<0x0A>" for a line end, the unknown token), it is too many. It is too few
    where a model leaves out letters that it has no token for, and where a token takes white space along. A tokenizer
    that can do both has no lengths; so those that add up to the length of the text are right.
    """
    backend = tokenizer.backend_tokenizer
    model = backend.model
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    before = [*_steps(backend.normalizer), *_steps(backend.pre_tokenizer)]
    after = _steps(backend.post_processor)
    if any(map(_loses_letters, before)) or any(step.get("trim_offsets") for step in after):
        return None
    adds = any(step["type"] in ("Prepend", "Metaspace") or step.get("add_prefix_space") for step in before)
    swallows = any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values())
    if (swallows or model.unk_token is None) and (adds or model.byte_fallback):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    lengths[list(vocabulary.values())] = [len(token) for token in vocabulary]
    if model.unk_token is not None:
        lengths[vocabulary[model.unk_token]] = _MANY
    return lengths


def _steps(part: object) -> list[dict]:
    """Return what a part of a tokenizer consists of."""
    state = json.loads(part.__getstate__()) if part is not None else {"type": "Sequence"}
    if state["type"] != "Sequence":
        return [state]
    lists = [value for value in state.values() if isinstance(value, list)]
    return [step for steps in lists for step in steps]


def _loses_letters(step: dict) -> bool:
    """Return whether a step could take away letters of an ASCII text, or make one of several."""
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "")) != len(step["content"])
    return step["type"] not in _KEEPING or step.get("behavior") == "Removed"
