"""Measure a model with a head on labelled texts, and label others with it."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qlora_lite.adapters.files import load_adapter
from qlora_lite.artifacts.trained_run import TrainedRun, open_trained
from qlora_lite.data.examples import read_examples
from qlora_lite.data.label_metrics import confusion, probabilities, scores_of
from qlora_lite.data.labelled_rows import Labelled, encode_texts, example_of, read_labelled, shortened
from qlora_lite.data.labels import LABELS, NUMBER, ONE_LABEL
from qlora_lite.data.metrics import Score
from qlora_lite.data.picture_files import decode, pillow
from qlora_lite.data.pictures import Picture, read_pictures
from qlora_lite.data.pictures import example_of as picture_example
from qlora_lite.data.problems import Problems, read_place
from qlora_lite.data.row_formats import JUDGEMENTS, PAIRS, is_preference
from qlora_lite.data.sources import Source, read_rows
from qlora_lite.data.statistics import Statistics
from qlora_lite.files import explain_write_errors, require_another, require_writable, write_text
from qlora_lite.prepare.build import build_to_use, train_settings, workload_of
from qlora_lite.prepare.datasets import with_known_columns
from qlora_lite.recipe import schema
from qlora_lite.recipe.schema import Recipe
from qlora_lite.train.head_workload import HeadWorkload, outputs_for
from qlora_lite.train.loop import eval_batches
from qlora_lite.train.mask_head import MaskHead, measure_masks
from qlora_lite.train.picture_embedding import PictureEmbedding
from qlora_lite.train.picture_head import Pictures
from qlora_lite.train.step import evaluating
from qlora_lite.train.transformer import ModelSpec

MAX_SHOWN = 30  # labels of a confusion matrix that a report shows
_BLANK = {NUMBER: "0", LABELS: "[]"}  # what stands for a label that nobody knows


def measure_labels(
    workload: HeadWorkload, model: nn.Module, batches: Iterable
) -> tuple[dict[str, Score], list[list[int]] | None]:
    """Return the scores of a model on batches of labelled texts, and of one label the confusion matrix."""
    if isinstance(workload, MaskHead):
        scores, matrix = measure_masks(workload, model, batches)
        return scores, matrix if len(workload.labels) <= MAX_SHOWN else None
    outputs, there = (each.numpy() for each in outputs_for(workload, model, batches))
    matrix = None
    if workload.problem == ONE_LABEL and len(workload.labels) <= MAX_SHOWN:
        matrix = confusion(outputs.argmax(1), there, len(workload.labels)).tolist()
    return scores_of(outputs, there, workload.problem), matrix


def load_head(recipe: Recipe, adapter: str | Path | None, tokenizer) -> tuple[nn.Module, HeadWorkload]:
    """Load a recipe's model with its head for use, with an adapter if one is given.

    Args:
        recipe: with the names of its labels.
    """
    model = build_to_use(recipe, [Path(adapter)] if adapter else [])
    if adapter:
        load_adapter(model, adapter)
    work = workload_of(recipe, ModelSpec(model.config)).of_tokenizer(tokenizer)
    work.check_forward(model, recipe.data.max_tokens)
    return model, work


@dataclass(frozen=True, slots=True)
class Predicted:
    """What became of a file: texts that were labelled, and how many were cut to ``data.max_tokens``."""

    texts: int
    cut: int


def predict_labels(
    run: str | Path, rows: str | Path, out: str | Path, model_path: str | None = None, unfinished: bool = False
) -> Predicted:
    """Label every row of a file with a run's model, in order, one JSON object a line with the row's place.

    Of a reward model, rows are chats, and each gets a "reward", of pairs scores of "chosen" and "rejected". Others get
    a label (of several "labels", of a number a "value"), "probabilities" by label, and the row's own label as
    "reference" where it has one; pictures of task.kind image-embedding an "embedding" of length 1 in their place.

    Args:
        run: a run folder, or an adapter folder as peft writes it, with the labels in its ``config.json``.
        rows: a data file with the columns of the run's own rows, the label not needed.
        out: JSONL file.
        model_path, unfinished: see ``artifacts.trained_run.open_trained``.

    Raises:
        DataError: rows are malformed, all of them named.
        RecipeError: the run is one of a language model.
        OutputError: the file cannot be written.
    """
    require_writable(out := Path(out))
    require_another(out, Path(rows))
    trained = open_trained(run, model_path, unfinished, has_head=True)
    recipe, tokenizer = trained.recipe, trained.tokenizer()
    if recipe.label_problem is None:
        return _score_chats(trained, rows, out)
    if recipe.of_pictures:
        return _label_pictures(trained, rows, out)
    found, problems = read_texts(recipe, rows), Problems()
    examples, cut = [], 0
    for row, encoding in zip(found, encode_texts([row.texts for row in found], tokenizer), strict=True):
        ids = shortened(encoding, recipe.data.max_tokens)
        cut += len(ids) < len(encoding.ids)
        if not ids:
            problems.add(row.where, "the tokenizer makes no token of this text")
            continue
        blank = _BLANK.get(recipe.problem, (recipe.task.labels or ("",))[0])
        examples.append(example_of(ids, replace(row, label=blank)))
    problems.raise_if_any()
    model, work = load_head(recipe, trained.adapter, tokenizer)
    outputs, _ = outputs_for(work, model, eval_batches(work, examples, train_settings(recipe)))
    lines = []
    for row, output in zip(found, outputs.numpy(), strict=True):
        reference = {} if row.label is None else {"reference": row.label}
        lines.append({"where": row.where} | described(output, work.labels, work.problem) | reference)
    _write_lines(out, lines)
    return Predicted(len(lines), cut)


def _score_chats(trained: TrainedRun, rows: str | Path, out: Path) -> Predicted:
    """Write the reward of every chat of a file, in the formats of a language model; of pairs that of both."""
    recipe, tokenizer = trained.recipe, trained.tokenizer()
    own = _source_of(recipe, rows)
    # whatever a row says of its answer, it gets a score
    places, read = zip(*read_rows(Source(own.path)), strict=True)
    found = [{k: v for k, v in row.items() if k not in JUDGEMENTS} for row in read]
    own = replace(own, rows=found)
    d, by = recipe.data, PAIRS if own.rejected or is_preference(found[0]) else None
    data = read_examples(
        [own], tokenizer, d.template, d.train_on, d.max_tokens, train_on_end=d.train_on_end, preference=by
    )
    data.problems.raise_if_any()
    model, work = load_head(recipe, trained.adapter, tokenizer)
    outputs, _ = outputs_for(work, model, eval_batches(work, data.examples, train_settings(recipe)))
    scores, lines = iter(outputs[:, 0].tolist()), []
    for example in data.examples:
        names = ("chosen", "rejected") if by else ("reward",)
        _, number, _ = read_place(example.where) or ("", 0, 0)
        lines.append({"where": places[number - 1]} | {name: next(scores) for name in names})
    _write_lines(out, lines)
    return Predicted(len(lines), 0)


def _label_pictures(trained: TrainedRun, rows: str | Path, out: Path) -> Predicted:
    """Label every picture of a folder or of a table's rows; labels that it has are the references."""
    recipe, statistics = trained.recipe, Statistics()
    found = list(read_pictures(_source_of(recipe, rows), statistics, recipe.label_problem or "", needs_label=False))
    statistics.problems.raise_if_any()
    if recipe.has_masks:
        return _write_masks(trained, [picture for picture, _ in found], out)
    blank = (recipe.task.labels or ("",))[0]
    examples = [picture_example(replace(picture, label=blank), digest) for picture, digest in found]
    model, work = load_head(recipe, trained.adapter, trained.tokenizer())
    batches = eval_batches(work, examples, train_settings(recipe))
    if isinstance(work, PictureEmbedding):
        given = [{"embedding": each} for each in embeddings_of(work, model, batches)]
    else:
        outputs, _ = outputs_for(work, model, batches)
        given = [described(output, work.labels, work.problem) for output in outputs.numpy()]
    lines = []
    for (picture, _), said in zip(found, given, strict=True):
        reference = {} if picture.label is None else {"reference": picture.label}
        lines.append({"where": picture.where, "picture": picture.path} | said | reference)
    _write_lines(out, lines)
    return Predicted(len(lines), 0)


