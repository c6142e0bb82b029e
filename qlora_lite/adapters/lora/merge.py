"""Add a layer's low-rank update to its weight.

    W + scale * B A,    formed in float32 and rounded once by whoever stores it

Merging leaves nothing to compute at generation (LoRA, arXiv 2106.09685, section 4.1), but only a weight of more
bits can hold the sum: in bf16 a step of the weight is 1/256 of it and small updates are rounded away one by one, which
is why the merge measures what came of it (see the package's ``merge`` module).

Shapes: W [out, in], A [r, in], B [out, r].
"""

import torch

from qlora_lite.adapters.read import Factors


def merged_weight(weight: torch.Tensor, factors: Factors) -> torch.Tensor:
    """Return ``weight + scale * lora_B @ lora_A`` in float32.

    Args:
        weight: [out, in], any float type; left as it is.
        factors: of the same layer.
    """
    merged = weight.to(torch.float32, copy=True)
    return merged.addmm_(factors.lora_B.float(), factors.lora_A.float(), alpha=factors.scale)
