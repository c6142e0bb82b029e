"""``qlora-lite doctor``: what this machine has, and what will be slow on it and why."""

import json

import click

from .output import echo, echo_exactly, prepare


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Show versions, GPU, CUDA build and bitsandbytes backend, and what will be slow and why."""
    prepare(verbose=False)
    from qlora_lite.doctor import examine

    found = examine()
    if as_json:
        echo_exactly(json.dumps(found))
        return
    for group in ("versions", "machine"):
        echo(group)
        for name, value in found[group].items():
            echo(f"  {name.replace('_', ' '):22} {value}")
    echo("notes")
    for note in found["notes"] or ["nothing to say: this machine is fine"]:
        echo(f"  {note}")
