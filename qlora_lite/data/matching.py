"""Compare an answer with its reference: whole, or what a pattern extracts from both.

A chain of thought is worth its last line only, and "Positive." is the class positive. The rules are those of lm-eval's
strict-match filter: the first match counts, of a pattern with groups the first group that took part in it, and an
answer in which nothing is found is wrong. White space at the ends never counts.

Source: lm-evaluation-harness, filters/extraction.py (regex, take_first) and its exact_match metric.
"""

from dataclasses import dataclass

import regex

MATCH_SECONDS = 1.0  # for one text; an honest pattern takes microseconds


@dataclass(frozen=True, slots=True)
class Matching:
    """Say what of an answer is compared.

    ``regex`` and not ``re``, because only it can give up: some patterns take for ever on some texts.

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
