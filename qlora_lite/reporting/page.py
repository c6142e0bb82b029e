"""The HTML around a report's content: escaping, tables, the style sheet and the small hover script.

Plain string functions and not a template engine: the page has six kinds of element, and every text that comes
from a run passes through `text()`. The page's own policy (`default-src 'none'`) forbids the browser to load
anything, so even a text that slipped through could not fetch or send.

Layer L0: the standard library and `terminal` only.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape

from qlora_lite.terminal import printable

_PICTURE = re.compile(r"data:image/(?:jpeg|png);base64,[A-Za-z0-9+/=]+")


def text(value: object) -> str:
    """Write a value as HTML text; None as nothing.

    Control characters, which HTML does not allow, and marks that turn the letters behind them are shown as escapes.
    """
    return "" if value is None else escape(printable(str(value)), quote=True)


def section(title: str, body: str, note: str = "") -> str:
    """Wrap HTML in a titled section; an empty body gives no section."""
    note = f'<p class="note">{text(note)}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>{note}{body}</section>" if body else ""


def figure(label: str, value: str, before: str = "", detail: str = "") -> str:
    """Show one headline figure, with an arrow from an earlier value where there is one."""
    arrow = f'<span class="before">{text(before)} →</span> ' if before else ""
    value = f'<div class="value">{arrow}<span>{text(value) or "—"}</span></div>'
    return (
        f'<div class="figure"><div class="label">{text(label)}</div>{value}'
        f'<div class="detail">{text(detail)}</div></div>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]], numeric: int | range, totals: int = 0) -> str:
    """Write a table.

    Args:
        head: column titles.
        rows: cells, escaped here.
        numeric: the column, or columns, to align right, counted from 0.
        totals: how many of the last rows are sums.
    """
    right = range(numeric, numeric + 1) if isinstance(numeric, int) else numeric

    def cells(row: Sequence[object], tag: str) -> str:
        style = [' class="number"' if column in right else "" for column in range(len(row))]
        return "".join(f"<{tag}{style[i]}>{text(cell)}</{tag}>" for i, cell in enumerate(row))

    first_total = len(rows) - totals
    kinds = ["" if index < first_total else ' class="total"' for index in range(len(rows))]
    body = "".join(f"<tr{kind}>{cells(row, 'td')}</tr>" for kind, row in zip(kinds, rows, strict=True))
    head_row = f"<thead><tr>{cells(head, 'th')}</tr></thead>"
    return f'<div class="scroll"><table>{head_row}<tbody>{body}</tbody></table></div>'


def pairs(title: str, entries: Iterable[tuple[str, object]]) -> str:
    """Write a small titled list of names and values."""
    rows = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in entries)
    return f'<div class="card"><h3>{text(title)}</h3><dl>{rows}</dl></div>'


def page(title: str, body: str) -> str:
    """Return the whole document."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body><main>{body}</main>\n"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


