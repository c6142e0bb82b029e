"""Write the report about a recipe's data as one offline page.

It shows the dict that `preflight` makes and nothing else, so the page of a run is the page that
`qlora-lite data` would have shown. Target tokens are coloured and underlined, so that they can be seen without
colours too.

Layer L6: the standard library and the page's own HTML.
"""

from __future__ import annotations

from pathlib import Path

from qlora_lite.files import write_text
from qlora_lite.prepare.preflight import facts_of_row, first_places, line_of_problem, line_of_template, what_was_read

from .page import figure, page, section, table, text

_MAX_PROBLEMS = 200


def write_data_page(report: dict, path: Path, name: str | None = None) -> None:
    """Write the page.

    Args:
        report: see `preflight.Preflight`.
        path: file to write.
        name: of the recipe.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(path, render(report, name or "data"))


def render(report: dict, name: str) -> str:
    """Return the page's HTML."""
    body = [
        f"<style>{_STYLE}</style>",
        _head(report, name),
        _figures(report),
        section("Problems", _problems(report)),
        section("First examples", _rows(report), "As the model sees them; target tokens are coloured and underlined."),
        section("Labels", _labels(report), "Examples of each label; the commonest alone reaches the baseline."),
        section("Lengths", _histogram(report), "Number of examples by their length in tokens."),
        section("Sources", _sources(report)),
        section("Rows left out", _dropped(report)),
        section("Special tokens", _special_tokens(report)),
        section("Chat template", _template(report)),
    ]
    return page(f"{name}: data - qlora-lite", "".join(body))


def _head(report: dict, name: str) -> str:
    status, style = ("can be trained on", "good") if report["ok"] else ("cannot be trained on", "bad")
    sample = what_was_read(report)
    looked_at = f'<p class="facts">Checked: {text(sample)}.</p>' if sample else ""
    return (
        f'<div class="head"><h1>Data of {text(name)}</h1><span class="status {style}">{status}</span></div>{looked_at}'
    )


def _figures(report: dict) -> str:
    share = report["target_tokens"] / max(1, report["tokens"])
    full = report["packing_efficiency"]
    packs = (
        f"{report['packs']:,} packed sequences of {report['max_tokens']:,} tokens"
        if report.get("packs")
        else "no packing"
    )
    evaluation = report.get("eval")
    left_out, lengths = sum(report["dropped"].values()), report.get("answer_tokens") or {}
    rows = figure("Rows kept", f"{report['rows_kept']:,}", detail=f"of {report['rows_read']:,}, {left_out:,} left out")
    if report["rows_kept"] and not report["tokens"]:  # pictures
        return f'<div class="figures">{rows}{figure("Evaluation examples", _evaluated(evaluation))}</div>'
    figures = [
        rows,
        figure("Tokens", f"{report['tokens']:,}", detail=f"longest example {report.get('longest_tokens', 0):,}"),
        figure("Target tokens", f"{share:.1%}", detail=f"{report['target_tokens']:,} tokens"),
        figure("Packing efficiency", f"{full:.1%}" if full is not None else "", detail=packs),
        figure(
            "Evaluation examples",
            _evaluated(evaluation),
            detail=f"{evaluation['target_tokens']:,} target tokens" if evaluation else "",
        ),
    ]
    figures += [figure(f"Mean tokens, {name}", f"{mean:.1f}") for name, mean in lengths.items()]
    return f'<div class="figures">{"".join(figures)}</div>'


def _evaluated(evaluation: dict | None) -> str:
    return f"{evaluation['rows_kept']:,}" if evaluation else "none"


def _labels(report: dict) -> str:
    found = report.get("labels")
    if not found:
        return ""
    parts = {"training": found["train"], "evaluation": found.get("eval", {})}
    names = dict.fromkeys(name for part in parts.values() for name in part.get("counts", {}))
    rows = [[name, *(f"{part.get('counts', {}).get(name, 0):,}" for part in parts.values())] for name in names]
    others = dict.fromkeys(key for part in parts.values() for key in part if key != "counts")
    rows += [
        [key.replace("_", " "), *(f"{part[key]:.4g}" if key in part else "" for part in parts.values())]
        for key in others
    ]
    return table(["label", *parts], rows, numeric=range(1, 3), totals=len(others))


