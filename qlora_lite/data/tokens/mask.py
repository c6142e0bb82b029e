"""Tokenise rendered rows once as a whole and mark the tokens to learn, by the characters each token covers.

Counting the tokens of prompt and answer apart and adding them up, the other known way, is off by a token
wherever the two join; a token here is learned or not by its place in the text. Where an answer begins, the
tokens before it must be the ones that the prompt alone gives, because those are what the model sees when it
answers. A row for which they are not is an error.

Many rows are marked at once (``mark_rows``): all their tokens are concatenated, and so are their characters, and the
tokens of a span are those between two places of a sorted array, found for all spans in one call. A row about which
there is any doubt (a token across a border, an end that is no special token, other tokens before an answer than its
prompt has, nothing to learn) is left to ``mark_row``, which decides it and says what is wrong. So the rules stand there
alone, and the rest is a shortcut for rows that keep them.

Shapes: T tokens of a row, or of all rows; R rows, S spans. Characters are counted in the rendered text, or in those of
all rows, end to end; spans are (first, one past the last).
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING

import numpy as np

from qlora_lite.data.chat.conversation import Conversation
from qlora_lite.data.chat.render import END_OF_ANSWER, TEMPLATE, Ahead, render
from qlora_lite.data.chat.template import Template
from qlora_lite.errors import DataError

from .example_checks import NOTHING_TO_LEARN
from .storage import Example, PictureFile
from .tokenise import TextTokens, tokenise_rows

if TYPE_CHECKING:  # transformers takes seconds to import, and a check of a recipe needs none of it
    from transformers import PreTrainedTokenizerFast

MASK = "token cut by the mask"
_CURE_OF_SEAM = (
    "remove white space from the start of the answer (of data.template joined: from the end of the prompt, and begin "
    "the answer with it), or choose another data.template"
)
_SEAM = (
    "the tokens before an answer (after {tail!r}) are not those that the prompt alone gives, so training "
    f"would not see what the model sees when it answers; {_CURE_OF_SEAM}"
)


@dataclass(frozen=True, slots=True)
class Row:
    """Hold a rendered conversation.

    Args:
        text: all of it, special tokens included.
        targets: the spans of characters to learn.
        answers: the spans of answers, end token included; the last answer is always among them.
        where: the row's place.
        pictures: those that are in the text.
    """

    text: str
    targets: tuple[tuple[int, int], ...]
    answers: tuple[tuple[int, int], ...]
    where: str
    pictures: tuple[PictureFile, ...] = ()


@dataclass(frozen=True, slots=True)
class Tokens:
    """Hold the tokens of a text.

    Args:
        ids: int32 [T].
        starts: int64 [T], the first character of each token.
        ends: int64 [T], one past its last character.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def answers_of(conversation: Conversation, train_on: str, train_on_end: bool = True) -> tuple[list[int], list[int]]:
    """Choose the answers to learn, and those whose characters must be known for it.

    Of train_on all, none to learn: everything is, but for the turns that are left out, whose characters must be known.

    Args:
        conversation: the row.
        train_on: see ``examples.read_examples``.
        train_on_end: see ``render_row``.

    Raises:
        DataError: there is nothing to learn.
    """
    turns = conversation.turns
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    if train_on == "completion" and (count := sum(turns[index].is_target for index in answers)) > 1:
        raise DataError(
            f"train_on completion needs rows with one answer, this has {count}; set data.train_on to assistant or last"
        )
    wanted = answers[-1:] if train_on == "last" else answers
    targets = [index for index in wanted if turns[index].is_target]
    if not targets and train_on != "all":
        fault = "nothing to learn: every answer that counts has weight 0 or train false; give one 1 or true"
        raise DataError(fault, NOTHING_TO_LEARN)
    if train_on == "all":
        return [], [i for i in answers if i == answers[-1] or turns[i].left_out or not train_on_end]
    return targets, sorted({*targets, answers[-1]})


def render_row(
    conversation: Conversation,
    template: Template,
    train_on: str,
    train_on_end: bool = True,
    ahead: Ahead | None = None,
) -> Row:
    """Render a conversation and choose the characters to learn, end tokens among them.

    Args:
        conversation: the row.
        template: how to write it.
        train_on: see ``examples.read_examples``.
        train_on_end: False if the caller needs every end token's place, to unlearn it.
        ahead: see ``render.render``.

    Raises:
        DataError: there is nothing to learn, or the template fails (see ``render.render``).
    """
    turns = conversation.turns
    targets, needed = answers_of(conversation, train_on, train_on_end)
    rendering = render(template, conversation, needed, ahead)
    spans = [rendering.answers[index] for index in targets]
    if train_on == "all":
        left_out = [rendering.answers[index] for index in needed if turns[index].left_out]
        holes = [(first, _before_special(rendering.text, last, template)) for first, last in left_out]
        spans = [*_without((0, len(rendering.text)), holes)]
    found = tuple(rendering.answers[index] for index in needed)
    return Row(rendering.text, tuple(spans), found, conversation.where)


