"""The page of a sweep: its points as a table, what each axis changes, and which points no other one beats.

Means are over the seeds, with the standard deviation where there are several. Layer L0: the standard library only.
"""

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

from qlora_lite.reporting.charts import Series, line_chart, short_number
from qlora_lite.reporting.page import figure, page, section, table, text
from qlora_lite.units import format_bytes, format_count, format_score, format_seconds

COSTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "peak_bytes": ("peak memory", lambda value: format_bytes(int(value))),
    "seconds": ("time", format_seconds),
    "tokens_per_second": ("tokens/s", lambda value: f"{value:,.0f}"),
    "trainable_parameters": ("trainable weights", lambda value: format_count(int(value))),
}
PRICES = "peak_bytes", "seconds", "trainable_parameters"
COMPLETE = "complete"
SHORT_LABEL = 14  # letters below an axis


def render_sweep(result: dict) -> str:
    """Return the page's HTML of what ``sweep.json`` holds."""
    done = ranked(result)
    head = f'<div class="head"><h1>{text(result["name"])}</h1></div>'
    seeds = f", {result['seeds']} seeds each" if result["seeds"] > 1 else ""
    facts = f"{len(done)} of {len(result['points'])} points complete{seeds}"
    return page(
        f"{result['name']} - qlora-lite",
        head
        + f'<p class="facts">{text(facts)}</p>'
        + _best(result, done)
        + section("Points", _points(result, done), "Best first; mean over the seeds, ± standard deviation.")
        + section("Points without a result", _others(result, done))
        + section(
            "What each setting changes",
            _axes(result, done),
            "The best point with each value, and the mean of all points with it.",
        )
        + section(
            "Quality and its price",
            _prices(result, done),
            "Every point; the line joins those that no other one beats in both.",
        ),
    )


def ranked(result: dict) -> list[dict]:
    """Return the complete points that have the figure of the goal, the best first."""
    key = f"{result['goal']}_after"
    found = [point for point in result["points"] if point["status"] == COMPLETE and key in point["mean"]]
    return sorted(found, key=lambda point: point["mean"][key], reverse=not is_low_good(result))


def is_low_good(result: dict) -> bool:
    """Return whether less of the goal's figure is better."""
    return result["goal"].endswith("loss")


def named(point: dict) -> str:
    """Return a point's choices on one line."""
    return ", ".join(f"{axis} {_shown(value)}" for axis, value in point["choice"].items())


def quality(result: dict, point: dict) -> str:
    """Write the figure of the goal, with its spread over the seeds."""
    key = f"{result['goal']}_after"
    spread = point["standard_deviation"].get(key)
    return format_score(result["goal"], {"value": point["mean"][key], "standard_error": spread})


def _label(result: dict) -> str:
    return "evaluation loss" if result["goal"] == "eval_loss" else result["goal"].replace("_", " ")


def _shown(value: object) -> str:
    return short_number(value) if isinstance(value, float) else str(value)


def _best(result: dict, done: Sequence[dict]) -> str:
    if not done:
        return ""
    best = done[0]
    costs = [figure(label, form(best["mean"][key])) for key, (label, form) in COSTS.items() if key in best["mean"]]
    figures = figure(_label(result), quality(result, best), detail=named(best)) + "".join(costs)
    return f'<div class="figures">{figures}</div>'


def _points(result: dict, done: Sequence[dict]) -> str:
    rows = [
        (
            *map(_shown, point["choice"].values()),
            quality(result, point),
            *(form(point["mean"][key]) if key in point["mean"] else "" for key, (_, form) in COSTS.items()),
        )
        for point in done
    ]
    head = (*result["axes"], _label(result), *(label for label, _ in COSTS.values()))
    return table(head, rows, numeric=range(len(result["axes"]), len(head))) if rows else ""


def _others(result: dict, done: Sequence[dict]) -> str:
    rows = [
        (*map(_shown, point["choice"].values()), point["status"], next(_reasons(point), ""))
        for point in result["points"]
        if point not in done
    ]
    return table((*result["axes"], "status", "reason"), rows, numeric=range(0)) if rows else ""


def _reasons(point: dict) -> Iterator[str]:
    return (run["error"] for run in point["runs"] if run.get("error"))


def _axes(result: dict, done: Sequence[dict]) -> str:
    key, best_of = f"{result['goal']}_after", min if is_low_good(result) else max
    charts = []
    for axis in result["axes"]:
        by_value: dict[str, list[float]] = {}
        for point in sorted(done, key=lambda point: _order(point["choice"][axis])):
            by_value.setdefault(_shown(point["choice"][axis]), []).append(point["mean"][key])
        if len(by_value) < 2:
            continue
        places = dict(enumerate(by_value.values()))
        series = [
            Series("mean", [(x, fmean(values)) for x, values in places.items()], 1, dots=True),
            Series("best", [(x, best_of(values)) for x, values in places.items()], 2, dots=True),
        ]
        names: dict[float, str] = {x: name[:SHORT_LABEL] for x, name in enumerate(by_value)}
        charts.append(_plot(axis, series, axis, names))
    return f'<div class="grid2">{"".join(charts)}</div>' if charts else ""


def _order(value: object) -> tuple:
    """Return what sorts numbers by size, numbers written as text too, and names as they are."""
    try:
        return 0, float(str(value)), ""
    except ValueError:
        return 1, 0.0, str(value)


def _prices(result: dict, done: Sequence[dict]) -> str:
    key, sign = f"{result['goal']}_after", 1 if is_low_good(result) else -1
    charts = []
    for cost in PRICES:
        label, form = COSTS[cost]
        points = sorted((point["mean"][cost], point["mean"][key]) for point in done if cost in point["mean"])
        if len({price for price, _ in points}) < 2:
            continue
        front: list[tuple[float, float]] = []
        for price, value in sorted(points, key=lambda point: (point[0], sign * point[1])):
            if not front or sign * value < sign * front[-1][1]:
                front.append((price, value))
        low, high = points[0][0], points[-1][0]
        names = {low: form(low), high: form(high)}
        series = [Series("point", points, 1, dots=True, line=False), Series("not beaten", front, 2, dots=True)]
        charts.append(_plot(f"{_label(result)} and {label}", series, label, names))
    return f'<div class="grid2">{"".join(charts)}</div>' if charts else ""


def _plot(title: str, series: Sequence[Series], across: str, names: dict[float, str]) -> str:
    chart = line_chart(series, title=title, across=across, names=names, from_zero=False)
    keys = "".join(f'<span><i class="key-{s.style}"></i>{text(s.label)}</span>' for s in series)
    plot = f'<div class="legend">{keys}</div><div class="plot">{chart}</div>'
    return f'<div class="card"><h3>{text(title)}</h3>{plot}</div>'
