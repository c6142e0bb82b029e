"""Keep tokenised rows in flat arrays, in memory or in files that are memory-mapped.

A million Example objects with their arrays and texts take several GiB as Python objects; as flat arrays they take
what their bytes are, and from files only the pages at hand lie in memory. (``datasets`` would store them as Arrow
tables and hand out Python lists, token by token, where a slice of an array is a view.)

Files of a folder: token_ids int32 [tokens], learned bool [tokens], text UTF-8 bytes [bytes] (each row's prompt, then
its answer), rows int64 [R + 1, 8]; row r + 1 of ``rows`` holds the ends of row r in token_ids, of its prompt and of its
answer in text, the number of its file, its line, which row it is where its line holds several (else 0), the tokens of
the first of its two sequences (else 0), and whether its answer is one to imitate. The first line is zeros, so each row
begins where the line before it ends.

Of a preference, an example holds two sequences: the prompt with the chosen answer, and the prompt with the rejected
one. They are stored as one, so that whatever orders, packs, cuts, counts and holds out examples cannot part them.

Shapes: R rows stored; N examples, which name their row in ``order``: a weight repeats rows or leaves them out.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple, overload

import numpy as np

from qlora_lite.data.readers.problems import read_place, write_place


class PictureFile(NamedTuple):
    """A picture of a row: its file, the SHA-256 of what is in it, and its grid (``picture_grids``), if it has one."""

    path: str
    digest: str
    grid: tuple[int, int] | tuple[()] = ()


FILES = {"token_ids": np.int32, "is_target": np.bool_, "text": np.uint8, "rows": np.int64}
_COLUMNS = 8


@dataclass(frozen=True, slots=True)
class Example:
    """Hold one tokenised row.

    Args:
        token_ids: int32 [T].
        is_target: bool [T]; learned[t] means that token t is to be predicted.
        prompt: the text up to the last answer, special tokens included; "" for a plain document.
        answer: what follows it up to the token that ends the last answer, without special tokens; "" for a plain
            document, and where it was cut off.
        where: the row's place, "file.jsonl:12".
        first: tokens of the first of two sequences; 0 where there is one.
        desirable: whether the answer is one to imitate.
        references: what the reference model gives the sequences, where that is known (``Examples.references``).
        pictures: those of a chat, in order; their tokens are among ``token_ids``.
    """

    token_ids: np.ndarray
    is_target: np.ndarray
    prompt: str
    answer: str
    where: str
    first: int = 0
    desirable: bool = True
    references: tuple[float, ...] = ()
    pictures: tuple[PictureFile, ...] = ()


@dataclass(frozen=True, slots=True)
class Examples(Sequence[Example]):
    """Hold examples as flat arrays; indexing makes an ``Example``, slicing another ``Examples`` without copying.

    Args:
        token_ids: int32 [tokens].
        is_target: bool [tokens].
        text: uint8 [bytes].
        rows: int64 [R + 1, 8], see the module's text.
        files: the names that the file numbers stand for.
        order: int64 [N], the row of each example.
        references: float32 [R, 2], the logarithm of the probability that the reference model gives the target tokens of
            each row's two sequences; None where it is not known.
        pictures: those of each row, in memory; None where no row has any.
    """

    token_ids: np.ndarray
    is_target: np.ndarray
    text: np.ndarray
    rows: np.ndarray
    files: tuple[str, ...]
    order: np.ndarray
    references: np.ndarray | None = None
    pictures: tuple[tuple[PictureFile, ...], ...] | None = None

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return replace(self, order=self.order[index])
        row = int(self.order[index])
        before, (end, prompt_end, answer_end, file, *place, first, desirable) = self.rows[row : row + 2].tolist()
        start, _, text_start, *_ = before
        return Example(
            self.token_ids[start:end],
            self.is_target[start:end],
            self.text[text_start:prompt_end].tobytes().decode(),
            self.text[prompt_end:answer_end].tobytes().decode(),
            write_place(self.files[file], *place),
            first,
            bool(desirable),
            () if self.references is None else tuple(self.references[row].tolist()),
            self.pictures[row] if self.pictures else (),
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each example: int64 [N]."""
        starts = self.rows[:, 0]
        return starts[self.order + 1] - starts[self.order]

    @property
    def target_counts(self) -> np.ndarray:
        """Return the target tokens of each example: int64 [N]."""
        starts = self.rows[:-1, 0]
        return np.add.reduceat(self.is_target, starts, dtype=np.int64)[self.order] if len(starts) else self.order

    @property
    def picture_digests(self) -> list[str]:
        """Return what tells the pictures of each example from others: nothing where none has any."""
        return ["".join(each.digest for each in self.pictures[row]) for row in self.order] if self.pictures else []

    def digest(self) -> str:
        """Return a SHA-256 over tokens, mask and pictures of all examples in order, wherever they come from."""
        result = hashlib.sha256()
        for array in (self.order, self.rows[:, 0], *self._of_pairs(), self.token_ids, self.is_target):
            result.update(np.ascontiguousarray(array))
        result.update(" ".join(self.picture_digests).encode())
        return result.hexdigest()

    def _of_pairs(self) -> list[np.ndarray]:
        """Return what sets examples of two sequences apart; nothing of others, whose digest it would change."""
        return [self.rows[:, 6:]] if self.rows[:, 6].any() else []

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        """Return token_ids and learned of all examples, end to end; a view where they lie so already."""
        order = self.order
        if len(order) and int(order[-1]) - int(order[0]) == len(order) - 1 and (np.diff(order) == 1).all():
            whole = slice(self.rows[order[0], 0], self.rows[order[-1] + 1, 0])
            return self.token_ids[whole], self.is_target[whole]
        parts = [slice(self.rows[row, 0], self.rows[row + 1, 0]) for row in order]
        empty = slice(0, 0)
        return tuple(
            np.concatenate([flat[part] for part in [empty, *parts]]) for flat in (self.token_ids, self.is_target)
        )


