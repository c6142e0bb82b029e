"""Open picture files, whatever is in them, and say what is wrong with those that are broken.

Pillow decodes. What it is given is turned to three channels of 8 bits: 16 bits are scaled, not clipped as Pillow's own
conversion does, and an alpha channel is left out, as transformers' processors do.
"""

import base64
import binascii
import hashlib
import io
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_lite.errors import DataError, first_line, how_to_install
from qlora_lite.files import cache_root, explain_write_errors, sha256

if TYPE_CHECKING:
    from PIL.Image import Image

BROKEN, NO_PICTURE = "broken picture", "picture missing"
LONGEST_PATH = 1000  # letters: what is longer is something else, and would fill the screen
MAX_PIXELS = 89_478_485  # of a picture: 256 MiB with three channels, where Pillow begins to warn
# What Pillow raises over a file that is no picture, cut short, or not what its header says.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, ArithmeticError, struct.error)


@cache
def pillow():
    """Return Pillow's modules.

    Raises:
        DataError: it is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise DataError(f"pictures need Pillow: {how_to_install('vision')}") from None
    return Image, ImageOps


@cache
def decoding_threads() -> ThreadPoolExecutor:
    """Return this process's threads that read and decode pictures."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "pictures")


def file_of(value: object, where: str) -> Path:
    """Return the file of a row's picture: the one that it names, or one in the cache with the bytes that it holds, as
    they are or in a data: URL.

    Args:
        where: the place of the row.

    Raises:
        DataError: there is none.
    """
    if isinstance(value, Mapping):  # as data sets of the hub have them
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.startswith("data:"):
        value = picture_bytes(value)
    if isinstance(value, bytes):
        return _stored(value)
    if value is not None and not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(
            f"the picture is of the type {kind}, neither a path nor bytes; of Pillow's pictures "
            "datasets.Dataset.from_list(rows) keeps the bytes"
        )
    if not value or not value.strip():
        raise DataError("the picture is missing: write a path, or a picture's bytes as data sets of the hub have them")
    return relative_file(value, where)


def picture_bytes(url: str) -> bytes:
    """Return what a data: URL holds.

    Raises:
        DataError: it is no base64.
    """
    try:
        return base64.b64decode(url.partition(",")[2], validate=True)
    except (binascii.Error, ValueError):
        raise DataError("a data: URL holds no base64; write the picture's path") from None


def relative_file(name: str, where: str) -> Path:
    """Return a path as the folder of the table means it.

    Raises:
        DataError: it is an address, or too long for a path.
    """
    refuse_address(name)
    if len(name) > LONGEST_PATH:
        raise DataError(
            f"the picture is a text of {len(name):,} letters, which is no path; if it is base64, write it "
            "behind data:image/png;base64,",
            NO_PICTURE,
        )
    return Path(where.rpartition(":")[0]).parent / os.path.expanduser(name)


def refuse_address(name: str) -> None:
    """Check that a picture is no address: nothing is fetched while rows are read, and what lies behind one changes.

    Raises:
        DataError: it is one.
    """
    if name.startswith(("http://", "https://", "s3://", "gs://", "file://")):
        raise DataError(
            f"a picture is the address {name[:60]!r}: pictures are not fetched; download it, and write its path",
            NO_PICTURE,
        )


def _stored(content: bytes) -> Path:
    """Write a picture into the cache, under a name made of its content."""
    name = hashlib.sha256(content).hexdigest()
    path = cache_root() / "pictures" / name[:2] / name
    if not path.exists() or sha256(path) != name:
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{name}.{os.getpid()}.partial")
            partial.write_bytes(content)
            partial.replace(path)
    return path


def open_picture(path: str | Path) -> "Image":
    """Return a picture as it is in its file, turned as its camera says; of several frames the first.

    Raises:
        DataError: it is broken, too large or not there.
    """
    library, ops = pillow()
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for without end
        raise DataError(f"{path} is not an ordinary file; remove it, or correct the path", BROKEN)
    try:
        with library.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"the picture has {image.width:,} x {image.height:,} pixels, more than "
                    f"{MAX_PIXELS:,}; make it smaller",
                    BROKEN,
                )
            image.load()
            with suppress(SyntaxError, struct.error):  # what the camera said may be broken in a whole picture
                image.getexif()  # is kept, for the turn
            image.info.clear()  # or what the camera wrote would be written anew without it, which often fails
            return ops.exif_transpose(image)
    except FileNotFoundError:
        what = f"there is no picture {path}; correct the path, which begins where the table lies"
        raise DataError(what, BROKEN) from None
    except (library.DecompressionBombError, library.DecompressionBombWarning):
        raise DataError(f"the picture has more than {MAX_PIXELS:,} pixels; make it smaller", BROKEN) from None
    except _BROKEN as error:
        raise DataError(f"not a whole picture ({first_line(error)}); replace or remove it", BROKEN) from None


def decode(path: str | Path) -> "Image":
    """Return a picture with three channels of 8 bits.

    Raises:
        DataError: see ``open_picture``.
    """
    image = open_picture(path)
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        library, _ = pillow()
        image = library.fromarray(_in_8_bits(np.asarray(image)))
    return image.convert("RGB")


def thumbnail(path: str | Path) -> bytes:
    """Return a picture as a JPEG of a few thousand bytes for a page.

    Raises:
        DataError: see ``open_picture``.
    """
    image, buffer = decode(path), io.BytesIO()
    image.thumbnail((96, 96))
    image.save(buffer, "jpeg", quality=80)
    return buffer.getvalue()


def _in_8_bits(array: np.ndarray) -> np.ndarray:
    """Return a grey picture of 16 bits in 8; of floating-point numbers, from 0 to 1 or to 255."""
    if array.dtype.kind == "f":
        factor = 255.0 if array.max(initial=0) <= 1 else 1.0
    else:
        factor = 255 / 65535 if array.max(initial=0) > 255 or array.dtype == np.uint16 else 1.0
    return np.clip(np.rint(array.astype(np.float64) * factor), 0, 255).astype(np.uint8)
