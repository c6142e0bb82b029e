"""``qlora-lite export``: write a run in another program's format, and check it."""

from pathlib import Path

import click

from qlora_lite.registry import names
from qlora_lite.units import format_bytes

from .options import of_a_run
from .output import echo, echo_agreement, prepare


@click.command()
@click.argument("run")
@click.option("--to", "form", required=True, type=click.Choice(names("forms")))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; must be new or empty.")
@click.option(
    "--base",
    type=click.Choice(["nf4", "fp4", "original"]),
    help="gguf, ollama: merge into the run's 4-bit weights (default), or the original ones.",
)
@click.option(
    "--dtype",
    help="gguf, ollama: type of the matrices: f16 (default, or that of train.merge_aware), bf16, q8_0 or q4_0.",
)
@of_a_run
def export(
    run: str, form: str, out: Path, base: str | None, dtype: str | None, model_path: str | None, unfinished: bool
) -> None:
    """Write RUN for another program, load it back, and compare what it does with the run's adapter. kohya is for
    denoisers' LoRA weights in ComfyUI and other programs, and is not loaded back.

    RUN is a run folder, or an adapter folder in the PEFT format.
    """
    prepare()
    from qlora_lite.export.formats import REPORT, ExportSettings, export_run

    report = export_run(run, out, ExportSettings(form, base, dtype), model_path, unfinished)
    layers = f"{report['layers']} layers, " if report["layers"] else ""
    echo(f"wrote {out}: {form}, {layers}{format_bytes(report['size_bytes'])}")
    if "error" in report:
        echo(f"{'loaded back':24}changes the base model's logits as the adapter does, within {report['error']:.1e}")
    elif "share" in report:
        said = f"changes the base model's logits by {report['share']:.1%} of what the adapter changes"
        rounding = f"100% would be exact; relative rounding error of the logits {report['distance']:.1e}"
        echo(f"{'loaded back':24}{said} ({rounding})")
    elif "distance" in report:
        echo(f"{'loaded back':24}the model's logits, with a relative rounding error of {report['distance']:.1e}")
    elif "read_back" in report:
        echo(f"{'loaded back':24}the logits of the weights that were chosen, within {report['read_back']:.1e}")
    if "conversations_compared" in report:
        echo(f"{'template':24}same tokens for {report['conversations_compared']} random conversations")
    echo_agreement(report)
    for note in report.get("notes", []):
        echo(f"note: {note}")
    echo(f"{'use':24}{report['use']}")
    echo(f"{'report':24}{out / REPORT}")
