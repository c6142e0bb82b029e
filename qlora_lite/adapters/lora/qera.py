"""Begin with what makes up for the error of 4 bits in a layer's outputs on the user's own rows: QERA.

    E = W - Q;      scale * B A = U U^T E,  U the largest left singular vectors of E X

Q is the weight in 4 bit, which stays the base as it is. Of all products of rank r this brings Q X nearest to W X, while
LoftQ's makes the error of the weight small, whatever its inputs are. (QERA writes it with a root of the inputs'
autocorrelation R, of E R^1/2 and its inverse: the same where there is an inverse, and one of every [in, in].)

X is never there whole: what is kept of it are some random sums of its rows, whose products with E have nearly the same
left singular vectors.

Shapes: W, Q, E [out, in], X [in, T] (rows [T, in] as layers are given them), A [r, in], B [out, r], U [out, r].
Source: QERA, arXiv 2410.06040, theorem 1; random sums: arXiv 0909.4061, section 4.
"""

import torch

from .start import padded

QERA = "qera"
SUMS = 128  # of the rows of X, at least; for higher ranks twice as many


class RandomSums:
    """Sums of all rows that were added, each row times a random number of its own for each sum.

    Args:
        rank: the largest that they are for.
    """

    def __init__(self, rank: int):
        self.sums = torch.empty(0)
        self._count, self._chance = max(SUMS, 2 * rank), torch.Generator().manual_seed(0)

    def add(self, rows: torch.Tensor) -> None:
        """Add rows [T, in], any float type, on any device; what is kept [sums, in] is in host memory."""
        shares = torch.randn(self._count, len(rows), generator=self._chance)
        part = (shares.to(rows.device) @ rows.float()).cpu()
        self.sums = self.sums + part if len(self.sums) else part


def correction(
    error: torch.Tensor, sums: torch.Tensor, rank: int, scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return A and B, singular vectors times roots of singular values of their product, and the share that they make
    up for of the error's squares in the layer's outputs.

    Args:
        error: float32 [out, in].
        sums: float32 [sums, in], see ``RandomSums``.
        rank: of A and B, whose last rows and columns are zeros where the weight is smaller.
        scale: that ``B A`` will be multiplied by.
    """
    seen = error @ sums.t()
    # squares rise; a singular value decomposition of what is seen would take several times as long
    squares, vectors = torch.linalg.eigh((seen.t() @ seen).double())
    left = torch.linalg.qr(seen @ vectors[:, -rank:].to(seen.dtype)).Q
    u, s, right = torch.linalg.svd(left.t() @ error, full_matrices=False)
    root = (s / scale).sqrt()
    lora_a, lora_b = padded(root[:, None] * right, rank, 0), padded(left @ u * root, rank, 1)
    return lora_a.to(dtype), lora_b.to(dtype), (squares[-rank:].sum() / squares.sum()).item()
