"""Turn the rows of one source into examples: render, tokenise, mask, and fit them into max_tokens.

Rows are handled a thousand at a time: one call of the tokenizer for all of them, which uses every core, in a thread
of its own, so that the next rows are read and the last ones masked meanwhile.

Rows longer than max_tokens can be split into parts that can each be learned from. A document becomes windows of
max_tokens. Each begins with the last token of the one before, which is context there and not learned, so every token of
the document is learned exactly once, as in the whole. Begin-of-text and the end token stay where the document has them.

A conversation is cut between exchanges (a user turn and all up to the next one), never inside an answer, which
without its question would teach to invent. Each part holds as many exchanges as fit, and the system turn and tools
again. Every answer stands in exactly one part. What was said in earlier parts is not seen: the price of the cut. An
exchange that does not fit alone is left out and counted. (Cutting the tokens at max_tokens, the other known way, gives
parts that begin in the middle of a turn, without the template around it: text that the model never sees in use.)
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from threading import Lock
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from qlora_lite.data.chat.conversation import Conversation, Document
from qlora_lite.data.chat.render import CONTROL_TOKEN, check_shape, for_pictures, render_ahead
from qlora_lite.data.chat.row_formats import LABELS, PAIRS, read_conversations
from qlora_lite.data.chat.template import begin_of_text, choose_template, special_ids_of
from qlora_lite.data.picture_reader import PictureReader
from qlora_lite.data.readers.sources import Source
from qlora_lite.errors import DataError, tokenizer_faults

from .example_checks import NOTHING_TO_LEARN
from .mask import Marked, Row, answers_of, mark_rows, render_row, with_pictures
from .preferences import mismatched, paired
from .statistics import SHOWN_ROWS, TOO_LONG, ReadSettings, Statistics, count_unused, no_counts
from .storage import Example

if TYPE_CHECKING:  # transformers takes seconds to import, and a check of a recipe needs none of it
    from transformers import PreTrainedTokenizerFast

NOTHING_LEFT = "nothing left to learn after truncation"
LONG_EXCHANGE = "exchange longer than max_tokens in a split row"
UNLEARNED_PART = "part of a split row with nothing to learn"
_ROWS_PER_CALL = 1000
_TOKENIZER_IN_USE = Lock()  # a fast tokenizer cannot be called from two threads: each call sets it up anew

_Batch = list[Document] | list[tuple[Conversation, Row]]
_Encoded = list[list[int]] | tuple[list[Marked | DataError], set[int]]  # of documents, of conversations
_Made = Iterator[tuple[Conversation | Document, Marked]]


@dataclass(frozen=True, slots=True)
class TextReader:
    """Read conversations and documents, see ``RowReader``.

    Args:
        preferences: "pairs" or "labels" where answers are compared or judged, see ``row_formats.read_conversations``.
        pictures: what reads the pictures of chats; None refuses rows with some.
    """

    preferences: str | None = None
    pictures: PictureReader | None = None
    needs_tokenizer: ClassVar[bool] = True
    ends_answers: ClassVar[bool] = True

    def read(
        self, source: Source, tokenizer: "PreTrainedTokenizerFast", settings: ReadSettings, statistics: Statistics
    ) -> Iterator[list[Example]]:
        """See ``RowReader``; also raises DataError if there is no chat template, and one is needed."""
        if self.pictures:
            source = replace(source, with_pictures=True)
        first = [tokenizer.bos_token_id] if begin_of_text(tokenizer) else []
        prepared = _prepared(source, tokenizer, self, settings, statistics)
        for batch, encoded in _one_ahead(prepared, lambda batch: _encode(batch, tokenizer, settings, statistics)):
            if isinstance(batch[0], Document):
                made = _documents(batch, encoded, first, tokenizer, settings, statistics)
            else:
                made = _conversations(batch, encoded, statistics)
            if self.preferences == PAIRS:
                made = paired(made, statistics)
            elif self.preferences == LABELS:
                made = mismatched(list(made), settings.max_tokens)
            yield list(_fit(made, self, settings, statistics))

    def cure_of_long_rows(self, settings: ReadSettings) -> str:
        """See ``RowReader``."""
        smaller = "set data.resolution to show less of large pictures, "
        ends_matter = self.pictures is not None or self.preferences or settings.train_on == "last"
        choices = "drop" if ends_matter else "drop, truncate or split"
        return f"{smaller if self.pictures and self.pictures.keeps_shape else ''}or set data.overflow to {choices}"


TEXTS = TextReader()


def _chunks(
    source: Source, max_rows: int | None, preference: str | None, statistics: Statistics
) -> Iterator[list[Conversation | Document]]:
    """Yield the good rows of a source, some at a time, and count all of them."""
    unused = no_counts()
    statistics.unused.append(unused)

    def drop(reason: str, where: str) -> None:
        statistics.rows_read += 1
        statistics.drop(reason, where)

    look, of_row = partial(count_unused, unused), 2 if preference == PAIRS else 1
    found = read_conversations(source, statistics.problems, look, drop, statistics.seen_kinds, preference)
    rows = islice(found, max_rows and max_rows * of_row)
    while True:
        bad_before = statistics.problems.count
        chunk = list(islice(rows, _ROWS_PER_CALL))
        statistics.rows_read += len(chunk) // of_row + statistics.problems.count - bad_before
        if not chunk:
            return
        yield chunk


def _prepared(
    source: Source,
    tokenizer: "PreTrainedTokenizerFast",
    reader: TextReader,
    settings: ReadSettings,
    statistics: Statistics,
) -> Iterator[_Batch]:
    """Yield chunks of rows, conversations rendered."""
    pictures = reader.pictures
    for chunk in _chunks(source, settings.max_rows, reader.preferences, statistics):
        if isinstance(chunk[0], Document):
            yield chunk
            continue
        if statistics.template is None:
            chosen = choose_template(tokenizer, settings.template, pictures and pictures.template(tokenizer))
            statistics.template = for_pictures(chosen, pictures.token) if pictures else chosen
        if rendered := _rendered(chunk, pictures, settings, statistics):
            yield rendered


def _one_ahead(batches: Iterator[_Batch], work: Callable[[_Batch], _Encoded]) -> Iterator[tuple[_Batch, _Encoded]]:
    """Yield each batch with what ``work`` makes of it, working on the next one in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for batch in batches:
            started = batch, pool.submit(work, batch)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = started
        if waiting:
            yield waiting[0], waiting[1].result()


