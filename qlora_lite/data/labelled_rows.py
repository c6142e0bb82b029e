"""Turn rows of a text, or a pair of texts, and a label into examples.

The columns are those of the common sets (GLUE, SuperGLUE, IMDb, AG News and their like), or what the source's templates
over the columns give: ``prompt`` the text, ``completion`` the label. Which ones is decided by a source's first row.

A text becomes the tokens that the tokenizer makes of it, with its special tokens: [CLS] text [SEP] second text [SEP] of
BERT. A pair for a tokenizer without a separator is one text with a line break between. Special tokens that are written
out in a text stay the letters they are. What is too long is cut, if that is asked for, from the longer text's end, as
transformers' "longest_first" does; the special tokens stay.

One token of each example is marked as learned, its last: there is one target for each text.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from threading import Lock
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from qlora_lite.data.readers.fields import columns_of, fill, text_of
from qlora_lite.data.readers.json_rows import ask_for_columns
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.readers.sources import Source, read_rows
from qlora_lite.data.tokens.example_checks import NOTHING_TO_LEARN
from qlora_lite.data.tokens.statistics import SHOWN_ROWS, TOO_LONG, ReadSettings, Statistics, count_unused, no_counts
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import DataError, tokenizer_faults

from .labels import label_if_any, label_text

if TYPE_CHECKING:  # transformers takes seconds to import, and a check of a recipe needs none of it
    from transformers import PreTrainedTokenizerFast

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_a", "sentence_b"),
)
TEXTS = "sentence", "text", "review", "content", "document", "comment", "tweet", "question", "title"
LABEL_COLUMNS = "label", "labels", "class", "category", "target", "score", "rating", "stars"
FORMAT = "labelled"  # what a report calls such rows
_ROWS_PER_CALL = 1000
_IN_USE = Lock()  # a fast tokenizer cannot be called from two threads


@dataclass(frozen=True, slots=True)
class Labelled:
    """A row of one or two texts and its label as text; None where it has none and needs none."""

    texts: tuple[str, ...]
    label: str | None
    where: str


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a source's rows have their texts and their label; None for the columns that templates name."""

    texts: tuple[str, ...]
    label: str | None

    @property
    def names(self) -> frozenset[str]:
        """All of them."""
        return frozenset((*self.texts, *([self.label] if self.label else [])))


def columns_for(row: Mapping[str, object], where: str, source: Source, needs_label: bool = True) -> Columns | None:
    """Return the columns of a source by one of its rows; None where its templates name them.

    Raises:
        DataError: there are no such columns, or the source says a format for other rows.
    """
    if source.format not in (None, "table"):
        raise DataError(
            f"{source.path}: format {source.format} is of rows for a language model; texts with labels are "
            "recognised by their columns, or named by prompt and completion"
        )
    if source.prompt:
        return None
    if asked := ask_for_columns(row):
        raise DataError(f"{where}: {asked}")
    pair: tuple[str, ...] | None = next((pair for pair in PAIRS if {*pair} <= row.keys()), None)
    texts = pair or next(((name,) for name in TEXTS if name in row), None)
    label = next((name for name in LABEL_COLUMNS if name in row), None)
    if texts is None or (label is None and needs_label):
        what = "no text" if texts is None else "no label"
        columns, example = ", ".join(map(repr, row)), "{path: rows.csv, prompt: '{subject}', completion: '{topic}'}"
        raise DataError(
            f"{where}: {what} is recognised among the columns {columns}; name them with prompt and "
            f"completion, as in {example}"
        )
    return Columns(texts, label)


def read_labelled(
    source: Source, problems: Problems, problem: str, unused: dict | None = None, needs_label: bool = True
) -> Iterator[Labelled]:
    """Yield the good rows of a source in order; what is wrong with others is noted.

    Args:
        problem: see ``labels.label_text``.
        unused: counts what rows hold beside their columns, see ``statistics.count_unused``.
        needs_label: whether a row without a label is wrong.

    Raises:
        DataError: see ``columns_for``; a file cannot be read.
    """
    columns, is_known = None, False
    for where, row in read_rows(source, problems):
        if not is_known:
            columns, is_known = columns_for(row, where, source, needs_label), True
        try:
            yield _labelled(row, where, source, columns, problem, needs_label)
        except DataError as error:
            problems.add(where, error)
            continue
        if unused is not None:
            used = columns.names if columns else frozenset(columns_of(source.prompt) + columns_of(source.completion))
            count_unused(unused, row, used)


def _labelled(
    row: Mapping[str, object], where: str, source: Source, columns: Columns | None, problem: str, needs_label: bool
) -> Labelled:
    if columns:
        texts, value = tuple(text_of(row, name) for name in columns.texts), row.get(columns.label or "")
    else:
        names = columns_of(source.completion)
        texts, value = (fill(source.prompt, row),), None
        if source.completion == f"{{{names[0] if names else ''}}}":  # a list or a boolean, too
            value = row.get(names[0])
        elif needs_label or row.keys() >= {*names}:
            value = fill(source.completion, row)
    return Labelled(texts, (label_text if needs_label else label_if_any)(value, problem), where)


