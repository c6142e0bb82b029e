"""``qlora-lite report``: write the page about a run again, from what its folder holds."""

from pathlib import Path

import click

from .output import echo


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write report.html into RUN (a run folder), also of a run that was killed or still goes on."""
    from qlora_lite.reporting.report import write_report

    echo(f"wrote {write_report(run)}")
