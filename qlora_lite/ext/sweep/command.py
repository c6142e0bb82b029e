"""Train a recipe along axes of its settings, and compare the runs."""

from pathlib import Path

import click

from qlora_lite.cli.output import echo, prepare
from qlora_lite.cli.plan import machine_for
from qlora_lite.errors import RecipeError
from qlora_lite.units import format_bytes, format_seconds


@click.command()
@click.argument("sweep", type=click.Path(dir_okay=False, path_type=Path), metavar="SWEEP")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the runs, sweep.json and sweep.html.  [default: sweeps/NAME of the file's NAME.yaml]",
)
@click.option("--plan", "only_plan", is_flag=True, help="Plan the points of a grid for this machine, and train none.")
def sweep(sweep: Path, out: Path | None, only_plan: bool) -> None:
    """Train every point of SWEEP, a file that names a recipe and values of its settings, and compare them.

    The same command continues where it was; what is complete is not run again (qlora-lite explain sweep).
    """
    prepare()
    from .axes import load_sweep
    from .page import named, quality, ranked
    from .points import DOES_NOT_FIT, FAILED, PAGE, as_result, run_sweep

    wanted = load_sweep(sweep)
    if only_plan:
        _plan(wanted)
        return
    folder = (out or Path("sweeps") / sweep.stem).absolute()
    result = as_result(wanted, run_sweep(wanted, folder, sweep.stem), sweep.stem)
    for point in ranked(result):
        echo(f"{quality(result, point):20} {named(point)}")
    for point in result["points"]:
        if point["status"] != "complete":
            echo(f"{point['status']:20} {named(point)}")
    echo(f"\npage: {folder / PAGE}")
    if {point["status"] for point in result["points"]} <= {FAILED, DOES_NOT_FIT}:
        raise click.exceptions.Exit(1)


def _plan(wanted) -> None:
    """Print the memory and the time of a step of each point."""
    from .page import named
    from .points import planned

    if wanted.search != "grid":
        raise RecipeError(f"--plan is for a grid: search {wanted.search} chooses each point by what the others found")
    seconds, repeated = 0.0, len(wanted.seeds)
    echo(f"{'peak':>10} {'step':>9}")
    for choice, plan, steps in planned(wanted, machine_for):
        does_fit = "" if plan.fits else f"  does not fit in {format_bytes(plan.budget_bytes)}"
        step = plan.chosen.step_seconds
        echo(f"{format_bytes(plan.peak_bytes):>10} {format_seconds(step):>9}  {named({'choice': choice})}{does_fit}")
        seconds += step * steps * repeated * plan.fits
    if seconds:
        echo(
            f"\nsteps of all that fit, {repeated} of each: about {format_seconds(seconds)}, without loading and "
            "evaluation"
        )
