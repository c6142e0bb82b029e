"""Check the rows that training will see, after all reading, rendering, cutting and masking is done.

Faults of a single row are found where the row is made, and named there. The checks here look at the finished
examples once more, all of them and by plain comparison, because what is checked before a row is cut says nothing
about what is left of it (trl issue 6025), and because some faults belong to no row: an end token that is learned
nowhere.

Examples are looked at in chunks, so that a million short rows take about a second and little memory.

Shapes: T tokens of a chunk of rows; ids int [T], learned bool [T], starts int [rows], the first token of each.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qlora_lite.data.readers.problems import RowProblem

from .storage import Example, Examples, sequence_starts, stored

NOTHING_TO_LEARN = "nothing to learn"
BEGIN_TWICE = "begin token twice"
END_NOT_LEARNED = "end token never learned"
_ROWS_PER_CHUNK = 10_000


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """Say how often one special token stands in the examples, and how often it is learned."""

    token_id: int
    count: int
    targets: int


def check_examples(
    examples: Sequence[Example], begin_id: int | None, end_ids: Collection[int], end_is_target: bool = True
) -> list[RowProblem]:
    """Look for rows without a target token, a doubled begin-of-text, and an end token that is never learned.

    Args:
        examples: what training will use.
        begin_id: the begin-of-text token, if the tokenizer has one.
        end_ids: the tokens that end answers and documents.
        end_is_target: False where the recipe says that they are not to be learned.

    Returns:
        One problem per row and fault, and one for the set.
    """
    problems = []
    end_seen = not end_is_target or len(examples) == 0
    for rows, ids, is_target, starts in in_chunks(examples):
        for row in np.flatnonzero(~np.logical_or.reduceat(is_target, starts)):
            message = "no token of this row is learned; give it an answer, raise data.max_tokens, or remove it"
            problems.append(RowProblem(rows[row].where, NOTHING_TO_LEARN, message))
        for row in _begin_twice(ids, starts, begin_id, sequence_starts(rows)):
            message = "begin-of-text stands twice; take it out of the chat template or of data.template"
            problems.append(RowProblem(rows[row].where, BEGIN_TWICE, message))
        end_seen = end_seen or bool(np.isin(ids[is_target], list(end_ids)).any())
    if not end_seen:
        cure = "raise data.max_tokens if the rows are cut, or choose a data.template whose answers end with one"
        message = f"no row learns a token that ends it, so the model would never learn to stop; {cure}"
        problems.append(RowProblem("", END_NOT_LEARNED, message))
    return problems


def in_chunks(examples: Sequence[Example]) -> Iterator[tuple[Examples, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield examples some thousands at a time, with ids int [T], learned bool [T] and starts int [rows] of them."""
    examples = stored(examples)
    for first in range(0, len(examples), _ROWS_PER_CHUNK):
        rows = examples[first : first + _ROWS_PER_CHUNK]
        ids, is_target = rows.joined()
        yield rows, ids, is_target, np.cumsum(rows.lengths) - rows.lengths


def _begin_twice(ids: np.ndarray, starts: np.ndarray, begin_id: int | None, beginnings: np.ndarray) -> list[int]:
    """Return the rows in which begin-of-text follows itself; the last of one sequence and the first of the next do not.

    Args:
        starts: of rows.
        beginnings: of sequences.
    """
    if begin_id is None:
        return []
    second = np.flatnonzero((ids[1:] == begin_id) & (ids[:-1] == begin_id)) + 1
    second = second[~np.isin(second, beginnings)]
    return sorted(set((np.searchsorted(starts, second, side="right") - 1).tolist()))


def count_special_tokens(examples: Sequence[Example], special_ids: Collection[int]) -> list[SpecialToken]:
    """Count the special tokens that stand in the examples, the most frequent first."""
    width = max(special_ids, default=0) + 1
    counts, target_counts = np.zeros(width, np.int64), np.zeros(width, np.int64)
    for _, ids, is_target, _ in in_chunks(examples):
        counts += np.bincount(ids[ids < width], minlength=width)
        target_counts += np.bincount(ids[is_target & (ids < width)], minlength=width)
    found = [SpecialToken(i, int(counts[i]), int(target_counts[i])) for i in special_ids if counts[i]]
    return sorted(found, key=lambda token: (-token.count, token.token_id))


def histogram(lengths: Sequence[int], bars: int = 16) -> list[tuple[int, int, int]]:
    """Count lengths in equal ranges whose width is 1, 2 or 5 times a power of ten.

    Args:
        lengths: tokens of each row, each at least 1.
        bars: at most this many ranges.

    Returns:
        (first length, last length, rows) of each range, from the shortest row's to the longest's; ranges
        between them that hold no row are there too.
    """
    if not lengths:
        return []
    shortest, longest = min(lengths), max(lengths)
    width = next(
        w
        for power in range(19)
        for w in (10**power, 2 * 10**power, 5 * 10**power)
        if longest // w - shortest // w < bars
    )
    first = shortest // width
    counts = np.bincount(np.asarray(lengths) // width - first, minlength=longest // width - first + 1)
    return [((first + i) * width, (first + i + 1) * width - 1, int(count)) for i, count in enumerate(counts)]
