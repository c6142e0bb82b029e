"""``qlora-lite plan``: say what a recipe will need before anything is downloaded."""

import json
from pathlib import Path

import click

from qlora_lite.errors import QloraLiteError
from qlora_lite.files import write_text
from qlora_lite.recipe.load import load_recipe
from qlora_lite.units import format_bytes, parse_bytes

from .output import prepare


class _Size(click.ParamType):
    name = "size"

    def convert(self, value, param, ctx):
        try:
            size_bytes = value if isinstance(value, int) else parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return size_bytes or self.fail("no memory is nothing to plan for; write a size such as 8GiB", param, ctx)


@click.command()
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--vram", type=_Size(), help="Memory to plan for, such as 12GiB.")
@click.option("--card", help="Card to plan for, such as rtx-4060; see --cards.")
@click.option("--max-tokens", is_flag=True, help="Also find the longest sequence that fits.")
@click.option("--max-batch", is_flag=True, help="Also find how many packs fit at once.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page with a timeline.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--cards", is_flag=True, help="List the known cards.")
@click.option("--models", is_flag=True, help="List the models whose shapes are known without a network.")
def plan(recipe, overrides, vram, card, max_tokens, max_batch, html, as_json, cards, models) -> None:
    """Predict the memory of RECIPE and choose the fastest settings that fit.

    Without --vram and --card: for the machine at hand.
    """
    if cards or models:
        click.echo("\n".join(_known_cards() if cards else _known_models()))
        return
    if recipe is None:
        raise click.UsageError("name a recipe (or --cards, --models)")
    if vram is not None and card is not None:
        raise click.UsageError("--vram and --card exclude each other")
    settings = load_recipe(recipe, overrides, check_files=False)  # neither rows nor weights are needed
    prepare(verbose=not as_json)
    from qlora_lite import plan as planner
    from qlora_lite import plan_text

    machine = _machine(settings, vram, card)
    made = planner.plan_recipe(settings, machine, planner.budget_of(settings, machine))
    others = list(planner.alternatives(made))
    found = {}
    if max_tokens:
        found["max_tokens"] = _or_none(planner.max_tokens, made)
    if max_batch:
        found["max_batch"] = _or_none(planner.max_batch, made)
    if html is not None:
        from qlora_lite.memory_page import memory_page

        write_text(html, memory_page(plan_text.page_record(made, others, f"Memory plan of {Path(recipe).stem}")))
    if as_json:
        click.echo(json.dumps(plan_text.as_json(made, others) | found))
    else:
        _show(plan_text.describe(made, others), found, html)
    if not made.fits:
        if not as_json:
            raise planner.does_not_fit(made, others)
        raise click.exceptions.Exit(3)


def _machine(settings, vram, card):
    """Return the machine to plan for."""
    from qlora_lite.memory.cards import CARDS, find_card
    from qlora_lite.models.load import resolve_compute_dtype, resolve_device
    from qlora_lite.planning.machine import machine_of_card, this_machine

    if card is not None:
        machine = machine_of_card(find_card(card))
    elif vram is not None:
        like = min(CARDS, key=lambda known: (not known.bf16_flops_per_second, abs(known.memory_bytes - vram)))
        machine = machine_of_card(like).renamed(f"a card with {format_bytes(vram)} (speed of {like.name})", vram)
    else:
        device = resolve_device(settings.model.device)
        machine = this_machine(device, resolve_compute_dtype(settings.model.compute_dtype, device))
    return machine


def _or_none(solve, made) -> int | None:
    try:
        return solve(made)
    except QloraLiteError:
        return None


def _show(text: str, found: dict, html: Path | None) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(text)
    names = {"max_tokens": "longest sequence that fits", "max_batch": "packs that fit at once"}
    for key, value in found.items():
        console.print(f"{names[key]}, with every lever that saves memory: {value if value is not None else 'none'}")
    if html is not None:
        console.print(f"timeline: {html}")


def _known_cards() -> list[str]:
    from qlora_lite.memory.cards import CARDS

    return [f"{'card':20} {'usable':>9}  {'bf16 TFLOP/s':>12}  {'GB/s':>5}  memory as"] + [
        f"{card.name:20} {format_bytes(card.memory_bytes):>9}  "
        f"{(card.bf16_flops_per_second or 0) / 1e12 or '-':>12}  {card.bandwidth_bytes_per_second / 1e9:>5.0f}  "
        f"{card.memory_source}"
        for card in CARDS
    ]  # fmt: skip


def _known_models() -> list[str]:
    from qlora_lite.models.families import known_models

    return known_models()
