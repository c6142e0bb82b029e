"""Pictures in chats that keep their shapes: each is a grid of tokens, whose positions have three axes or one.

Qwen3-VL's are scaled as a whole, so that both edges are multiples of what a token stands for and the number of pixels
is between a least and a most one. So a picture's size says how many tokens it has, in how many rows and columns.
Mistral 3's are scaled so that the longer edge is no longer than a most one; behind each row of a picture but the last a
token of the text says that another begins, and one behind the last that the picture ends. Gemma 4's are scaled so that
they have as many tokens as their shape allows of a most number, small ones too.

Shapes: a grid is (height, width) in tokens; pixels float32 [height * width, patches of a token, numbers of a patch].

Source: Qwen2-VL, arXiv 2409.12191, sections 2.1 and 2.2 (M-RoPE); Pixtral, arXiv 2410.07073, section 2; transformers'
``smart_resize``, ``get_rope_index`` and ``PixtralProcessor``.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isqrt, prod
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from qlora_lite.data.tokens.storage import PictureFile
from qlora_lite.errors import DataError

from .picture_reader import MADE_UP, PictureReader

if TYPE_CHECKING:
    from PIL.Image import Image


BUDGETS = 70, 140, 280, 560, 1120  # tokens of a picture that Gemma 4's processor takes
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
    three_axes: ClassVar[bool] = True

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
            raise DataError(
                f"the model's processor makes {len(pixels)} patches of {pixels.shape[1]} numbers, and the "
                f"model takes {self.unit[0]} for each token, of {self.unit[1]} numbers; take both from one "
                "source"
            )
        return pixels.reshape(-1, *self.unit)

    def _size(self) -> dict[str, int]:
        """Return the least and the most pixels of a picture, in transformers' words."""
        own = self.load().image_processor.size
        most = self.longest_edge**2 if self.longest_edge else own["longest_edge"]
        return {"shortest_edge": min(own["shortest_edge"], most), "longest_edge": most}


class RowsReader(GridReader):
    """How pictures of Mistral 3 are read, in which a token of the text stands behind each row of tokens."""

    three_axes: ClassVar[bool] = False
    ends_rows: ClassVar[bool] = True

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the grid of a picture of a size.

        Raises:
            DataError: scaled to the model's longest edge it would be less than a pixel wide.
        """
        from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

        picture, most = np.broadcast_to(np.uint8(0), (3, height, width)), self._size()["longest_edge"]
        found = get_resize_output_image_size(picture, most, self.edge, "channels_first")
        if not prod(found):
            raise DataError(f"a picture of {width} x {height} pixels is too narrow to be scaled to {most}; cut it")
        return found[0] // self.edge, found[1] // self.edge

    def text(self, width: int, height: int) -> str:
        """See ``PictureReader.text``."""
        rows, columns = self.grid(width, height)
        behind_row, behind_picture = self.load().beside
        return behind_row.join([self.token * columns] * rows) + behind_picture

    def pixels(self, image: "Image") -> np.ndarray:
        """Return the pixels of a picture with three channels of 8 bits."""
        patch, size = {"height": self.edge, "width": self.edge}, self._size()
        found = self.load().image_processor(images=image, size=size, patch_size=patch, return_tensors="np")
        pixels, along = np.asarray(found["pixel_values"][0], np.float32), isqrt(self.unit[0])
        rows, columns = (edge // self.edge for edge in pixels.shape[1:])
        parts = pixels.reshape(3, rows, along, self.edge // along, columns, along, self.edge // along)
        return parts.transpose(1, 4, 2, 5, 0, 3, 6).reshape(-1, *self.unit)

    def _size(self) -> dict[str, int]:
        own = self.load().image_processor.size
        return {"longest_edge": self.longest_edge or own["longest_edge"]}


class BudgetReader(GridReader):
    """How pictures of Gemma 4 are read, which fill a number of tokens, one of ``BUDGETS``: the most that are no more
    than the square of ``longest_edge`` has, but for the least, or what the processor says."""

    three_axes: ClassVar[bool] = False

    def largest_of(self, tokens: int) -> int:
        """Return the tokens of the largest picture that so many have room for."""
        return min(tokens, self._budget())

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the grid of a picture of a size; one that is much longer than it is wide becomes a single row."""
        from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

        along = isqrt(self.unit[0])
        most = self._budget() * self.unit[0]
        found = get_aspect_ratio_preserving_size(height, width, self.edge // along, most, along)
        return found[0] // self.edge, found[1] // self.edge

    def text(self, width: int, height: int) -> str:
        """See ``PictureReader.text``."""
        before, behind = self.load().beside
        return before + super().text(width, height) + behind

    def pixels(self, image: "Image") -> np.ndarray:
        """Return the pixels of a picture with three channels of 8 bits."""
        along = isqrt(self.unit[0])
        found = self.load().image_processor(
            images=image,
            patch_size=self.edge // along,
            pooling_kernel_size=along,
            max_soft_tokens=self._budget(),
            return_tensors="np",
        )
        rows, columns = self.grid(*image.size)
        patches = np.asarray(found["pixel_values"][0], np.float32)[: rows * columns * self.unit[0]]
        return patches.reshape(rows, along, columns, along, -1).swapaxes(1, 2).reshape(-1, *self.unit)

    def _budget(self) -> int:
        if self.longest_edge is None:
            return self.load().image_processor.max_soft_tokens
        return max(each for each in BUDGETS if each <= max(BUDGETS[0], (self.longest_edge // self.edge) ** 2))


def grids_of(pictures: Iterable[PictureFile]) -> tuple[tuple[int, int], ...]:
    """Return the grids of pictures that keep their shapes; nothing of others."""
    return tuple(picture.grid for picture in pictures if picture.grid)


def positions_of(row_lengths: Sequence[int], begins: Sequence[int], grids: Sequence[tuple[int, int]]) -> np.ndarray:
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
