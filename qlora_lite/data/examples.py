"""Turn sources into token rows with a mask, and account for every row and token on the way.

Nothing is left out in silence: a row is an example, a counted entry of `dropped`, or part of an error that
names it.

Special tokens written out inside a row's text never become control tokens: in a conversation they are an
error (see `template.render`), in a plain document they are tokenised as the letters they are.

Shapes: T tokens of a row; token_ids int32 [T], learned bool [T]. learned[0] is always False: nothing precedes
it.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from qlora_lite.data.check import NOTHING_TO_LEARN, check_examples
from qlora_lite.data.formats import Conversation, Document, read_conversations
from qlora_lite.data.lines import Problems
from qlora_lite.data.mask import (
    MASK,
    end_places,
    learned_tokens,
    render_row,
    seam_faults,
    special_ids_of,
    tokenise,
)
from qlora_lite.data.read import Source
from qlora_lite.data.template import CONTROL_TOKEN, Template, begin_of_text, check_shape, choose_template
from qlora_lite.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAIN_ON = ("assistant", "completion", "all", "last")
OVERFLOW = ("error", "drop", "truncate")
BAD_SOURCE = "source not usable"
TOO_LONG = "longer than max_tokens"
_ROWS_PER_CALL = 1000


@dataclass(frozen=True, slots=True)
class Example:
    """Hold one tokenised row.

    Args:
        token_ids: int32 [T].
        learned: bool [T]; learned[t] means that token t is to be predicted.
        prompt: the text up to the last answer, special tokens included; "" for a plain document.
        answer: the last answer; "" for a plain document.
        where: the row's place, "file.jsonl:12".
    """

    token_ids: np.ndarray
    learned: np.ndarray
    prompt: str
    answer: str
    where: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """Hold the rows of a run and what became of every row read.

    Args:
        examples: the rows kept, repeated as the sources' weights say.
        rows_read: rows in the files.
        rows_kept: rows in `examples`.
        dropped: reason -> rows left out for it, malformed ones included.
        truncated: rows cut to max_tokens.
        tokens: tokens of all examples.
        learned_tokens: tokens that are predicted, of all examples.
        end_token_ids: the tokens that end answers and documents; generation stops at any of them.
        template: the chat template used; None if every row is a plain document.
        problems: what is wrong with rows and with the set.
    """

    examples: list[Example]
    rows_read: int
    rows_kept: int
    dropped: dict[str, int]
    truncated: int
    tokens: int
    learned_tokens: int
    end_token_ids: frozenset[int]
    template: Template | None
    problems: Problems


@dataclass(slots=True)
class _Account:
    """What became of the rows so far."""

    problems: Problems = field(default_factory=Problems)
    rows_read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    too_long: list[tuple[int, str]] = field(default_factory=list)
    end_token_ids: set[int] = field(default_factory=set)
    shapes: dict[tuple, DataError | None] = field(default_factory=dict)


def build_examples(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerFast,
    template: str | None = None,
    train_on: str = "assistant",
    max_tokens: int = 1024,
    overflow: str = "error",
    train_on_end: bool = True,
    max_bad_rows: int = 0,
) -> Dataset:
    """Read, render, tokenise and mask the rows of all sources, and accept them only if they can be trained on.

    Args:
        sources: see `read_examples`, as all others.
        max_bad_rows: rows that may be left out because they are malformed.

    Raises:
        DataError: rows are malformed, too long, or leave nothing to learn; up to 20 are named at once.
    """
    data = read_examples(sources, tokenizer, template, train_on, max_tokens, overflow, train_on_end)
    data.problems.raise_if_any(max_bad_rows)
    return data


def read_examples(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerFast,
    template: str | None = None,
    train_on: str = "assistant",
    max_tokens: int = 1024,
    overflow: str = "error",
    train_on_end: bool = True,
) -> Dataset:
    """Read, render, tokenise and mask the rows of all sources, and note every problem.

    A source's weight w uses each of its rows w times on average: of n rows, floor(n w) examples, evenly
    spread.

    Args:
        sources: where rows come from, in order.
        tokenizer: a fast tokenizer; its state is not changed.
        template: None for the tokenizer's own chat template, or see `choose_template`.
        train_on: "assistant" learns every answer; "completion" the one answer of rows that have just one;
            "last" the last answer; "all" every token. Plain documents are always learned whole.
        max_tokens: longest row, at least 2 tokens.
        overflow: for longer rows: "error", "drop", or "truncate" (keep the first max_tokens tokens; a row
            that loses all it had to learn is dropped and counted).
        train_on_end: whether the tokens that end answers and documents are learned.

    Returns:
        The examples with their counts and problems; rows with a problem are left out and counted.

    Raises:
        DataError: an argument is out of range.
    """
    _check_arguments(sources, tokenizer, train_on, max_tokens, overflow)
    account = _Account()
    chosen: Template | None = None
    examples: list[Example] = []
    for source in sources:
        kept: list[Example] = []
        try:
            for chunk in _chunks(source, account):
                if isinstance(chunk[0], Document):
                    made = _document_examples(chunk, tokenizer, train_on_end, account)
                else:
                    chosen = chosen or choose_template(tokenizer, template)
                    made = _conversation_examples(chunk, chosen, train_on, train_on_end, account)
                kept += _fit(made, max_tokens, overflow, account)
        except DataError as error:
            _note_bad_source(source, error, account.problems)
        weighted = list(_repeat(kept, source.weight))
        account.dropped["left out by the weight of their source"] += len(kept) - len({id(e) for e in weighted})
        examples += weighted
    account.dropped.update({rule: n for rule, n in account.problems.counts.items() if rule != BAD_SOURCE})
    _note_too_long(account, max_tokens)
    if not examples and not account.problems.count:
        left = f"no row is left to train on: {_reasons(account.dropped)}"
        account.problems.add(sources[0].path, left, NOTHING_TO_LEARN, fatal=True)
    for problem in check_examples(examples, tokenizer.bos_token_id, account.end_token_ids, train_on_end):
        account.problems.add(problem.where, problem.message, problem.rule, fatal=True)
    return Dataset(
        examples=examples,
        rows_read=account.rows_read,
        rows_kept=len(examples),
        dropped={reason: count for reason, count in account.dropped.items() if count},
        truncated=account.truncated,
        tokens=sum(len(example.token_ids) for example in examples),
        learned_tokens=sum(int(example.learned.sum()) for example in examples),
        end_token_ids=frozenset(account.end_token_ids),
        template=chosen,
        problems=account.problems,
    )


def _chunks(source: Source, account: _Account) -> Iterator[list[Conversation | Document]]:
    """Yield the good rows of a source, some at a time, and count all of them."""
    rows = read_conversations(source, account.problems)
    while True:
        bad_before = account.problems.count
        chunk = list(islice(rows, _ROWS_PER_CALL))
        account.rows_read += len(chunk) + account.problems.count - bad_before
        if not chunk:
            return
        yield chunk


def _check_arguments(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerFast,
    train_on: str,
    max_tokens: int,
    overflow: str,
) -> None:
    if train_on not in TRAIN_ON:
        raise DataError(f"data.train_on {train_on!r} is unknown; choose one of {', '.join(TRAIN_ON)}")
    if overflow not in OVERFLOW:
        raise DataError(f"data.overflow {overflow!r} is unknown; choose one of {', '.join(OVERFLOW)}")
    if max_tokens < 2:
        raise DataError(f"data.max_tokens is {max_tokens}; a row needs at least 2 tokens")
    if not tokenizer.is_fast:
        raise DataError(
            "this tokenizer has no tokenizer.json, so the place of its tokens in the text is unknown; "
            "convert it with transformers first (load it with AutoTokenizer and save it again)"
        )
    for source in sources:
        if not 0 < source.weight < float("inf"):
            raise DataError(f"{source.path}: weight {source.weight} must be above 0 and finite")
    if not sources:
        raise DataError("no data source is given; set data.train")


def _note_bad_source(source: Source, error: DataError, problems: Problems) -> None:
    """Note an error that ends the reading of a source; its text may begin with the file it is about."""
    place, _, message = str(error).partition(": ")
    if not place.startswith(source.path.partition("*")[0].rstrip("/")):
        place, message = "", str(error)
    problems.add(place, message, BAD_SOURCE, fatal=True)


# --- documents ----------------------------------------------------------------------------------------------


def _document_examples(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, train_on_end: bool, account: _Account
) -> Iterator[Example]:
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
        if last and not train_on_end:
            learned[-1] = False
        if learned.any():
            yield Example(token_ids, learned, "", "", document.where)
        else:
            fault = "a document of one token has nothing to learn; remove it"
            account.problems.add(document.where, fault, NOTHING_TO_LEARN)


# --- conversations ------------------------------------------------------------------------------------------


def _conversation_examples(
    conversations: Sequence[Conversation], template: Template, train_on: str, train_on_end: bool, account: _Account
) -> Iterator[Example]:
    rows = []
    for conversation in conversations:
        try:
            _check_shape_once(conversation, template, account)
            rows.append(render_row(conversation, template, train_on, train_on_end))
        except DataError as error:
            account.problems.add(conversation.where, error)
    tokens = tokenise([row.text for row in rows], template.tokenizer)
    faults = seam_faults(rows, tokens, template.tokenizer)
    special_ids = special_ids_of(template.tokenizer)
    for row, row_tokens, seam_fault in zip(rows, tokens, faults, strict=True):
        try:
            if seam_fault:
                raise DataError(seam_fault, MASK)
            learned = learned_tokens(row_tokens.starts, row_tokens.ends, row.learned, row.text)
            ends = end_places(row, row_tokens, special_ids)
        except DataError as error:
            account.problems.add(row.where, error)
            continue
        account.end_token_ids.update(row_tokens.ids[ends].tolist())
        learned[ends] &= train_on_end
        yield Example(row_tokens.ids, learned, row.text[: row.answers[-1][0]], row.answer, row.where)


def _check_shape_once(conversation: Conversation, template: Template, account: _Account) -> None:
    """Check each sequence of roles the first time it comes; rows of a bad one all get its error."""
    shape = tuple((turn.role, not turn.content, bool(turn.calls)) for turn in conversation.turns)
    if shape not in account.shapes:
        try:
            account.shapes[shape] = check_shape(template, conversation)
        except DataError as error:
            account.shapes[shape] = error
    if error := account.shapes[shape]:
        raise error


# --- length and weight --------------------------------------------------------------------------------------


def _fit(examples: Iterator[Example], max_tokens: int, overflow: str, account: _Account) -> Iterator[Example]:
    for example in examples:
        length = len(example.token_ids)
        if length <= max_tokens:
            yield example
        elif overflow in ("error", "drop"):
            account.dropped[TOO_LONG] += 1
            if overflow == "error":
                account.too_long.append((length, example.where))
        elif not example.learned[:max_tokens].any():
            account.dropped["nothing left to learn after truncation"] += 1
        else:
            account.truncated += 1
            token_ids, learned = example.token_ids[:max_tokens].copy(), example.learned[:max_tokens].copy()
            yield Example(token_ids, learned, example.prompt, example.answer, example.where)


def _repeat(examples: Sequence[Example], weight: float) -> Iterator[Example]:
    """Yield example i as often as the whole numbers in (i w, (i + 1) w] are many."""
    share = Fraction(weight).limit_denominator(1_000_000)
    for index, example in enumerate(examples):
        for _ in range(int((index + 1) * share) - int(index * share)):
            yield example


def _note_too_long(account: _Account, max_tokens: int) -> None:
    if not account.too_long:
        return
    longest = heapq.nlargest(5, account.too_long)
    places = ", ".join(f"{where} ({length} tokens)" for length, where in longest)
    fault = (
        f"{len(account.too_long)} of {account.rows_read} rows are longer than data.max_tokens {max_tokens}; "
        f"the longest: {places}; raise data.max_tokens, or set data.overflow to drop or truncate"
    )
    account.problems.add("", fault, TOO_LONG, fatal=True)


def _reasons(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} rows {reason}" for reason, count in dropped.items() if count) or "the sources are empty"
