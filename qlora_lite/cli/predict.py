"""``qlora-lite predict``: label the texts of a file with a run that has a head."""

from pathlib import Path

import click

from qlora_lite.units import counted

from .options import of_a_run
from .output import echo, prepare, step_progress


@click.command()
@click.argument("run")
@click.option(
    "--rows",
    required=True,
    metavar="FILE",
    help="Data file with the columns of the run's own rows, or a folder of pictures.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="JSONL file: place, label, probabilities (or embedding) and, where a row has one, its own label as reference.",
)
@of_a_run
def predict(run: str, rows: str, out: Path, model_path: str | None, unfinished: bool) -> None:
    """Label every row of a file.

    RUN is a run folder with a task.kind other than language-model, or its adapter folder. Of task.kind reward rows are
    chats, which get scores, of image-classification pictures, and of image-embedding pictures, which get an embedding.
    Texts longer than the run's data.max_tokens are cut; longer chats are an error.
    """
    prepare(verbose=False)
    from qlora_lite.inference.label import label_rows

    with step_progress("loading"):
        done = label_rows(run, rows, out, model_path, unfinished)
    cut = f"; cut to data.max_tokens: {done.cut:,}" if done.cut else ""
    echo(f"{counted(done.rows, 'row')} labelled in {out}{cut}")
