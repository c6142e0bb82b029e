"""Plan which rows share a step, and join them without padding.

Rows are packed in one sequence; positions restart at 0 in each and ``row_lengths`` lets attention keep
them apart. There is no padding token, so nothing is computed for nothing and no mask can hide a real token.

Packing is best fit, decreasing: rows from longest to shortest, each into the fullest pack that still has room
(Johnson, "Near-optimal bin packing algorithms", 1973: at most 11/9 of the fewest packs). Concatenating
everything and cutting at max_tokens, the other known way, fills packs fully but tears rows in two.

| order         | rows and packs                                                                               |
|---------------|----------------------------------------------------------------------------------------------|
| shuffle       | best-fit packs in random order                                                               |
| as-is         | rows keep their order; a new pack begins when the next row does not fit                      |
| longest-first | best-fit packs, that with the longest row first: what does not fit fails in the first step   |
| by-length     | rows of similar length share a pack and a step; the steps come in random order                  |

``pieces_of`` turns a batch back into text for a person, from the tensors that the model gets and nothing before them:
what it shows is what training sees, and a fault anywhere on the way shows too.

Shapes: T tokens of a micro-batch; input_ids and position_ids [1, T], labels [T]. Lengths are in tokens.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from qlora_lite.errors import DataError

from .storage import Example, row_lengths

IGNORED_LABEL = -100
ORDERS = ("shuffle", "as-is", "longest-first", "by-length")


@dataclass(frozen=True, slots=True)
class Batch:
    """Hold packed sequences.

    Args:
        input_ids: int64 [1, T].
        position_ids: int64 [1, T], restarting at 0 in each row; [3, 1, T] of pictures with grids.
        labels: int64 [T], already shifted: labels[t] is token t+1 of the same row if it is learned, else
            -100.
        row_lengths: tokens of each row; their sum is T.
        where: the place of each row.
        pixels: of the rows' pictures, float32 [N, ...] (``picture_reader``, ``picture_grids``); None without any.
        grids: of pictures that keep their shapes.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    row_lengths: tuple[int, ...]
    where: tuple[str, ...]
    pixels: torch.Tensor | None = None
    grids: tuple[tuple[int, int], ...] = ()


def plan_epoch(
    lengths: Sequence[int],
    max_tokens: int,
    packing: bool,
    micro_batch_size: int,
    order: str = "shuffle",
    seed: int = 0,
    epoch: int = 0,
    micro_batches: int = 1,
) -> list[list[int]]:
    """Choose the rows of each micro-batch of an epoch; equal arguments give equal plans.

    Args:
        lengths: tokens of each row, each from 1 to max_tokens.
        max_tokens: room of a pack.
        packing: True to fill packs with several rows; False for one row each.
        micro_batch_size: packs (rows, without packing) per micro-batch, at least 1; the last may have fewer.
        order: one of ORDERS.
        seed: of the run.
        epoch: from 0; each has its own order.
        micro_batches: of a step. A step's packs are the same however many micro-batches they are cut into.

    Returns:
        Row numbers per micro-batch; every row stands in exactly one.

    Raises:
        DataError: a row is longer than max_tokens, or an argument is out of range.
    """
    if order not in ORDERS or micro_batch_size < 1:
        raise DataError(f"order {order!r} must be one of {', '.join(ORDERS)}, micro_batch_size {micro_batch_size} >= 1")
    rows = list(range(len(lengths)))
    chance = random.Random(f"{seed}/{epoch}")
    if order in ("shuffle", "by-length"):
        chance.shuffle(rows)
    if order in ("longest-first", "by-length"):
        rows.sort(key=lambda row: -lengths[row])
    if not packing:
        packs = [[row] for row in rows]
    elif order in ("shuffle", "longest-first"):
        packs = pack_best_fit(lengths, max_tokens, rows)
    else:
        packs = pack_in_order(lengths, max_tokens, rows)
    if order == "shuffle" and packing:
        chance.shuffle(packs)
    if order == "by-length":
        steps = _groups(packs, micro_batch_size * micro_batches)
        rest = steps.pop() if len(packs) % (micro_batch_size * micro_batches) else []  # stays last, as in all orders
        chance.shuffle(steps)
        packs = [pack for step in (*steps, rest) for pack in step]
    return [[row for pack in group for row in pack] for group in _groups(packs, micro_batch_size)]


def _groups(packs: list[list[int]], size: int) -> list[list[list[int]]]:
    return [packs[start : start + size] for start in range(0, len(packs), size)]


