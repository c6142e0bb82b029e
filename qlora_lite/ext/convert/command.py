"""Convert FILE of another trainer to a recipe."""

import shlex
from pathlib import Path

import click

from qlora_lite.cli.output import echo, echo_exactly
from qlora_lite.errors import OutputError
from qlora_lite.files import write_text

from .recipe import convert as make_recipe


@click.command()
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", help="Write the recipe to this file, which must not exist yet.  [default: standard output]")
@click.option("--partial", is_flag=True, help="Leave out settings that affect training but cannot be converted.")
def convert(file: str, overrides: tuple[str, ...], out: str | None, partial: bool) -> None:
    """Convert FILE of another trainer to a recipe.

    FILE is YAML of axolotl, LlamaFactory, torchtune, trl or unsloth, a script (.py, .sh) or notebook, or in quotes the
    command that starts a script of trl ('trl sft --lora_r 8 ...'); nothing in it is run. A line is printed for each
    setting that is not taken over as it is. KEY=VALUE gives what FILE does not say, such as data.train=rows.jsonl.
    """
    made = make_recipe(file, overrides, partial=partial)
    if out is not None and Path(out).exists():
        raise OutputError(f"{out} exists already; remove it, or name another file")
    for note in made.notes:
        echo(f"{note.kind}: {note}", err=True)
    if out is None:
        echo_exactly(made.text, nl=False)
        return
    write_text(Path(out), made.text)
    echo(f"wrote {out}; next: qlora-lite data {shlex.quote(out)}")
