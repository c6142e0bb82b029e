"""``qlora-lite compare``: several runs over one base model, measured and answered side by side."""

import json
from contextlib import ExitStack
from pathlib import Path

import click

from qlora_lite.files import require_writable

from .options import of_a_run, shots_option
from .output import echo, echo_exactly, one_line, prepare, step_progress


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--base", is_flag=True, help="Measure the bare base model too.")
@click.option("--rows", type=click.IntRange(min=0), help="Examples to measure; default as in the first run's recipe.")
@shots_option
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for compare.html and .json.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@of_a_run
def compare(
    runs: tuple[str, ...],
    base: bool,
    rows: int | None,
    shots: int,
    out: Path | None,
    as_json: bool,
    model_path: str | None,
    unfinished: bool,
) -> None:
    """Measure RUNs on the evaluation examples of the first one, with one base model in memory.

    The others may also be adapter folders in the PEFT format.
    """
    prepare(verbose=False)
    from qlora_lite.inference.compare import PAGE, compare_runs, write_comparison

    if out:
        require_writable(out / PAGE)
    with step_progress("loading") as progress:
        result = compare_runs(runs, base, rows, model_path, unfinished, progress.watch, shots)
    with ExitStack() as when_printed:  # a full disk must not take the figures with it, nor a reader who leaves the page
        if out:
            when_printed.callback(write_comparison, result, out)
        if as_json:
            echo_exactly(json.dumps(result))
            return
        left = echo_models(result)
        if rows is None and not result["answers"]:
            echo("note: no answers are compared, following the first run's train.metrics_examples; --rows N compares N")
        for row in result["answers"][:2]:
            echo(f"\n{'prompt':{left}}{one_line(row['question'])}\n{'reference':{left}}{one_line(row['reference'])}")
            for name, answer in row["answers"].items():
                echo(f"{name:{left}}{one_line(answer)}")
    if out:
        echo(f"\n{'page':{left}}{out / PAGE}")


def echo_models(result: dict) -> int:
    """Print the figures of a comparison, a column for each model; return the width of the first column."""
    from qlora_lite.reporting.compare_page import NOT_THE_SAME, figures_of

    echo(f"evaluation examples of {result['rows_of']}\n")
    columns = {model["name"]: figures_of(model) for model in result["models"]}
    widths = {name: 2 + max(map(len, (name, *figures.values()))) for name, figures in columns.items()}
    labels = dict.fromkeys(label for figures in columns.values() for label in figures)
    left = max(24, *(len(name) + 2 for name in columns))
    echo(f"{'':{left}}" + "".join(f"{name:>{width}}" for name, width in widths.items()))
    for label in labels:
        echo(f"{label:{left}}" + "".join(f"{columns[name][label]:>{width}}" for name, width in widths.items()))
    for name, score in result["models"][0].get("metrics", {}).items():
        if "signature" in score:
            echo(f"{name + ' signature':{left}}{score['signature']}")
    if not result["same_tokens"]:
        echo(f"note: {NOT_THE_SAME}")
    return left
