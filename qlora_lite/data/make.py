"""Turn the rows of one source into examples: render, tokenise, mask, and fit them into max_tokens.

Rows are handled a thousand at a time: one call of the tokenizer for all of them, which uses every core.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from qlora_lite.data.check import NOTHING_TO_LEARN
from qlora_lite.data.formats import Conversation, Document, read_conversations
from qlora_lite.data.lines import Problems
from qlora_lite.data.mask import MASK, end_places, learned_tokens, render_row, seam_faults, special_ids_of, tokenise
from qlora_lite.data.read import Source
from qlora_lite.data.split import only_last_answer, parts, windows
from qlora_lite.data.stored import Example
from qlora_lite.data.template import CONTROL_TOKEN, Template, begin_of_text, check_shape, choose_template
from qlora_lite.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOO_LONG = "longer than max_tokens"
NOTHING_LEFT = "nothing left to learn after truncation"
LONG_EXCHANGE = "exchange longer than max_tokens in a split row"
UNLEARNED_PART = "part of a split row with nothing to learn"
_ROWS_PER_CALL = 1000
_SHOWN_ROWS = 5


@dataclass(frozen=True, slots=True)
class Settings:
    """Say how rows become tokens; the names, meanings and ranges are those of `examples.read_examples`."""

    train_on: str
    max_tokens: int
    overflow: str
    train_on_end: bool


@dataclass(slots=True)
class Account:
    """What became of the rows so far.

    Args:
        problems: what is wrong with rows.
        rows_read: rows seen, good or not.
        dropped: reason -> rows left out for it, problems apart.
        truncated: rows cut to max_tokens.
        split: rows cut into parts.
        longest: the longest of the rows that are an error for their length, (tokens, where).
        end_token_ids: the tokens that end answers and documents.
        template: the chat template, once a conversation needed it.
        shapes: sequence of roles -> what is wrong with it.
    """

    problems: Problems = field(default_factory=Problems)
    rows_read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    split: int = 0
    longest: list[tuple[int, str]] = field(default_factory=list)
    end_token_ids: set[int] = field(default_factory=set)
    template: Template | None = None
    shapes: dict[tuple, DataError | None] = field(default_factory=dict)


def make_examples(
    source: Source, tokenizer: PreTrainedTokenizerFast, template: str | None, settings: Settings, account: Account
) -> Iterator[list[Example]]:
    """Yield the examples of a source, some at a time, in the order of the rows.

    Args:
        source: where the rows are.
        tokenizer: a fast tokenizer.
        template: see `template.choose_template`.
        settings: how rows become tokens.
        account: gets the counts and problems.

    Raises:
        DataError: a file cannot be read, its format is not known, or there is no template.
    """
    for chunk in _chunks(source, account):
        if isinstance(chunk[0], Document):
            made = _document_examples(chunk, tokenizer, settings, account)
        else:
            account.template = account.template or choose_template(tokenizer, template)
            made = _conversation_examples(chunk, settings, account)
        yield list(_fit(made, settings, account))


def note_too_long(account: Account, max_tokens: int) -> None:
    """Add the problem that rows are too long, if there are any, with the longest of them."""
    if not account.longest:
        return
    places = ", ".join(f"{where} ({length} tokens)" for length, where in sorted(account.longest, reverse=True))
    fault = (
        f"{account.dropped[TOO_LONG]} of {account.rows_read} rows are longer than data.max_tokens {max_tokens}; the "
        f"longest: {places}; raise data.max_tokens, or set data.overflow to drop, truncate or split"
    )
    account.problems.add("", fault, TOO_LONG, fatal=True)


def _chunks(source: Source, account: Account) -> Iterator[list[Conversation | Document]]:
    """Yield the good rows of a source, some at a time, and count all of them."""
    rows = read_conversations(source, account.problems)
    while True:
        bad_before = account.problems.count
        chunk = list(islice(rows, _ROWS_PER_CALL))
        account.rows_read += len(chunk) + account.problems.count - bad_before
        if not chunk:
            return
        yield chunk


_Made = Iterator[tuple[Conversation | Document, Example]]


def _document_examples(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, settings: Settings, account: Account
) -> _Made:
    """Tokenise whole documents: begin-of-text where the tokenizer writes it, the text, the end token."""
    first = [tokenizer.bos_token_id] if begin_of_text(tokenizer) else []
    last = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    account.end_token_ids.update(last)
    encoded = tokenizer(
        [document.text for document in documents],
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    control_ids = special_ids_of(tokenizer) - {tokenizer.unk_token_id}
    for document, ids in zip(documents, encoded["input_ids"], strict=True):
        if control := control_ids.intersection(ids):
            names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(control))))
            fault = f"the text became the control token {names}; write it differently"
            account.problems.add(document.where, fault, CONTROL_TOKEN)
            continue
        token_ids = np.array(first + ids + last, dtype=np.int32)
        learned = np.ones(len(token_ids), dtype=np.bool_)
        learned[:1] = False
        if last and not settings.train_on_end:
            learned[-1] = False
        if learned.any():
            yield document, Example(token_ids, learned, "", "", document.where)
        else:
            fault = "a document of one token has nothing to learn; remove it"
            account.problems.add(document.where, fault, NOTHING_TO_LEARN)


def _conversation_examples(conversations: Sequence[Conversation], settings: Settings, account: Account) -> _Made:
    template, rows, rendered = account.template, [], []
    for conversation in conversations:
        try:
            _check_shape_once(conversation, template, account)
            rows.append(render_row(conversation, template, settings.train_on, settings.train_on_end))
            rendered.append(conversation)
        except DataError as error:
            account.problems.add(conversation.where, error)
    tokens = tokenise([row.text for row in rows], template.tokenizer)
    faults = seam_faults(rows, tokens, template.tokenizer)
    special_ids = special_ids_of(template.tokenizer)
    for conversation, row, row_tokens, seam_fault in zip(rendered, rows, tokens, faults, strict=True):
        try:
            if seam_fault:
                raise DataError(seam_fault, MASK)
            learned = learned_tokens(row_tokens.starts, row_tokens.ends, row.learned, row.text)
            ends = end_places(row, row_tokens, special_ids)
        except DataError as error:
            account.problems.add(row.where, error)
            continue
        account.end_token_ids.update(row_tokens.ids[ends].tolist())
        learned[ends] &= settings.train_on_end
        prompt = row.text[: row.answers[-1][0]]
        yield conversation, Example(row_tokens.ids, learned, prompt, row.answer, row.where)


def _check_shape_once(conversation: Conversation, template: Template, account: Account) -> None:
    """Check each sequence of roles the first time it comes; rows of a bad one all get its error."""
    shape = tuple((turn.role, not turn.content, bool(turn.calls)) for turn in conversation.turns)
    if shape not in account.shapes:
        try:
            account.shapes[shape] = check_shape(template, conversation)
        except DataError as error:
            account.shapes[shape] = error
    if error := account.shapes[shape]:
        raise error


def _fit(made: _Made, settings: Settings, account: Account) -> Iterator[Example]:
    max_tokens, overflow = settings.max_tokens, settings.overflow
    for row, example in made:
        if len(example.token_ids) <= max_tokens:
            yield example
        elif overflow in ("error", "drop"):
            account.dropped[TOO_LONG] += 1
            if overflow == "error":
                account.longest = heapq.nlargest(_SHOWN_ROWS, [*account.longest, (len(example.token_ids), row.where)])
        elif overflow == "split":
            account.split += 1
            yield from windows(example, max_tokens) if isinstance(row, Document) else _split(row, settings, account)
        elif not example.learned[:max_tokens].any():
            account.dropped[NOTHING_LEFT] += 1
        else:
            account.truncated += 1
            token_ids, learned = example.token_ids[:max_tokens].copy(), example.learned[:max_tokens].copy()
            yield replace(example, token_ids=token_ids, learned=learned)


def _split(conversation: Conversation, settings: Settings, account: Account) -> Iterator[Example]:
    """Yield the examples of the parts of a conversation, and count the parts that give none."""
    if settings.train_on == "last":
        conversation, settings = only_last_answer(conversation), replace(settings, train_on="assistant")
    whole = replace(settings, train_on="all")  # any part can be measured, also one with nothing to learn

    def length_of(part: Conversation) -> int:
        measured = list(_conversation_examples([part], whole, account))
        return len(measured[0][1].token_ids) if measured else settings.max_tokens + 1

    for part in parts(conversation, length_of, settings.max_tokens):
        if settings.train_on != "all" and not any(t.learned for t in part.turns if t.role == "assistant"):
            account.dropped[UNLEARNED_PART] += 1
            continue
        for _, example in _conversation_examples([part], settings, account):
            if len(example.token_ids) <= settings.max_tokens:
                yield example
            else:
                account.dropped[LONG_EXCHANGE] += 1
