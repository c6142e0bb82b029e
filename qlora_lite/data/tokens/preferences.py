"""Join what a preference compares: a row's chosen and rejected answer, or an answer and one that belongs elsewhere.

The two are one example (see ``storage``), each behind the whole prompt. (Writing the prompt once and
both answers behind it, the other known way, needs an attention mask that neither fused kernels nor other tools have.)

KTO (arXiv 2402.01306) judges answers one by one, and measures them by how far the model has moved from its reference:
the mean log-ratio of answers that belong to other prompts. As in trl, each prompt gets the answer of the row before it;
of the first row of a thousand that are read at once, of the last of those.

Shapes: T tokens of a sequence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from qlora_lite.data.chat.conversation import Conversation
from qlora_lite.data.readers.problems import RowProblem

from .mask import Marked
from .statistics import Statistics
from .storage import Example, Examples, sequences_of, stored

OTHER_PROMPT = "prompts with other tokens"
SAME_ANSWERS = "chosen equal to rejected"
ONE_END = "end token in one answer only"
ONE_LABEL = "labels all alike"

_Made = Iterator[tuple[Conversation, Marked]]


def paired(made: _Made, statistics: Statistics) -> _Made:
    """Yield one example for each two of one row, that with the chosen answer first; note what cannot be compared.

    A row of which only one answer became an example has a problem already.
    """
    before: tuple[Conversation, Marked] | None = None
    for conversation, marked in made:
        if before is None or before[0].where != conversation.where:
            before = conversation, marked
            continue
        chosen, rejected = before[1].example, marked.example
        if fault := _fault(chosen, rejected, statistics.end_token_ids):
            statistics.problems.add(conversation.where, *fault)
        else:
            yield before[0], replace(marked, example=_joined(chosen, rejected))
        before = None


def _fault(chosen: Example, rejected: Example, end_ids: set[int]) -> tuple[str, str] | None:
    """Return what keeps two answers from being compared, and the name of that fault."""
    answers = [example.token_ids[_prompt_tokens(example) :] for example in (chosen, rejected)]
    prompts = [example.token_ids[: _prompt_tokens(example)] for example in (chosen, rejected)]
    if not np.array_equal(*prompts):
        return (
            "the prompt has other tokens before the rejected answer than before the chosen one; choose another "
            "data.template",
            OTHER_PROMPT,
        )
    if np.array_equal(*answers):
        return "the chosen and the rejected answer are the same; remove the row", SAME_ANSWERS
    chosen_ends, rejected_ends = (example.token_ids[example.is_target][-1] in end_ids for example in (chosen, rejected))
    if chosen_ends != rejected_ends:
        which = "chosen" if chosen_ends else "rejected"
        return f"only the {which} answer has an end token, which would decide the comparison", ONE_END
    return None


def _prompt_tokens(example: Example) -> int:
    """Return the tokens before the first target."""
    return int(example.is_target.argmax())


def _joined(first: Example, second: Example) -> Example:
    """Return an example of two sequences, with the texts of the first."""
    token_ids, is_target = (
        np.concatenate([getattr(each, name) for each in (first, second)]) for name in ("token_ids", "is_target")
    )
    return replace(first, token_ids=token_ids, is_target=is_target, first=len(first.token_ids))


def mismatched(made: Sequence[tuple[Conversation, Marked]], max_tokens: int) -> _Made:
    """Yield each example with its prompt before another row's answer as second sequence, cut to the room that is left.

    Args:
        max_tokens: of both sequences. One whose own sequence leaves no room is longer, for the caller to see.
    """
    for number, (conversation, marked) in enumerate(made):
        own, other = marked.example, made[number - 1][1].example
        prompt, answer = _prompt_tokens(own), slice(_prompt_tokens(other), None)
        room = max(1, max_tokens - len(own.token_ids) - prompt)
        tokens = np.concatenate([own.token_ids[:prompt], other.token_ids[answer][:room]])
        is_target = np.concatenate([np.zeros(prompt, np.bool_), other.is_target[answer][:room]])
        joined = _joined(own, replace(own, token_ids=tokens, is_target=is_target))
        yield conversation, replace(marked, example=replace(joined, desirable=conversation.desirable))


def check_labels(examples: Examples) -> RowProblem | None:
    """Return what is wrong with judgements of single answers that are all alike."""
    desirable = examples.rows[examples.order + 1, 7]
    if not len(desirable) or 0 < desirable.sum() < len(desirable):
        return None
    message = f"every label is {str(bool(desirable[0])).lower()}, so that nothing is told apart; add rows of the other"
    return RowProblem("", ONE_LABEL, message)


def answers_alone(examples: Examples, count: int | None = None) -> Examples:
    """Return the first sequences of examples whose answer is one to imitate, as rows for a language model.

    Args:
        count: the first ones, so many; None for all.
    """
    found = (sequences_of(example)[0] for example in examples if example.desirable)
    return stored(list(islice(found, count)))


def answered(examples: Examples, preference: str | None, count: int) -> Examples:
    """Return the first rows that are answered to measure a model.

    Args:
        preference: see ``Recipe.preference``; None where rows are not compared.
    """
    return answers_alone(examples, count) if preference else examples[:count]


def answer_tokens(examples: Examples) -> tuple[float, float]:
    """Return the mean target tokens of the first and of the second sequences: of chosen and of rejected answers."""
    first, total = examples.rows[examples.order + 1, 6], int(examples.target_counts.sum())
    starts = examples.rows[examples.order, 0]
    sums = np.concatenate([[0], np.cumsum(examples.is_target)])
    of_first = int((sums[starts + first] - sums[starts]).sum())
    return of_first / len(first), (total - of_first) / len(first)
