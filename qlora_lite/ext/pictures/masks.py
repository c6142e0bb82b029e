"""Score masks."""

from collections.abc import Iterable

from torch import nn

from qlora_lite.ext.heads.measure import MAX_SHOWN, Scores
from qlora_lite.train.mask_head import measure_masks
from qlora_lite.train.workload import Workload


def score_masks(workload: Workload, model: nn.Module, batches: Iterable) -> Scores:
    """Return the scores of a model on batches of pictures with a class for each pixel."""
    scores, matrix = measure_masks(workload, model, batches)
    return scores, matrix if len(workload.batches.labels) <= MAX_SHOWN else None
