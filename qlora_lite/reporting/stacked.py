"""Stacked areas as inline SVG text: how memory is made up, moment by moment, with the phases of a step marked.

Beside `charts` and not in it, because almost nothing is shared: areas instead of lines, moments in order instead
of steps, names of phases above the plot, and values that are read in a legend and not in a tip. As there, every
colour is a CSS class (`band-3`, `on-band-3` for text upon it), so the page follows the reader's colour scheme.

Each moment is drawn as a level segment, not joined by a slope to the next: memory changes in jumps. The bands
are painted from the highest sum down, each to the ground, so that no gap can show between two of them.

Units: bytes; pixels of the drawing. Layer: the standard library only.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import accumulate, groupby

LEFT, RIGHT, TOP, BOTTOM = 66, 14, 46, 44  # margins around the plot, pixels; the phases' names stand in the upper one
MAX_MOMENTS = 1500
LETTER, LINE = 7.0, 14  # width of a letter at the labels' size, and height of a line, pixels


@dataclass(frozen=True, slots=True)
class Moment:
    """What is held at one moment.

    Args:
        index: place in the step, counted from 0.
        phase: such as "backward".
        module: that ran; may be empty.
        sizes: bytes, one per band, the lowest band first.
    """

    index: int
    phase: str
    module: str
    sizes: tuple[int, ...]

    @property
    def total_bytes(self) -> int:
        """The sum over all bands."""
        return sum(self.sizes)


def thin(moments: Sequence[Moment], limit: int = MAX_MOMENTS) -> list[Moment]:
    """Return at most `limit` moments: the fullest of each slice, so that no peak is lost, at the slice's place."""
    width = max(math.ceil(len(moments) / limit), 1)
    slices = [moments[start : start + width] for start in range(0, len(moments), width)]
    return [replace(max(part, key=lambda m: m.total_bytes), index=part[0].index) for part in slices]


@dataclass(frozen=True, slots=True)
class Axes:
    """Where labels stand: (value, text) on the upright axis in bytes and on the level one in moments."""

    bytes: Sequence[tuple[float, str]]
    moments: Sequence[tuple[float, str]]
    title: str


@dataclass(frozen=True, slots=True)
class _Frame:
    """From moments and bytes to pixels."""

    first: int
    end: int
    top_bytes: float
    width: int
    height: int

    def x(self, index: float) -> float:
        share = (index - self.first) / max(self.end - self.first, 1)
        return round(LEFT + share * (self.width - LEFT - RIGHT), 1)

    def y(self, size: float) -> float:
        return round(self.height - BOTTOM - size / self.top_bytes * (self.height - TOP - BOTTOM), 1)


def stacked_chart(
    moments: Sequence[Moment],
    bands: Sequence[tuple[str, str]],
    axes: Axes,
    *,
    title: str,
    peak: str,
    budget: tuple[int, str] | None = None,
    width: int = 1000,
    height: int = 400,
) -> str:
    """Draw moments as stacked areas.

    Args:
        moments: at least one, in order, thinned.
        bands: (name, CSS class) of each, the lowest first.
        axes: labels; the last one upright is the upper border and lies at or above every total.
        title: what is shown, for screen readers.
        peak: text at the fullest moment.
        budget: bytes and text of a dashed line; None, or above the upper border, for no line.
        width: of the drawing, pixels.
        height: of the drawing, pixels.

    Returns:
        One `<svg>` element; `data-plot` tells the page's script where its plot begins and ends.
    """
    frame = _Frame(moments[0].index, _end(moments), axes.bytes[-1][0], width, height)
    edges = [frame.x(moment.index) for moment in moments] + [frame.x(frame.end)]
    sums = [[frame.y(total) for total in accumulate(moment.sizes)] for moment in moments]
    parts = [_grid(frame, axes)]
    parts += [_area(edges, [row[band] for row in sums], frame.y(0), bands[band][1]) for band in range(len(bands))[::-1]]
    parts.append(_phases(frame, edges, moments))
    parts += [_name(edges, sums, band, *bands[band], frame.y(0)) for band in range(len(bands))]
    parts.append(_marks(frame, edges, moments, peak, budget))
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{frame.y(0)}" visibility="hidden"/>')
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title, quote=True)}" data-plot="{LEFT} {width - RIGHT}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _grid(frame: _Frame, axes: Axes) -> str:
    right, ground = frame.width - RIGHT, frame.y(0)
    parts = []
    for size, label in axes.bytes:
        y = frame.y(size)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(_text(LEFT - 8, y + 4, label, "end"))
    for index, label in axes.moments:
        x, half = frame.x(index), LETTER * len(label) / 2
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{ground}" y2="{ground + 4}"/>')
        x = min(x, frame.width - half)  # a long last number stays inside
        parts.append(_text(x, ground + 17, label))
    return "".join(parts) + _text((LEFT + right) / 2, ground + 35, axes.title)


