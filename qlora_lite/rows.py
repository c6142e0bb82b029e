"""Turn the data section of a recipe into rows.

Apart from `build`, because it needs no model code: `qlora-lite data` starts without bitsandbytes, whose import takes
as long as everything else together.
"""

from collections.abc import Sequence

from .data.account import Settings
from .data.examples import Dataset, read_examples
from .data.held_out import hold_out
from .data.read import Source
from .data.stored import Example
from .data.stream import RowStream, largest_rows
from .files import cache_root
from .recipe.schema import Recipe

STREAM_SAMPLE_ROWS = 1000  # of each streamed source, looked at before training


def build_data(recipe: Recipe, tokenizer, which: str = "train") -> Dataset | None:
    """Read, render and tokenise a recipe's training or evaluation rows; None if it has none.

    Raises:
        DataError: a row cannot be used.
    """
    if which == "eval" and not recipe.data.has_eval:
        return None
    parts = read_data(recipe, tokenizer, (which,))
    for part in parts.values():
        part.problems.raise_if_any(recipe.data.max_bad_rows)
    return parts[which]


def read_data(recipe: Recipe, tokenizer, wanted: Sequence[str] = ("train", "eval")) -> dict[str, Dataset]:
    """Read a recipe's training and evaluation rows; what is wrong with them is noted, not raised.

    Of streamed training rows, only the first ones are read.

    Args:
        wanted: of "train" and "eval"; where one is a share of the other's rows both are read.
    """
    if share := recipe.data.eval_share:
        return dict(zip(("train", "eval"), hold_out(_read(recipe, tokenizer, "train"), share), strict=True))
    return {which: _read(recipe, tokenizer, which) for which in wanted if getattr(recipe.data, which) is not None}


def _read(recipe: Recipe, tokenizer, which: str) -> Dataset:
    d = recipe.data
    sources = build_sources(recipe, which)
    settings = d.template, d.train_on, d.max_tokens, d.overflow, d.train_on_end
    if d.streaming and which == "train":
        return read_examples(sources, tokenizer, *settings, max_rows=STREAM_SAMPLE_ROWS)
    return read_examples(sources, tokenizer, *settings, cache_root() / "tokens")


def build_stream(recipe: Recipe, tokenizer) -> RowStream | None:
    """Return the training rows of a recipe as a stream; None if it does not ask for one."""
    d = recipe.data
    if not d.streaming:
        return None
    settings = Settings(d.train_on, d.max_tokens, d.overflow, d.train_on_end)
    return RowStream(tuple(build_sources(recipe, "train")), tokenizer, d.template, settings, d.max_bad_rows)


def rows_to_plan(recipe: Recipe, data: Dataset) -> Sequence[Example]:
    """Return the rows whose largest micro-batch decides what fits: the training rows, or the worst a stream can give.

    Args:
        data: the training rows; with a stream, its first ones.
    """
    if not recipe.data.streaming:
        return data.examples
    t = recipe.train
    count = t.micro_batch_size * t.gradient_accumulation_steps
    return largest_rows(data.examples, recipe.data.max_tokens, recipe.data.packing, count)


def build_sources(recipe: Recipe, which: str) -> list[Source]:
    """Return where a recipe's training or evaluation rows come from."""
    streaming = recipe.data.streaming and which == "train"
    part = "train" if recipe.data.eval_share else which
    return [
        Source(s.path, s.format, s.weight, s.prompt, s.completion, streaming, None, s.documents, f"data.{part}")
        for s in getattr(recipe.data, part)
    ]
