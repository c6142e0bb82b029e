"""Begin A with the directions in which a layer's inputs vary most on the user's own rows, and share ranks out so: EVA.

    X = U S V^T, X the inputs of a layer over some rows' tokens;      A = the first rows of V^T, B = 0

B = 0 leaves the model as it is, so that the base is the one of the files. A layer's largest squares of S, as shares of
their sum, say how much of its inputs' variance its ranks explain; of all layers' shares the largest are taken, as many
as the layers' own ranks are together, and not more than ``RATIO`` times its own rank of one layer. A layer may be left
without any.

X is never there whole: of what was seen a few more directions are kept than will be needed, each as long as its S, and
what comes next is put below them. (The authors' and peft's code updates a principal component analysis with means, and
stops each layer when its directions no longer turn; here all see the same tokens, and means are left in.)

Shapes: X [T, in], A [r, in].
Source: arXiv 2410.07170.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from qlora_lite.errors import ModelError

EVA = "eva"
RATIO = 2  # of the largest rank that a layer may be given to its own
SPARE = 32  # directions that are kept beyond those
ROWS = 512  # of X at once


class Directions:
    """The largest right singular vectors of all rows that were added, up to some count."""

    def __init__(self, count: int):
        self._kept, self._count, self._total = torch.empty(0), count + SPARE, 0.0

    def add(self, rows: torch.Tensor) -> None:
        """Add rows [T, in], any float type, on any device; what is kept is in host memory."""
        for part in rows.split(ROWS):
            part = part.double()
            self._total += part.square().sum().item()
            both = torch.cat([self._kept.to(part), part]) if len(self._kept) else part
            _, left = torch.linalg.eigh(both @ both.t())
            self._kept = (left[:, -self._count :].flip(1).t() @ both).float().cpu()  # S V^T

    def found(self, count: int) -> tuple[torch.Tensor, list[float]]:
        """Return orthonormal directions [n, in], at most so many, and the share of all squares that each explains."""
        lengths = self._kept.double().norm(dim=1)
        real = int((lengths > 1e-6 * lengths.amax()).sum())  # others are rounding
        kept = slice(min(count, real))
        shares = (lengths[kept].square() / self._total).tolist()
        return (self._kept[kept] / lengths[kept, None]).float(), shares


def share_out(shares: Mapping[str, Sequence[float]], own: Mapping[str, int]) -> dict[str, int]:
    """Return the ranks of layers by path, as many together as their own ones; layers that get none are left out.

    Args:
        shares: of each layer's variance, falling, as many as it may be given.
        own: ranks before.

    Raises:
        ModelError: there are not so many.
    """
    order = sorted((-share, place) for place, path in enumerate(own) for share in shares[path])
    if len(order) < (budget := sum(own.values())):
        raise ModelError(
            f"lora.start eva found {len(order)} directions in the inputs of {len(own)} layers, fewer than "
            f"their ranks, {budget}: set lora.rank to {len(order) // len(own)} or less, or train on more "
            "rows"
        )
    taken = Counter(place for _, place in order[:budget])
    return {path: taken[place] for place, path in enumerate(own) if taken[place]}


def kept_scale(alpha: float, before: int, after: int, rslora: bool) -> float:
    """Return the alpha with which a layer of another rank has the scale that it had."""
    return alpha * (math.sqrt(after / before) if rslora else after / before)
