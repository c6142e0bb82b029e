"""Turn the data section of a recipe into rows.

Apart from `build`, because it needs no model code: `qlora-lite data` starts without bitsandbytes, whose import takes
as long as everything else together.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Literal, overload

from qlora_lite.data.chat.preference_rows import CHOSEN, is_preference
from qlora_lite.data.chat.row_formats import LABELS, PAIRS
from qlora_lite.data.checks.held_out import hold_out
from qlora_lite.data.checks.matching import Matching
from qlora_lite.data.checks.metrics import Measures
from qlora_lite.data.labelled_rows import LabelReader
from qlora_lite.data.readers.fields import columns_of
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.readers.sources import Source, read_rows
from qlora_lite.data.tokens.encode import TextReader
from qlora_lite.data.tokens.examples import Dataset, RowStream, largest_rows
from qlora_lite.data.tokens.preferences import answers_alone
from qlora_lite.data.tokens.statistics import ReadSettings
from qlora_lite.data.tokens.storage import Example, stored
from qlora_lite.errors import DataError
from qlora_lite.recipe import schema
from qlora_lite.recipe.schema import Recipe

from .method import virtual_tokens
from .task import find_preference, find_task

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
    parts = read_data(recipe, tokenizer, (which,), compares or find_task(recipe).has_head)  # a head has to compare
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
        compares: whether preferences are read as such; else the answers to imitate of the same rows, and rows of other
            kinds as what they are.
    """

    def read(which: str) -> Dataset:
        preference = find_preference(recipe) if compares else told_by(recipe, which)
        return _read(recipe, tokenizer, which, preference, compares)

    if share := recipe.data.eval_share:
        found = dict(zip(("train", "eval"), hold_out(read("train"), share), strict=True))
    else:
        found = {which: read(which) for which in wanted if getattr(recipe.data, which) is not None}
    return found if compares else {which: _to_imitate(data) for which, data in found.items()}


def held_out_digest(data: Dataset) -> str:
    """Return a SHA-256 over evaluation rows, the same wherever they lie and whether preferences are compared or not."""
    return stored(list(_to_imitate(data).examples)).digest()


def warn_of_other_rows(recipe: Recipe, data: Dataset, digest: str | None) -> None:
    """Warn where a run may have learned rows that ``data.eval_share`` holds out now, since its data has changed.

    Args:
        recipe: of the run, or what it is measured with.
        data: the evaluation rows that this recipe has now.
        digest: ``held_out_digest`` of those that the run held out; None where that is not known.
    """
    if recipe.data.eval_share and digest is not None and held_out_digest(data) != digest:
        log.warning(
            "the run's data has changed since it was trained: it may have learned some of the rows that "
            "data.eval_share holds out now; `qlora-lite evaluate RUN data.eval=PATH` takes others"
        )


def told_by(recipe: Recipe, which: str) -> str | None:
    """Return what the preferences of a recipe are told by in these rows; None where they are of another kind."""
    sources = build_sources(recipe, which)
    firsts = [row for source in sources for row in [_first_row(source)] if row is not None]
    has_templates = all(source.rejected for source in sources)
    preference = find_preference(recipe)
    if preference == PAIRS and (has_templates or all(map(is_preference, firsts))):
        return PAIRS
    return LABELS if preference == LABELS and all({"label", "kto_tag"} & row.keys() for row in firsts) else None


def _first_row(source: Source) -> dict | None:
    with suppress(DataError, OSError, StopIteration):  # reading it for good says what is wrong
        return next(read_rows(source, Problems()))[1]
    return None


def _to_imitate(data: Dataset) -> Dataset:
    """Return the answers to imitate of a set that compares or judges some; others as they are."""
    if not data.examples.rows[:, 6].any():
        return data
    examples = answers_alone(data.examples)
    return replace(
        data,
        examples=examples,
        rows_kept=len(examples),
        examples_of=(len(examples),),
        tokens=int(examples.lengths.sum()),
        target_tokens=int(examples.target_counts.sum()),
    )


def _read(recipe: Recipe, reader, which: str, preference: str | None, compares: bool) -> Dataset:
    sources = build_sources(recipe, which, compares)
    max_rows = STREAM_SAMPLE_ROWS if recipe.data.streaming and which == "train" else None
    return find_task(recipe).read(recipe, sources, reader, preference, max_rows)


def build_stream(recipe: Recipe, tokenizer) -> RowStream | None:
    """Return the training rows of a recipe as a stream; None if it does not ask for one."""
    d = recipe.data
    if not d.streaming:
        return None
    longest = d.max_tokens - virtual_tokens(recipe)
    settings = ReadSettings(d.template, d.train_on, longest, d.overflow, d.train_on_end)
    labels = find_task(recipe).label_kind
    reader = LabelReader(labels) if labels else TextReader()
    return RowStream(tuple(build_sources(recipe, "train")), tokenizer, settings, reader, d.max_bad_rows)


def rows_to_plan(recipe: Recipe, data: Dataset) -> Sequence[Example]:
    """Return the rows whose largest micro-batch decides what fits: the training rows, or the worst a stream can give.

    Args:
        data: the training rows; with a stream, its first ones.
    """
    if not recipe.data.streaming:
        return data.examples
    t = recipe.train
    count = t.micro_batch_size * t.gradient_accumulation_steps
    return largest_rows(data.examples, recipe.data.max_tokens - virtual_tokens(recipe), recipe.data.packing, count)


def with_known_columns(
    sources: Sequence[schema.Source], known: Sequence[schema.Source], needs_answers: bool = True
) -> tuple[schema.Source, ...]:
    """Return sources that name no columns with those of the first known source that their first row fits.

    Args:
        sources: of rows that a run is to be measured on, or, where answers are not needed, to be used on.
        known: of the run's own rows.
    """
    return tuple(_with_columns(source, known, needs_answers) for source in sources)


def _with_columns(source: schema.Source, known: Sequence[schema.Source], needs_answers: bool) -> schema.Source:
    if source.format or source.prompt:
        return source
    with suppress(DataError, OSError, StopIteration):  # reading it for good says what is wrong
        _, row = next(read_rows(Source(source.path), Problems()))
        for each in known:
            answer = columns_of(each.completion) if needs_answers and each.prompt else ()
            if each.prompt and row.keys() >= {*columns_of(each.prompt), *answer}:
                named = {"prompt": each.prompt, "completion": each.completion}
                if each.rejected and row.keys() >= {*columns_of(each.rejected)}:
                    named["rejected"] = each.rejected
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
    sources = [
        Source(
            s.path,
            s.format,
            s.weight,
            s.prompt,
            s.completion,
            streaming,
            None,
            s.documents,
            f"data.{part}",
            s.rejected,
            find_task(recipe).multimodal,
        )
        for s in getattr(recipe.data, part)
    ]
    return sources if compares else list(map(_as_chosen, sources))


def _as_chosen(source: Source) -> Source:
    """Return a source that says of its rows that the chosen answers count, if they are of that kind."""
    is_open = source.format is None and source.prompt is None
    return replace(source, format=CHOSEN) if is_open and is_preference(_first_row(source) or {}) else source


def measures_of(recipe: Recipe) -> Measures:
    """Return what a recipe measures of answers, and how it compares them with their references."""
    t = recipe.train
    matching = Matching(t.exact_match_pattern, t.exact_match_ignore, t.exact_match_ignore_case)
    return Measures(t.metrics, matching, t.metrics_choices)