def sequences_of(example: Example) -> tuple[Example, ...]:
    """Return the sequences of an example, each as an example of its own."""
    if not example.first:
        return (example,)
    parts = slice(example.first), slice(example.first, None)
    return tuple(
        replace(example, token_ids=example.token_ids[part], is_target=example.is_target[part], first=0)
        for part in parts
    )


def sequence_starts(examples: Examples) -> np.ndarray:
    """Return the first token of every sequence of consecutive examples, rising: int64 [sequences]."""
    starts, first = np.cumsum(examples.lengths) - examples.lengths, examples.rows[examples.order + 1, 6]
    return np.union1d(starts, starts + first)


def virtual_ids(count: int) -> list[int]:
    """Return the ids of so many virtual tokens (``adapters.prompt``): -1, -2 and so on."""
    return list(range(-1, -count - 1, -1))


def with_virtual(example: Example, count: int) -> Example:
    """Return an example with so many virtual tokens before it, none of them a target."""
    token_ids = np.concatenate([np.array(virtual_ids(count), np.int32), example.token_ids])
    return replace(
        example, token_ids=token_ids, is_target=np.concatenate([np.zeros(count, np.bool_), example.is_target])
    )


def row_lengths(examples: Sequence[Example]) -> list[int]:
    """Return the tokens of each example."""
    if isinstance(examples, Examples):
        return examples.lengths.tolist()
    return [len(example.token_ids) for example in examples]


def longest_sequences(examples: Sequence[Example]) -> list[int]:
    """Return the tokens of the longer sequence of each example, or of its only one."""
    if isinstance(examples, Examples):
        first = examples.rows[examples.order + 1, 6]
        return np.maximum(first, examples.lengths - first).tolist()
    return [max(example.first, len(example.token_ids) - example.first) for example in examples]


def target_counts(examples: Sequence[Example]) -> list[int]:
    """Return the target tokens of each example."""
    if isinstance(examples, Examples):
        return examples.target_counts.tolist()
    return [int(example.is_target.sum()) for example in examples]


def largest_token(examples: Sequence[Example]) -> int:
    """Return the largest token id of all examples, and of rows stored with them; -1 where there is none."""
    if isinstance(examples, Examples):
        return int(examples.token_ids.max(initial=-1))
    return max((int(example.token_ids.max(initial=-1)) for example in examples), default=-1)


def repeated(first: int, count: int, weight: float) -> np.ndarray:
    """Return the rows first, first + 1, ... with row i as often as whole numbers lie in (i w, (i + 1) w].

    Args:
        first: number of the first row.
        count: how many there are.
        weight: w, above 0; taken as the nearest fraction with a denominator of at most a million.

    Returns:
        int64 [floor(count w)].
    """
    share = Fraction(weight).limit_denominator(1_000_000)
    ends = np.arange(count + 1, dtype=np.int64) * share.numerator // share.denominator
    return np.repeat(np.arange(first, first + count, dtype=np.int64), np.diff(ends))


