"""``qlora-lite doctor``: what this machine has, and what will be slow on it and why."""

import json

import click

from .output import prepare, print_result


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Show versions, GPU, CUDA build and bitsandbytes backend, and what will be slow and why."""
    prepare(verbose=False)
    from qlora_lite.doctor import examine

    found = examine()
    print_result(json.dumps(found) if as_json else _described(found))


def _described(found: dict) -> str:
    lines = []
    for group in ("versions", "machine"):
        lines += [group, *(f"  {name.replace('_', ' '):22} {_in_words(value)}" for name, value in found[group].items())]
    notes = found["notes"] or ["none: this machine is fine"]
    return "\n".join([*lines, "notes", *(f"  {note}" for note in notes)])


def _in_words(value: str | bool | None) -> str:
    return value if isinstance(value, str) else {None: "none", True: "yes", False: "no"}[value]
