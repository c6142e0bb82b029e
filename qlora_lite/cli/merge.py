"""``qlora-lite merge``: merge a run's adapter into its base model, and measure the difference."""

from pathlib import Path

import click

from qlora_lite.units import format_bytes, format_seconds

from .options import of_a_run
from .output import echo, echo_agreement, prepare


@click.command()
@click.argument("run")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; must be new or empty.")
@click.option(
    "--base",
    type=click.Choice(["nf4", "fp4", "original"]),
    help="Merge into the run's 4-bit weights (default), or into the original ones.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bf16", "f16", "f32"]),
    default="auto",
    show_default=True,
    help="auto is f16, or bf16 where that does not hold the weights or what the model computes.",
)
@click.option("--quantize", "quantize_to", type=click.Choice(["nf4", "fp4"]), help="Write a 4-bit checkpoint.")
@click.option(
    "--rows",
    type=click.IntRange(min=0),
    default=32,
    show_default=True,
    help="Held-out examples to measure on; 0 measures nothing (not with --quantize).",
)
@of_a_run
def merge(
    run: str,
    out: Path,
    base: str | None,
    dtype: str,
    quantize_to: str | None,
    rows: int,
    model_path: str | None,
    unfinished: bool,
) -> None:
    """Write the base model with RUN's adapter merged into it as an ordinary transformers checkpoint.

    RUN is a run folder, or an adapter folder in the PEFT format (with --rows 0).
    """
    prepare()
    from qlora_lite.export.merge import REPORT, MergeSettings, merge_run

    report = merge_run(run, out, MergeSettings(base, dtype, quantize_to, rows), model_path, unfinished)
    cost = f"{format_seconds(report['seconds'])}, {format_bytes(report['peak_bytes_above_start'])} of memory"
    echo(f"wrote {out}: {report['layers']} layers merged into the {report['merged_into']} weights; {cost}")
    echo_agreement(report)
    for note in report["notes"]:
        echo(f"note: {note}")
    echo(f"{'report':24}{out / REPORT}")
