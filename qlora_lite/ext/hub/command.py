"""Upload a run's adapter or merged model to the hub, with a model card."""

import tempfile
from pathlib import Path

import click

from qlora_lite.cli.options import of_a_run
from qlora_lite.cli.output import echo, prepare
from qlora_lite.units import format_bytes


@click.command()
@click.argument("run")
@click.argument("repo", metavar="OWNER/NAME")
@click.option(
    "--merged",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Push the model in this folder, which qlora-lite merge wrote from RUN.",
)
@click.option(
    "--base-model",
    metavar="OWNER/NAME",
    help="Name of the base model on the hub, if the run has it from a file or folder.",
)
@click.option("--public", is_flag=True, help="Make the repository public.  [default: private]")
@click.option("--yes", is_flag=True, help="Send without asking.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent, and send nothing; needs no token.")
@of_a_run
def push(
    run: str,
    repo: str,
    merged: Path | None,
    base_model: str | None,
    public: bool,
    yes: bool,
    dry_run: bool,
    model_path: str | None,
    unfinished: bool,
) -> None:
    """Upload RUN's adapter, or its merged model, to the hub's repository OWNER/NAME, which is private unless --public.

    The adapter goes in peft's format, a model that was trained whole in transformers', with a model card of the run's
    settings and figures. All that is sent is shown first; checkpoints, logs, data and paths of this machine are never
    sent.
    """
    prepare()
    from huggingface_hub import HfApi

    from qlora_lite import __version__

    from .push import PushSettings, prepare_push, send

    settings = PushSettings(repo, merged, base_model, public)
    api = HfApi(library_name="qlora-lite", library_version=__version__)
    with tempfile.TemporaryDirectory() as scratch:
        found = prepare_push(run, settings, Path(scratch), api, model_path, unfinished, dry_run)
        _show(found)
        if dry_run:
            echo("nothing was sent (--dry-run)")
        elif yes or click.confirm(f"Send this to {repo}?"):
            echo(f"sent to {send(found, api)}")
        else:
            echo("nothing was sent")


def _show(found) -> None:
    there = found.there or ()
    echo(f"{found.card}\n{'-' * 20} above: {next(iter(found.files))}")
    echo(
        f"{'repository':14}{found.repo}, {'private' if found.private else 'PUBLIC'}, "
        f"{'new' if found.there is None else 'exists already'}"
    )
    for name in found.files:
        echo(f"{'file':14}{name}, {format_bytes(found.size_bytes(name))}{', replaced' if name in there else ''}")
    if others := sorted(set(there) - found.files.keys() - {".gitattributes"}):
        echo(f"{'unchanged':14}{', '.join(others)}")
    for note in found.notes:
        echo(f"{'note':14}{note}")
