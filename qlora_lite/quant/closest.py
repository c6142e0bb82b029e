"""Codes of a weight whose products with given inputs are nearest to those of another weight, by coordinate descent.

Column by column each weight takes the value on its grid that is best while all others stay, so that |X (W' - W)^T|
never grows. GPTQ rounds each column once and has later ones make up for it; beginning from a weight that is on the grid
already, that moves far more of it, and so ends further away.

Where blocks choose scales too (Q4_0), each block's is fitted to its codes before these are chosen anew.

Shapes: inputs X [n, in] as ``gram`` = X^T X, float32 [in, in]; weights [in, out] here, of a layer's weight [out, in].
Source: GPTQ, arXiv 2210.17323; coordinate descent instead, arXiv 2309.01885 (QuantEase).
"""

from typing import Protocol

import torch
from torch import Tensor

GGUF_BLOCK = 32  # weights of Q4_0 and Q8_0 that share a scale
SWEEPS = 2  # of coordinate descent over all columns of a weight
COLUMNS = 128  # whose changes are put into the error of all others at once
DAMPING = 0.01  # of the mean square of an input, added to each: few inputs do not say all
FIRST_STEPS = 9  # of Q4_0 that are tried on each side of the one that llama.cpp takes, each a tenth of a code apart
_SMALLEST = 1e-38


class Grid(Protocol):
    """The values that weights may take."""

    def nearest(self, column: int, wanted: Tensor) -> Tensor:
        """Return the values nearest to wanted ones [out] of a column of weights."""

    def refit(self, column: int, weight: Tensor, missing: Tensor, gram: Tensor) -> None:
        """Change what a block of columns has in common, if the grid has such and a block begins at this column.

        Args:
            weight: of COLUMNS columns, from the multiple of it below this one; changed with it.
            missing: of the same, how their error is seen by the inputs, [columns, out]; changed with it.
            gram: of the same, [columns, columns].
        """


def damped(gram: Tensor) -> Tensor:
    """Return X^T X of a few inputs as a copy that many could have."""
    gram = gram.clone()
    gram.diagonal().add_(DAMPING * gram.diagonal().mean() + _SMALLEST)
    return gram


def descend(weight: Tensor, error: Tensor, gram: Tensor, grid: Grid) -> None:
    """Change a weight on a grid so that its products with inputs get nearer to those of another.

    Args:
        weight: [in, out], on the grid; changed.
        error: what is missing in it, [in, out].
        gram: X^T X of the inputs, ``damped``.
    """
    columns, error = len(weight), gram @ error  # as the inputs see it
    for start in [*range(0, columns, COLUMNS)] * SWEEPS:
        some = slice(start, min(start + COLUMNS, columns))
        own, missing, before, within = weight[some], error[some].clone(), weight[some].clone(), gram[some, some]
        for number in range(len(missing)):
            column = start + number
            grid.refit(column, own, missing, within)
            found = grid.nearest(column, own[number] + missing[number] / within[number, number])
            missing[number:] -= within[number:, number, None] * (found - own[number])
            own[number] = found
        error -= gram[:, some] @ (own - before)


def closest_q4_0(weight: Tensor, gram: Tensor) -> Tensor:
    """Return a weight in Q4_0 blocks, uint8 [out, in / 32 * 18], see this module; beside it, memory for eight of it.

    Args:
        weight: [out, in], any float type, in whole blocks of 32; left as it is.
        gram: X^T X of its inputs; left as it is.
    """
    gram, wanted = damped(gram), weight.t().float().contiguous()
    grid = _Q4_0(wanted, gram.diagonal())
    found = grid.values()
    descend(found, wanted.sub_(found), gram, grid)
    return grid.packed()


class _Q4_0:
    """Codes -8 to 7, times a step in float16 for each 32 of a row of the weight."""

    def __init__(self, weight: Tensor, squares: Tensor):
        """Begin with the step of each block that rounding changes least for inputs of such mean squares [in]."""
        blocks, squares = weight.view(-1, GGUF_BLOCK, weight.shape[1]), squares.view(-1, GGUF_BLOCK, 1)
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        steps, least = largest, torch.full_like(largest, torch.inf)
        for number in range(-FIRST_STEPS, FIRST_STEPS + 1):
            step = (largest / (-8 - number / 10)).half().float()
            errors = (_codes(blocks, step) * step - blocks).square_().mul_(squares).sum(1, keepdim=True)
            steps, least = torch.where(errors < least, step, steps), torch.minimum(errors, least)
        self.codes, self.steps = _codes(blocks, steps).view_as(weight), steps.squeeze(1)

    def values(self) -> Tensor:
        return self.codes * self.steps.repeat_interleave(GGUF_BLOCK, 0)

    def nearest(self, column: int, wanted: Tensor) -> Tensor:
        step = self.steps[column // GGUF_BLOCK]
        self.codes[column] = _codes(wanted, step)
        return self.codes[column] * step

    def refit(self, column: int, weight: Tensor, missing: Tensor, gram: Tensor) -> None:
        if column % GGUF_BLOCK:
            return
        codes, step = self.codes[column : column + GGUF_BLOCK], self.steps[column // GGUF_BLOCK]
        block = slice(column % COLUMNS, column % COLUMNS + GGUF_BLOCK)
        curvature = (codes * (gram[block, block] @ codes)).sum(0).clamp_(min=_SMALLEST)
        more = (step + (codes * missing[block]).sum(0) / curvature).half().float() - step
        step += more
        weight[block] += (change := codes * more)
        missing -= gram[:, block] @ change

    def packed(self) -> Tensor:
        codes = self.codes.t().add(8).to(torch.uint8).reshape(-1, GGUF_BLOCK)
        steps = self.steps.t().reshape(-1, 1).half().view(torch.uint8)
        halves = codes[:, : GGUF_BLOCK // 2] | codes[:, GGUF_BLOCK // 2 :] << 4
        return torch.cat([steps, halves], 1).view(self.codes.shape[1], -1)


def _codes(wanted: Tensor, step: Tensor) -> Tensor:
    return (wanted * torch.where(step == 0, 0.0, step.reciprocal())).round_().clamp_(-8, 7)
