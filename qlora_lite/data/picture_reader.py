"""Pictures in chats: what stands for one in the text, and its pixels.

Both come from the model's own processor in transformers, so that they are what the model was trained with. What stands
for a picture depends on its size alone (a large one may be cut into several, each with tokens of its own), so that rows
are read without resizing any picture, and pixels are made when a batch is.

Shapes: pixels float32 [N, 3, H, W], of one picture or more; of those that keep their shapes see ``picture_grids``.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from qlora_lite.data.tokens.storage import Example, PictureFile
from qlora_lite.errors import DataError

from .picture_files import decode, decoding_threads, pillow

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerFast

MADE_UP = PictureFile("", "")  # of an example that a memory probe makes up: one picture of the model's size
SIZES_KNOWN = 4096
_begun: dict[tuple["PictureReader", PictureFile], Future] = {}  # see ``PictureReader.expect``


@dataclass(frozen=True)
class PictureReader:
    """How a model's pictures are read.

    Args:
        token_id: the token that stands for a part of a picture.
        tokens: how many of these a picture of one size [H, W] has.
        edge: H and W, in pixels.
        longest_edge: that a picture is scaled to before it is cut; None is what the processor says.
        model: that it is of, by name and revision.
        load: returns transformers' processor, which a plan without rows does not need.
    """

    token_id: int
    tokens: int
    edge: int
    longest_edge: int | None = None
    model: tuple[str, str | None] = ("", None)
    load: Callable[[], Any] = field(default=lambda: None, compare=False, repr=False)

    keeps_shape: ClassVar[bool] = False
    three_axes: ClassVar[bool] = False  # of the positions of such pictures' tokens (M-RoPE)
    ends_rows: ClassVar[bool] = False  # whether a token of the text stands behind each row of tokens

    @property
    def unit(self) -> tuple[int, ...]:
        """The shape of the pixels that ``tokens`` stand for."""
        return 3, self.edge, self.edge

    def made_up(self, units: int, largest: int) -> tuple[PictureFile, ...]:
        """Return so many made-up pictures of one size."""
        return (MADE_UP,) * units

    def largest_of(self, units: int) -> int:
        """Return how many units the largest picture has."""
        return 1

    def grid(self, width: int, height: int) -> tuple[int, int] | tuple[()]:
        """Return height and width in tokens of a picture that keeps its shape; nothing of others."""
        return ()

    @property
    def token(self) -> str:
        """What a chat template writes for a picture."""
        return self.load().image_token

    def template(self, tokenizer: "PreTrainedTokenizerFast") -> str | None:
        """Return the chat template that the model's files have beside the tokenizer's, which lacks one; None if not."""
        own = None if tokenizer.chat_template else self.load().chat_template
        return own if isinstance(own, str) else None

    @property
    def digest(self) -> str:
        """A SHA-256 of what makes pixels."""
        said = self.load().image_processor.to_json_string()
        return hashlib.sha256(f"{said} {self.longest_edge}".encode()).hexdigest()

    def text(self, width: int, height: int) -> str:
        """Return what stands for a picture of a size in the text."""
        return _text_of(self, width, height)

    def pixels(self, image: "Image") -> np.ndarray:
        """Return the pixels of a picture with three channels of 8 bits."""
        return self._processed(image)[0]

    def _processed(self, image: "Image") -> tuple[np.ndarray, str]:
        scaled = {"size": {"longest_edge": self.longest_edge}} if self.longest_edge else {}
        found = self.load()(
            images=image, text=[self.token], return_tensors="np", return_text_replacement_offsets=True, **scaled
        )
        pixels = np.asarray(found["pixel_values"], np.float32)
        pixels = pixels.reshape(-1, *pixels.shape[-3:])
        if pixels.shape[1:] != (3, self.edge, self.edge):
            raise DataError(
                f"the model's processor makes pictures of {pixels.shape[2]} x {pixels.shape[3]} pixels, "
                f"and the model is for {self.edge} x {self.edge}; take both from one source"
            )
        return pixels, found["text_replacement_offsets"][0][0]["replacement"]

    def looked_at(self, rows: Sequence[Sequence[str]]) -> list[list[tuple[PictureFile, str]] | DataError]:
        """Return the pictures of rows, each with what stands for it in the text; or what is wrong with one of a row.

        Args:
            rows: the files of each row.
        """
        waiting = [[decoding_threads().submit(self._looked_at, path) for path in paths] for paths in rows]
        found: list[list[tuple[PictureFile, str]] | DataError] = []
        for futures in waiting:
            try:
                found.append([future.result() for future in futures])
            except DataError as error:
                found.append(error)
        return found

    def _looked_at(self, path: str) -> tuple[PictureFile, str]:
        size = decode(path).size
        return PictureFile(path, look(path), self.grid(*size)), self.text(*size)

    def expect(self, examples: Sequence[Example]) -> None:
        """Begin with the pixels of pictures that will be asked for next; what was begun before is forgotten."""
        before = dict(_begun)
        _begun.clear()
        for picture in {picture for example in examples for picture in example.pictures}:
            _begun[self, picture] = before.get((self, picture)) or decoding_threads().submit(self._pixels_of, picture)

    def of_examples(self, examples: Sequence[Example]) -> np.ndarray | None:
        """Return the pixels of the examples' pictures in order; None where there are none.

        Raises:
            DataError: a picture is broken by now, gone, or was replaced by another.
        """
        waiting = [
            (example, _begun.get((self, picture)) or decoding_threads().submit(self._pixels_of, picture))
            for example in examples
            for picture in example.pictures
        ]
        found: list[np.ndarray] = []
        for example, future in waiting:
            try:
                found.append(future.result())
            except DataError as error:
                raise DataError(f"{example.where}: {error}", error.rule) from None
        return np.concatenate(found) if found else None

    def of_files(self, pictures: Sequence[PictureFile]) -> np.ndarray:
        """Return the pixels of at least one picture.

        Raises:
            DataError: see ``of_examples``.
        """
        return np.concatenate([self._pixels_of(picture) for picture in pictures])

    def _pixels_of(self, picture: PictureFile) -> np.ndarray:
        if picture.path == MADE_UP.path:
            return np.zeros((prod(picture.grid), *self.unit), np.float32)
        look(picture.path, picture.digest)
        return self.pixels(decode(picture.path))


@lru_cache(SIZES_KNOWN)
def _text_of(reader: PictureReader, width: int, height: int) -> str:
    library, _ = pillow()
    return reader._processed(library.new("RGB", (width, height)))[1]


def look(path: str, known: str | None = None) -> str:
    """Return the SHA-256 of a picture file.

    Raises:
        DataError: it cannot be read, or is another than that of a known SHA-256.
    """
    try:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"the picture {path} cannot be read ({error.strerror or error})") from None
    if known is not None and digest != known:
        raise DataError(f"the picture {path} was changed since the rows were read; start again")
    return digest
