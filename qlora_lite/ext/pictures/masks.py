"""Masks: pictures that give each pixel of another one a class, of segmentation.

A mask is a grey or palette picture of the size of its own, whose values are the numbers of classes from 0 on; IGNORED
ones have none. Its pictures' labels hold what is known of it, as JSON: its file, its content's SHA-256 and its classes.

Shapes: classes int64 [H, W], -100 where there is none.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_lite.data.picture_files import BROKEN, open_picture
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import DataError

from .pixels import Processor

if TYPE_CHECKING:
    from PIL.Image import Image

IGNORED, WITHOUT = 255, -100  # in a file, in a batch


def read_mask(path: str | Path) -> "Image":
    """Return a mask, its values as they are in the file.

    Raises:
        DataError: it is broken, or its pixels are colours and no numbers.
    """
    image = open_picture(path)
    if image.mode not in ("L", "P", "1"):
        cure = "save it as grey or palette picture with a class's number from 0 in each pixel, or 255 for none"
        raise DataError(f"the mask {path} has pixels of the kind {image.mode}, no numbers of classes; {cure}", BROKEN)
    return image


def label_of_mask(path: str, size: tuple[int, int]) -> str:
    """Return what a picture's label says of its mask.

    Args:
        size: width and height of the picture.

    Raises:
        DataError: see ``read_mask``; or the mask has another size.
    """
    mask = read_mask(path)
    if mask.size != size:
        sizes = f"{mask.width} x {mask.height} pixels, and its picture {size[0]} x {size[1]}"
        raise DataError(f"the mask {path} has {sizes}; make them equal", BROKEN)
    classes = sorted({int(value) for value in np.unique(np.asarray(mask))} - {IGNORED})
    if not classes:
        raise DataError(f"every pixel of the mask {path} is {IGNORED}, which has no class", BROKEN)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return json.dumps({"mask": path, "sha256": digest, "classes": [str(each) for each in classes]})


def classes_of(example: Example, processor: Processor, chance: random.Random | None) -> np.ndarray:
    """Return the classes of a picture's pixels as a processor cuts it."""
    values = processor.cut(read_mask(json.loads(example.answer)["mask"]), 0, IGNORED, chance)[0]
    return np.where(values == IGNORED, WITHOUT, values.astype(np.int64))