@dataclass(frozen=True, slots=True)
class LabelReader:
    """Read labelled texts, see ``statistics.RowReader``.

    Args:
        labels: their kind, see ``labels.label_text``.
    """

    labels: str
    needs_tokenizer: ClassVar[bool] = True
    ends_answers: ClassVar[bool] = False

    def read(
        self, source: Source, tokenizer: "PreTrainedTokenizerFast", settings: ReadSettings, statistics: Statistics
    ) -> Iterator[list[Example]]:
        """See ``RowReader`` and ``read_labelled``."""
        unused = no_counts()
        statistics.unused.append(unused)
        rows = islice(read_labelled(source, statistics.problems, self.labels, unused), settings.max_rows)
        while True:
            bad_before = statistics.problems.count
            chunk = list(islice(rows, _ROWS_PER_CALL))
            statistics.rows_read += len(chunk) + statistics.problems.count - bad_before
            if not chunk:
                return
            yield list(_fitted(chunk, tokenizer, settings, statistics))

    def cure_of_long_rows(self, settings: ReadSettings) -> str:
        """See ``RowReader``."""
        return f"or set data.overflow to {'drop' if settings.train_on == 'last' else 'drop or truncate'}"


def _fitted(
    rows: Sequence[Labelled], tokenizer: "PreTrainedTokenizerFast", settings: ReadSettings, statistics: Statistics
) -> Iterator[Example]:
    most = settings.max_tokens
    for row, encoding in zip(rows, encode_texts([row.texts for row in rows], tokenizer), strict=True):
        file, ids = row.where.rpartition(":")[0], encoding.ids
        statistics.seen_files[file] += 1
        if not ids:
            statistics.problems.add(row.where, "the tokenizer makes no token of this text", NOTHING_TO_LEARN)
            continue
        if len(ids) > most and settings.overflow != "truncate":
            statistics.drop(TOO_LONG, row.where)
            if settings.overflow == "drop":
                statistics.dropped_long[file] += 1
            else:
                statistics.longest = sorted([*statistics.longest, (len(ids), row.where)], reverse=True)[:SHOWN_ROWS]
            continue
        if len(ids) > most:
            ids = shortened(encoding, most)
            statistics.truncated += 1
        statistics.kept_files.add(file)
        yield example_of(ids, row)


def example_of(ids: Sequence[int], row: Labelled) -> Example:
    """Return the example of a row whose texts became tokens."""
    is_target: np.ndarray = np.zeros(len(ids), np.bool_)
    is_target[-1] = True
    return Example(np.array(ids, np.int32), is_target, "\n".join(row.texts), row.label or "", row.where)


@tokenizer_faults()
def encode_texts(texts: Sequence[tuple[str, ...]], tokenizer: "PreTrainedTokenizerFast") -> list:
    """Return what the tokenizer makes of texts and pairs, special tokens added: ``tokenizers.Encoding`` objects."""
    joined = tokenizer.sep_token_id is None
    inputs = ["\n".join(each) if joined or len(each) == 1 else each for each in texts]
    with _IN_USE, _as_letters(tokenizer.backend_tokenizer) as backend:
        return backend.encode_batch(inputs, add_special_tokens=True)


@contextmanager
def _as_letters(backend) -> Iterator:
    """Let a tokenizer cut and pad nothing, and take special tokens in a text for letters; put back what was."""
    before, cuts, pads = backend.encode_special_tokens, backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        yield backend
    finally:
        backend.encode_special_tokens = before
        if cuts:
            backend.enable_truncation(**cuts)
        if pads:
            backend.enable_padding(**pads)


def shortened(encoding, most: int) -> list[int]:
    """Return the tokens of a text or pair, cut where they are too many: special tokens stay.

    Of a pair the longer text is cut to the length of the other, and then both to halves, as tokenizers' "longest_first"
    does.
    """
    ids, of_text = encoding.ids, [-1 if text is None else text for text in encoding.sequence_ids]
    if len(ids) <= most:
        return ids
    room = max(0, most - of_text.count(-1))
    kept = {0: room, 1: 0}
    if 1 in of_text:
        short, long = sorted((0, 1), key=of_text.count)
        kept[short] = min(of_text.count(short), room // 2)
        kept[long] = room - kept[short]
    found, seen = [], {-1: 0, 0: 0, 1: 0}
    for token, text in zip(ids, of_text, strict=True):
        if text < 0 or seen[text] < kept[text]:
            found.append(token)
        seen[text] += 1
    return found[:most]