STYLE = """
:root {
  --paper: #f6f6f4; --card: #fff; --ink: #1b1f24; --soft: #646b75; --rule: #e3e4e1; --grid: #ecedea;
  --one: #2457c5; --pale: #a9bfec; --two: #b8560f; --good: #1b7a43; --warn: #8f5a00; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --card: #1b1f23; --ink: #e6e8ea; --soft: #98a1ab; --rule: #2c3238; --grid: #262b30;
  --one: #7ba6ff; --pale: #3f5a94; --two: #f0a35e; --good: #62c98c; --warn: #e3b35a; --bad: #ff8a80;
} }
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 56px; }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 40px 0 12px; }
h3 { font-size: 13px; font-weight: 600; color: var(--soft); margin: 0 0 8px; }
.head { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 14px; }
.status {
  font-size: 13px; font-weight: 600; border: 1px solid currentColor; border-radius: 99px; padding: 1px 10px;
}
.good { color: var(--good); }
.warn { color: var(--warn); }
.bad { color: var(--bad); }
.facts, .note { color: var(--soft); margin: 6px 0 0; overflow-wrap: anywhere; }
.note { margin: -8px 0 12px; font-size: 14px; }
.notice { border-left: 3px solid var(--bad); background: var(--card); padding: 10px 14px; margin: 16px 0 0; }
.figures {
  display: grid; grid-template-columns: 1.3fr 1.3fr 1fr 1fr 1fr; gap: 1px; margin-top: 24px; overflow: hidden;
  background: var(--rule); border: 1px solid var(--rule); border-radius: 8px;
}
.figure { background: var(--card); padding: 14px 16px; }
.confusion td { text-align: right; background: color-mix(in srgb, var(--pale) calc(var(--share) * 100%), transparent); }
.seen { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; font-size: 14px; }
.seen img { width: 56px; height: 56px; object-fit: contain; border-radius: 4px; vertical-align: middle; }
.seen img.large { width: 96px; height: 96px; }
.seen img.patches { image-rendering: pixelated; }
.seen figure { margin: 0; }
.seen figcaption { color: var(--soft); font-size: 12px; max-width: 9em; overflow-wrap: anywhere; }
.label, .detail, .legend { font-size: 13px; color: var(--soft); }
.value { font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
.value span { white-space: nowrap; }
.value .before { color: var(--soft); font-weight: 400; }
.card, .scroll { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; min-width: 0; }
.card { padding: 14px 16px; }
.grid2 { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25em), 1fr)); }
.wide { overflow-x: auto; }
.columns { columns: 25em; column-gap: 16px; }
.columns .card { break-inside: avoid; margin-bottom: 16px; }
.plot { position: relative; }
.chart { display: block; width: 100%; height: auto; touch-action: pan-y; }
.narrow { display: none; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0 0 6px; }
.legend i { display: inline-block; width: 18px; border-top: 3px solid; margin: 0 6px 4px 0; }
.legend .key-1 { border-color: var(--pale); }
.legend .key-2 { border-color: var(--one); }
.legend .key-3 { border-color: var(--two); }
.tick { font-size: 11.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--grid); }
.cursor { stroke: var(--soft); stroke-dasharray: 3 3; }
polyline { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.line-1 { stroke: var(--pale); stroke-width: 1.4; }
.line-2 { stroke: var(--one); stroke-width: 2; }
.line-3 { stroke: var(--two); stroke-width: 1.5; stroke-dasharray: 4 4; }
.dot-1 { fill: var(--pale); }
.dot-2 { fill: var(--one); }
.dot-3 { fill: var(--two); }
.gap { fill: var(--bad); }
.tip {
  position: absolute; top: -6px; left: 0; background: var(--ink); color: var(--paper); border-radius: 4px;
  font-size: 12px; padding: 2px 8px; pointer-events: none; white-space: nowrap;
}
.nothing { color: var(--soft); margin: 8px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 8px 16px; border-top: 1px solid var(--rule); vertical-align: top; }
th { font-size: 13px; font-weight: 600; color: var(--soft); border-top: 0; white-space: nowrap; }
td:first-child, td:last-child:not(.number) { min-width: 11em; }
.total td { font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
dl, .sample { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 3px 16px; }
dl { margin: 0; font-size: 14px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
pre {
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 260px; overflow-y: auto;
}
.sample { gap: 8px 16px; margin-bottom: 12px; }
.sample h3 { margin: 1px 0 0; }
.sample .prompt { color: var(--soft); }
@media (max-width: 960px) {
  .figures { grid-template-columns: repeat(6, 1fr); }
  .figure { grid-column: span 2; }
  .figure:nth-child(-n+2) { grid-column: span 3; }
}
@media (max-width: 640px) {
  main { padding: 20px 14px 40px; }
  .wide { display: none; }
  .narrow { display: block; }
  .figure, .figure:nth-child(n) { grid-column: span 3; padding: 10px 12px; }
  .figure:last-child { grid-column: span 6; }
  .value { font-size: 18px; }
  .sample { grid-template-columns: minmax(0, 1fr); gap: 2px; }
  .sample pre { margin-bottom: 8px; }
  th, td { padding: 7px 10px; }
}
@media print { body { background: none; } .card, .scroll { break-inside: avoid; } }
"""

# Shows the values of the step nearest to the pointer. It reads only data-points and writes only textContent.
SCRIPT = """
for (const plot of document.querySelectorAll('.plot')) for (const svg of plot.querySelectorAll('svg')) {
  const points = JSON.parse(svg.dataset.points), cursor = svg.querySelector('.cursor');
  const tip = document.createElement('div');
  tip.className = 'tip'; tip.hidden = true; plot.append(tip);
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    let best = points[0];
    for (const point of points) if (Math.abs(point[0] - x) < Math.abs(best[0] - x)) best = point;
    for (const end of ['x1', 'x2']) cursor.setAttribute(end, best[0]);
    cursor.setAttribute('visibility', 'visible');
    tip.textContent = best[1]; tip.hidden = false;
    const left = best[0] / scale - tip.offsetWidth / 2;
    tip.style.left = Math.max(0, Math.min(left, box.width - tip.offsetWidth)) + 'px';
  });
  svg.addEventListener('pointerleave', () => {
    tip.hidden = true; cursor.setAttribute('visibility', 'hidden');
  });
}
"""


def image(uri: object, style: str = "") -> str:
    """Return a picture that a run has written, as a data URI; nothing for what is none."""
    if not isinstance(uri, str) or not _PICTURE.fullmatch(uri):
        return ""
    return f'<img alt="" class="{style}" src="{uri}">'