@torch.no_grad()
def embeddings_of(work: PictureEmbedding, model: nn.Module, batches: Iterable[Pictures]) -> Iterator[list[float]]:
    """Yield the embedding of every picture, to six decimals, with dropout off."""
    with evaluating(model):
        for batch in batches:
            for embedding in work.embeddings(model, work.inputs(batch, work.device(model))).tolist():
                yield [round(number, 6) for number in embedding]


def _write_masks(trained: TrainedRun, pictures: Sequence[Picture], out: Path) -> Predicted:
    """Write a mask of its own size for every picture into a folder beside the file, which names them."""
    model, work = load_head(trained.recipe, trained.adapter, trained.tokenizer())
    assert isinstance(work, MaskHead)
    folder, device, lines = out.with_name(f"{out.stem}-masks"), work.device(model), []
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    library, _ = pillow()
    examples = [picture_example(replace(picture, label=""), "0" * 64) for picture in pictures]
    numbered = iter(enumerate(pictures, 1))
    with torch.no_grad(), evaluating(model):
        for batch in eval_batches(work, examples, train_settings(trained.recipe)):
            given = work.outputs(model, work.inputs(batch, device)).argmax(1).to(torch.uint8).cpu().numpy()
            for classes, (number, picture) in zip(given, numbered, strict=False):
                path = folder / f"{number:05}-{Path(picture.path).stem}.png"
                size = decode(picture.path).size
                with explain_write_errors(path):
                    library.fromarray(classes).resize(size, library.Resampling.NEAREST).save(path)
                shares = np.bincount(classes.ravel(), minlength=len(work.labels)) / classes.size
                shown = {label: float(share) for label, share in zip(work.labels, shares, strict=True) if share}
                lines.append({"where": picture.where, "picture": picture.path, "mask": str(path), "shares": shown})
    _write_lines(out, lines)
    return Predicted(len(lines), 0)


def _write_lines(out: Path, lines: Iterable[dict]) -> None:
    with explain_write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_texts(recipe: Recipe, rows: str | Path) -> list[Labelled]:
    """Return the rows of a file, read with the templates of the recipe's own data if it has their columns.

    Raises:
        DataError: rows are malformed, or there are none.
    """
    problems = Problems()
    found = list(read_labelled(_source_of(recipe, rows), problems, recipe.problem, needs_label=False))
    problems.raise_if_any()
    return found


def _source_of(recipe: Recipe, rows: str | Path) -> Source:
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
    return {"label": labels[int(output.argmax())], "probabilities": by_label}
