"""One offline HTML page about the memory of a training step, planned or measured.

It takes a record of plain values (JSON) and not the ledger's objects, so that the page can be written from a
file later, by the planner and by the profiler alike. Module names and every other text come from outside and
are escaped. Without JavaScript the page is a static picture: the list beside the chart then shows the peak.

The record (every key but `timeline` and `peak` may be missing):
    title, subtitle: str. sentences: [str], shown as written.
    budget_bytes: int or None; memory there is.
    peak: {bytes, phase, module, breakdown: {category: bytes}}; of the tensors, as in the timeline.
    timeline: [{phase, module, bytes: {category: bytes}}], in order; thinned here to the fullest of each slice.
    constants: [{name, bytes, why}]; what the device or the process needs besides, at all times. Drawn below the
        tensors, and part of every total that is compared with the budget.
    predicted, measured: {category: bytes} or None.
    alternatives: [{change, peak_bytes, step_seconds or None, fits or None}]; peak_bytes with the constants.

Layer: as `report`; the standard library only.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qlora_lite.memory.bar import BESIDE, BESIDE_COLOURS, CATEGORIES, COLOURS, OTHER, OTHER_COLOURS, in_order
from qlora_lite.units import format_bytes, format_seconds

from .charts import nice_ticks, short_number
from .page import figure, page, section, table, text
from .stacked import LEFT, RIGHT, SCRIPT, Axes, Moment, moments_data, stacked_chart, thin
from .stacked import STYLE as TIMELINE_STYLE

BANDS = (BESIDE, *CATEGORIES, OTHER)
STYLE_OF = {name: f"band-{number}" for number, name in enumerate(BANDS)}
LOAD, END = "load", "end"  # the phases before the step, in which all that stays arrives, and after it
BUDGET_OUT_OF_SIGHT = 2.5  # a budget this many times the peak would flatten the chart: it is told, not drawn


def memory_page(record: Mapping[str, Any]) -> str:
    """Return the whole HTML document for a record as the module's text describes it."""
    title = str(record.get("title") or "Memory of a training step")
    note = "Every change of memory in one step, in order. Hover over the chart to see what is allocated, and where."
    body = [
        _head(record, title),
        _figures(record),
        _sentences(record),
        section("One training step", _timeline(record, title), note),
        section(" and ".join(_sides(record)).capitalize(), _comparison(record), "Tensors at the peak."),
        section("Other settings", _alternatives(record), "Peaks include non-tensor memory."),
        section("Non-tensor memory", _constants(record)),
    ]
    return page(f"{title} - qlora-lite", f"{''.join(body)}<style>{_style()}</style><script>{SCRIPT}</script>")


def _beside_bytes(record: Mapping[str, Any]) -> int:
    return sum(int(constant["bytes"]) for constant in record.get("constants") or [])


def _peak_bytes(record: Mapping[str, Any]) -> int:
    return int(record["peak"]["bytes"]) + _beside_bytes(record)


def _breakdown(record: Mapping[str, Any]) -> dict[str, int]:
    """Return the peak by category in order, non-tensor memory included."""
    beside = {BESIDE: _beside_bytes(record)} if _beside_bytes(record) else {}
    return beside | in_order(record["peak"].get("breakdown") or {})


def _head(record: Mapping[str, Any], title: str) -> str:
    budget, badge = record.get("budget_bytes"), ""
    if budget:
        fits = _peak_bytes(record) <= budget
        badge = f'<span class="status {"good" if fits else "bad"}">{"fits" if fits else "does not fit"}</span>'
    facts = f'<p class="facts">{text(record.get("subtitle"))}</p>' if record.get("subtitle") else ""
    return f'<div class="head"><h1>{text(title)}</h1>{badge}</div>{facts}'


def _figures(record: Mapping[str, Any]) -> str:
    peak, budget, peak_bytes = record["peak"], record.get("budget_bytes"), _peak_bytes(record)
    tensors = f"tensors {format_bytes(int(peak['bytes']))}" if _beside_bytes(record) else ""
    largest = max(_breakdown(record).items(), key=lambda item: item[1], default=("", 0))
    room = (budget or 0) - peak_bytes
    figures = [
        figure("Peak", format_bytes(peak_bytes), detail=tensors),
        figure("Where", str(peak.get("phase") or ""), detail=str(peak.get("module") or "")),
        figure("Largest part", f"{_percent(largest[1], peak_bytes)}" if largest[1] else "", detail=largest[0]),
        figure("Budget", format_bytes(budget) if budget else "", detail="" if budget else "none given"),
        figure("Left" if room >= 0 or not budget else "Too much", format_bytes(abs(room)) if budget else ""),
    ]
    return f'<div class="figures">{"".join(figures)}</div>'


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else ""


