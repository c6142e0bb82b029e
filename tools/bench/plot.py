"""Draw the memory option table as one offline SVG: memory by category as stacked bars, and tokens a second beside them.

Standard library only. Colours are those of every other memory picture (``memory.bar``); memory of the host is a thin
bar below the device's, because it is another memory and not more of the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from qlora_lite.memory.bar import COLOURS, in_order
from qlora_lite.reporting.charts import nice_ticks, short_number
from qlora_lite.units import format_bytes

WIDTH, ROW, BAR, HOST = 980, 44, 18, 6  # pixels
LEFT, SPLIT, RIGHT = 264, 640, 740  # where the bars begin, the longest ends, and the speeds begin
SPEED_END = 900
HEAD, LEGEND_COLUMN, LEGEND_ROW = 74, 186, 18
STYLE = (
    "text{font:13px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#1f2328}"
    ".small{font-size:11.5px;fill:#57606a}.title{font-size:15px;font-weight:600}.grid{stroke:#d8dee4}"
    ".speed{fill:#8b929b}.missing{fill:#ad3b2e}"
)


def option_plot(result: Mapping) -> str:
    """Return the SVG of a result of ``tools/bench/memory_options``, without its table of memory options alone."""
    parts, top = [], 8
    tables = [table for table in result["tables"] if not table.get("alone")]
    for table in tables:
        drawn, height = _table(table, top, result["machine"]["gpu"] or result["machine"]["cpu"])
        parts.append(drawn)
        top += height
    shown = {name for table in tables for row in table["rows"] for name in _breakdown(row)}
    legend, height = _legend([name for name in COLOURS if name in shown], top)
    total = top + height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" width="{WIDTH}" height="{total}" '
        f'role="img" aria-label="What every memory option saves and costs"><style>{STYLE}</style>'
        f'<rect width="{WIDTH}" height="{total}" fill="#ffffff"/>{"".join(parts)}{legend}</svg>\n'
    )


def _breakdown(row: Mapping) -> dict[str, int]:
    parts = in_order(row.get("measured_breakdown") or row["predicted_breakdown"])
    return {name: size for name, size in parts.items() if name != "on disk"}


def _held(row: Mapping, place: str) -> int:
    """Return what a row holds on the device ("bytes") or the host ("host_bytes"): measured, or else predicted."""
    measured = f"measured_{place}"
    return row[measured] if measured in row else row[f"predicted_{place}"]


def _table(table: Mapping, top: int, device: str) -> tuple[str, int]:
    """Draw one model and length; return it and its height."""
    rows = table["rows"]
    most = max(_held(row, place) for row in rows for place in ("bytes", "host_bytes"))
    unit, unit_bytes = ("GiB", 2**30) if most >= 2**30 else ("MiB", 2**20)
    fastest = max((row.get("tokens_per_second", 0) for row in rows), default=0) or 1
    ticks = [tick for tick in nice_ticks(0, most / unit_bytes, 5) if tick <= most / unit_bytes]
    scale = (SPLIT - LEFT) / most
    bottom = top + HEAD + ROW * len(rows)
    parts = [
        f'<text class="title" x="12" y="{top + 20}">{escape(table["model"])}, 1 x {table["tokens"]:,} tokens, '
        f"{escape(device)}</text>",
        _small(12, top + HEAD - 14, "each row adds a memory option"),
        _small(RIGHT, top + HEAD - 14, "tokens a second"),
    ]
    for tick in ticks:
        x = round(LEFT + tick * unit_bytes * scale, 1)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{top + HEAD - 8}" y2="{bottom - 6}"/>')
        parts.append(_small(x, top + HEAD - 14, f"{short_number(tick)} {unit}" if tick else "0", "middle"))
    for number, row in enumerate(rows):
        place = top + HEAD + ROW * number
        parts += [_bar(row, "+ " if number else "", place, scale), _speed(row, place, fastest)]
    return "".join(parts), HEAD + ROW * len(rows) + 14


def _bar(row: Mapping, sign: str, top: int, scale: float) -> str:
    """Draw a row's name, its device's bar with the total, and its host's bar."""
    parts, x = [f'<text x="12" y="{top + 14}">{escape(sign + row["option"])}</text>'], float(LEFT)
    for name, size in _breakdown(row).items():
        if name != "offloaded":
            parts.append(_rect(x, top, size * scale, BAR, COLOURS[name][0], f"{name}: {format_bytes(size)}"))
            x += size * scale
    total = _held(row, "bytes")
    parts.append(_small(x + 6, top + 13, format_bytes(total)))
    host = _held(row, "host_bytes")
    if host:
        label = f"host memory: {format_bytes(host)}"
        parts.append(_rect(LEFT, top + BAR + 4, host * scale, HOST, COLOURS["offloaded"][0], label))
        parts.append(_small(LEFT + host * scale + 6, top + BAR + 11, f"{format_bytes(host)} in host memory"))
    return "".join(parts)


def _speed(row: Mapping, top: int, fastest: float) -> str:
    if "failed" in row:
        return f'<text class="small missing" x="{RIGHT}" y="{top + 13}">out of memory (bar: predicted)</text>'
    speed = row["tokens_per_second"]
    width = (SPEED_END - RIGHT) * speed / fastest
    return f'<rect class="speed" x="{RIGHT}" y="{top}" width="{width:.1f}" height="{BAR}"/>' + _small(
        RIGHT + width + 6, top + 13, short_number(round(speed, 1))
    )


def _legend(names: list[str], top: int) -> tuple[str, int]:
    """Draw the categories' colours in lines of five; return them and their height."""
    parts = []
    for number, name in enumerate(names):
        x, y = 12 + LEGEND_COLUMN * (number % 5), top + LEGEND_ROW * (number // 5)
        label = "host memory (thin bar)" if name == "offloaded" else name
        parts += [_rect(x, y, 12, 12, COLOURS[name][0], label), _small(x + 18, y + 10.5, label)]
    return "".join(parts), LEGEND_ROW * -(-len(names) // 5) + 10


def _rect(x: float, y: float, width: float, height: float, colour: str, label: str) -> str:
    place = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}"'
    return f'<rect {place} fill="{colour}"><title>{escape(label)}</title></rect>'


def _small(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text class="small" x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'
