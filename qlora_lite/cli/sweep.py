"""``qlora-lite sweep``: the runs of a recipe along axes of its settings, compared."""

from pathlib import Path

import click

from .output import echo, prepare


@click.command()
@click.argument("sweep", type=click.Path(dir_okay=False, path_type=Path), metavar="SWEEP")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the runs, sweep.json and sweep.html.  [default: sweeps/NAME of the file's NAME.yaml]",
)  # fmt: skip
def sweep(sweep: Path, out: Path | None) -> None:
    """Train every point of SWEEP, a file that names a recipe and values of its settings, and compare them.

    The same command continues where it was; what is complete is not run again (qlora-lite explain sweep).
    """
    prepare()
    from qlora_lite.recipe.sweep import load_sweep
    from qlora_lite.reporting.sweep_page import named, quality, ranked
    from qlora_lite.runs.sweep import PAGE, as_result, run_sweep

    wanted = load_sweep(sweep)
    folder = (out or Path("sweeps") / sweep.stem).absolute()
    result = as_result(wanted, run_sweep(wanted, folder, sweep.stem), sweep.stem)
    for point in ranked(result):
        echo(f"{quality(result, point):20} {named(point)}")
    for point in result["points"]:
        if point["status"] != "complete":
            echo(f"{point['status']:20} {named(point)}")
    echo(f"\npage: {folder / PAGE}")