def _area(edges: Sequence[float], tops: Sequence[float], ground: float, style: str) -> str:
    """Draw the area below a stepped line; segments of one height are one stroke."""
    path, height = [f"M{edges[0]},{ground}"], ground
    for start, top in zip(edges, tops, strict=False):
        if top != height:
            path.append(f"H{start}V{top}")
            height = top
    return f'<path class="{style}" d="{"".join(path)}H{edges[-1]}V{ground}z"/>'


def _name(
    edges: Sequence[float], sums: Sequence[Sequence[float]], band: int, name: str, style: str, ground: float
) -> str:
    """Write a band's name where it is thick enough for a long enough segment; nothing where it never is."""
    width, best, place = LETTER * len(name) + 12, 15.0, None
    for start in range(0, len(sums), max(len(sums) // 60, 1)):
        stop = bisect_left(edges, edges[start] + width)
        if stop >= len(edges):
            break
        segment = sums[start:stop]
        low = min(row[band - 1] if band else ground for row in segment)
        high = max(row[band] for row in segment)
        if low - high > best + 1:
            best, place = low - high, (edges[start] + 7, (low + high) / 2 + 4)
    return _text(*place, name, "start", f"tick on-{style}") if place else ""


def _phases(frame: _Frame, edges: Sequence[float], moments: Sequence[Moment]) -> str:
    """Write each phase's name above its segment, and a line where it begins; a narrow one's name stands higher."""
    parts, start, rows = [], 0, {30: 0.0, 14: 0.0}  # height of a row of names: where its last name ended
    for phase, group in groupby(moments, key=lambda moment: moment.phase):
        stop = start + len(list(group))
        left, right, width = edges[start], edges[stop], LETTER * len(phase)
        if start:
            parts.append(f'<line class="phase" x1="{left}" x2="{left}" y1="{TOP - 10}" y2="{frame.y(0)}"/>')
        middle = min((left + right) / 2, frame.width - width / 2)
        for y, taken in rows.items():
            if middle - width / 2 > taken and (right - left > width or y == 14):
                parts.append(_text(middle, y, phase, style="tick phase-name"))
                rows[y] = middle + width / 2 + 8
                break
        start = stop
    return "".join(parts)


def _marks(
    frame: _Frame, edges: Sequence[float], moments: Sequence[Moment], peak: str, budget: tuple[int, str] | None
) -> str:
    """Draw the budget's line and the peak's dot, their texts in each other's lee."""
    fullest = max(range(len(moments)), key=lambda i: moments[i].total_bytes)
    x, y = (edges[fullest] + edges[fullest + 1]) / 2, frame.y(moments[fullest].total_bytes)
    half = LETTER * len(peak) / 2
    middle = min(max(x, LEFT + half), frame.width - RIGHT - half)
    parts, label_y, on_right = [], y - 9, x < frame.width / 2
    if budget and budget[0] <= frame.top_bytes:
        line, right = frame.y(budget[0]), frame.width - RIGHT
        place = f'x1="{LEFT}" x2="{right}" y1="{line}" y2="{line}"'
        parts.append(f'<line class="under" {place}/><line class="budget" {place}/>')
        if label_y - 12 < line < label_y + 4:
            label_y = line - 6
        x_text, anchor = (right - 4, "end") if on_right else (LEFT + 6, "start")
        room = right - middle - half if on_right else middle - half - LEFT  # beside the peak's text, if that is as high
        is_in_the_way = abs(label_y - line + 6) < LINE and room < LETTER * len(budget[1]) + 6
        y_text = min(label_y, line - 6) - LINE if is_in_the_way else line - 6
        parts.append(_text(x_text, y_text, budget[1], anchor, "tick halo"))
    parts.append(f'<circle class="peak" cx="{x:.1f}" cy="{y}" r="4"/>')
    return "".join(parts) + _text(middle, label_y, peak, style="tick halo strong")


def moments_data(moments: Sequence[Moment]) -> str:
    """Return the moments as JSON for the page's script, escaped for an attribute; names once each, sizes in KiB."""
    phases = {phase: place for place, phase in enumerate(dict.fromkeys(moment.phase for moment in moments))}
    modules = {module: place for place, module in enumerate(dict.fromkeys(moment.module for moment in moments))}
    data = {
        "edges": [moment.index - moments[0].index for moment in moments] + [_end(moments) - moments[0].index],
        "phases": list(phases),
        "modules": list(modules),
        "phase": [phases[moment.phase] for moment in moments],
        "module": [modules[moment.module] for moment in moments],
        "kib": [[round(size / 1024) for size in moment.sizes] for moment in moments],
    }
    return escape(json.dumps(data, separators=(",", ":")), quote=True)


def _end(moments: Sequence[Moment]) -> int:
    """Return where the last moment ends: as far behind its beginning as moments are apart on average."""
    first, last = moments[0].index, moments[-1].index
    return last + max((last - first) // max(len(moments) - 1, 1), 1)


STYLE = """
.phase { stroke: var(--soft); stroke-width: 0.8; opacity: 0.6; }
.phase-name { font-weight: 600; }
.under { stroke: var(--card); stroke-width: 3.5; opacity: 0.8; }
.budget { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 7 4; }
.peak { fill: var(--ink); stroke: var(--card); stroke-width: 1.5; }
.halo { fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 3.5px; stroke-linejoin: round; }
.strong { font-weight: 700; }
.timeline .cursor { stroke: var(--ink); }
.timeline h3 { margin: 18px 0 0; }
.where { margin: 0; font-size: 14px; color: var(--soft); overflow-wrap: anywhere; min-height: 1.6em; }
.where b { color: var(--ink); font-size: 17px; font-variant-numeric: tabular-nums; }
.bands {
  display: grid; gap: 4px 28px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20em), 1fr));
  margin: 8px 0 18px; font-size: 13px; font-variant-numeric: tabular-nums;
}
.bands div { display: grid; grid-template-columns: 14px 1fr 7em 3em; gap: 8px; align-items: center; }
.bands i { width: 14px; height: 14px; border-radius: 3px; }
.bands b, .bands em { text-align: right; font-style: normal; white-space: nowrap; }
.bands em { color: var(--soft); }
"""

# Writes the moment under the pointer into its `.where` and `.bands`. Reads only data attributes, writes
# only textContent.
SCRIPT = """
for (const card of document.querySelectorAll('.timeline')) {
  const data = JSON.parse(card.dataset.moments), last = data.kib.length - 1, drawings = card.querySelectorAll('svg');
  const slots = [...card.querySelectorAll('.where b, .where span, .bands b, .bands em')];
  const peak = slots.map(slot => slot.textContent);
  const write = texts => slots.forEach((slot, i) => { slot.textContent = texts[i]; });
  const size = kib => {
    let power = 0;
    while (power < 3 && kib >= 1023.95) { kib /= 1024; power += 1; }
    return kib ? kib.toFixed(1) + ' ' + ['KiB', 'MiB', 'GiB', 'TiB'][power] : '0 B';
  };
  const plots = [...drawings].map(svg => svg.dataset.plot.split(' ').map(Number));
  drawings.forEach((svg, drawing) => {
    svg.addEventListener('pointermove', event => {
      const box = svg.getBoundingClientRect(), [left, right] = plots[drawing], end = data.edges[last + 1];
      const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
      const after = data.edges.findIndex(edge => edge > (x - left) / (right - left) * end);
      const i = after < 0 ? last : Math.min(Math.max(after - 1, 0), last);
      const sum = data.kib[i].reduce((a, b) => a + b, 0);
      const place = [data.phases[data.phase[i]], data.modules[data.module[i]]].filter(name => name).join(' · ');
      write([size(sum), place, ...data.kib[i].flatMap(k => [size(k), sum ? Math.round(100 * k / sum) + ' %' : ''])]);
      drawings.forEach((other, k) => {
        const at = plots[k][0] + (data.edges[i] + data.edges[i + 1]) / 2 / end * (plots[k][1] - plots[k][0]);
        const cursor = other.querySelector('.cursor');
        for (const name of ['x1', 'x2']) cursor.setAttribute(name, at);
        cursor.setAttribute('visibility', 'visible');
      });
    });
    svg.addEventListener('pointerleave', () => {
      write(peak);
      for (const other of drawings) other.querySelector('.cursor').setAttribute('visibility', 'hidden');
    });
  });
}
"""