def pack_best_fit(lengths: Sequence[int], max_tokens: int, rows: Sequence[int]) -> list[list[int]]:
    """Fill packs by best fit, decreasing; rows of equal length are taken in the order given.

    Packs stand in the order of their longest rows. n rows take O(n log n) comparisons; the sorted list of distinct
    rooms never has more than max_tokens entries.

    Args:
        lengths: tokens of each row.
        max_tokens: room of a pack.
        rows: the rows to pack.

    Returns:
        The rows of each pack; no pack has more than max_tokens tokens.

    Raises:
        DataError: a row is longer than max_tokens.
    """
    packs: list[list[int]] = []
    rooms: list[int] = []  # distinct free room of the packs, ascending
    packs_with_room: dict[int, list[int]] = {}
    for row in sorted(rows, key=lambda row: -lengths[row]):
        length = lengths[row]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            _check_length(row, length, max_tokens)
            pack, room = len(packs), max_tokens
            packs.append([])
        else:
            room = rooms[place]
            pack = packs_with_room[room].pop()
            if not packs_with_room[room]:
                del packs_with_room[room], rooms[place]
        packs[pack].append(row)
        left = room - length
        if left not in packs_with_room:
            packs_with_room[left] = []
            insort(rooms, left)
        packs_with_room[left].append(pack)
    return packs


def pack_in_order(lengths: Sequence[int], max_tokens: int, rows: Sequence[int]) -> list[list[int]]:
    """Fill packs with rows in the order given, beginning a new pack when the next row does not fit.

    Args:
        lengths: tokens of each row.
        max_tokens: room of a pack.
        rows: the rows to pack.

    Returns:
        The rows of each pack.

    Raises:
        DataError: a row is longer than max_tokens.
    """
    packs: list[list[int]] = []
    room = 0
    for row in rows:
        _check_length(row, lengths[row], max_tokens)
        if lengths[row] > room:
            packs.append([])
            room = max_tokens
        packs[-1].append(row)
        room -= lengths[row]
    return packs


def packing_efficiency(lengths: Sequence[int], max_tokens: int, packs: Sequence[Sequence[int]]) -> float:
    """Return the share of the packs' room that tokens fill, from 0 to 1 (0 for no packs).

    Args:
        lengths: tokens of each row.
        max_tokens: room of a pack.
        packs: the rows of each pack.
    """
    if not packs:
        return 0.0
    return sum(lengths[row] for pack in packs for row in pack) / (max_tokens * len(packs))


class Extent(NamedTuple):
    """The most of each that a micro-batch has: its memory grows with all of them."""

    tokens: int
    rows: int
    longest: int  # tokens of a row
    targets: int  # tokens
    pictures: int = 0  # in units of ``Workload.picture_counts``
    largest_picture: int = 0


def extent_of(
    lengths: Sequence[int],
    targets: Sequence[int],
    batches: Sequence[Sequence[int]],
    pictures: np.ndarray | None = None,
) -> Extent:
    """Return the most of each that any of some micro-batches has.

    Args:
        lengths: tokens of each row.
        targets: target tokens of each row.
        batches: the rows of each micro-batch, at least one.
        pictures: int64 [rows, 2], of each row, and how large the largest is; None where rows have none.
    """
    counts = np.fromiter(map(len, batches), np.int64)
    rows, starts = np.fromiter(chain.from_iterable(batches), np.int64), np.cumsum(counts) - counts
    shown, sizes = (np.zeros((len(lengths), 2), np.int64) if pictures is None else pictures)[rows].T
    tokens, taught = (np.asarray(each)[rows] for each in (lengths, targets))
    most, most_targets, pictures_most = (int(np.add.reduceat(each, starts).max()) for each in (tokens, taught, shown))
    return Extent(most, int(counts.max()), int(tokens.max()), most_targets, pictures_most, int(sizes.max()))


def enlarged(rows: Sequence[Example], most: Extent) -> list[Example]:
    """Return rows that need as much memory as any micro-batch: the tokens of the one that has most, cut into other rows
    where another has more rows or a longer one, and learned as much as any, evenly: parts of it have some to learn too.

    Args:
        rows: of the micro-batch with the most tokens; they are repeated where ``most`` has more.
    """
    lengths = [len(row.token_ids) for row in rows]
    if (sum(lengths), len(rows), max(lengths)) != most[:3]:
        lengths = _cut_otherwise(sorted(lengths, reverse=True), most)
    elif sum(int(row.is_target.sum()) for row in rows) >= most.targets:
        return list(rows)
    tokens, found = np.resize(np.concatenate([row.token_ids for row in rows]), most.tokens), []
    rooms, end = np.array(lengths) - 1, 0  # a row's first token is predicted by none
    shares = np.cumsum(rooms) * min(most.targets, rooms.sum()) // max(1, rooms.sum())
    for length, count in zip(lengths, np.diff(shares, prepend=0).tolist(), strict=True):
        start, end = end, end + length
        is_target = np.zeros(length, np.bool_)
        is_target[1 : 1 + count] = True
        found.append(replace(rows[0], token_ids=tokens[start:end], is_target=is_target))
    return found