def peak_in_words(record: Mapping[str, Any]) -> str:
    """Return where the peak is and what it consists of: "Peak of 6.7 GiB in backward of block 17: ..."."""
    peak, whole = record["peak"], _peak_bytes(record)
    phase, module = peak.get("phase"), peak.get("module")
    where = (f" in {phase}" if phase else "") + (f" of {module}" if module else "")
    parts = sorted(_breakdown(record).items(), key=lambda item: -item[1])
    shares = [f"{name} {_percent(size, whole)}" for name, size in parts if size >= whole / 200]
    return f"Peak of {format_bytes(whole)}{where}" + (f": {', '.join(shares)}." if shares else ".")


def _sentences(record: Mapping[str, Any]) -> str:
    lines = [peak_in_words(record), *(record.get("sentences") or [])]
    return f'<div class="sentences">{"".join(f"<p>{text(line)}</p>" for line in lines)}</div>'


def _timeline(record: Mapping[str, Any], title: str) -> str:
    timeline = record.get("timeline") or []
    if not timeline:
        return '<p class="nothing">No timeline was recorded.</p>'
    moments, names = _moments(timeline, _beside_bytes(record))
    budget, most = record.get("budget_bytes"), max(moment.total_bytes for moment in moments)
    line = (budget, f"budget {format_bytes(budget)}") if budget and budget <= BUDGET_OUT_OF_SIGHT * most else None
    label = f"{title}: memory by category over one step"
    shown = thin(moments)
    charts = _drawings(shown, names, len(moments), label, f"peak {format_bytes(_peak_bytes(record))}", line)
    changing = _changing([moment for moment in moments if moment.phase not in (LOAD, END)], names)
    if changing:
        step = [moment for moment in shown if moment.phase not in (LOAD, END)]
        part = [replace(m, sizes=tuple(m.sizes[band] for band in changing)) for m in step]
        top = max(moment.total_bytes for moment in part)
        charts += "<h3>Only what changes during the step</h3>" + _drawings(
            part, [names[band] for band in changing], len(moments), f"{label}, changing part", format_bytes(top), None
        )
    data = moments_data(shown)
    return f'<div class="card timeline" data-moments="{data}">{_where(record)}{_legend(record, names)}{charts}</div>'


def _drawings(
    moments: Sequence[Moment], names: Sequence[str], count: int, title: str, peak: str, budget: tuple[int, str] | None
) -> str:
    """Draw a chart twice, for wide and for narrow screens."""
    top = max(*(moment.total_bytes for moment in moments), budget[0] if budget else 0, 1)
    bands = [(name, STYLE_OF[name]) for name in names]
    drawings = ""
    for style, width, height in (("wide", 1000, 400), ("narrow", 350, 300)):
        axes = _axes(top, count, width, height)
        drawing = stacked_chart(moments, bands, axes, title=title, peak=peak, budget=budget, width=width, height=height)
        drawings += f'<div class="{style}">{drawing}</div>'
    return drawings


def _changing(moments: Sequence[Moment], names: Sequence[str]) -> list[int]:
    """Return the bands that change by over half a percent of the peak; none where they are most of it anyway."""
    most = max((moment.total_bytes for moment in moments), default=0)
    spans = [[moment.sizes[band] for moment in moments] for band in range(len(names))]
    changing = [band for band, sizes in enumerate(spans) if moments and max(sizes) - min(sizes) > most / 200]
    level_bytes = sum(max(sizes, default=0) for band, sizes in enumerate(spans) if band not in changing)
    return changing if level_bytes > most / 3 else []


def _moments(timeline: Sequence[Mapping[str, Any]], beside_bytes: int) -> tuple[list[Moment], list[str]]:
    """Return every moment, and the bands that hold anything at any of them."""
    parts = [{BESIDE: beside_bytes} | in_order(point["bytes"]) for point in timeline]
    names = [name for name in BANDS if any(part.get(name) for part in parts)]
    moments = [
        Moment(index, phase, str(point["module"]), tuple(part.get(name, 0) for name in names))
        for index, (phase, point, part) in enumerate(zip(_phases(timeline), timeline, parts, strict=True))
    ]
    return moments, names


