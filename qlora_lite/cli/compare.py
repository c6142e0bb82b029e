"""``qlora-lite compare``: several runs over one base model, measured and answered side by side."""

import json
from pathlib import Path

import click

from .options import of_a_run
from .output import echo, echo_exactly, one_line, prepare, step_progress

_WIDTHS = 8, 16, 10, 12, 16, 12


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--base", is_flag=True, help="Measure the bare base model too.")
@click.option("--rows", type=click.IntRange(min=0), help="Examples to answer; default as in the first run's recipe.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for compare.html and .json.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@of_a_run
def compare(runs: tuple[str, ...], base: bool, rows: int | None, out: Path | None, as_json: bool,
            model_path: str | None, unfinished: bool) -> None:  # fmt: skip
    """Measure RUNs on the evaluation examples of the first one, with one base model in memory.

    The others may also be adapter folders in the PEFT format.
    """
    prepare(verbose=False)
    from qlora_lite.inference.compare import PAGE, compare_runs, write_comparison
    from qlora_lite.reporting.compare_page import FIGURES, NOT_THE_SAME, figures_of

    with step_progress("loading") as progress:
        result = compare_runs(runs, base, rows, model_path, unfinished, progress.watch)
    if out:
        write_comparison(result, out)
    if as_json:
        echo_exactly(json.dumps(result))
        return
    echo(f"evaluation examples of {result['rows_of']}\n")
    left = max(24, *(len(model["name"]) + 2 for model in result["models"]))
    for name, figures in (("", FIGURES), *((model["name"], figures_of(model)) for model in result["models"])):
        echo(f"{name:{left}}" + "".join(f"{figure:>{width}}" for figure, width in zip(figures, _WIDTHS, strict=True)))
    if rows is None and not result["answers"]:
        echo("note: no answers are compared, following the first run's train.metrics_examples; --rows N compares N")
    if not result["same_tokens"]:
        echo(f"note: {NOT_THE_SAME}")
    for row in result["answers"][:2]:
        echo(f"\n{'prompt':{left}}{one_line(row['question'])}\n{'reference':{left}}{one_line(row['reference'])}")
        for name, answer in row["answers"].items():
            echo(f"{name:{left}}{one_line(answer)}")
    if out:
        echo(f"\n{'page':{left}}{out / PAGE}")
