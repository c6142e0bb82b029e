"""``qlora-lite data``: what a recipe's data becomes, and what is wrong with it, before training."""

import json
import logging
import sys
from pathlib import Path

import click

from qlora_lite.errors import QloraLiteError, RecipeError
from qlora_lite.recipe.load import load_recipe

from .output import echo_exactly, echo_styled, prepare, shown

_SHOWN_LABELS = 20
_SHOWN_LETTERS = 1_000  # of an example, in a terminal
_BAR_CELLS = 40
_LEARNED, _SEEN = {"fg": "green", "bold": True}, {"dim": True}


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--rows", type=click.IntRange(min=0), default=3, show_default=True, help="Examples to show.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--html", type=click.Path(path_type=Path), help="Write an offline page to this file.")
def data(recipe: str, overrides: tuple[str, ...], rows: int, as_json: bool, html: Path | None) -> None:
    """Show RECIPE's data as training would see it, and fail on errors in it."""
    try:
        settings = load_recipe(recipe, overrides)
        prepare(verbose=False)
        logging.getLogger("qlora_lite.progress").setLevel(logging.INFO)
        from qlora_lite.prepare.preflight import preflight
        from qlora_lite.prepare.task import find_task

        found = preflight(settings, find_task(settings).reader(settings), rows)
    except QloraLiteError as error:
        if as_json:
            echo_exactly(json.dumps(_report_of(error)))
            raise click.exceptions.Exit(error.exit_code) from None
        raise
    if html:
        from qlora_lite.reporting.data_page import write_data_page

        write_data_page(found.report, html, settings.output.name)
    if as_json:
        echo_exactly(json.dumps(found.report))
        raise click.exceptions.Exit(0 if found.report["ok"] else 2)
    if found.report["rows_read"]:
        echo_styled(_text(shown(found.report)))
    found.raise_if_unusable()


def _report_of(error: QloraLiteError) -> dict:
    """Return the report of rows that were not read, because of an error of the recipe or the model."""
    from qlora_lite.data.readers.problems import RowProblem
    from qlora_lite.prepare.preflight import empty_report, problem_entry

    problems = [(p.where, p.message) for p in error.problems] if isinstance(error, RecipeError) else [("", str(error))]
    rule = "recipe or model"
    return empty_report([problem_entry(RowProblem(where, rule, message), True) for where, message in problems])


def _text(report: dict) -> str:
    from qlora_lite.prepare.preflight import facts_of_row, line_of_problem, what_was_read

    lines = _source_lines("source", report["sources"])
    if sample := what_was_read(report):
        lines.append(_line("checked", sample))
    lines += _count_lines(report)
    if report["packs"]:
        packed = f"{report['packs']:,} packed sequences of {report['max_tokens']:,} tokens"
        lines.append(_line("packing", f"{packed}, {report['packing_efficiency']:.1%} full"))
    if lengths := report["answer_tokens"]:
        said = ", ".join(f"{name} {mean:.1f}" for name, mean in lengths.items())
        lines.append(_line("answers", f"mean tokens: {said}"))
    if report["eval"]:
        lines += ["", *_source_lines("evaluation", report["eval"]["sources"]), *_count_lines(report["eval"])]
    lines += ["", *_label_lines(report), *_template_lines(report), "", *_histogram(report)]
    for row in report["rows"]:
        lines += ["", click.style(f"{row['where']}: {facts_of_row(row)}", bold=True), *_row(row)]
    warnings = [problem for problem in report["problems"] if problem["severity"] == "warning"]
    if warnings:
        lines += ["", *(click.style(f"warning: {line_of_problem(problem)}", fg="yellow") for problem in warnings)]
    if report["ok"]:
        verdict = f"no errors in {sample}" if sample else "no errors: this data can be trained on"
        lines += ["", click.style(verdict, fg="green")]
    return "\n".join(lines)


def _line(label: str, value: str) -> str:
    return f"{label:16} {value}"


def _source_lines(label: str, sources: list[dict]) -> list[str]:
    lines = []
    for source in sources:
        weight = "" if source["weight"] == 1 else f", weight {source['weight']:g}"
        lines.append(_line(label, f"{source['path']} ({source['format'] or 'format not recognised'}{weight})"))
        if len(sources) > 1:
            counts = f"{source['examples']:,} examples, {source['tokens']:,} tokens"
            lines.append(_line("", f"{counts}, {source['target_tokens']:,} target tokens"))
        lines += [_line("", note) for note in source["notes"]]
    return lines


