"""Turn the data section of a recipe into rows.

Apart from `build`, because it needs no model code: `qlora-lite data` starts without bitsandbytes, whose import takes
as long as everything else together.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal, overload

from qlora_lite.data.example_checks import Matching
from qlora_lite.data.examples import Dataset, RowStream, largest_rows, read_examples
from qlora_lite.data.fields import columns_of
from qlora_lite.data.held_out import hold_out
from qlora_lite.data.metrics import Measures
from qlora_lite.data.problems import Problems
from qlora_lite.data.row_formats import CHOSEN, PAIRS, is_preference
from qlora_lite.data.sources import Source, read_rows
from qlora_lite.data.statistics import Settings
from qlora_lite.data.storage import Example
from qlora_lite.errors import DataError
from qlora_lite.files import cache_root
from qlora_lite.recipe import schema
from qlora_lite.recipe.schema import Recipe

log = logging.getLogger("qlora_lite")
STREAM_SAMPLE_ROWS = 1000  # of each streamed source, looked at before training


@overload
def build_data(recipe: Recipe, tokenizer, which: Literal["train"] = "train", compares: bool = False) -> Dataset: ...
@overload
def build_data(recipe: Recipe, tokenizer, which: Literal["eval"], compares: bool = False) -> Dataset | None: ...
def build_data(recipe, tokenizer, which="train", compares=False):
    """Read, render and tokenise a recipe's training or evaluation rows; None if it has none.

    Args:
        compares: see ``read_data``; without it, preferences are read as answers to imitate, the chosen and good ones.

    Raises:
        DataError: a row cannot be used.
    """
    if which == "eval" and not recipe.data.has_eval:
        return None
    parts = read_data(recipe, tokenizer, (which,), compares)
    for part in parts.values():
        part.problems.raise_if_any(recipe.data.max_bad_rows)
    return parts[which]


def read_data(
    recipe: Recipe, tokenizer, wanted: Sequence[str] = ("train", "eval"), compares: bool = True
) -> dict[str, Dataset]:
    """Read a recipe's training and evaluation rows; what is wrong with them is noted, not raised.

    Of streamed training rows, only the first ones are read.

    Args:
        wanted: of "train" and "eval"; where one is a share of the other's rows both are read.
        compares: whether preferences are read as such; else as answers to imitate.
    """
    preference = recipe.preference if compares or recipe.problem else None  # a head can only be measured by comparing

    def read(which: str) -> Dataset:
        return _read(recipe, tokenizer, which, preference)

    if share := recipe.data.eval_share:
        return dict(zip(("train", "eval"), hold_out(read("train"), share), strict=True))
    return {which: read(which) for which in wanted if getattr(recipe.data, which) is not None}


def _read(recipe: Recipe, tokenizer, which: str, preference: str | None) -> Dataset:
    d = recipe.data
    sources = build_sources(recipe, which, compares=preference is not None)
    room = d.max_tokens - recipe.virtual_tokens * (2 if preference else 1)  # of two sequences, or one
    settings = d.template, d.train_on, room, d.overflow, d.train_on_end
    if d.streaming and which == "train":
        rows = STREAM_SAMPLE_ROWS
        return read_examples(sources, tokenizer, *settings, None, rows, preference, recipe.label_problem)
    return read_examples(sources, tokenizer, *settings, cache_root() / "tokens", None, preference, recipe.label_problem)


def build_stream(recipe: Recipe, tokenizer) -> RowStream | None:
    """Return the training rows of a recipe as a stream; None if it does not ask for one."""
    d = recipe.data
    if not d.streaming:
        return None
    longest = d.max_tokens - recipe.virtual_tokens
    settings = Settings(d.train_on, longest, d.overflow, d.train_on_end, problem=recipe.label_problem)
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
    return largest_rows(data.examples, recipe.data.max_tokens - recipe.virtual_tokens, recipe.data.packing, count)


def with_known_columns(sources: Sequence[schema.Source], known: Sequence[schema.Source]) -> tuple:
    """Return sources that name no columns with those of the first known source that their first row fits.

    Args:
        sources: of rows that a run is to be measured on.
        known: of the run's own rows.
    """
    return tuple(_with_columns(source, known) for source in sources)


def _with_columns(source: schema.Source, known: Sequence[schema.Source]) -> schema.Source:
    if source.format or source.prompt:
        return source
    with suppress(DataError, OSError, StopIteration):  # reading it for good says what is wrong
        _, row = next(read_rows(Source(source.path), Problems()))
        for each in known:
            if each.prompt and row.keys() >= {*columns_of(each.prompt), *columns_of(each.completion)}:
                named = {"prompt": each.prompt, "completion": each.completion}
            elif each.format == CHOSEN and is_preference(row):
                named = {"format": CHOSEN}
            else:
                continue
            said = ", ".join(f"{name}: {value!r}" for name, value in named.items())
            log.warning("%s is read as rows of the run are: %s", source.path, said)
            return source.model_copy(update=named)
    return source


def build_sources(recipe: Recipe, which: str, compares: bool = True) -> list[Source]:
    """Return where a recipe's training or evaluation rows come from.

    Args:
        compares: see ``read_data``.
    """
    streaming = recipe.data.streaming and which == "train"
    part = "train" if recipe.data.eval_share else which
    as_chosen = CHOSEN if recipe.preference == PAIRS and not compares else None
    return [
        Source(
            s.path, s.format or (None if s.prompt else as_chosen), s.weight, s.prompt, s.completion, streaming, None,
            s.documents, f"data.{part}", s.rejected,
        )
        for s in getattr(recipe.data, part)
    ]  # fmt: skip


def measures_of(recipe: Recipe) -> Measures:
    """Return what a recipe measures of answers, and how it compares them with their references."""
    t = recipe.train
    matching = Matching(t.exact_match_pattern, t.exact_match_ignore, t.exact_match_ignore_case)
    return Measures(t.metrics, matching, t.metrics_choices)