def with_pictures(row: Row, picture: str, shown: Sequence[tuple[PictureFile, str]]) -> Row:
    """Return a rendered conversation in which each picture is written out, and never learned.

    Args:
        picture: what the template wrote for each.
        shown: the pictures, each with the text that stands for it.

    Raises:
        DataError: the template wrote more or fewer.
    """
    begins = [found.start() for found in re.finditer(re.escape(picture), row.text)]
    if len(begins) != len(shown):
        raise DataError(
            f"the chat template writes {len(begins)} pictures where the row has {len(shown)}; choose "
            "another data.template",
            TEMPLATE,
        )
    texts, parts = [text for _, text in shown], row.text.split(picture)
    grown = [0, *accumulate(len(text) - len(picture) for text in texts)]
    ends = zip(begins, pairwise(grown), strict=True)
    holes = [(begin + before, begin + after + len(picture)) for begin, (before, after) in ends]

    def moved(span: tuple[int, int]) -> tuple[int, int]:
        first, last = (at + grown[bisect_left(begins, at)] for at in span)
        return first, last

    return Row(
        "".join(chain(parts[:1], *zip(texts, parts[1:], strict=True))),
        tuple(piece for span in row.targets for piece in _without(moved(span), holes)),
        tuple(map(moved, row.answers)),
        row.where,
        tuple(file for file, _ in shown),
    )


def _before_special(text: str, at: int, template: Template) -> int:
    """Return where the white space from a place on ends, if what follows it is a special token or nothing.

    Some end tokens take that white space with them (transformers' ``rstrip``).
    """
    end = len(text) - len(text[at:].lstrip())
    return end if end == len(text) or template.special.match(text, end) else at


