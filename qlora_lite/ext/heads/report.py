"""The part of a run's page that shows confusion matrices.

Everything comes from the run's summary, so that whatever is not what it should be is left out.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

from qlora_lite.reporting.page import text

NOTE = "Held-out examples or pixels by label (row), and what they were given."


def confusion(summary: Mapping[str, Any]) -> str:
    """Show the confusion matrices before and after training, cells coloured by their share of a row."""
    known = summary.get("confusion")
    labels = known.get("labels") if isinstance(known, dict) else None
    if not isinstance(known, dict) or not isinstance(labels, list) or not labels:
        return ""
    shown = [(when, matrix) for when in ("before", "after") if _is_matrix(matrix := known.get(when), len(labels))]
    return f'<div class="columns">{"".join(_matrix(when, labels, matrix) for when, matrix in shown)}</div>'


def _is_matrix(matrix: object, size: int) -> TypeGuard[list[list[int]]]:
    return (
        isinstance(matrix, list)
        and len(matrix) == size
        and all(
            isinstance(row, list) and len(row) == size and all(isinstance(count, int) for count in row)
            for row in matrix
        )
    )


def _matrix(when: str, labels: list, matrix: list[list[int]]) -> str:
    head = "".join(f"<th>{text(label)}</th>" for label in labels)
    rows = ""
    for label, row in zip(labels, matrix, strict=True):
        total = max(1, sum(row))
        cells = "".join(f'<td style="--share:{count / total:.3f}">{count:,}</td>' for count in row)
        rows += f"<tr><th>{text(label)}</th>{cells}</tr>"
    corner = '<th title="the label that a row has, and the one that it was given">is \\ given</th>'
    table = f'<table class="confusion"><thead><tr>{corner}{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="card"><h3>{text(when.capitalize())}</h3><div class="wide">{table}</div></div>'
