"""Train a vision encoder with a head over its patches: a class for each pixel (segmentation).

The head is the one of image classification, a linear layer, applied to every patch: where it reads the first token
beside the mean of the patches (DINOv2), it reads each patch in the mean's place. So the model has no module that
transformers' class for image classification lacks, and transformers and peft load the adapter into that. The logits of
patches become those of pixels by bilinear interpolation, as in DINOv2's linear evaluation (Oquab et al., "DINOv2",
2023, section 7.4), and the loss is cross-entropy, the mean over a picture's pixels that have a class, then over the
pictures: a picture with few such pixels counts as much as another.

Shapes: logits float32 [N, C, H, W], targets int64 [N, H, W], -100 where a pixel has no class.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.adapters.parts import base_path
from qlora_lite.data.checks.metrics import Score
from qlora_lite.data.labels import MASKS
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import ModelError
from qlora_lite.ext.heads.measure import MAX_SHOWN, Scores
from qlora_lite.memory.marks import category
from qlora_lite.models.nested import of_blocks
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.model_spec import ModelSpec
from qlora_lite.train.objective import LossSum, Objective
from qlora_lite.train.step import evaluating
from qlora_lite.train.workload import Workload

from .head import PictureBatches, Pictures, VisionSpec, options_of
from .masks import WITHOUT
from .pixels import Processor


@dataclass(frozen=True)
class MaskLoss(Objective):
    """The cross-entropy of pixels, and the share of them that are given their class."""

    is_likelihood: ClassVar[bool] = False

    def __call__(self, model: nn.Module, outputs: torch.Tensor, inputs: Pictures) -> LossSum:
        """Return the sum over pictures of their pixels' means."""
        targets = inputs.targets.to(outputs.device)
        with category("logits"):
            each = functional.cross_entropy(outputs, targets, ignore_index=WITHOUT, reduction="none")
        counted = targets != WITHOUT
        counts = counted.sum((1, 2)).clamp(min=1)
        with torch.no_grad():
            right = ((outputs.argmax(1) == targets).sum((1, 2)) / counts).sum()
        return LossSum((each.sum((1, 2)) / counts).sum(), {"pixel_accuracy": right})

    @property
    def name(self) -> str:
        """The problem's."""
        return MASKS


@dataclass(frozen=True)
class MaskBatches(PictureBatches):
    """Pictures with a class for each pixel."""

    def _targets(self, examples: Sequence[Example], classes: list[np.ndarray | None]) -> torch.Tensor:
        size = (self.processor.height, self.processor.width)
        blank: np.ndarray = np.full(size, WITHOUT, np.int64)  # of pictures that are to be labelled
        return torch.from_numpy(np.stack([blank if each is None else each for each in classes]))

    def planned_inputs(self, shape: BatchShape, device: torch.device) -> Pictures:
        """Return pictures of zeros."""
        found, p = super().planned_inputs(shape, device), self.processor
        targets = torch.zeros(len(shape.lengths), p.height, p.width, dtype=torch.int64, device=device)
        return found._replace(targets=targets)


@dataclass(frozen=True, eq=False)
class MaskSpec(VisionSpec):
    """A vision encoder with a head over its patches. Its outputs are the logits of pixels."""

    def outputs(self, model: nn.Module, inputs: Pictures) -> torch.Tensor:
        """Return the logits of pixels.

        Raises:
            ModelError: the model's head is no linear layer over tokens.
        """
        pixels, size = inputs.pixels.to(self.device(model)), of_blocks(model.config).patch_size
        encoder, shape = getattr(model, base_path(model)), tuple(pixels.shape[-2:])
        hidden = encoder(pixel_values=pixels, **options_of(model, pixels)).last_hidden_state
        height, width = (edge // size for edge in shape)
        patches = hidden[:, hidden.shape[1] - height * width :]
        reads = next(parameter.shape[1] for parameter in model.classifier.parameters() if parameter.ndim == 2)
        if reads == 2 * hidden.shape[2]:
            patches = torch.cat([hidden[:, :1].expand_as(patches), patches], dim=2)
        elif reads != hidden.shape[2]:
            raise ModelError(
                f"{type(model).__name__} has no head that can read single patches; choose DINOv2, ViT, SigLIP or CLIP"
            )
        with category("logits"):
            logits = model.classifier(patches).float().transpose(1, 2).unflatten(2, (height, width))
            return functional.interpolate(logits, shape, mode="bilinear", align_corners=False)


def mask_head(method: AdapterMethod, labels: tuple[str, ...], processor: Processor, spec: ModelSpec | None) -> Workload:
    """Return a vision encoder with a head that gives each pixel a class.

    Args:
        spec: of the model, for a plan.
    """
    spec, batches = (spec or MaskSpec()).read_by(processor), MaskBatches(processor, labels, MASKS)
    return Workload(spec, batches, MaskLoss(), method)


@torch.no_grad()
def score_masks(work: Workload, model: nn.Module, batches: Iterable[Pictures]) -> Scores:
    """Return mean intersection over union and accuracy of pixels, with dropout off, and the confusion of pixels.

    The union of a class is all pixels that have it or were given it, in all pictures together; a class that no pixel
    has and none was given does not count.
    """
    count, device, pictures = len(work.batches.labels), work.spec.device(model), 0
    matrix = torch.zeros(count * count, dtype=torch.int64)
    with evaluating(model):
        for batch in batches:
            given = work.spec.outputs(model, work.batches.inputs(batch, device)).argmax(1).cpu()
            has_class = batch.targets != WITHOUT
            matrix += torch.bincount(batch.targets[has_class] * count + given[has_class], minlength=count * count)
            pictures += len(given)
    square = matrix.view(count, count)
    both, union = square.diagonal(), square.sum(0) + square.sum(1) - square.diagonal()
    miou = (both[union > 0] / union[union > 0]).mean().item() if union.any() else 0.0
    accuracy = (both.sum() / square.sum().clamp(min=1)).item()
    scores = {"miou": miou, "pixel_accuracy": accuracy}
    shown = square.tolist() if count <= MAX_SHOWN else None
    return {name: Score(value, None, pictures) for name, value in scores.items()}, shown