def _without(span: tuple[int, int], holes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield what is left of a span outside of holes."""
    first, last = span
    for begin, end in holes:
        if first <= begin and end <= last:
            if first < begin:
                yield first, begin
            first = end
    if first < last:
        yield first, last


def tokenise(texts: list[str], tokenizer: "PreTrainedTokenizerFast") -> list[Tokens]:
    """Tokenise texts that already hold their special tokens.

    Args:
        texts: what to tokenise, in one call.
        tokenizer: a fast tokenizer.

    Returns:
        The tokens of each text.
    """
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    result = []
    for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        result.append(Tokens(np.array(ids, dtype=np.int32), places[:, 0], places[:, 1]))
    return result


def target_mask(starts: np.ndarray, ends: np.ndarray, spans: Sequence[tuple[int, int]], text: str) -> np.ndarray:
    """Mark the tokens whose characters lie in one of the spans.

    A special token may swallow white space after it (transformers' ``rstrip``), so the last token of a span may
    reach beyond its end as far as the text there is white space.

    Args:
        starts: int [T], first character of each token.
        ends: int [T], one past the last character.
        spans: (first character, one past the last), ascending, not overlapping.
        text: what the characters count.

    Returns:
        bool [T]; the first token is never marked.

    Raises:
        DataError: a token lies partly in a span, or nothing is marked.
    """
    is_target = np.zeros(len(starts), dtype=np.bool_)
    for first, last in spans:
        over = np.flatnonzero((starts < last) & (ends > last))
        if len(over) and text[last : int(ends[over].max())].strip():
            raise DataError(
                f"one token holds the end of an answer and what follows: {_shown(text, starts, ends, over)}",
                MASK,
            )
        across = np.flatnonzero((starts < first) & (ends > first))
        if len(across):
            raise DataError(
                "one token holds the beginning of an answer and what stands before it: "
                f"{_shown(text, starts, ends, across)}; {_CURE_OF_SEAM}",
                MASK,
            )
        is_target |= (starts >= first) & (starts < last)
    is_target[:1] = False
    if not is_target.any():
        raise DataError("no token to learn in this row; give it an answer, or remove it", NOTHING_TO_LEARN)
    return is_target


def _shown(text: str, starts: np.ndarray, ends: np.ndarray, tokens: np.ndarray) -> str:
    return repr(text[starts[tokens[0]] : ends[tokens[0]]])


def mark_row(row: Row, tokens: Tokens, template: Template, train_on_end: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mark what is learned of one row.

    Args:
        row: the rendered row.
        tokens: of its text.
        template: the one that it was rendered with.
        train_on_end: whether the tokens that end answers are learned.

    Returns:
        bool [T], and the index of the token that ends each answer: int64 [answers].

    Raises:
        DataError: a token lies across the border of an answer, the tokens before one are not those of the prompt
            alone, one does not end with a special token, or nothing is learned.
    """
    if fault := seam_fault(row, tokens, template):
        raise DataError(fault, MASK)
    is_target = target_mask(tokens.starts, tokens.ends, row.targets, row.text)
    ends = end_places(row, tokens, template.special_ids)
    is_target[ends] &= train_on_end
    return is_target, ends


def seam_fault(row: Row, tokens: Tokens, template: Template) -> str | None:
    """Say whether the tokens before an answer differ from those of its prompt alone.

    Only the text from the last special token before the answer is tokenised again: tokenizers cut at special
    tokens first, so nothing before it has an influence.

    Args:
        row: the rendered row.
        tokens: of its text.
        template: the one that it was rendered with.

    Returns:
        What is wrong, or None.
    """
    special_ids = sorted(template.special_ids)
    for first, _ in row.answers:
        after = int(np.searchsorted(tokens.starts, first))
        specials = np.flatnonzero(np.isin(tokens.ids[:after], special_ids))
        begin = int(specials[-1]) if len(specials) else 0
        tail = row.text[int(tokens.starts[begin]) if after > begin else first : first]
        (alone,) = tokenise([tail], template.tokenizer)
        if not np.array_equal(alone.ids, tokens.ids[begin:after]):
            return _SEAM.format(tail=tail[-20:])
    return None


def end_places(row: Row, tokens: Tokens, special_ids: frozenset[int]) -> np.ndarray:
    """Return the index of the token that ends each answer: int [answers].

    Raises:
        DataError: an answer does not end with a special token.
    """
    places = np.searchsorted(tokens.starts, [last for _, last in row.answers]) - 1
    if not special_ids.issuperset(tokens.ids[places].tolist()):
        raise DataError(
            "the end of an answer is not a token of its own, so the model would never learn to stop; choose "
            "another data.template",
            END_OF_ANSWER,
        )
    return places


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
        is_target, doubtful, last_ends, end_ids = _mark(rows, tokens, template, train_on_end)
    else:
        is_target, doubtful = np.zeros(len(tokens.ids), np.bool_), np.ones(len(rows), np.bool_)
        last_ends, end_ids = np.zeros(len(rows), np.int64), set()
    made: list[Marked | DataError] = []
    borders = tokens.borders.tolist()
    for index, row in enumerate(rows):
        start, end = borders[index], borders[index + 1]
        first = tokens.text_borders[index]
        ids, marks, last_end = tokens.ids[start:end], is_target[start:end], last_ends[index]
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
        example = Example(ids, marks, row.text[:begin], answer, row.where, pictures=row.pictures)
        made.append(Marked(example, int(last_end) - start + 1))
    return made, end_ids


def _in_order(tokens: TextTokens) -> bool:
    """Return whether tokens follow each other in the text and every row has some, as all that is done here needs."""
    ascending = all((np.diff(places) >= 0).all() for places in (tokens.starts, tokens.ends))
    return bool(ascending and (np.diff(tokens.borders) > 0).all())


def _mark(
    rows: Sequence[Row], tokens: TextTokens, template: Template, train_on_end: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, set[int]]:
    """Return what is learned bool [T], which rows are in doubt bool [R], and what ends answers.

    The last two are the index of the token that ends each row's last answer, int64 [R], and the ids of all such tokens.
    """
    is_special = np.isin(tokens.ids, sorted(template.special_ids))
    spans = _spans([row.targets for row in rows], tokens)
    answers = _spans([row.answers for row in rows], tokens)
    doubtful = np.zeros(len(rows), np.bool_)

    begins, ends = _tokens_before(tokens, spans.row, spans.first), _tokens_before(tokens, spans.row, spans.last)
    count = len(tokens.ids)
    is_target = np.cumsum(np.bincount(begins, minlength=count + 1) - np.bincount(ends, minlength=count + 1))[:-1] > 0
    is_target[tokens.borders[:-1]] = False
    doubtful[spans.row[_is_torn(tokens, begins, spans.first) | _is_torn(tokens, ends, spans.last)]] = True
    doubtful |= ~np.logical_or.reduceat(is_target, tokens.borders[:-1])

    places = _tokens_before(tokens, answers.row, answers.last) - 1
    doubtful[answers.row[(places < tokens.borders[answers.row]) | ~is_special[places]]] = True
    doubtful[answers.row[_has_other_prompt(rows, tokens, answers, is_special, template)]] = True
    last_ends = places[np.cumsum([len(row.answers) for row in rows]) - 1]
    places = places[~doubtful[answers.row]]
    if not train_on_end:
        is_target[places] = False
    return is_target, doubtful, last_ends, set(np.unique(tokens.ids[places]).tolist())


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
