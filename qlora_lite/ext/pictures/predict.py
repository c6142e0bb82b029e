"""Label pictures with a head: classes, masks, or embeddings."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qlora_lite.data.labels import MASKS, ONE_LABEL
from qlora_lite.data.picture_files import decode, pillow
from qlora_lite.data.tokens.statistics import Statistics
from qlora_lite.ext.heads.loss import outputs_for
from qlora_lite.ext.heads.measure import load_head
from qlora_lite.ext.heads.predict import described, source_to_label, write_lines
from qlora_lite.files import explain_write_errors
from qlora_lite.prepare.moment import LabelledRows
from qlora_lite.prepare.settings import train_settings
from qlora_lite.recipe.schema import Recipe
from qlora_lite.train.loop import eval_batches
from qlora_lite.train.step import evaluating
from qlora_lite.train.workload import Workload

from .embedding import EmbeddingSpec
from .examples import Picture, read_pictures
from .examples import example_of as picture_example
from .head import Pictures


def read(recipe: Recipe, rows: str | Path, labels: str) -> list[tuple[Picture, str]]:
    """Return the pictures of a folder or of a table's rows, each with the digest of its file.

    Raises:
        DataError: some cannot be read.
    """
    statistics = Statistics()
    found = list(read_pictures(source_to_label(recipe, rows), statistics, labels, needs_label=False))
    statistics.problems.raise_if_any()
    return found


def label_pictures(recipe: Recipe, adapter: Path | None, processor, rows: str | Path, out: Path) -> LabelledRows:
    """Label every picture of a folder or of a table's rows; labels that it has are the references."""
    found = read(recipe, rows, ONE_LABEL)
    blank = (recipe.task.labels or ("",))[0]
    examples = [picture_example(replace(picture, label=blank), digest) for picture, digest in found]
    model, work = load_head(recipe, adapter, processor)
    batches = eval_batches(work, examples, train_settings(recipe))
    if isinstance(work.spec, EmbeddingSpec):
        given = [{"embedding": each} for each in embeddings_of(work, work.spec, model, batches)]
    else:
        outputs, _ = outputs_for(work, model, batches)
        given = [described(output, work.batches.labels, work.objective.name) for output in outputs.numpy()]
    lines = []
    for (picture, _), said in zip(found, given, strict=True):
        reference = {} if picture.label is None else {"reference": picture.label}
        lines.append({"where": picture.where, "picture": picture.path} | said | reference)
    write_lines(out, lines)
    return LabelledRows(len(lines), 0)


@torch.no_grad()
def embeddings_of(
    work: Workload, spec: EmbeddingSpec, model: nn.Module, batches: Iterable[Pictures]
) -> Iterator[list[float]]:
    """Yield the embedding of every picture, to six decimals, with dropout off."""
    with evaluating(model):
        for batch in batches:
            for embedding in spec.embeddings(model, work.batches.inputs(batch, spec.device(model))).tolist():
                yield [round(number, 6) for number in embedding]


def write_masks(recipe: Recipe, adapter: Path | None, processor, rows: str | Path, out: Path) -> LabelledRows:
    """Write a mask of its own size for every picture into a folder beside the file, which names them."""
    pictures = [picture for picture, _ in read(recipe, rows, MASKS)]
    model, work = load_head(recipe, adapter, processor)
    folder, device, lines = out.with_name(f"{out.stem}-masks"), work.spec.device(model), []
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    library, _ = pillow()
    examples = [picture_example(replace(picture, label=""), "0" * 64) for picture in pictures]
    numbered = iter(enumerate(pictures, 1))
    with torch.no_grad(), evaluating(model):
        for batch in eval_batches(work, examples, train_settings(recipe)):
            given = work.spec.outputs(model, work.batches.inputs(batch, device)).argmax(1).to(torch.uint8).cpu().numpy()
            for classes, (number, picture) in zip(given, numbered, strict=False):
                path = folder / f"{number:05}-{Path(picture.path).stem}.png"
                size = decode(picture.path).size
                with explain_write_errors(path):
                    library.fromarray(classes).resize(size, library.Resampling.NEAREST).save(path)
                shares = np.bincount(classes.ravel(), minlength=len(work.batches.labels)) / classes.size
                shown = {label: float(share) for label, share in zip(work.batches.labels, shares, strict=True) if share}
                lines.append({"where": picture.where, "picture": picture.path, "mask": str(path), "shares": shown})
    write_lines(out, lines)
    return LabelledRows(len(lines), 0)
