"""Line charts as inline SVG text, for a report that is one file and loads nothing.

Drawn here and not by a plotting library: the page then needs no download and no dependency, and it follows
the reader's colour scheme, because every colour is a CSS class (`line-1`, `dot-2`, `grid`) and never a value.

A chart is laid out in CSS pixels at a given width, so that letters keep their size; a page that is read on
phones asks for a second, narrower drawing. Values that are not finite leave a gap in the line and a mark on
the upper border. A long series is thinned to the lowest and highest point of each slice, which keeps every
spike visible.

Layer L0: the standard library only.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

from .page import text

Point = tuple[float, float]  # step, value; the value may be NaN or infinite
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 10, 26  # margins around the plot, pixels
MAX_POINTS = 600  # drawn per series
LARGEST = 1e100  # a value beyond is drawn like an infinite one
SMALLEST = 1e-300  # below it a division by the number of ticks, or the next lower power of ten, would be nothing


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart.

    Args:
        label: name shown when hovering.
        points: (step, value) with rising steps.
        style: number of the CSS classes `line-N` and `dot-N`.
        dots: also draw a dot at every point.
        line: join the points.
    """

    label: str
    points: Sequence[Point]
    style: int = 1
    dots: bool = False
    line: bool = True


def drawable(value: float) -> bool:
    """Check whether a value has a place on an axis."""
    return math.isfinite(value) and abs(value) < LARGEST