def _problems(report: dict) -> str:
    listed = report["problems"][:_MAX_PROBLEMS]
    notices = "".join(
        f'<p class="notice {problem["severity"]}"><b>{text(problem["rule"])}</b> {text(line_of_problem(problem))}</p>'
        for problem in listed
    )
    errors_shown = sum(problem["severity"] == "error" for problem in listed)
    if report["errors"] > errors_shown:
        notices += f'<p class="facts">and {report["errors"] - errors_shown:,} more errors</p>'
    return notices


def _rows(report: dict) -> str:
    return "".join(map(_row, report.get("rows", [])))


def _row(row: dict) -> str:
    pieces = "".join(_piece(piece) for piece in row["pieces"])
    facts = text(f"{row['where']} · {facts_of_row(row)}")
    return f'<div class="card row"><p class="facts">{facts}</p><pre>{pieces}</pre></div>'


def _piece(piece: dict) -> str:
    kind = "learned" if piece["is_target"] else "seen"
    return f'<span class="{kind}{" token" if piece["special"] else ""}">{text(piece["text"])}</span>'


def _histogram(report: dict) -> str:
    bars = report.get("lengths", [])
    most = max((bar["rows"] for bar in bars), default=0)
    rows = ""
    for bar in bars:
        label = f"{bar['from']:,}" if bar["from"] == bar["to"] else f"{bar['from']:,}-{bar['to']:,}"
        drawn = f'<i style="width:{100 * bar["rows"] / most:.2f}%"></i>' if bar["rows"] else ""
        rows += f"<dt>{label}</dt><dd>{drawn}<span>{bar['rows']:,}</span></dd>"
    return f'<div class="card"><dl class="bars">{rows}</dl></div>' if rows else ""


def _sources(report: dict) -> str:
    named = [("training", s) for s in report.get("sources", [])]
    named += [("evaluation", s) for s in (report.get("eval") or {}).get("sources", [])]
    rows = [
        [
            use,
            s["path"],
            s["format"] or "not recognised",
            "; ".join(s["notes"]),
            f"{s['weight']:g}",
            *(f"{s[count]:,}" for count in ("examples", "tokens", "target_tokens")),
        ]
        for use, s in named
    ]
    columns = ["used for", "path", "format", "notes", "weight", "examples", "tokens", "targets"]
    return table(columns, rows, numeric=range(4, 8)) if rows else ""


def _dropped(report: dict) -> str:
    parts = [("training", report), ("evaluation", report.get("eval") or {"dropped": {}})]
    rows = [
        [use, reason, f"{n:,}", first_places(part, reason)]
        for use, part in parts
        for reason, n in part["dropped"].items()
    ]
    for count, what in (("truncated", "kept, but truncated"), ("split", "kept, but split")):
        if cut := report.get(count):
            rows.append(["training", what, f"{cut:,}", ""])
    return table(["used for", "reason", "rows", "where"], rows, numeric=2) if rows else ""


def _special_tokens(report: dict) -> str:
    rows = [[t["token"], t["id"], f"{t['targets']:,}", f"{t['count']:,}"] for t in report.get("special_tokens", [])]
    return table(["token", "id", "targets", "count"], rows, numeric=3) if rows else ""


def _template(report: dict) -> str:
    template = report.get("template")
    if not template:
        return ""
    facts = line_of_template(template)
    return f'<div class="card"><p class="facts">{text(facts)}</p><pre>{text(template["text"])}</pre></div>'


_STYLE = """
.row { margin-bottom: 12px; }
.row pre, .card > pre { margin-top: 8px; }
.row pre { max-height: 420px; }
.card > .facts { margin: 0; font-size: 13px; }
.seen { color: var(--soft); }
.learned { color: var(--good); text-decoration: underline; text-decoration-thickness: 2px; text-underline-offset: 3px; }
.token { border: 1px solid currentColor; border-radius: 4px; padding: 0 3px; margin: 0 1px; font-size: 11.5px; }
.notice { margin: 8px 0 0; overflow-wrap: anywhere; }
.notice b { color: var(--bad); margin-right: 6px; }
.notice.warning { border-color: var(--warn); }
.notice.warning b { color: var(--warn); }
.bars { gap: 5px 14px; font-variant-numeric: tabular-nums; }
.bars dt { text-align: right; }
.bars dd { display: flex; align-items: center; gap: 8px; }
.bars i { height: 14px; background: var(--one); border-radius: 2px; min-width: 1px; flex-shrink: 1; }
.bars span { color: var(--soft); font-size: 13px; white-space: nowrap; }
"""
