"""Find evaluation rows, and evaluation prompts, that stand in training too.

Rows are compared by a number each, so that a million short ones take about a second and little memory.
"""

from collections.abc import Sequence

import numpy as np

from qlora_lite.data.readers.problems import RowProblem
from qlora_lite.data.tokens.example_checks import in_chunks
from qlora_lite.data.tokens.storage import Example, stored

IN_BOTH = "evaluation row in training"
PROMPT_IN_BOTH = "evaluation prompt in training"
OVERLAP_ERROR_SHARE = 0.01  # from this share of the evaluation rows on, duplicates are an error
_SHOWN_ROWS = 5


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
    (asked, is_asked), (given, is_target) = prompt_signatures(evaluation), prompt_signatures(train)
    is_found = np.isin(asked, given[is_target])
    if is_found.any():  # before all tokens are looked at again
        judged = is_judged(train, evaluation)
        is_found &= ~np.isin(signatures(evaluation, judged), signatures(train, judged))
    found = np.flatnonzero(is_found)
    if not len(found):
        return None
    first = int(found[0])
    twin = int(np.flatnonzero(is_target & (given == asked[first]))[0])
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
    found: list[np.ndarray] = [np.empty(0, np.uint64)]
    for rows, ids, _, starts in in_chunks(examples):
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
