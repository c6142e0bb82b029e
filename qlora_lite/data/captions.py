"""Pictures with captions, for a denoiser: where a caption stands, and which rectangle a picture is cut to.

A picture's caption is the text of a file with its name (``dog.txt`` beside ``dog.png``), a column of a table, one that
a recipe gives to all that have none, or the name of the folder that the picture lies in. A folder with a
``metadata.jsonl`` or ``metadata.csv`` is that table, as data sets of the hub have it.

Each picture keeps its aspect ratio as nearly as it can: it is cut to that of a few rectangles of about one area which
has its ratio (buckets), and never enlarged.

Shapes: pixels float32 [C, H, W], from -1 to 1.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_lite.data.readers.data_files import open_bytes, reader_of
from qlora_lite.data.readers.fields import kind_of
from qlora_lite.data.readers.sources import Source, read_rows
from qlora_lite.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

CAPTIONS = "captions"  # what such rows have in the place of labels
CAPTION_COLUMNS = "text", "caption", "prompt", "description", "label"
BESIDE = ".txt"  # suffix of a picture's caption
METADATA = "metadata.jsonl", "metadata.csv", "metadata.parquet"
NO_CAPTION, TOO_SMALL = "picture without a caption", "picture that is too small"
_STEEPEST = 2.0  # aspect ratio
_BICUBIC = 3  # Pillow's number


@dataclass(frozen=True)
class Fit:
    """How pictures become pixels for a denoiser.

    Args:
        sizes: height and width of each rectangle.
        channels: 3, or 1 for grey.
        caption: of pictures that have none; None is none.
    """

    sizes: tuple[tuple[int, int], ...]
    channels: int = 3
    caption: str | None = None

    @property
    def largest(self) -> tuple[int, int]:
        """The rectangle with the largest area."""
        return max(self.sizes, key=math.prod)

    @property
    def digest(self) -> str:
        """What names it by its content."""
        return hashlib.sha256(repr((self.sizes, self.channels)).encode()).hexdigest()

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Return the rectangle, height and width, of the ratio that is nearest to a picture's.

        Raises:
            DataError: the picture is smaller, so that it would be enlarged.
        """
        ratio = math.log(height / width)
        size = min(self.sizes, key=lambda each: abs(math.log(each[0] / each[1]) - ratio))
        if height < size[0] or width < size[1]:
            raise DataError(
                f"the picture has {width} x {height} pixels, and {size[1]} x {size[0]} are wanted; give a "
                "larger one, or lower data.resolution",
                TOO_SMALL,
            )
        return size

    def cut(self, image: "Image") -> tuple[np.ndarray, np.ndarray]:
        """Return the pixels of a picture's middle, and what SDXL is told of it: float32 [6].

        Those are height and width of the whole, row and column where it was cut (after it was made smaller), and height
        and width of the result.

        Raises:
            DataError: see ``size_of``.
        """
        height, width = self.size_of(image.width, image.height)
        scale = max(height / image.height, width / image.width)
        smaller = max(width, round(scale * image.width)), max(height, round(scale * image.height))
        whole = image.height, image.width
        if smaller != image.size:
            image = image.resize(smaller, _BICUBIC)
        top, left = (image.height - height) // 2, (image.width - width) // 2
        image = image.convert("L" if self.channels == 1 else "RGB").crop((left, top, left + width, top + height))
        array = np.asarray(image, np.float32) / np.float32(127.5) - np.float32(1)
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        return np.ascontiguousarray(array), np.array((*whole, top, left, height, width), np.float32)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write nothing: the pipeline says it."""


def rectangles(resolution: int, multiple: int, with_others: bool) -> tuple[tuple[int, int], ...]:
    """Return the square of a resolution, and rectangles of at most its area with up to twice the height or width.

    Args:
        multiple: what every height and width is a multiple of.
    """
    if not with_others:
        return ((resolution, resolution),)
    step = math.ceil(resolution / 16 / multiple) * multiple
    found = {(resolution, resolution)}
    for long in range(resolution + step, int(resolution * math.sqrt(_STEEPEST)) + 1, step):
        if (short := resolution**2 // long // multiple * multiple) and long <= _STEEPEST * short:
            found |= {(long, short), (short, long)}
    return tuple(sorted(found))


def caption_text(value: object) -> str:
    """Return a row's caption.

    Raises:
        DataError: it is missing, or no text.
    """
    if value is None:
        raise DataError('the caption is missing or null; write one ("" is none), or data.caption for all', NO_CAPTION)
    if isinstance(value, int) and not isinstance(value, bool):  # the name of a class
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"the caption is {kind_of(value)}, not text; put it in quotes", NO_CAPTION)
    return value.strip()


def caption_of(path: Path, folder: Path, fit: Fit) -> str:
    """Return the caption of a picture in a folder.

    Raises:
        DataError: there is none.
    """
    beside = path.with_suffix(BESIDE)
    if beside.is_file():
        try:
            return beside.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"its caption {beside.name} cannot be read ({error}); write it as UTF-8 text", NO_CAPTION
            ) from None
    if fit.caption is not None:
        return fit.caption
    inside = path.relative_to(folder).parts
    if len(inside) == 1:
        raise DataError(
            f"the picture has no caption: write {beside.name} beside it, a metadata.jsonl with the columns "
            "file_name and text, or data.caption for all",
            NO_CAPTION,
        )
    return inside[0]


def caption_in(value: object, fit: Fit) -> str:
    """Return the caption of a table's row.

    Args:
        value: as the row has it.

    Raises:
        DataError: there is none.
    """
    return fit.caption if value is None and fit.caption is not None else caption_text(value)


def captions_in(path: str | Path, column: str | None = None) -> list[str]:
    """Return the texts of a file to draw pictures of: its lines, of which an empty one is no text, or a table's column.

    Args:
        column: of a table; None for one that is known by its name.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    if reader_of(Path(path), is_text=True) == "text":
        try:
            with open_bytes(Path(path)) as file:
                found = file.read().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise DataError(f"{path}: not UTF-8; convert the file to UTF-8") from None
    else:
        found = []
        for where, row in read_rows(Source(str(path))):
            column = column or next((name for name in CAPTION_COLUMNS if name in row), None)
            if column not in row:
                raise DataError(
                    f"{where}: {'no prompt' if column is None else repr(column)} is among the columns "
                    f"{', '.join(map(repr, row))}; name it with --column"
                )
            found.append(caption_text(row[column]))
    if not found:
        raise DataError(f"{path}: there is no prompt in this file; write one a line")
    return found


def metadata_of(folder: Path) -> Path | None:
    """Return the table in a folder of pictures that says their captions, if there is one."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)