@dataclass(slots=True)
class ExampleWriter:
    """Write examples one after the other.

    Args:
        folder: where the files go; None keeps them in memory.
        files: the names of the rows' files so far.
        count: rows so far.
    """

    folder: Path | None = None
    files: list[str] = field(default_factory=list)
    count: int = 0
    _sinks: dict[str, BinaryIO] = field(default_factory=dict)
    _ends: list[int] = field(default_factory=lambda: [0, 0])  # tokens and bytes of text so far
    _pictures: list[tuple[PictureFile, ...]] = field(default_factory=list)

    def add_all(self, examples: Iterable[Example]) -> None:
        """Append examples."""
        if not self._sinks:
            self._sinks = {name: self._open(name) for name in FILES}
            self._sinks["rows"].write(np.zeros(_COLUMNS, np.int64).tobytes())
        batch = list(examples)
        if not batch:
            return
        self._sinks["token_ids"].write(np.concatenate([example.token_ids for example in batch]).tobytes())
        self._sinks["is_target"].write(np.concatenate([example.is_target for example in batch]).tobytes())
        texts = [text.encode() for example in batch for text in (example.prompt, example.answer)]
        self._sinks["text"].write(b"".join(texts))
        rows = np.empty((len(batch), _COLUMNS), np.int64)
        rows[:, 0] = self._ends[0] + np.cumsum([len(example.token_ids) for example in batch])
        rows[:, 1:3] = self._ends[1] + np.cumsum([len(text) for text in texts]).reshape(-1, 2)
        rows[:, 3:6] = [self._place(example.where) for example in batch]
        rows[:, 6:] = [(example.first, example.desirable) for example in batch]
        self._ends = [int(rows[-1, 0]), int(rows[-1, 2])]
        self._sinks["rows"].write(rows.tobytes())
        self._pictures += [example.pictures for example in batch]
        self.count += len(batch)

    def finish(self, order: np.ndarray) -> Examples:
        """Close the files and return what was written.

        Args:
            order: int64 [N], the row of each example.
        """
        self.add_all(())
        if self.folder is None:
            buffers = {name: sink.getbuffer() for name, sink in self._sinks.items()}
            found = _examples({name: np.frombuffer(buffers[name], FILES[name]) for name in FILES}, self.files, order)
            return replace(found, pictures=tuple(self._pictures)) if any(self._pictures) else found
        for sink in self._sinks.values():
            sink.close()
        return load_arrays(self.folder, self.files, order)

    def _open(self, name: str) -> BinaryIO:
        return io.BytesIO() if self.folder is None else (self.folder / name).open("wb")

    def _place(self, where: str) -> tuple[int, int, int]:
        file, line, row = read_place(where)
        if not self.files or self.files[-1] != file:
            self.files.append(file)
        return len(self.files) - 1, line, row


def prompt_tokens(example: Example) -> int:
    """Return the tokens before the last answer of an example: all up to the last run of tokens that are learned."""
    others = np.flatnonzero(~example.is_target[: int(np.flatnonzero(example.is_target)[-1])])
    return int(others[-1]) + 1 if len(others) else 0


def load_arrays(folder: Path, files: Sequence[str], order: np.ndarray) -> Examples:
    """Map the files that an ``ExampleWriter`` wrote.

    Raises:
        OSError, ValueError: a file is missing, or its size is not a whole number of entries.
    """
    return _examples({name: _mapped(folder / name, dtype) for name, dtype in FILES.items()}, files, order)


def _mapped(path: Path, dtype: type) -> np.ndarray:
    """Map a file; an empty one cannot be mapped. A plain array over the map: slices of np.memmap are slow."""
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)


def _examples(arrays: dict[str, np.ndarray], files: Sequence[str], order: np.ndarray) -> Examples:
    rows = arrays.pop("rows").reshape(-1, _COLUMNS)
    return Examples(**arrays, rows=rows, files=tuple(files), order=order)


def stored(examples: Iterable[Example] | Examples) -> Examples:
    """Return examples as flat arrays in memory; those that are so already stay as they are."""
    if isinstance(examples, Examples):
        return examples
    writer = ExampleWriter()
    writer.add_all(examples)
    return writer.finish(np.arange(writer.count))
