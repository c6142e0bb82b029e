"""Tokenise the texts of many conversations, and each piece that they share only once.

A text is cut before every special token, where a tokenizer cuts it too: it looks for special tokens first, and
normalises, splits and merges what stands between them piece by piece. So the tokens of the pieces, end to end, are
those of the whole. In chats a third of the text is the template's, the same pieces in every row; the bare call
tokenises them again for each. (Keeping tokens of earlier calls, the other known way, would need a bound and an
eviction; a call of a thousand rows repeats enough.)

Where a token stands in the text follows from the lengths of the tokens before it, for most tokenizers and texts of
ASCII letters; the tokenizer's own answer takes a quarter of the time.

A piece begins with its special token, so that it does not become the beginning of a text, before which some tokenizers
put a space. Where that is not enough, because special tokens take white space along or overlap, nothing is cut.

Shapes: R texts, T tokens of all of them. Characters are counted in all texts, end to end.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Encoding, Tokenizer

if TYPE_CHECKING:  # transformers takes seconds to import, and a check of a recipe needs none of it
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


def tokenise_rows(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerFast",
    cut: re.Pattern[str] | None,
    token_lengths: np.ndarray | None = None,
) -> TextTokens:
    """Tokenise texts that already hold their special tokens.

    Args:
        texts: what to tokenise, each at least one character.
        tokenizer: a fast tokenizer.
        cut: matches before which the texts are cut; None to leave them whole.
        token_lengths: from ``lengths_of_tokens``; None to ask the tokenizer where in the text its tokens stand.
    """
    number_of: dict[str, int] = {}
    numbers, pieces_of_row = [], []
    for text in texts:
        pieces = _cut(text, cut) if cut else [text]
        numbers += [number_of.setdefault(piece, len(number_of)) for piece in pieces]
        pieces_of_row.append(len(pieces))
    ids, offsets, counts = _encode(list(number_of), tokenizer, token_lengths)
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


def _encode(
    texts: list[str], tokenizer: "PreTrainedTokenizerFast", token_lengths: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids int32 [T], offsets int64 [T, 2] and the number of tokens of each text: int64 [texts].

    The calls are those below transformers', which takes half as long again to repack the result.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    before, backend.encode_special_tokens = backend.encode_special_tokens, tokenizer.split_special_tokens
    try:
        if token_lengths is None:
            return _arrays(backend.encode_batch(texts, add_special_tokens=False))
        return _encode_by_lengths(texts, backend, token_lengths)
    finally:
        backend.encode_special_tokens = before


def _encode_by_lengths(texts: list[str], backend: Tokenizer, token_lengths: np.ndarray) -> tuple[np.ndarray, ...]:
    """Encode without offsets where lengths give them."""

    def located(indices: list[int]) -> dict[int, Encoding]:
        chosen = [texts[index] for index in indices]
        return dict(zip(indices, backend.encode_batch(chosen, add_special_tokens=False), strict=True))

    with_offsets = located([index for index, text in enumerate(texts) if not text.isascii()])
    rest = [text for index, text in enumerate(texts) if index not in with_offsets]
    fast = iter(backend.encode_batch_fast(rest, add_special_tokens=False))
    encodings = [with_offsets[index] if index in with_offsets else next(fast) for index in range(len(texts))]
    counts = _counts(encodings)
    ids = _ids(encodings, counts)

    lengths = token_lengths[ids]
    ends = np.cumsum(lengths)
    borders = np.concatenate([[0], np.cumsum(counts)])
    characters = np.concatenate([[0], ends])[borders]  # before each text, by the lengths of tokens
    ends -= np.repeat(characters[:-1], counts)
    offsets = np.stack([ends - lengths, ends], axis=1)
    sums = np.diff(characters).tolist()
    with_offsets |= located([i for i, text in enumerate(texts) if sums[i] != len(text) and i not in with_offsets])
    for index, encoding in with_offsets.items():
        offsets[borders[index] : borders[index + 1]] = _offsets([encoding], len(encoding))
    return ids, offsets, counts


def _arrays(encodings: list[Encoding]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = _counts(encodings)
    return _ids(encodings, counts), _offsets(encodings, int(counts.sum())), counts


def _offsets(encodings: list[Encoding], count: int) -> np.ndarray:
    flat = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
    return np.fromiter(flat, np.int64, 2 * count).reshape(-1, 2)


def _counts(encodings: list[Encoding]) -> np.ndarray:
    return np.fromiter(map(len, encodings), np.int64, len(encodings))


def _ids(encodings: list[Encoding], counts: np.ndarray) -> np.ndarray:
    return np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, int(counts.sum()))
