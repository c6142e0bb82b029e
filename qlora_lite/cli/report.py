"""``qlora-lite report``: write a run's report page again, from what its folder holds."""

from pathlib import Path

import click

from .output import echo


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write report.html into RUN (a run folder), also for a run that was killed or is still running."""
    from qlora_lite.reporting.report import write_report

    echo(f"wrote {write_report(run)}")
