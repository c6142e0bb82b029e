"""Turn a batch back into text, so that a person can see which tokens are learned.

It reads the tensors that the model gets, labels included, and nothing that came before them: what it shows is what
training sees, and a fault anywhere on the way shows too.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerFast

from .batch import IGNORED_LABEL, Batch


@dataclass(frozen=True, slots=True)
class Piece:
    """Hold a stretch of text whose tokens are alike; a special token is a piece of its own."""

    text: str
    learned: bool
    special: bool


def pieces_of(batch: Batch, tokenizer: PreTrainedTokenizerFast, special_ids: Collection[int]) -> list[list[Piece]]:
    """Cut each row of a batch into pieces of learned and of masked text.

    Args:
        batch: rows as they go into the model.
        tokenizer: decodes them.
        special_ids: the tokens to show one by one.

    Returns:
        The pieces of each row; their texts joined are the row's text.
    """
    rows, start = [], 0
    for length in batch.row_lengths:
        ids = batch.input_ids[0, start : start + length].tolist()
        labels = batch.labels[start : start + length].tolist()
        learned = [False, *(label != IGNORED_LABEL for label in labels[:-1])]  # labels[t] is token t + 1
        rows.append(_pieces_of_row(ids, learned, tokenizer, special_ids))
        start += length
    return rows


def _pieces_of_row(
    ids: list[int], learned: list[bool], tokenizer: PreTrainedTokenizerFast, special_ids: Collection[int]
) -> list[Piece]:
    def kind(place: int) -> tuple[bool, bool, int]:
        special = ids[place] in special_ids
        return learned[place], special, place if special else -1

    pieces, text = [], ""
    for (is_learned, special, _), places in groupby(range(len(ids)), kind):
        upto = list(places)[-1] + 1
        # Decoded from the row's beginning: many tokenizers drop the space before the first token they decode.
        longer = tokenizer.decode(ids[:upto], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if upto < len(ids):
            longer = longer.rstrip("\ufffd")  # a letter of several tokens belongs to the piece that completes it
        pieces.append(Piece(longer[len(text) :], is_learned, special))
        text = longer
    return pieces
