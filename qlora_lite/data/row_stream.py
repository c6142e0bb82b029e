"""Make examples while training uses them, for sources that are larger than disk or patience.

Nothing is kept: each epoch reads the sources anew. Rows come in the order of the files, and packs are filled as
``batch.plan_epoch`` does with order "as-is", so a streamed epoch gives the batches that the same rows give in memory.
(Shuffling within a buffer, the other known way, gives neither the order of the file nor a shuffled set, and another
result for each size of the buffer.)

What the checks of the whole set would find before training is found here when its row comes: the error then ends the
run. Tokens for memory alone need no stream: the token cache is memory-mapped (see ``storage``).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from transformers import PreTrainedTokenizerFast

from .encode import make_examples
from .sources import Source
from .statistics import Settings, Statistics, note_lost_kinds, note_too_long
from .storage import Example


@dataclass(frozen=True, slots=True)
class RowStream:
    """Say what to read, again for every epoch; the names and meanings are those of ``examples.read_examples``."""

    sources: tuple[Source, ...]
    tokenizer: PreTrainedTokenizerFast
    template: str | None
    settings: Settings
    max_bad_rows: int = 0

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples of one epoch in order, rows repeated as the weights of their sources say.

        Raises:
            DataError: there are more bad rows than allowed, a row is too long, or a file cannot be read.
        """
        statistics = Statistics()
        for source in self.sources:
            share, index = Fraction(source.weight).limit_denominator(1_000_000), 0
            for examples in make_examples(source, self.tokenizer, self.template, self.settings, statistics):
                self._raise_if_unusable(statistics)
                for example in examples:
                    for _ in range(int((index + 1) * share) - int(index * share)):
                        yield example
                    index += 1
        note_lost_kinds(statistics)
        self._raise_if_unusable(statistics)

    def _raise_if_unusable(self, statistics: Statistics) -> None:
        note_too_long(statistics, self.settings.max_tokens)
        statistics.problems.raise_if_any(self.max_bad_rows)


def stream_batches(
    examples: Iterable[Example], max_tokens: int, packing: bool, micro_batch_size: int
) -> Iterator[list[Example]]:
    """Yield the rows of each micro-batch, those of ``plan_epoch`` with order "as-is".

    Args:
        examples: rows of at most max_tokens tokens.
        max_tokens: room of a pack.
        packing: True to fill packs with several rows; False for one row each.
        micro_batch_size: packs (rows, without packing) per micro-batch; the last may have fewer.
    """
    rows: list[Example] = []
    packs = room = 0
    for example in examples:
        length = len(example.token_ids)
        if not packing or length > room:
            if packs == micro_batch_size:
                yield rows
                rows, packs = [], 0
            packs, room = packs + 1, max_tokens
        rows.append(example)
        room -= length
    if rows:
        yield rows


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
        replace(first, token_ids=np.resize(first.token_ids, length), learned=np.ones(length, np.bool_))
        for length in lengths
    ] * count