def _cut_otherwise(lengths: Sequence[int], most: Extent) -> list[int]:
    """Return the lengths of the longest row and of so many others as it leaves tokens for, in proportions as given.

    (Of various lengths, because a CPU has kernels for each.)
    """
    longest = min(most.longest, most.tokens - (most.rows > 1))
    count = min(most.rows - 1, most.tokens - longest)
    others, spare = np.resize(lengths[1:] or lengths, count), most.tokens - longest - count
    found = 1 + np.diff(np.cumsum(others) * spare // max(1, others.sum()), prepend=0)
    if found.max(initial=0) > longest:
        found = 1 + np.diff(np.arange(1, count + 1) * spare // count, prepend=0)
    return [longest, *found.tolist()]


def collate(examples: Sequence[Example]) -> Batch:
    """Pack rows into one sequence.

    Args:
        examples: at least one row.

    Returns:
        One sequence of all rows, without padding.

    Raises:
        DataError: no row in it has a token to learn, which would make the loss 0/0.
    """
    labels = [_shifted_labels(example) for example in examples]
    input_ids = np.concatenate([example.token_ids for example in examples]).astype(np.int64)
    lengths = tuple(len(example.token_ids) for example in examples)
    batch = Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        labels=torch.from_numpy(np.concatenate(labels)),
        row_lengths=lengths,
        where=tuple(example.where for example in examples),
    )
    if not bool((batch.labels != IGNORED_LABEL).any()):
        raise DataError(f"no token to learn in the rows {', '.join(batch.where)}")
    return batch


def _shifted_labels(example: Example) -> np.ndarray:
    labels = np.full(len(example.token_ids), IGNORED_LABEL, dtype=np.int64)
    labels[:-1] = np.where(example.is_target[1:], example.token_ids[1:], IGNORED_LABEL)
    return labels


def _check_length(row: int, length: int, max_tokens: int) -> None:
    if length > max_tokens:
        raise DataError(f"row {row} has {length} tokens, more than data.max_tokens {max_tokens}")


@dataclass(frozen=True, slots=True)
class Piece:
    """Hold a segment of text whose tokens are alike; a special token is a piece of its own."""

    text: str
    is_target: bool
    special: bool


def pieces_of(batch: Batch, tokenizer: PreTrainedTokenizerFast, special_ids: Collection[int]) -> list[list[Piece]]:
    """Cut each row of a batch into pieces of learned and of masked text.

    Args:
        batch: rows as they go into the model.
        tokenizer: decodes them.
        special_ids: the tokens to show one by one.

    Returns:
        The pieces of each row; their texts joined are the row's text.
    """
    rows, start = [], 0
    for length in batch.row_lengths:
        ids = batch.input_ids[0, start : start + length].tolist()
        labels = batch.labels[start : start + length].tolist()
        is_target = [False, *(label != IGNORED_LABEL for label in labels[:-1])]  # labels[t] is token t + 1
        rows.append(_pieces_of_row(ids, is_target, tokenizer, special_ids))
        start += length
    return rows


def _pieces_of_row(
    ids: list[int], is_target: list[bool], tokenizer: PreTrainedTokenizerFast, special_ids: Collection[int]
) -> list[Piece]:
    def kind(place: int) -> tuple[bool, bool, int]:
        special = ids[place] in special_ids
        return is_target[place], special, place if special else -1

    pieces, text = [], ""
    for (learns, special, _), places in groupby(range(len(ids)), kind):
        upto = list(places)[-1] + 1
        # Decoded from the row's beginning: many tokenizers drop the space before the first token they decode.
        longer = tokenizer.decode(ids[:upto], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if upto < len(ids):
            longer = longer.rstrip("\ufffd")  # a letter of several tokens belongs to the piece that completes it
        pieces.append(Piece(longer[len(text) :], learns, special))
        text = longer
    return pieces


def stream_batches(
    examples: Iterable[Example],
    max_tokens: int,
    packing: bool,
    micro_batch_size: int,
    lengths: Callable[[Sequence[Example]], Sequence[int]] = row_lengths,
) -> Iterator[list[Example]]:
    """Yield the rows of each micro-batch, those of ``plan_epoch`` with order "as-is".

    Args:
        examples: rows of at most max_tokens tokens.
        max_tokens: room of a pack.
        packing: True to fill packs with several rows; False for one row each.
        micro_batch_size: packs (rows, without packing) per micro-batch; the last may have fewer.
        lengths: returns the tokens that rows take.
    """
    rows: list[Example] = []
    packs = room = 0
    for example in examples:
        (length,) = lengths([example])
        if not packing or length > room:
            if packs == micro_batch_size:
                yield rows
                rows, packs = [], 0
            packs, room = packs + 1, max_tokens
        rows.append(example)
        room -= length
    if rows:
        yield rows
