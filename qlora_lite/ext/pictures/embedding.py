"""Train a vision encoder whose embeddings are trained: pictures of one class are to lie together.

The embedding of a picture is what the head of image classification reads, scaled to length 1 (of DINOv2 the first token
beside the mean of the patches). Each class has a direction too, the head's row of weights scaled likewise, and the loss
is the cross-entropy of the cosines between the two over a temperature, the normalised softmax of Zhai and Wu,
"Classification is a strong baseline for deep metric learning", arXiv 1811.12649, beside the head's bias. Unlike losses
of pairs or triplets it is a sum over pictures, so that micro-batches of any size give the same gradients.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from qlora_lite.memory.marks import category

from .head import Pictures, VisionSpec

TEMPERATURE = 0.05  # what is usual for this loss


@dataclass(frozen=True, eq=False)
class EmbeddingSpec(VisionSpec):
    """A vision encoder with directions of classes. Its outputs are cosines over the temperature, and bias."""

    def embeddings(self, model: nn.Module, inputs: Pictures) -> torch.Tensor:
        """Return what the head reads of each picture, of length 1, float32 [N, D]."""
        read: list[torch.Tensor] = []
        handle = model.classifier.register_forward_pre_hook(lambda _, given: read.append(given[0]))
        try:
            super().outputs(model, inputs)
        finally:
            handle.remove()
        return functional.normalize(read[0].float(), dim=1)

    def outputs(self, model: nn.Module, inputs: Pictures) -> torch.Tensor:
        """Return the logits of classes for each picture, float32 [N, C]."""
        found = self.embeddings(model, inputs)
        weight, bias = (next(p for p in model.classifier.parameters() if p.ndim == ndim).float() for ndim in (2, 1))
        with category("logits"):
            return functional.linear(found, functional.normalize(weight, dim=1) / TEMPERATURE, bias)
