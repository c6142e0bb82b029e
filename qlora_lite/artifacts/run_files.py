"""Read what a run left in its folder, as far as it is there.

A run may have been killed while it wrote, so nothing is taken for granted: a missing file, a last line that
is cut short or a figure of the wrong type is noted or left out, never an error. The strict reader of recipes
is not used, because a report must also be possible for a recipe of another version.

Layer L0: the standard library only.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS_DIGEST = "metrics_sha256"  # of the file's bytes, in the summary of a run that ended and in a checkpoint
HELD_OUT_DIGEST = "held_out_sha256"  # in the summary's data, of the rows that data.eval_share held out
DAMAGE = "damage.json"  # what four bits cost, where `qlora-lite damage` was asked for the run
PICTURES = "pictures.json"  # what a report shows of held-out pictures, where rows are such
SAMPLES = "samples"  # folder of pictures that a denoiser drew before and after training
SAMPLES_INDEX = "samples.json"  # of that folder: prompts, and the pictures as data URIs
# Of figures in metrics.jsonl and summary.json.
FORMER_NAMES = {
    "labelled_tokens": "target_tokens",
    "eval_labelled_tokens": "eval_target_tokens",
    "learned_tokens": "target_tokens",
}
RECIPE, METRICS, SUMMARY = "recipe.yaml", "metrics.jsonl", "summary.json"


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What was found in a run folder; `problems` says what could not be read."""

    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    recipe: str
    problems: list[str]
    damage: dict[str, Any]


def read_run(run_dir: Path) -> RunFiles:
    """Read the files of a run, as far as they are there."""
    problems: list[str] = []
    summary = _json_object(_read(run_dir / SUMMARY, []))  # whatever is wrong, one line says it below
    if summary is None:
        summary = {}
        problems.append("There is no complete summary.json; the figures come from metrics.jsonl alone.")
    text = _read(run_dir / METRICS, problems)
    digest = summary.get(METRICS_DIGEST)
    if text and isinstance(digest, str) and hashlib.sha256((run_dir / METRICS).read_bytes()).hexdigest() != digest:
        problems.append("metrics.jsonl is damaged: it is not what the run wrote (its SHA-256 differs).")
    lines = [line for line in text.split("\n") if line.strip()]
    metrics = [row for row in map(_json_object, lines) if row and _is_step(row.get("step"))]
    if len(metrics) < len(lines):
        problems.append(f"{len(lines) - len(metrics)} of {len(lines)} lines of metrics.jsonl could not be read.")
    return RunFiles(summary, metrics, _read(run_dir / RECIPE, problems), problems, read_object(run_dir / DAMAGE))


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; an empty one where there is none that can be read."""
    return _json_object(_read(path, [])) or {}


def _read(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        problems.append(f"{path.name} is missing.")
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}.")
    return ""


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return with_present_names(value) if isinstance(value, dict) else None


def with_present_names(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures of a run under the names that they have now."""
    return {
        FORMER_NAMES.get(name, name): with_present_names(value) if isinstance(value, dict) else value
        for name, value in figures.items()
    }


def number(value: object) -> float | None:
    """Return a JSON number as a float (infinite where it is too large for one), anything else as None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if isinstance(value, float) or abs(value) < 10**300 else math.inf


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**12


def curve(run: RunFiles, key: str) -> list[tuple[int, float]]:
    """Return (step, value) of every line with `key`; null is NaN, and of a repeated step the last counts."""
    values = {}
    for row in run.metrics:
        if key in row:
            value = number(row[key])
            values[row["step"]] = math.nan if value is None else value
    return sorted(values.items())


def figures_of_metrics(run: RunFiles) -> dict[str, Any]:
    """Return the figures that can be had without a summary."""
    found: dict[str, Any] = {}
    steps = [step for step, _ in curve(run, "loss")]
    if steps:
        found["steps"] = steps[-1]
    peaks = [value for _, value in curve(run, "peak_bytes") if math.isfinite(value)]
    if peaks:
        found["peak_bytes"] = max(peaks)
    for key in ("eval_loss", "exact_match"):
        points = curve(run, key)
        if points and points[0][0] == 0:
            found[f"{key}_before"] = points[0][1]
        if points and points[-1][0] > 0:
            found[f"{key}_after"] = points[-1][1]
    return found
