"""What a report shows of some held-out pictures, before training and after: label, neighbours, and what patches say.

Neighbours are the training pictures whose features point the same way (cosine similarity). How often the nearest one
has a held-out picture's label is a score of the encoder alone, of its head's classes or of others it never saw (recall
at 1 of a search for pictures of the same class). Features are what the head reads. A map colours each patch by
the first three principal components of all shown patches, red, green and blue: patches of one colour look alike to the
encoder. Signs of components are chosen so that their largest weight is positive, and each runs from its least to its
most value.

Shapes: features [N, D], patches [N, H, W, D], maps [N, H, W, 3].
"""

import base64
import io
import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from qlora_lite.adapters.parts import base_path
from qlora_lite.artifacts.run_files import PICTURES
from qlora_lite.data.checks.metrics import Score, mean
from qlora_lite.data.picture_files import thumbnail
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import DataError, DoesNotFitError, OutputError
from qlora_lite.ext.heads.metrics import probabilities
from qlora_lite.files import write_text
from qlora_lite.models.nested import of_blocks
from qlora_lite.prepare.moment import AFTER, Measured, Moment
from qlora_lite.train.step import evaluating
from qlora_lite.train.workload import Workload
from qlora_lite.units import counted

from .head import Pictures

log = logging.getLogger("qlora_lite")
SHOWN, NEIGHBOURS = 12, 3  # held-out pictures, and neighbours of each
COMPARED = 500  # pictures of either kind, at most, for the score of neighbours


class Seen(NamedTuple):
    """What an encoder with a head makes of pictures, in host memory: outputs [N, C], features, patches (or none)."""

    outputs: torch.Tensor
    features: torch.Tensor
    patches: torch.Tensor


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """Return so many examples, evenly spread over all, which are ordered by class where they come from folders."""
    count = min(count, len(examples))
    return [examples[int(index)] for index in np.linspace(0, len(examples) - 1, count)] if count else []


def look(work: Workload, model: nn.Module, batches: Iterable[Pictures], patches: bool = True) -> Seen:
    """Return what a model makes of pictures, with dropout off, its patches only if they are wanted."""
    found, device, kept, read = [], work.spec.device(model), [], []
    encoder, size = getattr(model, base_path(model)), of_blocks(model.config).patch_size
    handles = (
        encoder.register_forward_hook(lambda *call: kept.append(call[-1].last_hidden_state)),
        model.classifier.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])),
    )
    try:
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                outputs = work.spec.outputs(model, work.batches.inputs(batch, device)).cpu()
                hidden = kept.pop().float().cpu()
                height, width = (edge // size for edge in batch.pixels.shape[-2:])
                others = hidden.shape[1] - height * width  # class and register tokens, which come first
                shown = hidden[:, others if patches else hidden.shape[1] :]
                found.append((outputs, read.pop().float().cpu(), shown.unflatten(1, (-1, width))))
    finally:
        for handle in handles:
            handle.remove()
    return Seen(*map(torch.cat, zip(*found, strict=True)))


def neighbour_score(
    held: Sequence[Example], features: torch.Tensor, training: Sequence[Example], known: torch.Tensor
) -> Score:
    """Return how often the training picture that is nearest to a held-out one has the same label."""
    nearest = (functional.normalize(features) @ functional.normalize(known).T).argmax(1).tolist()
    return mean([training[place].answer == each.answer for each, place in zip(held, nearest, strict=True)])


def maps_of(patches: torch.Tensor) -> np.ndarray:
    """Return colours for patches, uint8 [N, H, W, 3]; see the module's text."""
    flat = patches.flatten(0, 2)
    flat = flat - flat.mean(0)
    _, _, axes = torch.linalg.svd(flat, full_matrices=False)
    axes = axes[:3]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    values = flat @ axes.T
    low, high = values.amin(0), values.amax(0)
    values = (values - low) / (high - low).clamp(min=1e-12)
    colours = functional.pad(values, (0, 3 - values.shape[1]))
    return (255 * colours).round().to(torch.uint8).unflatten(0, patches.shape[:3]).numpy()


def described(
    work: Workload, held: Sequence[Example], seen: Seen, training: Sequence[Example], known: Seen
) -> list[dict[str, Any]]:
    """Return what was made of held-out pictures, in JSON's terms, pictures as data URIs."""
    shares = probabilities(seen.outputs.numpy(), work.objective.name)
    near = functional.normalize(seen.features) @ functional.normalize(known.features).T
    nearest = near.topk(min(NEIGHBOURS, len(training))).indices.tolist()
    result = []
    for share, places, colours in zip(shares, nearest, maps_of(seen.patches), strict=True):
        neighbours = [{"picture": _jpeg(training[place]), "label": training[place].answer} for place in places]
        result.append(
            {
                "label": work.batches.labels[int(share.argmax())],
                "share": float(share.max()),
                "neighbours": neighbours,
                "map": _png(colours),
            }
        )
    return result


def given(examples: Sequence[Example]) -> list[dict[str, str]]:
    """Return held-out pictures with their labels, likewise."""
    return [{"where": each.where, "label": each.answer, "picture": _jpeg(each)} for each in examples]


def _jpeg(example: Example) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(thumbnail(example.prompt)).decode()}"


def _png(colours: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def show_pictures(moment: Moment, result: Measured | None) -> Measured | None:
    """Write down what a run's model makes of some held-out pictures, for the report; return the scores with that of
    neighbours. What hinders it is a warning."""
    trainer, data = moment.trainer, moment.eval_data
    if data is None:
        return result
    work = trainer.workload.plain()
    training, held = (spread(part, COMPARED) for part in (moment.data.examples, data.examples))
    shown = spread(held, SHOWN)

    def seen(part: Sequence[Example], patches: bool = False) -> Seen:
        return trainer.computed(part, lambda _, batches: look(work, trainer.model, batches, patches))

    try:
        with moment.at_once():
            known, features, all_of_shown = seen(training), seen(held).features, seen(shown, patches=True)
        score = neighbour_score(held, features, training, known.features)
        if trainer.processes.is_first:
            path = moment.folder / PICTURES
            before = json.loads(path.read_text(encoding="utf-8")) if moment.when == AFTER and path.is_file() else {}
            made = described(work, shown, all_of_shown, training, known)
            write_text(path, json.dumps(before | {"given": given(shown), moment.when: made}) + "\n")
    except (DataError, OutputError, DoesNotFitError, ValueError) as error:
        log.warning("the report shows no pictures %s: %s", str(moment), error)
        return result
    more = Measured({"accuracy_nearest_neighbour": score})
    moment.log_scores(more, counted(len(held), "example"))
    return result._replace(scores=result.scores | more.scores) if result else more