@tokenizer_faults()
def _encode(
    batch: _Batch, tokenizer: "PreTrainedTokenizerFast", settings: ReadSettings, statistics: Statistics
) -> _Encoded:
    """Return the token ids of each document, or what becomes of each conversation."""
    with _TOKENIZER_IN_USE:
        if isinstance(batch[0], Document):
            return _encode_plain([document.text for document in batch], tokenizer)
        return mark_rows([row for _, row in batch], statistics.template, settings.train_on_end)


def _encode_plain(texts: list[str], tokenizer: "PreTrainedTokenizerFast") -> list[list[int]]:
    """Tokenise texts as the letters they are; transformers' own call takes half as long again to repack the result."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


def _documents(
    documents: Sequence[Document],
    encoded: list[list[int]],
    first: list[int],
    tokenizer: "PreTrainedTokenizerFast",
    settings: ReadSettings,
    statistics: Statistics,
) -> _Made:
    """Make examples of whole documents: begin-of-text where the tokenizer writes it, the text, the end token."""
    last = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    statistics.end_token_ids.update(last)
    flat = np.fromiter(chain.from_iterable(first + ids + last for ids in encoded), np.int32)
    ends = np.cumsum([len(first) + len(ids) + len(last) for ids in encoded])
    is_target = np.ones(len(flat), np.bool_)
    is_target[np.concatenate([[0], ends[:-1]])] = False
    if last and not settings.train_on_end:
        is_target[ends - 1] = False
    control = _control_tokens(encoded, tokenizer)
    for index, (document, start, end) in enumerate(
        zip(documents, [0, *ends[:-1].tolist()], ends.tolist(), strict=True)
    ):
        if index in control:
            names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(control[index]))))
            fault = f"the text became the control token {names}; write it differently"
            statistics.problems.add(document.where, fault, CONTROL_TOKEN)
        elif end - start > 1 and is_target[start:end].any():
            yield document, Marked(Example(flat[start:end], is_target[start:end], "", "", document.where), 0)
        else:
            fault = "a document of one token has nothing to learn; remove it"
            statistics.problems.add(document.where, fault, NOTHING_TO_LEARN)


def _control_tokens(encoded: list[list[int]], tokenizer: "PreTrainedTokenizerFast") -> dict[int, set[int]]:
    """Return the control tokens that texts became, by the number of the document."""
    control_ids = sorted(special_ids_of(tokenizer) - {tokenizer.unk_token_id})
    if not np.isin(np.fromiter(chain.from_iterable(encoded), np.int32), control_ids).any():
        return {}
    return {index: found for index, ids in enumerate(encoded) if (found := set(ids).intersection(control_ids))}


def _rendered(
    conversations: Sequence[Conversation],
    reader: PictureReader | None,
    settings: ReadSettings,
    statistics: Statistics,
) -> list:
    """Return the conversations that can be rendered, each with its text.

    Of two conversations of one row, both or none; what is wrong is noted once.
    """
    template, rendered, bad = statistics.template, [], set()
    needed = [_needed_answers(conversation, settings, statistics) for conversation in conversations]
    pairs = zip(conversations, needed, strict=True)
    ahead = render_ahead(template, [(talk, answers) for talk, answers in pairs if not isinstance(answers, DataError)])
    shown = reader.looked_at([each.pictures for each in conversations]) if reader else [None] * len(conversations)
    for conversation, answers, pictures in zip(conversations, needed, shown, strict=True):
        try:
            if isinstance(answers, DataError):
                raise answers
            row = render_row(conversation, template, settings.train_on, settings.train_on_end, next(ahead))
            if isinstance(pictures, DataError):
                raise pictures
            rendered.append((conversation, with_pictures(row, template.picture, pictures) if pictures else row))
        except DataError as error:
            if conversation.where not in bad:
                statistics.problems.add(conversation.where, error)
            bad.add(conversation.where)
    return [each for each in rendered if each[0].where not in bad]


def _needed_answers(
    conversation: Conversation, settings: ReadSettings, statistics: Statistics
) -> list[int] | DataError:
    """Return the answers to find, or what is wrong; a sequence of roles is checked until a row of it passes."""
    turns = conversation.turns
    shape = (*[(turn.role, not turn.content, bool(turn.calls)) for turn in turns], bool(conversation.tools))
    try:
        if shape not in statistics.shapes:
            check_shape(statistics.template, conversation)
            statistics.shapes.add(shape)
        return answers_of(conversation, settings.train_on, settings.train_on_end)[1]
    except DataError as error:
        return error


def _conversations(
    rendered: list[tuple[Conversation, Row]], encoded: tuple[list[Marked | DataError], set[int]], statistics: Statistics
) -> _Made:
    """Yield the examples of rendered conversations, and note what is wrong with the others, once for each row."""
    (made, end_token_ids), bad = encoded, set()
    statistics.end_token_ids.update(end_token_ids)
    for (conversation, row), marked in zip(rendered, made, strict=True):
        if not isinstance(marked, DataError):
            yield conversation, marked
        elif row.where not in bad:
            statistics.problems.add(row.where, marked)
            bad.add(row.where)


def _fit(made: _Made, reader: TextReader, settings: ReadSettings, statistics: Statistics) -> Iterator[Example]:
    for row, marked in made:
        file = row.where.rpartition(":")[0]
        statistics.seen_files[file] += 1
        for example in _fitted(row, marked, reader, settings, statistics):
            statistics.kept_kinds.update(row.kinds)
            statistics.kept_files.add(file)
            yield example


def _fitted(
    row: Conversation | Document, marked: Marked, reader: TextReader, settings: ReadSettings, statistics: Statistics
) -> Iterator[Example]:
    example, max_tokens, overflow = marked.example, settings.max_tokens, settings.overflow
    if len(example.token_ids) <= max_tokens:
        yield example
    elif overflow in ("error", "drop"):
        statistics.drop(TOO_LONG, row.where)
        if overflow == "drop":
            statistics.dropped_long.update([*row.kinds, row.where.rpartition(":")[0]])
        else:
            statistics.longest = heapq.nlargest(SHOWN_ROWS, [*statistics.longest, (len(example.token_ids), row.where)])
    elif overflow == "split":
        statistics.split += 1
        if isinstance(row, Document):
            yield from windows(example, max_tokens)
        else:
            yield from _split(row, reader.pictures, settings, statistics)
    elif not example.is_target[:max_tokens].any():
        statistics.drop(NOTHING_LEFT, row.where)
    else:
        statistics.truncated += 1
        token_ids, is_target = example.token_ids[:max_tokens].copy(), example.is_target[:max_tokens].copy()
        answer = example.answer if marked.answered <= max_tokens else ""
        yield replace(example, token_ids=token_ids, is_target=is_target, answer=answer)


def _split(
    conversation: Conversation, reader: PictureReader | None, settings: ReadSettings, statistics: Statistics
) -> Iterator[Example]:
    """Yield the examples of the parts of a conversation, and count the parts that give none."""
    if settings.train_on == "last":
        conversation, settings = _only_last_answer(conversation), replace(settings, train_on="assistant")
    whole = replace(settings, train_on="all")  # any part can be measured, also one with nothing to learn

    def made_of(part: Conversation, settings: ReadSettings) -> Example | None:
        rendered = _rendered([part], reader, settings, statistics)
        if not rendered:
            return None
        encoded = _encode(rendered, statistics.template.tokenizer, settings, statistics)
        return next((marked.example for _, marked in _conversations(rendered, encoded, statistics)), None)

    def length_of(part: Conversation) -> int:
        turns = tuple(replace(turn, left_out=False) for turn in part.turns)
        example = made_of(replace(part, turns=turns), whole)
        return len(example.token_ids) if example else settings.max_tokens + 1

    for part in parts(conversation, length_of, settings.max_tokens):
        if settings.train_on != "all" and not any(t.is_target for t in part.turns if t.role == "assistant"):
            statistics.drop(UNLEARNED_PART, part.where)
            continue
        example = made_of(part, settings)
        if example and len(example.token_ids) <= settings.max_tokens:
            yield example
        elif example:
            statistics.drop(LONG_EXCHANGE, part.where)


def windows(example: Example, max_tokens: int) -> Iterator[Example]:
    """Cut a document into windows that overlap by one token.

    Args:
        example: more than max_tokens tokens.
        max_tokens: most tokens of a window, at least 2.
    """
    for start in range(0, len(example.token_ids) - 1, max_tokens - 1):
        part = slice(start, start + max_tokens)
        is_target = example.is_target[part].copy()
        is_target[0] = False
        if is_target.any():
            yield replace(example, token_ids=example.token_ids[part].copy(), is_target=is_target)


def parts(conversation: Conversation, length_of: Callable[[Conversation], int], max_tokens: int) -> list[Conversation]:
    """Cut a conversation between exchanges into parts that fit.

    Args:
        conversation: the row.
        length_of: gives the tokens of a conversation.
        max_tokens: most tokens of a part.

    Returns:
        The parts in order; those that hold one exchange may still be too long.
    """
    turns = conversation.turns
    begins = [index for index, turn in enumerate(turns) if turn.role == "user"]
    system, ends = turns[: begins[0]], [*begins[1:], len(turns)]
    found, first = [], 0
    while first < len(begins):
        last = first
        part = replace(conversation, turns=system + turns[begins[first] : ends[first]])
        while last + 1 < len(begins):
            longer = replace(conversation, turns=system + turns[begins[first] : ends[last + 1]])
            if length_of(longer) > max_tokens:
                break
            part, last = longer, last + 1
        found.append(part)
        first = last + 1
    return found


def _only_last_answer(conversation: Conversation) -> Conversation:
    """Return a conversation of which no answer but the last is learned."""
    *earlier, last = conversation.turns
    return replace(conversation, turns=(*(replace(turn, is_target=False) for turn in earlier), last))
