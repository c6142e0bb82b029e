"""Score a head's outputs against labels: accuracy, F1, Matthews' correlation; Pearson's and Spearman's of numbers.

With C labels, a confusion matrix M [C, C] holds in row t and column p how many texts of label t were given p.
scikit-learn and scipy know many more cases; these few are a line or two each.

Definitions: F1 of a label is 2 tp / (2 tp + fp + fn), 0 where nothing is found and nothing is there; macro is the mean
over labels, binary that of the second of two, micro that of all decisions about several labels. Matthews' correlation
of several classes is Gorodkin's (Computational Biology and Chemistry 28, 2004). Spearman's is Pearson's of ranks, of
equal values their mean. A correlation with what is constant is 0.

Shapes: outputs float [N, C]; labels int [N], float [N, C] of several labels, float [N] of numbers.
"""

import math
from collections.abc import Sequence

import numpy as np

from qlora_lite.data.checks.metrics import Score, mean
from qlora_lite.data.labels import LABELS, NUMBER


def scores_of(outputs: np.ndarray, targets: np.ndarray, problem: str) -> dict[str, Score]:
    """Return the scores of a head's outputs by name."""
    count = len(targets)
    if problem == NUMBER:
        given = outputs[:, 0]
        error = math.sqrt(float(np.mean((given - targets) ** 2)))
        found = {
            "pearson": correlation(given, targets),
            "spearman": correlation(ranks(given), ranks(targets)),
            "rmse": error,
        }
        return {name: Score(value, None, count) for name, value in found.items()}
    if problem == LABELS:
        chosen, there = outputs > 0, targets > 0.5
        both, only, missed = (chosen & there).sum(0), (chosen & ~there).sum(0), (~chosen & there).sum(0)
        each = [f1(a, b, c) for a, b, c in zip(both.tolist(), only.tolist(), missed.tolist(), strict=True)]
        found = {"f1_macro": float(np.mean(each)), "f1_micro": f1(int(both.sum()), int(only.sum()), int(missed.sum()))}
        exact = mean((chosen == there).all(1).tolist())
        return {"accuracy": exact, **{name: Score(value, None, count) for name, value in found.items()}}
    matrix = confusion(outputs.argmax(1), targets, outputs.shape[1])
    right = mean((outputs.argmax(1) == targets).tolist())
    counts = (matrix.diagonal().tolist(), matrix.sum(0).tolist(), matrix.sum(1).tolist())
    each = [f1(hits, given - hits, there - hits) for hits, given, there in zip(*counts, strict=True)]
    found = {"f1_macro": float(np.mean(each)), "matthews": matthews(matrix)}
    if len(matrix) == 2:
        found["f1_binary"] = each[1]
    return {"accuracy": right, **{name: Score(value, None, count) for name, value in found.items()}}


def confusion(given: np.ndarray, there: np.ndarray, labels: int) -> np.ndarray:
    """Return how many texts of each label (row) were given each (column): int64 [C, C]."""
    return np.bincount(there * labels + given, minlength=labels * labels).reshape(labels, labels)


def f1(both: int, only_given: int, only_there: int) -> float:
    """Return the harmonic mean of precision and recall."""
    total = 2 * int(both) + int(only_given) + int(only_there)
    return 2 * int(both) / total if total else 0.0


def matthews(matrix: np.ndarray) -> float:
    """Return the correlation of labels that are there and that are given."""
    there, given, total = (axis.astype(float) for axis in (matrix.sum(1), matrix.sum(0), matrix.sum(keepdims=True)))
    count = float(total.item())
    variances = (count**2 - given @ given) * (count**2 - there @ there)
    return float((np.trace(matrix) * count - there @ given) / math.sqrt(variances)) if variances > 0 else 0.0


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return Pearson's correlation."""
    one, other = one - one.mean(dtype=np.float64), other - other.mean(dtype=np.float64)
    size = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / size if size else 0.0


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the rank of each value, of equal ones their mean: float64 [N]."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def probabilities(outputs: np.ndarray, problem: str) -> np.ndarray:
    """Return what a head's outputs say of each label, from 0 to 1: softmax of one label, the logistic of several."""
    outputs = outputs.astype(np.float64)
    if problem == LABELS:
        return 1 / (1 + np.exp(-np.clip(outputs, -700, 700)))
    shifted = np.exp(outputs - outputs.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)
