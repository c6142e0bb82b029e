"""Make examples of many rendered rows at once, by the rules that ``mask`` has for one.

All rows' tokens lie end to end, and so do their characters: the tokens of a span are those between two places of a
sorted array, found for all spans in one call. A row about which there is any doubt (a token across a border, an end
that is no special token, other tokens before an answer than its prompt has, nothing to learn) is handed to ``mask``,
which decides it and says what is wrong. So the rules stand there alone, and this is a shortcut for rows that keep them.

Shapes: R rows, S spans of all rows, T tokens. Characters are counted in all rows' texts, end to end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_lite.errors import DataError

from .mask import Row, Tokens, mark_row
from .pieces import TextTokens, tokenise_rows
from .storage import Example
from .template import Template


@dataclass(frozen=True, slots=True)
class _Spans:
    """Hold spans of rows: row, first and last (one past the last character), each int64 [S], ascending."""

    row: np.ndarray
    first: np.ndarray
    last: np.ndarray


@dataclass(frozen=True, slots=True)
class Marked:
    """Hold the example of a row, and how many tokens it has up to the end of its last answer."""

    example: Example
    answered: int


def mark_rows(rows: Sequence[Row], template: Template, train_on_end: bool) -> tuple[list[Marked | DataError], set[int]]:
    """Tokenise rendered rows and mark what is learned.

    Args:
        rows: at least one.
        template: the one that they were rendered with.
        train_on_end: whether the tokens that end answers are learned.

    Returns:
        The example of each row, or what is wrong with it; the tokens that end the answers of good rows.
    """
    tokens = tokenise_rows([row.text for row in rows], template.tokenizer, template.cut, template.token_lengths)
    if _in_order(tokens):
        learned, doubtful, last_ends, end_ids = _mark(rows, tokens, template, train_on_end)
    else:
        learned, doubtful = np.zeros(len(tokens.ids), np.bool_), np.ones(len(rows), np.bool_)
        last_ends, end_ids = np.zeros(len(rows), np.int64), set()
    made: list[Marked | DataError] = []
    borders = tokens.borders.tolist()
    for index, row in enumerate(rows):
        start, end = borders[index], borders[index + 1]
        first = tokens.text_borders[index]
        ids, marks, last_end = tokens.ids[start:end], learned[start:end], last_ends[index]
        if doubtful[index]:
            of_row = Tokens(ids, tokens.starts[start:end] - first, tokens.ends[start:end] - first)
            try:
                marks, ends = mark_row(row, of_row, template, train_on_end)
            except DataError as error:
                made.append(error)
                continue
            end_ids.update(ids[ends].tolist())
            last_end = start + ends[-1]
        begin = row.answers[-1][0]
        answer = template.special.sub("", row.text[begin : tokens.starts[last_end] - first])
        made.append(Marked(Example(ids, marks, row.text[:begin], answer, row.where), int(last_end) - start + 1))
    return made, end_ids


def _in_order(tokens: TextTokens) -> bool:
    """Tell whether tokens follow each other in the text and every row has some, as all that is done here needs."""
    ascending = all((np.diff(places) >= 0).all() for places in (tokens.starts, tokens.ends))
    return bool(ascending and (np.diff(tokens.borders) > 0).all())


def _mark(
    rows: Sequence[Row], tokens: TextTokens, template: Template, train_on_end: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, set[int]]:
    """Return what is learned bool [T], which rows are in doubt bool [R], and what ends answers.

    The last two are the index of the token that ends each row's last answer, int64 [R], and the ids of all such tokens.
    """
    is_special = np.isin(tokens.ids, sorted(template.special_ids))
    spans = _spans([row.learned for row in rows], tokens)
    answers = _spans([row.answers for row in rows], tokens)
    doubtful = np.zeros(len(rows), np.bool_)

    begins, ends = _tokens_before(tokens, spans.row, spans.first), _tokens_before(tokens, spans.row, spans.last)
    count = len(tokens.ids)
    learned = np.cumsum(np.bincount(begins, minlength=count + 1) - np.bincount(ends, minlength=count + 1))[:-1] > 0
    learned[tokens.borders[:-1]] = False
    doubtful[spans.row[_is_torn(tokens, begins, spans.first) | _is_torn(tokens, ends, spans.last)]] = True
    doubtful |= ~np.logical_or.reduceat(learned, tokens.borders[:-1])

    places = _tokens_before(tokens, answers.row, answers.last) - 1
    doubtful[answers.row[(places < tokens.borders[answers.row]) | ~is_special[places]]] = True
    doubtful[answers.row[_has_other_prompt(rows, tokens, answers, is_special, template)]] = True
    last_ends = places[np.cumsum([len(row.answers) for row in rows]) - 1]
    places = places[~doubtful[answers.row]]
    if not train_on_end:
        learned[places] = False
    return learned, doubtful, last_ends, set(np.unique(tokens.ids[places]).tolist())


def _spans(of_rows: Sequence[Sequence[tuple[int, int]]], tokens: TextTokens) -> _Spans:
    row = np.repeat(np.arange(len(of_rows)), [len(spans) for spans in of_rows])
    flat = np.array([span for spans in of_rows for span in spans], np.int64).reshape(-1, 2)
    begin = tokens.text_borders[row]
    return _Spans(row, flat[:, 0] + begin, flat[:, 1] + begin)


def _tokens_before(tokens: TextTokens, row: np.ndarray, characters: np.ndarray) -> np.ndarray:
    """Count the tokens that begin before each character, those of earlier rows included: int64 [S]."""
    # A token without characters may stand at the end of a row, where the next one begins.
    return np.maximum(np.searchsorted(tokens.starts, characters), tokens.borders[row])


def _is_torn(tokens: TextTokens, places: np.ndarray, characters: np.ndarray) -> np.ndarray:
    """Tell for each span whether the token before a place reaches beyond a character: bool [S]."""
    return (places > 0) & (tokens.ends[places - 1] > characters)


def _has_other_prompt(
    rows: Sequence[Row], tokens: TextTokens, answers: _Spans, is_special: np.ndarray, template: Template
) -> np.ndarray:
    """Tell for each answer whether the tokens before it differ from those of its prompt alone: bool [S].

    Only the text from the last special token before the answer is looked at, as in ``mask.seam_fault``; is_special bool
    [T] says which tokens are.
    """
    after = _tokens_before(tokens, answers.row, answers.first)
    specials = np.flatnonzero(is_special)
    begin = tokens.borders[answers.row]
    if len(specials):
        nearest = np.searchsorted(specials, after) - 1
        begin = np.maximum(begin, np.where(nearest >= 0, specials[nearest], 0))
    first = np.where(after > begin, tokens.starts[np.minimum(begin, len(tokens.ids) - 1)], answers.first)
    offset = tokens.text_borders[answers.row]
    tails = [
        rows[row].text[start:end]
        for row, start, end in zip(
            answers.row.tolist(), (first - offset).tolist(), (answers.first - offset).tolist(), strict=True
        )
    ]
    distinct = list(dict.fromkeys(tails))
    alone = tokenise_rows(distinct, template.tokenizer, None)
    ids_of = {
        tail: alone.ids[start:end].tobytes()
        for tail, start, end in zip(distinct, alone.borders[:-1], alone.borders[1:], strict=True)
    }
    pairs = zip(tails, begin.tolist(), after.tolist(), strict=True)
    return np.array([ids_of[tail] != tokens.ids[start:end].tobytes() for tail, start, end in pairs], np.bool_)
