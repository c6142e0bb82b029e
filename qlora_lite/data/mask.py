"""Tokenise rendered rows once as a whole and mark the tokens to learn, by the characters each token covers.

Counting the tokens of prompt and answer apart and adding them up, the other known way, is off by a token
wherever the two join; a token here is learned or not by its place in the text. Where an answer begins, the
tokens before it must be the ones that the prompt alone gives, because those are what the model sees when it
answers. A row for which they are not is an error.

Shapes: T tokens of a row. Characters are counted in the rendered text, spans are (first, one past the last).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from qlora_lite.errors import DataError

from .example_checks import NOTHING_TO_LEARN
from .forms import Form
from .render import END_OF_ANSWER, Ahead, render
from .row_formats import Conversation
from .template import Template

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
        learned: the spans to learn.
        answers: the spans of answers, end token included; the last answer is always among them.
        where: the row's place.
    """

    text: str
    learned: tuple[tuple[int, int], ...]
    answers: tuple[tuple[int, int], ...]
    where: str


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
    """Choose the answers to learn, and those whose characters must be known for it; of train_on all, none to learn.

    Args:
        conversation: the row.
        train_on: see ``examples.read_examples``.
        train_on_end: see ``render_row``.

    Raises:
        DataError: there is nothing to learn.
    """
    turns = conversation.turns
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    if train_on == "completion" and (count := sum(turns[index].learned for index in answers)) > 1:
        raise DataError(
            f"train_on completion needs rows with one answer, this has {count}; set data.train_on to assistant or last"
        )
    wanted = answers[-1:] if train_on == "last" else answers
    learned = [index for index in wanted if turns[index].learned]
    if not learned and train_on != "all":
        fault = "nothing to learn: every answer that counts has weight 0 or train false; give one 1 or true"
        raise DataError(fault, NOTHING_TO_LEARN)
    if train_on == "all":
        return [], sorted({answers[-1]} if train_on_end else answers)
    return learned, sorted({*learned, answers[-1]})


def render_row(
    conversation: Conversation,
    template: Template,
    train_on: str,
    train_on_end: bool = True,
    form: Form | None = None,
    ahead: Ahead | None = None,
) -> Row:
    """Render a conversation and choose the characters to learn, end tokens among them.

    Args:
        conversation: the row.
        template: how to write it.
        train_on: see ``examples.read_examples``.
        train_on_end: False if the caller needs every end token's place, to unlearn it.
        form: of conversations with these roles, to be filled in instead of rendering.
        ahead: see ``render.render``.

    Raises:
        DataError: there is nothing to learn, or the template fails (see ``render.render``).
    """
    turns = conversation.turns
    learned, needed = answers_of(conversation, train_on, train_on_end)
    if form and form.fits(turns, needed):
        rendering = form.fill(template, turns, needed)
    else:
        rendering = render(template, conversation, needed, ahead)
    spans = [(0, len(rendering.text))] if train_on == "all" else [rendering.answers[index] for index in learned]
    found = tuple(rendering.answers[index] for index in needed)
    return Row(rendering.text, tuple(spans), found, conversation.where)


def tokenise(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[Tokens]:
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


def learned_tokens(starts: np.ndarray, ends: np.ndarray, spans: Sequence[tuple[int, int]], text: str) -> np.ndarray:
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
    learned = np.zeros(len(starts), dtype=np.bool_)
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
        learned |= (starts >= first) & (starts < last)
    learned[:1] = False
    if not learned.any():
        raise DataError("no token to learn in this row; give it an answer, or remove it", NOTHING_TO_LEARN)
    return learned


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
    learned = learned_tokens(tokens.starts, tokens.ends, row.learned, row.text)
    ends = end_places(row, tokens, template.special_ids)
    learned[ends] &= train_on_end
    return learned, ends


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
