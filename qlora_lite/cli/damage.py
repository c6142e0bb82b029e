"""``qlora-lite damage``: what four bits cost on a recipe's rows, and which layers to leave in 16 bit."""

import json
from pathlib import Path

import click

from qlora_lite.artifacts.run_files import DAMAGE, RECIPE
from qlora_lite.files import require_writable
from qlora_lite.recipe.load import load_recipe
from qlora_lite.units import parse_bytes

from .output import echo, echo_exactly, prepare, step_progress


class _Size(click.ParamType):
    """A size with its unit."""

    name = "size"

    def convert(self, value, param, ctx):
        try:
            return parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--rows", type=click.IntRange(min=1), default=32, show_default=True, help="Most examples to measure on.")
@click.option(
    "--bytes",
    "most_bytes",
    type=_Size(),
    metavar="SIZE",
    help="Recommend the best set for so much more memory, such as 30MiB.",
)
@click.option(
    "--close",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="SHARE",
    help="Recommend the cheapest set that closes this share of the divergence, such as 0.5.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Page to write (.html), with the figures as .json beside it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def damage(
    recipe: str,
    overrides: tuple[str, ...],
    rows: int,
    most_bytes: int | None,
    close: float | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure what four bits cost on the evaluation examples of RECIPE, and which layers are worth 16 bit.

    Without --bytes and --close, the cheapest set of kinds of layer and blocks that closes half of the divergence from
    the 16-bit model is recommended, and the best for a tenth and a quarter of the whole base's bytes more. Each was
    measured. KEY=VALUE replaces a setting of the recipe. Of a run folder in RECIPE's place, that run's recipe is
    measured; the figures go there, and into its report.html.
    """
    if most_bytes is not None and close is not None:
        raise click.UsageError("give --bytes or --close, not both")
    run = Path(recipe) if (Path(recipe) / RECIPE).is_file() else None
    if run:
        from qlora_lite.reporting.report import require_run_folder

        require_run_folder(run)
    loaded = load_recipe(run / RECIPE if run else recipe, overrides)
    prepare(verbose=False)
    from qlora_lite.inference.damage import measure_damage, pages_of, write_damage
    from qlora_lite.reporting.damage_page import GROUPS, HEAD, row_of, set_lines
    from qlora_lite.reporting.report import write_report

    if out:
        require_writable(pages_of(out)[0])
    with step_progress("reading the model") as progress:
        result = measure_damage(loaded, rows, most_bytes, close, progress.watch)
    paths = write_damage(result, out) if out else ()
    if run:
        paths = (*paths, *write_damage(result, (run / DAMAGE).with_suffix(".html")), write_report(run))
    if as_json:
        echo_exactly(json.dumps(result))
        return
    lines = [row_of(result, model) for model in result["models"]]
    widths = [max(len(line[column]) for line in (HEAD, *lines)) for column in range(len(HEAD))]
    echo(f"{result['rows']} examples, {result['target_tokens']:,} target tokens, losses and KL in nats")
    for group, title in GROUPS.items():
        echo(f"\n{title}\n" + _line(HEAD, widths))
        for model in (model for model in result["models"] if model["group"] == group):
            echo(_line(row_of(result, model), widths))
    echo()
    for line in set_lines(result):
        echo(line)
    for path in paths:
        echo(f"wrote {path}")


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join([f"{cells[0]:{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(cells[1:], widths[1:], strict=True))])
