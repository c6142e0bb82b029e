"""Pictures in chats that keep their shapes: each is a grid of tokens, whose positions have three axes.

Qwen3-VL's are scaled as a whole, so that both edges are multiples of what a token stands for and the number of pixels
is between a least and a most one. So a picture's size says how many tokens it has, in how many rows and columns.

Shapes: a grid is (height, width) in tokens; pixels float32 [height * width, patches of a token, numbers of a patch].

Source: Qwen2-VL, arXiv 2409.12191, sections 2.1 and 2.2 (M-RoPE); transformers' ``smart_resize`` and
``get_rope_index``.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from qlora_lite.errors import DataError

from .picture_reader import MADE_UP, PictureReader
from .storage import PictureFile

if TYPE_CHECKING:
    from PIL.Image import Image


TOKENS_AT_ONCE = 1024  # that a frozen tower computes, or one picture


@dataclass(frozen=True)
class GridReader(PictureReader):
    """How pictures that keep their shapes are read: ``tokens`` is 1, ``edge`` that of a token's square, in pixels, and
    ``longest_edge`` that of the square with as many pixels as the largest picture.

    Args:
        token_pixels: patches of a token, and numbers of a patch.
    """

    token_pixels: tuple[int, int] = (1, 1)

    keeps_shape: ClassVar[bool] = True

    @property
    def unit(self) -> tuple[int, ...]:
        """The shape of a token's pixels."""
        return self.token_pixels

    def made_up(self, tokens: int, largest: int) -> tuple[PictureFile, ...]:
        """Return pictures of so many tokens in all that need as much memory as any of which none is larger: each stands
        for as many as a tower computes at a time."""
        most = max(largest, TOKENS_AT_ONCE)
        sizes = [min(most, tokens - begin) for begin in range(0, tokens, most)]
        return tuple(MADE_UP._replace(grid=(1, size)) for size in sizes)

    def largest_of(self, tokens: int) -> int:
        """Return the tokens of the largest picture that so many have room for."""
        return min(tokens, (self.longest_edge // self.edge) ** 2) if self.longest_edge else tokens

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the grid of a picture of a size.

        Raises:
            DataError: it is longer and narrower than the model's processor takes it.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        size = self._size()
        try:
            found = smart_resize(height, width, self.edge, size["shortest_edge"], size["longest_edge"])
        except ValueError as error:
            raise DataError(f"a picture of {width} x {height} pixels: {error}; cut it") from None
        return found[0] // self.edge, found[1] // self.edge

    def text(self, width: int, height: int) -> str:
        """See ``PictureReader.text``."""
        return self.token * prod(self.grid(width, height))

    def pixels(self, image: "Image") -> np.ndarray:
        """Return the pixels of a picture with three channels of 8 bits."""
        found = self.load().image_processor(images=image, size=self._size(), return_tensors="np")
        pixels = np.asarray(found["pixel_values"], np.float32)
        if pixels.shape[1] != self.unit[1] or len(pixels) % self.unit[0]:
            raise DataError(f"the model's processor makes {len(pixels)} patches of {pixels.shape[1]} numbers, and the "
                            f"model takes {self.unit[0]} for each token, of {self.unit[1]} numbers; take both from one "
                            "source")  # fmt: skip
        return pixels.reshape(-1, *self.unit)

    def _size(self) -> dict[str, int]:
        """Return the least and the most pixels of a picture, in transformers' words."""
        own = self.load().image_processor.size
        most = self.longest_edge**2 if self.longest_edge else own["longest_edge"]
        return {"shortest_edge": min(own["shortest_edge"], most), "longest_edge": most}


def grids_of(pictures: Iterable[PictureFile]) -> tuple[tuple[int, int], ...]:
    """Return the grids of pictures that keep their shapes; nothing of others."""
    return tuple(picture.grid for picture in pictures if picture.grid)


def positions_of(
    row_lengths: Sequence[int], begins: Sequence[int], grids: Sequence[tuple[int, int]]
) -> np.ndarray:  # fmt: skip
    """Return the positions in time, height and width of packed tokens, int64 [3, 1, T], from 0 in each row.

    A picture is one moment, and its tokens are as many rows and columns behind the position that it begins with as in
    its grid. Text continues behind the largest of these, with one position on all axes.

    Args:
        row_lengths: tokens of each row, T in all.
        begins: the first token of each picture, rising.
        grids: of the pictures.
    """
    found, pictures, begin = [], deque(zip(begins, grids, strict=True)), 0
    for end in accumulate(row_lengths):
        position = 0
        while pictures and pictures[0][0] < end:
            at, (height, width) = pictures.popleft()
            found.append(np.arange(position, position + at - begin)[None].repeat(3, 0))
            position += at - begin
            found.append(position + np.indices((1, height, width)).reshape(3, -1))
            position, begin = position + max(height, width), at + height * width
        found.append(np.arange(position, position + end - begin)[None].repeat(3, 0))
        begin = end
    return np.concatenate(found, axis=1)[:, None]
