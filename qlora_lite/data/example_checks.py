"""Check the rows that training will see, after all reading, rendering, cutting and masking is done.

Faults of a single row are found where the row is made, and named there. The checks here look at the finished
examples once more, all of them and by plain comparison, because what is checked before a row is cut says nothing
about what is left of it (trl issue 6025), and because some faults belong to no row: an end token that is learned
nowhere, evaluation rows that stand in training too.

Examples are looked at in chunks, so that a million short rows take about a second and little memory.

Shapes: T tokens of a chunk of rows; ids int [T], learned bool [T], starts int [rows], the first token of each.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import regex

from .problems import RowProblem
from .storage import Example, Examples, sequence_starts, stored

NOTHING_TO_LEARN = "nothing to learn"
BEGIN_TWICE = "begin token twice"
END_NOT_LEARNED = "end token never learned"
NO_ANSWER = "no answer to match"
IN_BOTH = "evaluation row in training"
PROMPT_IN_BOTH = "evaluation prompt in training"
OVERLAP_ERROR_SHARE = 0.01  # from this share of the evaluation rows on, duplicates are an error
_ROWS_PER_CHUNK = 10_000
_SHOWN_ROWS = 5
MATCH_SECONDS = 1.0  # for one text; an honest pattern takes microseconds


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """Say how often one special token stands in the examples, and how often it is learned."""

    token_id: int
    count: int
    learned: int


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
    for rows, ids, learned, starts in _chunks(examples):
        for row in np.flatnonzero(~np.logical_or.reduceat(learned, starts)):
            message = "no token of this row is learned; give it an answer, raise data.max_tokens, or remove it"
            problems.append(RowProblem(rows[row].where, NOTHING_TO_LEARN, message))
        for row in _begin_twice(ids, starts, begin_id, sequence_starts(rows)):
            message = "begin-of-text stands twice; take it out of the chat template or of data.template"
            problems.append(RowProblem(rows[row].where, BEGIN_TWICE, message))
        end_seen = end_seen or bool(np.isin(ids[learned], list(end_ids)).any())
    if not end_seen:
        cure = "raise data.max_tokens if the rows are cut, or choose a data.template whose answers end with one"
        message = f"no row learns a token that ends it, so the model would never learn to stop; {cure}"
        problems.append(RowProblem("", END_NOT_LEARNED, message))
    return problems


def _chunks(examples: Sequence[Example]) -> Iterator[tuple[Examples, np.ndarray, np.ndarray, np.ndarray]]:
    examples = stored(examples)
    for first in range(0, len(examples), _ROWS_PER_CHUNK):
        rows = examples[first : first + _ROWS_PER_CHUNK]
        ids, learned = rows.joined()
        yield rows, ids, learned, np.cumsum(rows.lengths) - rows.lengths


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


@dataclass(frozen=True, slots=True)
class Matching:
    """Say what of an answer is compared with its reference: all of it, or what a pattern extracts from both.

    A chain of thought is worth its last line only, and "Positive." is the class positive. The first match counts, of a
    pattern with groups the first group that took part in it, and an answer in which nothing is found is wrong. White
    space at the ends never counts. ``regex`` and not ``re``, because only it can give up: some patterns take for ever
    on some texts.

    Source: lm-evaluation-harness, filters/extraction.py (regex, take_first) and its exact_match metric.

    Args:
        pattern: regular expression; None compares the whole text.
        ignore: regular expression of what is removed from the compared text; None removes nothing.
        ignore_case: whether letters are compared without their case.
    """

    pattern: str | None = None
    ignore: str | None = None
    ignore_case: bool = False

    def extract(self, text: str) -> str | None:
        """Return what of a text is compared; None where nothing is found, or nothing is left of it.

        Raises:
            TimeoutError: a pattern takes too long on this text.
        """
        if self.pattern is not None:
            found = regex.search(self.pattern, text, timeout=MATCH_SECONDS)
            if found is None:
                return None
            text = next((group for group in found.groups() if group is not None), found[0])
        if self.ignore is not None:
            text = regex.sub(self.ignore, "", text, timeout=MATCH_SECONDS)
        text = text.strip()
        return (text.casefold() if self.ignore_case else text) or None


WHOLE = Matching()  # compares whole texts


def check_answers(examples: Sequence[Example], matching: Matching) -> tuple[list[RowProblem], bool]:
    """Look for examples that exact match cannot compare, among those whose answers were asked for.

    Args:
        examples: those that were asked for.
        matching: how answers are compared.

    Returns:
        What is wrong, and whether nothing can be compared: one is plain text, or none has an answer to compare.
        Otherwise those that cannot be compared are left out.
    """
    without = [example for example in examples if not example.answer]
    if plain := next((example.where for example in without if not example.prompt), None):
        message = "has no answer to match; set train.metrics_examples (--rows) to 0 for plain text"
        return [RowProblem(plain, NO_ANSWER, message)], True
    found = []
    if without:
        message = (
            f"the answers of {len(without)} of {len(examples)} rows were cut off at data.max_tokens, and are not "
            "compared; raise it, or set train.metrics_examples (--rows) to 0"
        )
        found.append(RowProblem(without[0].where, NO_ANSWER, message))
    try:
        lacking = [example for example in examples if example.answer and not can_match(example, matching)]
    except TimeoutError:
        message = "a regular expression of exact match takes too long on an answer; write it without nested repeats"
        return [*found, RowProblem("", NO_ANSWER, message)], True
    if lacking:
        message = (
            f"the regular expressions of exact match find nothing to compare in the answers of {len(lacking)} of "
            f"{len(examples)} examples, this one's ending {lacking[0].answer[-40:]!r}, and leave those out"
        )
        found.append(RowProblem(lacking[0].where, NO_ANSWER, message))
    return found, len(without) + len(lacking) == len(examples) > 0


def can_match(example: Example, matching: Matching) -> bool:
    """Return whether exact match compares an example: it has an answer, in which there is something to compare.

    Raises:
        TimeoutError: a regular expression takes too long on it.
    """
    return bool(example.answer) and matching.extract(example.answer) is not None


def check_overlap(train: Sequence[Example], evaluation: Sequence[Example]) -> tuple[RowProblem | None, bool]:
    """Look for evaluation rows that are training rows too, token for token (of judged answers: and label for label).

    Args:
        train: the training rows.
        evaluation: the evaluation rows.

    Returns:
        What is wrong, if anything, and whether it is so much that evaluation means nothing (1 % and above).
    """
    places: dict[tuple, list[str]] = {}
    judged = is_judged(train, evaluation)
    for row in evaluation:
        places.setdefault(_content(row, judged), []).append(row.where)
    alike = np.flatnonzero(np.isin(signatures(train, judged), signatures(evaluation, judged))).tolist()
    twins = {key: row.where for row in map(train.__getitem__, alike) if (key := _content(row, judged)) in places}
    found = [(where, twins[key]) for key, wheres in places.items() if key in twins for where in wheres]
    if not found:
        return None, False
    shown = ", ".join(f"{where} is {twin}" for where, twin in found[:_SHOWN_ROWS])
    message = (
        f"{len(found)} of {len(evaluation)} evaluation rows are training rows too ({shown}"
        f"{', ...' if len(found) > _SHOWN_ROWS else ''}); remove them from data.train or data.eval"
    )
    return RowProblem(found[0][0], IN_BOTH, message), len(found) >= OVERLAP_ERROR_SHARE * len(evaluation)


def is_judged(*parts: Sequence[Example]) -> bool:
    """Return whether examples are judged one by one: one at least is not to be imitated (see ``check_labels``)."""
    return not all(each.rows[each.order + 1, 7].all() for each in map(stored, parts))


def _content(row: Example, judged: bool) -> tuple:
    ids = row.token_ids[: row.first] if judged else row.token_ids  # what follows is another row's answer
    return ids.tobytes(), row.desirable, *(picture.digest for picture in row.pictures)


def check_prompts(train: Sequence[Example], evaluation: Sequence[Example], is_share: bool = False) -> RowProblem | None:
    """Look for evaluation rows whose prompt is that of a training row with another answer.

    Rows that are training rows themselves are left to ``check_overlap``.

    Args:
        train: the training rows.
        evaluation: the evaluation rows.
        is_share: whether data.eval_share held them out.
    """
    (asked, is_asked), (learned, is_target) = prompt_signatures(evaluation), prompt_signatures(train)
    is_found = np.isin(asked, learned[is_target])
    if is_found.any():  # before all tokens are looked at again
        judged = is_judged(train, evaluation)
        is_found &= ~np.isin(signatures(evaluation, judged), signatures(train, judged))
    found = np.flatnonzero(is_found)
    if not len(found):
        return None
    first = int(found[0])
    twin = int(np.flatnonzero(is_target & (learned == asked[first]))[0])
    cure = "keep all rows of a prompt in one of data.train and data.eval"
    if is_share:
        cure = "data.eval_share splits one with many rows; for new prompts, name rows with others in data.eval"
    message = (
        f"{len(np.unique(asked[found]))} of {len(np.unique(asked[is_asked]))} evaluation prompts are also prompts of "
        f"training rows, with other answers (this row has that of {train[twin].where}): they do not show what the "
        f"model does with prompts that it never saw; {cure}"
    )
    return RowProblem(evaluation[first].where, PROMPT_IN_BOTH, message)


def prompt_signatures(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Return a number per row that rows with the same prompt share, int64 [rows], and which have one, bool [rows].

    Other rows share it by a rare chance only. The numbers hold within this process.
    """
    examples = stored(examples)
    starts, ends = examples.rows[examples.order, 2], examples.rows[examples.order + 1, 1]
    spans, pictures = zip(starts.tolist(), ends.tolist(), strict=True), examples.picture_digests
    texts = [examples.text[start:end].tobytes() for start, end in spans]
    content = zip(texts, pictures, strict=True) if pictures else texts
    return np.array(list(map(hash, content)), np.int64), ends > starts


