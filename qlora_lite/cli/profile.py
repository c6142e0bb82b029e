"""``qlora-lite profile``: run a few real steps and show what used the memory and the time."""

from pathlib import Path

import click

from qlora_lite.recipe.load import load_recipe
from qlora_lite.units import format_bytes, format_seconds

from .output import echo, prepare


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--steps", type=click.IntRange(min=1), default=3, show_default=True, help="Optimizer steps to run.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder; default runs/NAME-profile.")
def profile(recipe: str, overrides: tuple[str, ...], steps: int, out: Path | None) -> None:
    """Run a few steps of RECIPE under the memory ledger; write memory.html and memory.json."""
    settings = load_recipe(recipe, overrides)
    prepare()
    from qlora_lite.runs.profile import profile_recipe

    done = profile_recipe(settings, out or Path("runs") / f"{settings.output.name}-profile", steps)
    f = done.figures
    place = f"{f['peak_phase']}, {f['peak_module'] or 'the loss'}"
    predicted = format_bytes(f["predicted_peak_bytes"])
    echo(f"peak of tensors  {format_bytes(f['peak_bytes'])} in {place} (predicted {predicted})")
    for name, size in sorted(f["measured"].items(), key=lambda item: -item[1]):
        echo(f"  {name:24} {format_bytes(size):>10}   predicted {format_bytes(f['predicted'].get(name, 0)):>10}")
    total = sum(f["seconds_by_phase"].values())
    for name, seconds in f["seconds_by_phase"].items():
        echo(f"  {name:24} {format_seconds(seconds):>10}   {seconds / total:.0%} of a step")
    echo(f"page             {done.page}")
