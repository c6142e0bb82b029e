"""Score masks."""

from collections.abc import Iterable

from torch import nn

from qlora_lite.ext.heads.measure import MAX_SHOWN, Scores
from qlora_lite.train.head_workload import HeadWorkload
from qlora_lite.train.mask_head import MaskHead, measure_masks


def score_masks(workload: HeadWorkload, model: nn.Module, batches: Iterable) -> Scores:
    """Return the scores of a model on batches of pictures with a class for each pixel."""
    assert isinstance(workload, MaskHead)
    scores, matrix = measure_masks(workload, model, batches)
    return scores, matrix if len(workload.labels) <= MAX_SHOWN else None