def _phases(timeline: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the phase of each moment; one between two phases belongs to the first, one after the last to the end."""
    named = [index for index, point in enumerate(timeline) if point["phase"] != LOAD]
    phase, last = LOAD, named[-1] if named else len(timeline)
    for index, point in enumerate(timeline):
        phase = str(point["phase"]) if point["phase"] != LOAD else END if index > last else phase
        yield phase


def _axes(top_bytes: int, count: int, width: int, height: int) -> Axes:
    """Return the axes' labels: sizes in one unit, and the number of the moment."""
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    unit, unit_bytes = next((pair for pair in units if top_bytes >= pair[1]), units[-1])
    sizes = nice_ticks(0.0, 1.06 * top_bytes / unit_bytes, height // 75)  # 6 %: room for the peak's text
    counts = [n for n in nice_ticks(0, count, (width - LEFT - RIGHT) // 110) if n <= count and n == int(n)]
    return Axes(
        [(size * unit_bytes, f"{short_number(size)} {unit}") for size in sizes],
        [(number, f"{number:,.0f}") for number in counts],
        "changes of memory, in order",
    )


def _where(record: Mapping[str, Any]) -> str:
    """Write the line above the chart: what is shown below it, at first the peak."""
    peak = record["peak"]
    place = " · ".join(str(peak[key]) for key in ("phase", "module") if peak.get(key))
    return f'<p class="where"><b>{format_bytes(_peak_bytes(record))}</b> <span>at the peak · {text(place)}</span></p>'


def _legend(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """List the bands with their bytes at the peak; the script writes other moments into it."""
    sizes, whole = _breakdown(record), _peak_bytes(record)
    rows = ""
    for name in names:
        size = sizes.get(name, 0)
        key = f'<i class="{STYLE_OF[name]}"></i><span>{text(name)}</span>'
        rows += f"<div>{key}<b>{format_bytes(size)}</b><em>{_percent(size, whole)}</em></div>"
    return f'<div class="bands">{rows}</div>'


def _sides(record: Mapping[str, Any]) -> dict[str, Mapping[str, int]]:
    return {key: record[key] for key in ("predicted", "measured") if record.get(key)}


def _comparison(record: Mapping[str, Any]) -> str:
    """Write predicted and measured per category, their difference where both are given."""
    given = _sides(record)
    if not given:
        return ""
    columns = {key: in_order(sizes) for key, sizes in given.items()}
    names = [name for name in BANDS if any(name in column for column in columns.values())]
    sums = {key: sum(column.values()) for key, column in columns.items()}
    rows = [_compared(name, [column.get(name, 0) for column in columns.values()]) for name in names]
    rows.append(_compared("total", list(sums.values())))
    head = ["category", *given, *(["difference", "of measured"] if len(given) == 2 else [])]
    return f'<div class="numbers">{table(head, rows, numeric=1, totals=1)}</div>'


def _compared(name: str, sizes: Sequence[int]) -> list[str]:
    cells = [name, *map(format_bytes, sizes)]
    if len(sizes) == 2:
        off = sizes[0] - sizes[1]
        share = f"{100 * off / sizes[1]:+.1f} %" if off and sizes[1] else ""
        cells += [_signed(off), share]
    return cells


def _signed(size: int) -> str:
    """Write a difference with its sign."""
    return ("+" if size > 0 else "") + format_bytes(size)


def _alternatives(record: Mapping[str, Any]) -> str:
    now, verdicts = _peak_bytes(record), {True: "fits", False: "does not fit", None: ""}
    rows = []
    for other in record.get("alternatives") or []:
        size, seconds = int(other["peak_bytes"]), other.get("step_seconds")
        time = format_seconds(seconds) if seconds is not None else ""
        rows.append([other["change"], format_bytes(size), _signed(size - now), time, verdicts[other.get("fits")]])
    head = ["change", "peak", "difference", "step", "budget"]
    return f'<div class="numbers">{table(head, rows, numeric=1)}</div>' if rows else ""


def _constants(record: Mapping[str, Any]) -> str:
    rows = [[c["name"], format_bytes(int(c["bytes"])), c.get("why")] for c in record.get("constants") or []]
    if not rows:
        return ""
    rows.append(["total", format_bytes(_beside_bytes(record)), ""])
    return table(["what", "size", "why"], rows, numeric=1, totals=1)


def _style() -> str:
    """Return the colours of the bands, of letters upon them, and the rest of this page's style sheet."""
    colours = dict(zip(BANDS, [BESIDE_COLOURS, *COLOURS.values(), OTHER_COLOURS], strict=True))
    schemes = ["", ""]
    rules = ""
    for name, pair in colours.items():
        style = STYLE_OF[name]
        for paper, colour in enumerate(pair):
            letters = "#fff" if _is_dark(colour) else "#10151b"
            schemes[paper] += f"--{style}: {colour}; --on-{style}: {letters}; "
        rules += f".{style} {{ fill: var(--{style}); background: var(--{style}); stroke: var(--{style}); }}\n"
        rules += f".tick.on-{style} {{ fill: var(--on-{style}); }}\n"
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {schemes[1]} }} }}"
    return f":root {{ {schemes[0]} }}\n{dark}\n{rules}{TIMELINE_STYLE}{STYLE}"


def _is_dark(colour: str) -> bool:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 140


STYLE = """
.sentences { margin-top: 20px; max-width: 72em; }
.sentences p { margin: 0 0 6px; overflow-wrap: anywhere; }
.sentences p:first-child { font-weight: 600; }
.figure .detail { overflow-wrap: anywhere; }
.numbers td:not(:first-child), .numbers th:not(:first-child) {
  text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
}
"""
