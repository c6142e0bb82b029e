"""Label texts with a head, and score chats."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qlora_lite.data.chat.preference_rows import is_preference
from qlora_lite.data.chat.row_formats import JUDGEMENTS, PAIRS
from qlora_lite.data.labelled_rows import Labelled, encode_texts, example_of, read_labelled, shortened
from qlora_lite.data.labels import LABELS, NUMBER
from qlora_lite.data.readers.problems import Problems, read_place
from qlora_lite.data.readers.sources import Source, read_rows
from qlora_lite.data.tokens.encode import TextReader
from qlora_lite.data.tokens.examples import read_examples
from qlora_lite.data.tokens.statistics import ReadSettings
from qlora_lite.files import explain_write_errors, write_text
from qlora_lite.prepare.datasets import with_known_columns
from qlora_lite.prepare.moment import LabelledRows
from qlora_lite.prepare.settings import train_settings
from qlora_lite.recipe import schema
from qlora_lite.recipe.schema import Recipe
from qlora_lite.train.loop import eval_batches

from .loss import outputs_for
from .measure import load_head
from .metrics import probabilities

_BLANK = {NUMBER: "0", LABELS: "[]"}  # what stands for a label that nobody knows


def label_texts(
    recipe: Recipe, adapter: Path | None, tokenizer, rows: str | Path, out: Path, problem: str
) -> LabelledRows:
    """Label every text of a file.

    Args:
        problem: what labels are, see ``data.labels``.
    """
    found, problems = read_texts(recipe, rows, problem), Problems()
    examples, cut = [], 0
    for row, encoding in zip(found, encode_texts([row.texts for row in found], tokenizer), strict=True):
        ids = shortened(encoding, recipe.data.max_tokens)
        cut += len(ids) < len(encoding.ids)
        if not ids:
            problems.add(row.where, "the tokenizer makes no token of this text")
            continue
        blank = _BLANK.get(problem, (recipe.task.labels or ("",))[0])
        examples.append(example_of(ids, replace(row, label=blank)))
    problems.raise_if_any()
    model, work = load_head(recipe, adapter, tokenizer)
    outputs, _ = outputs_for(work, model, eval_batches(work, examples, train_settings(recipe)))
    lines = []
    for row, output in zip(found, outputs.numpy(), strict=True):
        reference = {} if row.label is None else {"reference": row.label}
        lines.append({"where": row.where} | described(output, work.batches.labels, work.objective.name) | reference)
    write_lines(out, lines)
    return LabelledRows(len(lines), cut)


def score_chats(recipe: Recipe, adapter: Path | None, tokenizer, rows: str | Path, out: Path) -> LabelledRows:
    """Write the reward of every chat of a file, in the formats of a language model; of pairs that of both."""
    own = source_to_label(recipe, rows)
    # whatever a row says of its answer, it gets a score
    places, read = zip(*read_rows(Source(own.path)), strict=True)
    found = [{k: v for k, v in row.items() if k not in JUDGEMENTS} for row in read]
    own = replace(own, rows=found)
    d, by = recipe.data, PAIRS if own.rejected or is_preference(found[0]) else None
    data = read_examples(
        [own],
        tokenizer,
        ReadSettings(d.template, d.train_on, d.max_tokens, train_on_end=d.train_on_end),
        TextReader(by),
    )
    data.problems.raise_if_any()
    model, work = load_head(recipe, adapter, tokenizer)
    outputs, _ = outputs_for(work, model, eval_batches(work, data.examples, train_settings(recipe)))
    scores, lines = iter(outputs[:, 0].tolist()), []
    for example in data.examples:
        names = ("chosen", "rejected") if by else ("reward",)
        _, number, _ = read_place(example.where) or ("", 0, 0)
        lines.append({"where": places[number - 1]} | {name: next(scores) for name in names})
    write_lines(out, lines)
    return LabelledRows(len(lines), 0)


def write_lines(out: Path, lines: Iterable[dict]) -> None:
    """Write one JSON object a line."""
    with explain_write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_texts(recipe: Recipe, rows: str | Path, problem: str) -> list[Labelled]:
    """Return the rows of a file, read with the templates of the recipe's own data if it has their columns.

    Raises:
        DataError: rows are malformed, or there are none.
    """
    problems = Problems()
    found = list(read_labelled(source_to_label(recipe, rows), problems, problem, needs_label=False))
    problems.raise_if_any()
    return found


def source_to_label(recipe: Recipe, rows: str | Path) -> Source:
    """Return where a file's rows are, with the templates of the recipe's own data if it has their columns."""
    known = (*recipe.data.train, *(recipe.data.eval or ()))
    (source,) = with_known_columns([schema.Source(path=str(rows))], known, needs_answers=False)
    return Source(
        source.path,
        source.format,
        prompt=source.prompt,
        completion=source.completion,
        rejected=source.rejected,
        setting="--rows",
    )


def described(output: np.ndarray, labels: Sequence[str], problem: str) -> dict[str, Any]:
    """Return what a head's outputs [C] for one text say, in JSON's terms."""
    if problem == NUMBER:
        return {"value": float(output[0])}
    shares = probabilities(output[None], problem)[0].tolist()
    by_label = dict(zip(labels, shares, strict=True))
    if problem == LABELS:
        chosen = [label for label, value in zip(labels, output, strict=True) if value > 0]
        return {"labels": chosen, "probabilities": by_label}
    return {"label": labels[int(np.argmax(output))], "probabilities": by_label}
