"""How a picture becomes pixels: resized, cut, scaled, normalised, and augmented in training.

A processor is that of the model's own files (``preprocessor_config.json``), in transformers' words. Augmentations are
torchvision's RandomResizedCrop and RandomHorizontalFlip with their defaults, drawn from a generator of the caller's.

Shapes: pixels float32 [3, H, W].
"""

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_lite.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

AUGMENTS = ("none", "flip", "crop", "crop-flip")
_AREA, _RATIO, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # torchvision's RandomResizedCrop
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, in the order red, green, blue
_BICUBIC = 3  # Pillow's number


@dataclass(frozen=True)
class Processor:
    """How a picture becomes pixels: resize, cut, scale, normalise.

    Args:
        height, width: of the result.
        resize: the shortest edge before the cut, or height and width; None resizes nothing.
        resample: Pillow's number of the filter.
        scale: factor on 0 to 255.
        mean, std: of each channel, after scaling.
        augment: one of AUGMENTS, in training.
    """

    height: int
    width: int
    resize: int | tuple[int, int] | None = None
    resample: int = _BICUBIC
    scale: float = 1 / 255
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    augment: str = "none"

    def pixels(self, image: "Image", chance: random.Random | None = None) -> np.ndarray:
        """Return the pixels of a picture, float32 [3, H, W].

        Args:
            image: three channels of 8 bits.
            chance: draws the augmentation; None augments nothing.
        """
        array: np.ndarray = self.cut(image, self.resample, 0, chance).astype(np.float32)
        return (array * np.float32(self.scale) - self._column(self.mean)) / self._column(self.std)

    def cut(self, image: "Image", resample: int, fill: int, chance: random.Random | None = None) -> np.ndarray:
        """Return a picture resized, cut and augmented, its values as they are, [channels, H, W].

        Args:
            resample: Pillow's number of the filter.
            fill: the value around a picture that is too small.
            chance: see ``pixels``; of one state, it draws the same for pictures of one size.
        """
        flips = chance is not None and "flip" in self.augment
        if chance is not None and "crop" in self.augment:
            box = _random_box(image.width, image.height, chance)
            image = image.resize((self.width, self.height), resample, box)
        else:
            image = self._resized(image, resample)
        array = np.asarray(image)
        array = _cut(array[None] if array.ndim == 2 else array.transpose(2, 0, 1), self.height, self.width, fill)
        if flips and chance is not None and chance.random() < 0.5:
            array = array[:, :, ::-1]
        # in the order of its axes: a convolution would copy a batch that is laid out otherwise
        return np.ascontiguousarray(array)

    def _resized(self, image: "Image", resample: int) -> "Image":
        if self.resize is None:
            return image
        if isinstance(self.resize, tuple):
            return image.resize(self.resize[::-1], resample)
        short, long = sorted((image.width, image.height))
        other = int(self.resize * long / short)
        size = (self.resize, other) if image.width <= image.height else (other, self.resize)
        return image.resize(size, resample)

    def _column(self, values: Sequence[float]) -> np.ndarray:
        return np.array(values, np.float32)[:, None, None]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it for transformers' AutoImageProcessor, without the augmentation."""
        edges = {"height": self.height, "width": self.width}
        first = self.resize
        exact = dict(zip(edges, first, strict=True)) if isinstance(first, tuple) else edges
        size = {"shortest_edge": first} if isinstance(first, int) else exact
        said = {
            "image_processor_type": "BitImageProcessor",
            "do_resize": first is not None,
            "size": size,
            "resample": self.resample,
            "do_center_crop": True,
            "crop_size": edges,
            "do_rescale": True,
            "rescale_factor": self.scale,
            "do_normalize": True,
            "image_mean": [*self.mean],
            "image_std": [*self.std],
            "do_convert_rgb": True,
        }
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")

    @cached_property
    def digest(self) -> str:
        """A SHA-256 of what changes pixels."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


def processor_of(
    said: Mapping[str, Any], size: int | tuple[int, int], wanted: int | None = None, augment: str = "none"
) -> Processor:
    """Return the processor that a model's files describe, for pictures of a size.

    Args:
        said: what ``preprocessor_config.json`` says; nothing where a model has none.
        size: of the pictures that the model was made for, one edge or height and width.
        wanted: edge of the pictures that are wanted instead; None is what the files say.
        augment: one of AUGMENTS.

    Raises:
        DataError: it says what is no size, or no number.
    """
    try:
        crop = _edges(said.get("crop_size")) if said.get("do_center_crop") else None
        resize = _resize_of(said.get("size")) if said.get("do_resize", bool(said)) else None
        exact = resize if isinstance(resize, tuple) else None
        height, width = crop or exact or _edges(size)
        mean, std = (
            tuple(map(float, said.get(name) or usual)) for name, usual in (("image_mean", _MEAN), ("image_std", _STD))
        )
        if not said.get("do_normalize", True):
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        scale = float(said.get("rescale_factor") or 1 / 255) if said.get("do_rescale", True) else 1.0
        resample = int(said.get("resample", _BICUBIC))
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"the model's preprocessor_config.json cannot be used: {error}") from error
    if len(mean) != 3 or len(std) != 3 or 0 in std:
        raise DataError("the model's preprocessor_config.json is for pictures of other than three channels")
    if resize is None:
        resize = height if height == width else (height, width)
    if wanted:
        resize = round(resize * wanted / min(height, width)) if isinstance(resize, int) else (wanted, wanted)
        height = width = wanted
    return Processor(height, width, resize, resample, scale, mean, std, augment)


def _edges(said: Any) -> tuple[int, int]:
    """Return height and width of a size as transformers writes one."""
    if isinstance(said, Mapping):
        return (said["height"], said["width"]) if "height" in said else (said["shortest_edge"],) * 2
    height, width = (said, said) if isinstance(said, int) else said
    return int(height), int(width)


def _resize_of(said: Any) -> int | tuple[int, int] | None:
    if isinstance(said, Mapping):
        return int(said["shortest_edge"]) if "shortest_edge" in said else _edges(said)
    return said if said is None or isinstance(said, int) else _edges(said)


def _random_box(width: int, height: int, chance: random.Random) -> tuple[float, float, float, float]:
    """Return the part of a picture that RandomResizedCrop takes: left, upper, right, lower."""
    for _ in range(_TRIES):
        area = width * height * chance.uniform(*_AREA)
        ratio = math.exp(chance.uniform(*map(math.log, _RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = chance.randint(0, width - w), chance.randint(0, height - h)
            return left, upper, left + w, upper + h
    ratio = min(max(width / height, _RATIO[0]), _RATIO[1])  # of what is left, the middle
    wide, high = min(width, height * ratio), min(height, width / ratio)
    return (width - wide) / 2, (height - high) / 2, (width + wide) / 2, (height + high) / 2


def _cut(array: np.ndarray, height: int, width: int, fill: int) -> np.ndarray:
    """Return the middle of a picture [channels, H, W], with one value around it where it is smaller."""
    short = [max(0, wanted - there) for wanted, there in zip((height, width), array.shape[1:], strict=True)]
    if any(short):
        array = np.pad(array, [(0, 0), *((each // 2, each - each // 2) for each in short)], constant_values=fill)
    above, left = (array.shape[1] - height) // 2, (array.shape[2] - width) // 2
    return array[:, above : above + height, left : left + width]
