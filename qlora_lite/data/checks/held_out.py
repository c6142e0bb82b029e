"""Hold a share of the training rows out for evaluation.

Rows are chosen by the numbers of their file and line (and row, where a line holds several) and by which of them must
stay together, whatever the seed is.
Which must, the rendered rows say: another template, prompt or data.max_tokens may group them otherwise, and then other
rows are held out; ``compare`` looks where they are.
Rows that are alike token for token, and the parts of a split row, stay on one side together: what was learned is no
measure of what was not. So do rows with the same prompt, which for a conversation is all that stands before its last
answer: a system text or a greeting that many share makes no prompt of its own. A prompt with more rows than a quarter
of what is to be held out (one instruction for all rows, say) would be too much of what is measured, or a task that is
left unlearned: its rows are held out one by one, and the preflight says which prompts are on both sides.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.tokens.example_checks import NOTHING_TO_LEARN
from qlora_lite.data.tokens.examples import Dataset
from qlora_lite.data.tokens.storage import Examples

from .overlap import is_judged, prompt_signatures, scattered, signatures

HELD_OUT = "held out for evaluation (data.eval_share)"
PROMPT_SHARE = 0.25  # of the rows to hold out: a prompt with more is not kept together


def hold_out(data: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Return the training rows without a share of them, and that share, each row once whatever its weight.

    Args:
        data: training rows; what is wrong with them stays with the first part.
        share: of the rows, above 0 and below 1; more are taken only where else none could be.

    Returns:
        Training and evaluation rows. Where no row can be spared, none is, and the first part says so as a problem.
    """
    rows, sources = np.unique(data.examples.order, return_index=True)
    source_of: np.ndarray = np.asarray(np.searchsorted(np.cumsum(data.examples_of), sources, side="right"))
    is_held = _chosen(replace(data.examples, order=rows), share)
    held: np.ndarray = np.extract(is_held, rows)
    kept: np.ndarray = ~np.isin(data.examples.order, held)
    train_of = [int(part.sum()) for part in np.split(kept, np.cumsum(data.examples_of)[:-1])]
    eval_of = np.bincount(source_of[is_held], minlength=len(data.examples_of)).tolist()
    training = _with(data, data.examples.order[kept], train_of)
    places = len(np.unique(data.examples.rows[held + 1, 3:6], axis=0))  # a split row is one, whatever its parts
    training.dropped.update({HELD_OUT: places} if places else {})
    evaluation = replace(
        _with(data, held, eval_of),
        rows_read=places,
        dropped={},
        dropped_at={},
        truncated=0,
        split=0,
        problems=Problems(),
    )
    if len(rows) and not places:
        message = (
            "no row can be held out for data.eval_share: there is one only, or all are alike; name evaluation "
            "rows in data.eval"
        )
        training.problems.add("", message, NOTHING_TO_LEARN, fatal=True)
    return training, evaluation


def _chosen(examples: Examples, share: float) -> np.ndarray:
    """Return which of distinct rows are held out: bool [rows]."""
    wanted = max(round(share * len(examples)), 1)
    places: np.ndarray = examples.rows[examples.order + 1, 3:6].astype(np.uint64)
    file, line, row = places.T
    numbers = scattered(file << np.uint64(40) | line) ^ np.where(row > 0, scattered(row), np.uint64(0))
    same = signatures(examples, is_judged(examples))
    alike = [np.unique(each, return_inverse=True)[1] for each in (numbers, same, _by_prompt(examples, wanted))]
    groups = _groups(numbers, alike)
    keys, sizes = np.unique(groups, return_counts=True)
    fewest = int(sizes.min(initial=len(groups)))
    left, taken = min(max(wanted, fewest), len(groups) - fewest), []  # one group at least is left
    for key, size in zip(keys.tolist(), sizes.tolist(), strict=True):
        if size <= left:
            taken.append(key)
            left -= size
    return np.isin(groups, np.array(taken, np.uint64))


def _by_prompt(examples: Examples, wanted: int) -> np.ndarray:
    """Return a number per row that rows share whose prompt keeps them together: int64 [rows].

    Args:
        examples: distinct rows.
        wanted: rows to hold out.
    """
    prompts, has_prompt = prompt_signatures(examples)
    _, kinds, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    is_kept = has_prompt & (sizes[kinds] <= PROMPT_SHARE * wanted)
    return np.where(is_kept, prompts, np.arange(len(prompts)))


def _groups(numbers: np.ndarray, alike: Sequence[np.ndarray]) -> np.ndarray:
    """Return the least number of all rows that must stay together with each row: uint64 [rows].

    Args:
        numbers: a random one of each row, uint64 [rows].
        alike: for each way to be alike, what rows that are so share, int [rows], counted from 0.
    """
    groups = numbers
    while True:
        before = groups
        for members in alike:
            least: np.ndarray = np.full(len(groups), np.iinfo(np.uint64).max, np.uint64)
            np.minimum.at(least, members, groups)
            groups = least[members]
        if np.array_equal(before, groups):
            return groups


def _with(data: Dataset, order: np.ndarray, examples_of: list[int]) -> Dataset:
    """Return a data set with other examples of the same rows."""
    examples = replace(data.examples, order=order)
    return replace(
        data,
        examples=examples,
        rows_kept=len(examples),
        examples_of=tuple(examples_of),
        dropped=dict(data.dropped),
        tokens=int(examples.lengths.sum()),
        target_tokens=int(examples.target_counts.sum()),
    )
