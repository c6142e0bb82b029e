"""Examples of a denoiser: a picture as the autoencoder left it, and its text as the encoders did.

Both are computed once, before training, and kept as arrays, in memory or in files that are memory-mapped, so that no
encoder lies beside the denoiser. All examples of a run have texts of one shape; latents may be smaller than the run's
shape says, where pictures keep their aspect ratios.

Shapes: latents [C, H, W], already shifted and scaled as the denoiser wants them; text [T, D]; pooled text [P]; mask
[T]; sizes [6]; number of a class [].
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from qlora_lite.errors import DataError

_CHECKSUM = "checksum"  # in the metadata of a file
Stored = Path | Mapping[str, torch.Tensor]  # tensors by name, in a safetensors file or here


@dataclass(frozen=True, slots=True, eq=False)
class LatentExample:
    """A picture with its text; see ``denoisers.Conditions`` for what a denoiser takes beside the text.

    Args:
        number: of the example in its data; noise is drawn by it.
        place: where it came from, for errors.
    """

    latents: np.ndarray
    text: np.ndarray | None
    number: int
    pooled: np.ndarray | None = None
    mask: np.ndarray | None = None
    sizes: np.ndarray | None = None
    place: str = "an example"
    labels: np.ndarray | None = None


class LatentShapes(NamedTuple):
    """The shapes of an example's arrays, None of those that there are not."""

    latents: tuple[int, ...]
    text: tuple[int, ...] | None = None
    pooled: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    sizes: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None


def shapes_of(example: LatentExample) -> LatentShapes:
    """Return the shapes of an example's arrays."""
    arrays = {name: getattr(example, name) for name in LatentShapes._fields}
    return LatentShapes(**{name: tuple(array.shape) for name, array in arrays.items() if array is not None})


def check_shapes(examples: Sequence[LatentExample], shapes: LatentShapes) -> None:
    """Check that all examples have the arrays and shapes that a run is for, or smaller latents.

    Raises:
        DataError: naming the first that has others, and the arrays.
    """
    for example in examples:
        found = shapes_of(example)
        fits = found.latents[0] == shapes.latents[0] and prod(found.latents) <= prod(shapes.latents)
        if not fits or found[1:] != shapes[1:]:
            differing = [name for name, a, b in zip(shapes._fields, found, shapes, strict=True) if a != b]
            said = ", ".join(f"{name} {getattr(found, name)} in place of {getattr(shapes, name)}" for name in differing)
            raise DataError(
                f"{example.place}: {said}; encode all pictures at one resolution and all texts to one length"
            )


def stacked(examples: Sequence[LatentExample], name: str) -> torch.Tensor | None:
    """Return one array of each example as a tensor, None where they have none."""
    arrays = [getattr(example, name) for example in examples]
    return None if arrays[0] is None else torch.from_numpy(np.stack(arrays))


class LatentSet(Sequence):
    """Examples that are read from their files when they are asked for.

    Args:
        stored: of each example, what was computed of its picture and of its text.
        places: where each came from.
        neutral: what was computed of the empty text.
        numbers: of the examples; None counts them.
    """

    def __init__(
        self,
        stored: Sequence[tuple[Stored, Stored]],
        places: Sequence[str],
        neutral: Stored,
        numbers: Sequence[int] | None = None,
    ):
        self._stored, self._places, self.neutral = stored, places, neutral
        self._numbers = range(len(stored)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._stored)

    def neutral_example(self) -> LatentExample:
        """Return what was computed of the empty text as an example without a picture."""
        given: dict[str, Any] = {"text": None} | arrays_in(self.neutral)
        return LatentExample(**given, latents=np.zeros(0, np.float32), number=0)

    @overload
    def __getitem__(self, index: int) -> LatentExample: ...
    @overload
    def __getitem__(self, index: slice) -> "LatentSet": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return LatentSet(self._stored[index], self._places[index], self.neutral, self._numbers[index])
        picture, text = map(arrays_in, self._stored[index])
        given: dict[str, Any] = {"text": None} | picture | text
        return LatentExample(**given, number=self._numbers[index], place=self._places[index])


def arrays_in(stored: Stored) -> dict[str, np.ndarray]:
    """Return tensors as arrays, those of 16 bits in 32.

    Raises:
        DataError: the file is gone or damaged.
    """
    if isinstance(stored, Path):
        try:
            stored = read_checked(stored)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"cannot read {stored}, which this run has written ({error}); resume it, and it is computed anew"
            ) from error
    return {name: (each.float() if each.is_floating_point() else each).numpy() for name, each in stored.items()}


def checksum_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the metadata that ``read_checked`` looks for in a safetensors file of these tensors."""
    result = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        result.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        result.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return {_CHECKSUM: result.hexdigest()}


def read_checked(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file and compare its tensors with its checksum.

    Raises:
        OSError: it cannot be read.
        SafetensorError: it is no such file, or not as it was written.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if not checksum_of(tensors).items() <= (file.metadata() or {}).items():
            raise SafetensorError("it is not as it was written")
    return tensors
