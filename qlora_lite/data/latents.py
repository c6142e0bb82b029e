"""Examples of a denoiser: a picture as the autoencoder left it, and its text as the encoders did.

Both are computed once, before training, and kept as arrays, in memory or in files that are memory-mapped, so that no
encoder lies beside the denoiser. All examples of a run have one shape.

Shapes: latents [C, H, W], already shifted and scaled as the denoiser wants them; text [T, D]; pooled text [P]; mask
[T]; sizes [6].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from qlora_lite.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class LatentExample:
    """A picture with its text; see ``models.denoisers.Conditions`` for what a denoiser takes beside the text.

    Args:
        number: of the example in its data; noise is drawn by it.
        place: where it came from, for errors.
    """

    latents: np.ndarray
    text: np.ndarray
    number: int
    pooled: np.ndarray | None = None
    mask: np.ndarray | None = None
    sizes: np.ndarray | None = None
    place: str = "an example"


class LatentShapes(NamedTuple):
    """The shapes of an example's arrays, None of those that there are not."""

    latents: tuple[int, ...]
    text: tuple[int, ...]
    pooled: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    sizes: tuple[int, ...] | None = None


def shapes_of(example: LatentExample) -> LatentShapes:
    """Return the shapes of an example's arrays."""
    arrays = (getattr(example, name) for name in LatentShapes._fields)
    return LatentShapes(*(None if array is None else tuple(array.shape) for array in arrays))


def check_shapes(examples: Sequence[LatentExample], shapes: LatentShapes) -> None:
    """Check that all examples have the arrays and shapes that a run is for.

    Raises:
        DataError: naming the first that has others, and the arrays.
    """
    for example in examples:
        if (found := shapes_of(example)) != shapes:
            differing = [name for name, a, b in zip(shapes._fields, found, shapes, strict=True) if a != b]
            said = ", ".join(f"{name} {getattr(found, name)} in place of {getattr(shapes, name)}" for name in differing)
            raise DataError(f"{example.place}: {said}; encode all pictures at one resolution and all texts to one "
                            "length")  # fmt: skip


def stacked(examples: Sequence[LatentExample], name: str) -> torch.Tensor | None:
    """Return one array of each example as a tensor, None where they have none."""
    arrays = [getattr(example, name) for example in examples]
    return None if arrays[0] is None else torch.from_numpy(np.stack(arrays))
