"""Compare answers with their references, by what a pattern extracts from both."""

from collections.abc import Sequence
from dataclasses import dataclass

import regex

from qlora_lite.data.readers.problems import RowProblem
from qlora_lite.data.tokens.storage import Example

NO_ANSWER = "no answer to match"
MATCH_SECONDS = 1.0  # for one text; an honest pattern takes microseconds


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
