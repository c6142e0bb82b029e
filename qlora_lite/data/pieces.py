"""Tokenise the texts of many conversations, and each piece that they share only once.

A text is cut before every special token, where a tokenizer cuts it too: it looks for special tokens first, and
normalises, splits and merges what stands between them piece by piece. So the tokens of the pieces, end to end, are
those of the whole. In chats a third of the text is the template's, the same pieces in every row; the bare call
tokenises them again for each. (Keeping tokens of earlier calls, the other known way, would need a bound and an
eviction; a call of a thousand rows repeats enough.)

A piece begins with its special token, so that it does not become the beginning of a text, before which some tokenizers
put a space. Where that is not enough, because special tokens take white space along or overlap, nothing is cut.

Shapes: R texts, T tokens of all of them. Characters are counted in all texts, end to end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class TextTokens:
    """Hold the tokens of many texts.

    Args:
        ids: int32 [T].
        starts: int64 [T], the first character of each token.
        ends: int64 [T], one past its last character.
        borders: int64 [R + 1], the first token of each text, then T.
        text_borders: int64 [R + 1], the first character of each text, then how many there are.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    borders: np.ndarray
    text_borders: np.ndarray


def can_be_cut(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Tell whether texts may be cut before each special token without changing their tokens."""
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
    """Tell whether a token can begin before a special token and take a part of it away."""
    return any(
        text[start:] in beginnings or any(text[start:end] in special for end in range(start + 1, len(text)))
        for start in range(1, len(text))
    )


def tokenise_rows(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, cut: re.Pattern[str] | None) -> TextTokens:
    """Tokenise texts that already hold their special tokens.

    Args:
        texts: what to tokenise, each at least one character.
        tokenizer: a fast tokenizer.
        cut: matches before which the texts are cut; None to leave them whole.
    """
    number_of: dict[str, int] = {}
    numbers, pieces_of_row = [], []
    for text in texts:
        pieces = _cut(text, cut) if cut else [text]
        numbers += [number_of.setdefault(piece, len(number_of)) for piece in pieces]
        pieces_of_row.append(len(pieces))
    ids, offsets, counts = _encode(list(number_of), tokenizer)
    characters = np.fromiter(map(len, number_of), np.int64, len(number_of))

    pieces = np.array(numbers)
    lengths = counts[pieces]
    piece_ends = np.cumsum(lengths)
    # Token t of the texts is token t - (first of its place) + (first of its piece) of the distinct pieces.
    shift = (np.cumsum(counts) - counts)[pieces] - (piece_ends - lengths)
    source = np.arange(piece_ends[-1]) + np.repeat(shift, lengths)
    text_ends = np.cumsum(characters[pieces])
    base = np.repeat(text_ends - characters[pieces], lengths)
    last_pieces = np.cumsum(pieces_of_row) - 1
    return TextTokens(
        ids=ids[source],
        starts=offsets[source, 0] + base,
        ends=offsets[source, 1] + base,
        borders=np.concatenate([[0], piece_ends[last_pieces]]),
        text_borders=np.concatenate([[0], text_ends[last_pieces]]),
    )


def _cut(text: str, cut: re.Pattern[str]) -> list[str]:
    starts = [match.start() for match in cut.finditer(text)]
    if not starts or starts[0]:
        starts.insert(0, 0)
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids int32 [T], offsets int64 [T, 2] and the number of tokens of each text: int64 [texts].

    The call is the one below transformers', which takes half as long again to repack the result.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    before, backend.encode_special_tokens = backend.encode_special_tokens, tokenizer.split_special_tokens
    try:
        encodings = backend.encode_batch(texts, add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    counts = np.fromiter(map(len, encodings), np.int64, len(encodings))
    total = int(counts.sum())
    ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, total)
    flat = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
    return ids, np.fromiter(flat, np.int64, 2 * total).reshape(-1, 2), counts