def _count_lines(counts: dict) -> list[str]:
    from qlora_lite.prepare.preflight import first_places

    if not counts["rows_read"]:
        return []
    dropped = "".join(f", {count:,} dropped ({reason})" for reason, count in counts["dropped"].items())
    places = {reason: first_places(counts, reason) for reason in counts["dropped"]}
    cut = f", {counts['truncated']:,} truncated" if counts["truncated"] else ""
    cut += f", {counts['split']:,} split" if counts["split"] else ""
    share = counts["target_tokens"] / max(1, counts["tokens"])
    return [
        _line("rows", f"{counts['rows_read']:,} read, {counts['rows_kept']:,} kept{dropped}{cut}"),
        *(_line("dropped", f"{reason}: {where}") for reason, where in places.items() if where),
        *(
            [_line("tokens", f"{counts['tokens']:,}, of which {counts['target_tokens']:,} are targets ({share:.1%})")]
            if counts["tokens"]
            else []
        ),
    ]


def _label_lines(report: dict) -> list[str]:
    """Return how labels are spread, and what the commonest alone reaches."""
    lines, found = [], report.get("labels", {})
    for which in ("train", "eval"):
        for name, value in found.get(which, {}).items():
            if name == "counts":
                counts = [f"{label} {count:,}" for label, count in list(value.items())[:_SHOWN_LABELS]]
                shown = ", ".join(counts) + (", ..." if len(value) > len(counts) else "")
            else:
                shown = f"{value:.1%}" if name == "baseline_accuracy" else f"{value:.4g}"
            lines.append(_line(f"labels, {which}", f"{name.replace('_', ' ')}: {shown}"))
    return lines


def _template_lines(report: dict) -> list[str]:
    from qlora_lite.prepare.preflight import line_of_template

    lines = [_line("template", line_of_template(report["template"]))] if report["template"] else []
    for token in report["special_tokens"]:
        lines.append(_line("special token", f"{token['token']} {token['count']:,} times, {token['targets']:,} targets"))
    return lines


def _histogram(report: dict) -> list[str]:
    """Draw a bar for each range of lengths."""
    most = max((bar["rows"] for bar in report["lengths"]), default=0)
    lines = []
    for bar in report["lengths"]:
        cells = "█" * max(round(_BAR_CELLS * bar["rows"] / most), bar["rows"] > 0)
        label = f"{bar['from']}" if bar["from"] == bar["to"] else f"{bar['from']}-{bar['to']}"
        lines.append(f"{label + ' tokens':>20} {cells} {bar['rows']:,}")
    return lines


def _row(row: dict) -> list[str]:
    """Colour a row's text; where colours are taken away (a pipe), «...» still encloses target tokens."""
    text, was_target = "", False
    pieces = _clipped(row["pieces"]) if sys.stdout.isatty() else row["pieces"]
    for piece in [*pieces, {"text": "", "is_target": False, "special": False}]:
        mark = "" if piece["is_target"] == was_target else "«" if piece["is_target"] else "»"
        style = _LEARNED if piece["is_target"] else _SEEN
        text += mark + click.style(piece["text"], **style, reverse=piece["special"])
        was_target = piece["is_target"]
    return ["  " + line for line in text.split("\n")]


def _clipped(pieces: list[dict]) -> list[dict]:
    """Return an example's pieces without the middle of a long text."""
    over = sum(len(piece["text"]) for piece in pieces) - _SHOWN_LETTERS
    if over <= 0:
        return pieces
    gap = f" [... {over:,} letters, shown in a pipe and with --html FILE ...] "
    found, cut, end = [], _SHOWN_LETTERS // 2, 0
    for piece in pieces:
        text, begin = piece["text"], end
        end += len(text)
        middle = [{"text": gap, "is_target": False, "special": False}] if begin <= cut < end else []
        kept = text[: max(0, cut - begin)], text[max(0, cut + over - begin) :]
        found += [piece | {"text": kept[0]}, *middle, piece | {"text": kept[1]}]
    return [piece for piece in found if piece["text"]]
