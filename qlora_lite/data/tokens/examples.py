"""Turn sources into token rows with a mask, and account for every row and token on the way.

Nothing is left out in silence: a row is an example, a counted entry of ``dropped``, or part of an error that
names it.

Special tokens written out inside a row's text never become control tokens: in a conversation they are an
error (see ``render.render``), in a plain document they are tokenised as the letters they are.

A ``RowStream`` makes examples while training uses them, for sources that are larger than disk or patience. Nothing is
kept: each epoch reads the sources anew, in the order of the files. (Shuffling within a buffer, the other known way,
gives neither the order of the file nor a shuffled set, and another result for each size of the buffer.) What the checks
of the whole set would find before training is found when its row comes: the error then ends the run. Tokens for memory
alone need no stream: the token cache is memory-mapped (see ``storage``).
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_lite.data.chat.template import Template
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.readers.sources import Source
from qlora_lite.errors import DataError, OutputError
from qlora_lite.files import remove_old_leftovers, replacing_folder

from .encode import TEXTS
from .example_checks import NOTHING_TO_LEARN, check_examples
from .statistics import DEFAULT_SETTINGS, ReadSettings, RowReader, Statistics, note_lost_kinds, note_too_long
from .storage import Example, Examples, ExampleWriter, repeated
from .token_cache import cache_key, load_set, most_bytes, remove_least_used, save_set

if TYPE_CHECKING:  # transformers takes seconds to import, and a check of a recipe needs none of it
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("qlora_lite")
progress = logging.getLogger("qlora_lite.progress")  # of its own, so that a command can show it and nothing else
TRAIN_ON = ("assistant", "completion", "all", "last")
OVERFLOW = ("error", "drop", "truncate", "split")
BAD_SOURCE = "source not usable"
LEFT_OUT = "left out by the weight of their source"
_ROWS_PER_REPORT = 100_000


@dataclass(frozen=True, slots=True)
class Dataset:
    """Hold the rows of a run and what became of every row read.

    Args:
        examples: the rows kept, repeated as the sources' weights say.
        rows_read: rows in the files.
        rows_kept: rows in ``examples``; each part of a split row counts.
        dropped: reason -> rows left out for it, malformed ones included.
        dropped_at: reason -> the places of the first of them.
        truncated: rows cut to max_tokens.
        split: rows cut into several examples.
        examples_of: examples of each source, one after the other in ``examples``.
        unused: what the rows of each source hold that is not looked at, see ``statistics.no_counts``.
        tokens: tokens of all examples.
        learned_tokens: tokens that are predicted, of all examples.
        end_token_ids: the tokens that end answers and documents; generation stops at any of them.
        template: the chat template used; None if every row is a plain document.
        problems: what is wrong with rows and with the set.
    """

    examples: Examples
    rows_read: int
    rows_kept: int
    dropped: dict[str, int]
    dropped_at: dict[str, list[str]]
    truncated: int
    split: int
    examples_of: tuple[int, ...]
    unused: tuple[dict[str, Counter[str]], ...]
    tokens: int
    target_tokens: int
    end_token_ids: frozenset[int]
    template: Template | None
    problems: Problems


def build_examples(
    sources: Sequence[Source],
    tokenizer: "PreTrainedTokenizerFast",
    template: str | None = None,
    train_on: str = "assistant",
    max_tokens: int = 1024,
    overflow: str = "error",
    train_on_end: bool = True,
    max_bad_rows: int = 0,
) -> Dataset:
    """Read, render, tokenise and mask the rows of all sources, and accept them only if they can be trained on.

    Args:
        sources: see ``read_examples``.
        tokenizer: see ``read_examples``.
        template, train_on, max_tokens, overflow, train_on_end: see ``ReadSettings``.
        max_bad_rows: rows that may be left out because they are malformed.

    Raises:
        DataError: rows are malformed, too long, or leave nothing to learn; up to 20 are named at once.
    """
    settings = ReadSettings(template, train_on, max_tokens, overflow, train_on_end)
    data = read_examples(sources, tokenizer, settings)
    data.problems.raise_if_any(max_bad_rows)
    return data


def read_examples(
    sources: Sequence[Source],
    tokenizer: "PreTrainedTokenizerFast | None",
    settings: ReadSettings = DEFAULT_SETTINGS,
    reader: RowReader = TEXTS,
    cache: Path | None = None,
) -> Dataset:
    """Read, render, tokenise and mask the rows of all sources, and note every problem.

    A source's weight w uses each of its rows w times on average: of n rows, floor(n w) examples, evenly
    spread.

    Args:
        sources: where rows come from, in order.
        tokenizer: a fast tokenizer, whose state is not changed; None where the reader needs none.
        settings: how rows become tokens.
        reader: what the rows are.
        cache: folder of token caches, bounded in size (see ``token_cache``); None keeps the tokens in memory.

    Returns:
        The examples with their counts and problems; rows with a problem are left out and counted.

    Raises:
        DataError: an argument is out of range.
    """
    _check_arguments(sources, tokenizer, settings, reader)
    job = _Job(sources, tokenizer, settings, reader)
    examples, statistics = _cached(job, cache) if cache else _read(job, None)
    return Dataset(
        examples=examples,
        rows_read=statistics.rows_read,
        rows_kept=len(examples),
        dropped={reason: count for reason, count in statistics.dropped.items() if count},
        dropped_at=statistics.dropped_at,
        truncated=statistics.truncated,
        split=statistics.split,
        examples_of=tuple(statistics.examples_of),
        unused=tuple(statistics.unused),
        tokens=int(examples.lengths.sum()),
        target_tokens=int(examples.target_counts.sum()),
        end_token_ids=frozenset(statistics.end_token_ids),
        template=statistics.template,
        problems=statistics.problems,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """The arguments of ``read_examples``."""

    sources: Sequence[Source]
    tokenizer: "PreTrainedTokenizerFast | None"
    settings: ReadSettings
    reader: RowReader


def _cached(job: _Job, cache: Path) -> tuple[Examples, Statistics]:
    """Return the set from the cache, making the entry first where there is none."""
    key = cache_key(job.sources, job.tokenizer, job.settings, job.reader)
    if key is None:
        return _read(job, None)
    entry = cache / key
    if found := load_set(entry, job.tokenizer, job.settings.template):
        log.info("data: tokens from the cache %s", entry)
        return found
    remove_old_leftovers(cache)
    limit_bytes = most_bytes()
    try:
        with replacing_folder(entry) as folder:
            save_set(folder, *_read(job, folder))
    except OutputError as error:
        log.warning("the tokens are not cached: %s", error)
        return _read(job, None)
    remove_least_used(cache, entry, limit_bytes)
    return load_set(entry, job.tokenizer, job.settings.template) or _read(job, None)


def _read(job: _Job, folder: Path | None) -> tuple[Examples, Statistics]:
    """Read, render and tokenise all rows into arrays in memory, or in files of a folder."""
    statistics, writer = Statistics(), ExampleWriter(folder)
    orders = [_write(source, job, statistics, writer) for source in job.sources]
    examples = writer.finish(np.concatenate(orders))
    _note_problems(examples, job, statistics)
    return examples, statistics


def _write(source: Source, job: _Job, statistics: Statistics, writer: ExampleWriter) -> np.ndarray:
    """Write the examples of a source and return their order, repeated as its weight says."""
    first, next_report = writer.count, _ROWS_PER_REPORT
    try:
        for examples in job.reader.read(source, job.tokenizer, job.settings, statistics):
            writer.add_all(examples)
            if statistics.rows_read >= next_report:
                progress.info("data: %s rows read", f"{statistics.rows_read:,}")
                next_report = statistics.rows_read + _ROWS_PER_REPORT
    except DataError as error:
        _note_bad_source(source, error, statistics.problems)
    order = repeated(first, writer.count - first, source.weight)
    statistics.examples_of.append(len(order))
    statistics.dropped[LEFT_OUT] += writer.count - first - len(np.unique(order))
    return order


def _note_problems(examples: Examples, job: _Job, statistics: Statistics) -> None:
    """Add what is wrong with the set, and count the rows that problems left out."""
    statistics.dropped.update({rule: n for rule, n in statistics.problems.counts.items() if rule != BAD_SOURCE})
    for problem in statistics.problems.found:
        if problem.rule != BAD_SOURCE:
            statistics.note_dropped(problem.rule, problem.where)
    note_too_long(statistics, job.settings, job.reader)
    note_lost_kinds(statistics)
    if len(examples) == 0 and not statistics.problems.count:
        left = f"no row is left to train on: {_reasons(statistics.dropped)}"
        statistics.problems.add(job.sources[0].path, left, NOTHING_TO_LEARN, fatal=True)
    end_ids, end_is_target = statistics.end_token_ids, job.settings.train_on_end and job.reader.ends_answers
    begin_id = job.tokenizer.bos_token_id if job.tokenizer else None
    for problem in check_examples(examples, begin_id, end_ids, end_is_target):
        statistics.problems.add(problem.where, problem.message, problem.rule, fatal=True)


def _check_arguments(
    sources: Sequence[Source],
    tokenizer: "PreTrainedTokenizerFast | None",
    settings: ReadSettings,
    reader: RowReader,
) -> None:
    train_on, overflow, max_tokens = settings.train_on, settings.overflow, settings.max_tokens
    if train_on not in TRAIN_ON:
        raise DataError(f"data.train_on {train_on!r} is unknown; choose one of {', '.join(TRAIN_ON)}")
    if overflow not in OVERFLOW:
        raise DataError(f"data.overflow {overflow!r} is unknown; choose one of {', '.join(OVERFLOW)}")
    if not isinstance(max_tokens, int) or max_tokens < 2:
        raise DataError(f"data.max_tokens is {max_tokens!r}; a row needs at least 2 tokens")
    if reader.needs_tokenizer and not hasattr(tokenizer, "is_fast"):
        name = type(tokenizer).__name__
        raise DataError(f"a tokenizer is wanted, not {name}; qlora_lite.load_tokenizer(PATH) loads one")
    if reader.needs_tokenizer and not tokenizer.is_fast:
        raise DataError(
            "this tokenizer has no tokenizer.json, so the place of its tokens in the text is unknown; "
            "convert it with transformers first (load it with AutoTokenizer and save it again)"
        )
    if isinstance(sources, Source):
        raise DataError("sources is one source; put it into a list: [Source(...)]")
    for source in sources:
        if not isinstance(source, Source):
            cure = 'write Source("rows.jsonl"), or Source("mine", rows=rows) for rows in memory'
            raise DataError(f"a source is {type(source).__name__}; {cure}")
        if not 0 < source.weight < float("inf"):
            raise DataError(f"{source.path}: weight {source.weight} must be above 0 and finite")
        if source.rows is not None and (
            isinstance(source.rows, str | bytes | Mapping) or not isinstance(source.rows, Iterable)
        ):
            kind = type(source.rows).__name__
            raise DataError(f"{source.path}: rows is {kind}; give a list of dicts, one a row, or a datasets.Dataset")
    if not sources:
        raise DataError("no data source is given; set data.train")


def _note_bad_source(source: Source, error: DataError, problems: Problems) -> None:
    """Note an error that ends the reading of a source; its text may begin with the file it is about."""
    place, _, message = str(error).partition(": ")
    if not place.startswith(source.path.partition("*")[0].rstrip("/")):
        place, message = "", str(error)
    problems.add(place, message, BAD_SOURCE, fatal=True)


def _reasons(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} rows {reason}" for reason, count in dropped.items() if count) or "the sources are empty"


@dataclass(frozen=True, slots=True)
class RowStream:
    """Say what to read, again for every epoch; the names and meanings are those of ``examples.read_examples``."""

    sources: tuple[Source, ...]
    tokenizer: "PreTrainedTokenizerFast"
    settings: ReadSettings
    reader: RowReader = TEXTS
    max_bad_rows: int = 0

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples of one epoch in order, rows repeated as the weights of their sources say.

        Raises:
            DataError: there are more bad rows than allowed, a row is too long, or a file cannot be read.
        """
        statistics = Statistics()
        for source in self.sources:
            share, index = Fraction(source.weight).limit_denominator(1_000_000), 0
            for examples in self.reader.read(source, self.tokenizer, self.settings, statistics):
                self._raise_if_unusable(statistics)
                for example in examples:
                    for _ in range(int((index + 1) * share) - int(index * share)):
                        yield example
                    index += 1
        note_lost_kinds(statistics)
        self._raise_if_unusable(statistics)

    def _raise_if_unusable(self, statistics: Statistics) -> None:
        note_too_long(statistics, self.settings, self.reader)
        statistics.problems.raise_if_any(self.max_bad_rows)


def largest_rows(sample: Sequence[Example], max_tokens: int, packing: bool, count: int) -> list[Example]:
    """Return rows that need as much as any that a stream can give, to find out beforehand whether they fit.

    Args:
        sample: rows of the stream, at least one; the first one's tokens are repeated.
        max_tokens: room of a pack, or tokens of each row without packing.
        packing: packs may hold several rows, and hold two here, one of them of one token.
        count: how many packs.
    """
    first, lengths = sample[0], (max_tokens - 1, 1) if packing else (max_tokens,)
    return [
        replace(first, token_ids=np.resize(first.token_ids, length), is_target=np.ones(length, np.bool_))
        for length in lengths
    ] * count