def signatures(examples: Sequence[Example], judged: bool = False) -> np.ndarray:
    """Return a number per row that equal rows share, and others do by a rare chance only: uint64 [rows].

    Args:
        examples: the rows.
        judged: see ``is_judged``; such rows are equal by their own answers and labels, whichever row stands before.
    """
    found = [np.empty(0, np.uint64)]
    for rows, ids, _, starts in _chunks(examples):
        places = np.arange(len(ids)) - np.repeat(starts, rows.lengths)
        weights = scattered(np.arange(rows.lengths.max(), dtype=np.uint64))
        terms = (ids + 1).astype(np.uint64) * weights[places]
        if judged:
            first, desirable = rows.rows[rows.order + 1, 6:].T
            terms[places >= np.repeat(first, rows.lengths)] = 0
            terms[starts] += scattered(desirable.astype(np.uint64))
        found.append(np.add.reduceat(terms, starts))
        if pictures := rows.picture_digests:
            found[-1] ^= np.array([hash(each) & (2**64 - 1) for each in pictures], np.uint64)
    return np.concatenate(found)


def scattered(values: np.ndarray) -> np.ndarray:
    """Return numbers mixed so that near ones lie anywhere: uint64, as many.

    source: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def count_special_tokens(examples: Sequence[Example], special_ids: Collection[int]) -> list[SpecialToken]:
    """Count the special tokens that stand in the examples, the most frequent first."""
    width = max(special_ids, default=0) + 1
    counts, learned_counts = np.zeros(width, np.int64), np.zeros(width, np.int64)
    for _, ids, learned, _ in _chunks(examples):
        counts += np.bincount(ids[ids < width], minlength=width)
        learned_counts += np.bincount(ids[learned & (ids < width)], minlength=width)
    found = [SpecialToken(i, int(counts[i]), int(learned_counts[i])) for i in special_ids if counts[i]]
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