def short_number(value: float) -> str:
    """Write a number in at most four significant digits: "0.0021", "2.5e-05", "1,234"."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers, 1, 2 or 5 times a power of ten apart, that enclose [low, high]."""
    if high - low <= max(SMALLEST, 1e-9 * max(abs(low), abs(high))):
        high = low + (abs(low) if abs(low) > SMALLEST else 1.0)
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((power * factor for factor in (1, 2, 5) if power * factor >= rough), power * 10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten around [low, high]; only the powers over three decades."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) <= 3 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    below = [tick for tick in ticks if tick <= low]
    above = [tick for tick in ticks if tick >= high]
    return [tick for tick in ticks if below[-1] <= tick <= above[0]]


def smooth(points: Sequence[Point], window: float) -> list[Point]:
    """Return the exponential moving average over about `window` points, without the usual bias towards zero.

    Points that are not finite are left out of the average and of the result.
    """
    keep = 1 - 1 / max(window, 1.0)
    total = weight = 0.0
    result = []
    for step, value in points:
        if drawable(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
            result.append((step, total / weight))
    return result


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """Return about `limit` points: both ends, each slice's lowest and highest, all that are not finite."""
    if len(points) <= limit:
        return list(points)
    width = math.ceil(len(points) / (limit // 2))
    result: list[Point] = []
    for start in range(0, len(points), width):
        piece = points[start : start + width]
        finite = [point for point in piece if drawable(point[1])]
        chosen = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        result += sorted(chosen | {p for p in piece if not drawable(p[1])}, key=lambda p: p[0])
    return sorted({points[0], *result, points[-1]}, key=lambda point: point[0])


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    width: int = 480,
    height: int = 190,
    log: bool = False,
    across: str = "step",
    names: Mapping[float, str] | None = None,
    from_zero: bool = True,
) -> str:
    """Draw lines over training steps, or over anything else.

    Args:
        series: lines, the first one lowest; a series without points is left out.
        title: what is shown, for screen readers.
        width: of the drawing, pixels.
        height: of the drawing, pixels.
        log: use a logarithmic value axis if all values are above 1e-300 and the largest is over 30 times the
            smallest.
        across: what the numbers below are, where they are no steps.
        names: text in place of such a number.
        from_zero: let a value axis that is not logarithmic start at zero or below.

    Returns:
        One `<svg>` element, or a `<p>` that says there is nothing to draw.
    """
    series = [replace(s, points=thin(s.points)) for s in series if s.points]
    values = [value for s in series for _, value in s.points if drawable(value)]
    if not series:
        return '<p class="nothing">Nothing was recorded.</p>'
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    log = log and low > SMALLEST and high > 30 * low
    ticks = log_ticks(low, high) if log else nice_ticks(min(low, 0.0) if from_zero else low, high, 4)
    steps = [step for s in series for step, _ in s.points]
    frame = _Frame(min(steps), max(steps), ticks[0], ticks[-1], width, height, log)
    parts = [_axes(frame, ticks, names), *(_line(frame, s) for s in series), _gaps(frame, series)]
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{height - BOTTOM}" visibility="hidden"/>')
    hover = escape(json.dumps(_hover(frame, series, across, names or {})), quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{text(title)}" data-points="{hover}">{"".join(parts)}</svg>'
    )


@dataclass(frozen=True, slots=True)
class _Frame:
    """The plot's range in steps and values, and the drawing's size in pixels."""

    first: float
    last: float
    low: float
    high: float
    width: int
    height: int
    log: bool

    def x(self, step: float) -> float:
        share = 0.5 if self.last == self.first else (step - self.first) / (self.last - self.first)
        return round(LEFT + share * (self.width - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        share = (value - low) / (high - low)
        return round(self.height - BOTTOM - share * (self.height - TOP - BOTTOM), 1)


def _axes(frame: _Frame, ticks: list[float], names: Mapping[float, str] | None) -> str:
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{frame.width - RIGHT}" y1="{y}" y2="{y}"/>')
        label = short_number(tick)
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{label}</text>')
    if frame.log:
        place = f'x="{frame.width - RIGHT}" y="{TOP + 14}"'
        parts.append(f'<text class="tick" {place} text-anchor="end">logarithmic</text>')
    steps = [s for s in nice_ticks(frame.first, frame.last, frame.width // 70) if s == int(s)]
    shown = names or {s: f"{s:,.0f}" for s in steps if frame.first <= s <= frame.last}
    for step, label in sorted((shown or {frame.first: f"{frame.first:,.0f}"}).items()):
        x = min(frame.x(step), frame.width - 3.5 * len(label))  # a long last number stays inside
        parts.append(f'<text class="tick" x="{x}" y="{frame.height - 8}" text-anchor="middle">{text(label)}</text>')
    return "".join(parts)


def _line(frame: _Frame, series: Series) -> str:
    """Draw one series; a run of finite points is one stroke, a lone point a dot."""
    runs: list[list[Point]] = [[]]
    for point in series.points:
        if drawable(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    parts = []
    for run in runs:
        if len(run) > 1 and series.line:
            path = " ".join(f"{frame.x(step)},{frame.y(value)}" for step, value in run)
            parts.append(f'<polyline class="line-{series.style}" points="{path}"/>')
        for step, value in run if series.dots or len(run) == 1 else []:
            place = f'cx="{frame.x(step)}" cy="{frame.y(value)}"'
            parts.append(f'<circle class="dot-{series.style}" {place} r="3.5"/>')
    return "".join(parts)


def _gaps(frame: _Frame, series: Sequence[Series]) -> str:
    """Mark the steps whose value is NaN or infinite with a small triangle on the upper border."""
    steps = sorted({step for s in series for step, value in s.points if not drawable(value)})
    marks = [f"M{frame.x(s) - 4},{TOP - 6}h8l-4,7z" for s in steps[:MAX_POINTS]]
    return f'<path class="gap" d="{"".join(marks)}"/>' if marks else ""


def _hover(frame: _Frame, series: Sequence[Series], across: str, names: Mapping[float, str]) -> list[list]:
    """Return [pixel, text] per step, for the page's script."""
    texts: dict[float, list[str]] = {}
    for s in series:
        for step, value in s.points:
            texts.setdefault(step, []).append(f"{s.label} {short_number(value)}")
    places = {step: f"{across} {names.get(step, f'{step:,.0f}')}: " for step in sorted(texts)}
    return [[frame.x(step), place + ", ".join(texts[step])] for step, place in places.items()]
