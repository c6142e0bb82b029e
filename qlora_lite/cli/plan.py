"""``qlora-lite plan``: predict what a recipe needs, before anything is downloaded."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import click

from qlora_lite.errors import QloraLiteError, RecipeError
from qlora_lite.files import PACKAGE_PREFIX, require_writable, write_text
from qlora_lite.memory.gpus import GPUS, LINK, LINKS, NETWORK
from qlora_lite.models.families import CONFIG_IS_ENOUGH, known_models, known_pipelines, namesake, nearest
from qlora_lite.prepare.method import find_method
from qlora_lite.prepare.task import Task, find_task
from qlora_lite.recipe.catalog import closest_recipe, find_recipe, list_recipes, recipe_for_every_gpu
from qlora_lite.recipe.load import load_recipe, recipe_of
from qlora_lite.recipe.schema import Recipe
from qlora_lite.registry import find, names
from qlora_lite.terminal import printable
from qlora_lite.units import counted, format_bytes, format_seconds, parse_bytes

from .output import echo, echo_exactly, echo_styled, importing, prepare

log = logging.getLogger("qlora_lite")


class _Size(click.ParamType):
    name = "size"

    def convert(self, value, param, ctx):
        try:
            size_bytes = value if isinstance(value, int) else parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return size_bytes or self.fail("must be more than 0; write a size such as 8GiB", param, ctx)


@click.command()
@click.argument("named", required=False, metavar="RECIPE|MODEL")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--vram", type=_Size(), help="Memory to plan for, such as 12GiB.")
@click.option(
    "--gpu",
    multiple=True,
    help="GPU to plan for, such as rtx-4060; see --gpus. Several, also unequal ones, share every step: --gpu rtx-4090 "
    "--gpu rtx-3060.",
)
@click.option("--card", multiple=True, hidden=True)  # what --gpu was called
@click.option("--max-tokens", is_flag=True, help="Also find the largest data.max_tokens that fits.")
@click.option(
    "--max-batch", is_flag=True, help="Also find the largest micro-batch that fits, of packed sequences or pictures."
)
@click.option("--max-resolution", is_flag=True, help="Also find the largest data.resolution that fits.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page with a timeline.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--gpus",
    is_flag=False,
    flag_value=0,
    type=click.IntRange(min=0),
    metavar="[N]",
    help="Plan for N such GPUs in a machine, which share every step and, if need be, the weights; without N, list all.",
)
@click.option("--link", type=click.Choice([*LINKS]), help=f"What joins the GPUs of a machine; {LINK} if not given.")
@click.option(
    "--nodes", type=click.IntRange(min=1), default=1, metavar="M", help="Plan for M machines with N GPUs each."
)
@click.option("--network", type=click.Choice([*LINKS]), help=f"What joins the machines; {NETWORK} if not given.")
@click.option("--cards", is_flag=True, hidden=True)  # what --gpus was called
@click.option("--models", is_flag=True, help="List the models that can be planned without a network.")
def plan(
    named,
    overrides,
    vram,
    gpu,
    card,
    max_tokens,
    max_batch,
    max_resolution,
    html,
    as_json,
    gpus,
    link,
    nodes,
    network,
    cards,
    models,
) -> None:
    """Predict the memory of RECIPE, or of MODEL with a recipe's defaults, and choose the fastest settings that fit.

    RECIPE is a file or a built-in recipe's name. MODEL is what model.path takes: a hub id (one of --models, or a copy
    of the same name, needs no network), a .gguf file, or a folder, where the model's config.json is enough.

    Without --vram and --gpu: for the machine at hand.
    """
    if models:
        known = [*known_models(), *known_pipelines()]
        echo_exactly(json.dumps({"models": known}) if as_json else "\n".join(known))
        return
    if gpus == 0 or cards:
        echo_exactly(json.dumps({"gpus": [asdict(gpu) for gpu in GPUS]}) if as_json else _table_of_gpus())
        return
    if named is None:
        raise click.UsageError("name a recipe or a model (or --gpus, --models)")
    _check_machine(wanted := (*gpu, *card), vram, gpus, nodes)
    world_size = _check_links(gpus or len(wanted) or 1, link, nodes, network)
    settings = _settings(named, overrides)
    _check_searches(settings, max_tokens, max_resolution)
    if html is not None:
        require_writable(html)
    from qlora_lite.prepare.early import check_layers

    check_layers(settings)
    prepare(verbose=not as_json)
    if settings.model.device == "cpu" and (vram or wanted):
        log.warning("model.device cpu: this is the plan of a GPU all the same, which a run would leave alone")
    if settings.lora.start == "eva":
        log.warning("lora.start eva: planned with equal ranks; a run finds out each layer's, and then plans with those")
    with importing():
        from qlora_lite.planning.shared_step import Cluster
        from qlora_lite.prepare import plan as planner
        from qlora_lite.prepare import ranks
        from qlora_lite.prepare.share import share_of
        from qlora_lite.reporting import plan_text

    machines = [machine_for(settings, vram, name) for name in wanted] or [machine_for(settings, vram)]
    one, inside = machines[0], world_size // nodes
    if one.device_type == "cpu" and world_size > 1:
        raise click.UsageError("--gpus and --nodes plan several GPUs: say which with --gpu, or how large with --vram")
    cluster = Cluster(inside, nodes, link or LINK if inside > 1 else None, network or NETWORK if nodes > 1 else None)
    if len({*machines}) > 1:
        if html or max_tokens or max_batch or max_resolution:
            raise click.UsageError("--html and --max-... are for GPUs that are equal")
        _plan_unequal(settings, machines, cluster, as_json)
        return
    machine = ranks.dividing(settings, cluster.part(one), world_size)
    share = share_of(settings, world_size)
    made = planner.plan_recipe(share, machine, planner.budget_of(settings, machine))
    log.info(_title(settings, machine))
    others = list(planner.alternatives(made))
    if html is not None:
        from qlora_lite.reporting.memory_page import memory_page

        write_text(html, memory_page(plan_text.page_record(made, others, _title(settings, machine))))
    if not as_json:  # before what takes longer
        _print(plan_text.describe(made, others))
    found: dict[str, object] = {}
    if world_size > 1:
        found["shared"] = ranks.shared(settings, one, made, cluster)._asdict()
    found |= _searched(planner, share, made, max_tokens, max_batch, max_resolution)
    if as_json:
        echo_exactly(json.dumps(plan_text.as_json(made, others) | found))
    else:
        _show(found, planner.MAX_PACKS, html, find_method(settings).trains_base)
    if not made.fits:
        if not as_json:
            raise planner.does_not_fit(made, others)
        raise click.exceptions.Exit(3)


def _plan_unequal(settings: Recipe, machines: Sequence, cluster, as_json: bool) -> None:
    """Print the plans of GPUs of one machine that are not all equal, each of which has its own share."""
    from qlora_lite.prepare import ranks
    from qlora_lite.prepare.plan import budget_of
    from qlora_lite.reporting import plan_text

    parts = [replace(cluster.part(machine), name=machine.name) for machine in machines]
    asked = ranks.Ranks(tuple(parts), tuple(budget_of(settings, part) for part in parts))
    log.info(_title(settings, replace(parts[0], name=", ".join(part.name for part in parts))))
    plans = ranks.plan_ranks(settings, asked)
    shared = ranks.step_of_ranks(settings, asked, plans, cluster)
    if as_json:
        echo_exactly(json.dumps(plan_text.ranks_as_json(plans) | {"shared": shared._asdict()}))
    else:
        _print(plan_text.describe_ranks(plans))
        _show({"shared": shared._asdict()}, 0, None)
    if not all(plan.fits for plan in plans):
        if not as_json:
            ranks.require_fit(plans)
        raise click.exceptions.Exit(3)


def _check_machine(wanted: Sequence[str], vram: int | None, gpus: int | None, nodes: int) -> None:
    """Check that the options name one kind of machine."""
    if len(wanted) > 1 and (nodes > 1 or gpus):
        raise click.UsageError("several --gpu are those of one machine: leave out --gpus and --nodes")
    if vram is not None and wanted:
        raise click.UsageError("--vram and --gpu exclude each other")


def _check_links(gpus: int, link: str | None, nodes: int, network: str | None) -> int:
    """Return how many GPUs there are on all machines, after a check that each link joins something."""
    if link is not None and gpus < 2:
        raise click.UsageError("--link is what joins several GPUs of a machine: say how many with --gpus N")
    if network is not None and nodes < 2:
        raise click.UsageError("--network is what joins several machines: say how many with --nodes M")
    return gpus * nodes


def _settings(named: str, overrides: Sequence[str]) -> Recipe:
    """Return a recipe's settings, or the defaults for a model; neither rows nor weights are needed.

    Raises:
        RecipeError: it is neither, or a setting is wrong.
    """
    path = Path(os.path.expanduser(named))
    if not path.exists() and (named in dict(list_recipes()) or recipe_for_every_gpu(named)):
        return load_recipe(find_recipe(named), overrides, check_files=False)
    is_gguf = path.suffix == ".gguf"
    if (path.is_file() and not is_gguf) or path.suffix in (".yaml", ".yml"):
        return load_recipe(path, overrides, check_files=False)
    if not (path.is_dir() or is_gguf or "/" in named or namesake(named)):
        near = [name for name in (closest_recipe(named), *nearest(named)) if name]
        meant = f"did you mean {', '.join(near)}?" if near else "see qlora-lite recipes list, and plan --models."
        raise RecipeError(f"no recipe or known model is called {named!r}; {meant} {CONFIG_IS_ENOUGH}")
    if kind := next((name for name in names("tasks") if find("tasks", name, Task).fits_model(str(path))), None):
        model = os.path.abspath(path) if path.is_dir() else named
        task = {"kind": kind}
        return recipe_of({"model": {"path": model}, "task": task, "data": {"train": "not-read"}}, overrides, named)
    if path.is_dir() and not (path / "config.json").is_file():
        raise RecipeError(f"{named} has no config.json; name a recipe's .yaml file, or a model's folder")
    is_local = path.is_dir() or (is_gguf and not named.startswith(PACKAGE_PREFIX))
    model = os.path.abspath(path) if is_local else named
    return recipe_of({"model": {"path": model}, "data": {"train": "not-read.jsonl"}}, overrides, named)


def _title(settings, machine) -> str:
    """Name what is planned, with the settings by which plans of one model differ most: step and adapter."""
    size = find_method(settings).size(settings)
    steps = f"train.gradient_accumulation_steps {settings.train.gradient_accumulation_steps}"
    return (
        f"Memory plan of {settings.output.name}: {settings.model.path}, {_length(settings)}, {steps}, {size}, on "
        f"{machine.name}"
    )


def _length(settings) -> str:
    count = settings.train.micro_batch_size
    if (size := find_task(settings).picture_size(settings)) is None:
        return f"data.max_tokens {settings.data.max_tokens}" + (f", train.micro_batch_size {count}" * (count > 1))
    height, width = size
    return f"{counted(count, 'picture')} of {height} x {width} pixels"


def machine_for(settings, vram=None, gpu=None):
    """Return the machine to plan for."""
    from qlora_lite.memory.gpus import find_gpu, slowest_gpu
    from qlora_lite.models.load import resolve_device
    from qlora_lite.planning.machine import machine_of_gpu, this_machine

    if gpu is not None:
        machine = machine_of_gpu(find_gpu(gpu))
    elif vram is not None:
        like = slowest_gpu(vram)
        named = f"a GPU with {format_bytes(vram)} (as fast as {like.name}, the slowest of its size)"
        machine = machine_of_gpu(like).renamed(named, vram)
    else:
        device = resolve_device(settings.model.device)
        machine = this_machine(device, find_task(settings).compute_dtype(settings, device))
    return machine


def _check_searches(settings, max_tokens: bool, max_resolution: bool) -> None:
    has_tokens = find_task(settings).has_tokens
    if max_tokens and not has_tokens:
        raise click.UsageError(
            "--max-tokens is for rows of tokens, and this recipe's are pictures; see --max-resolution"
        )
    if max_resolution and has_tokens:
        raise click.UsageError(
            "--max-resolution is for rows that are pictures, and this recipe's are of tokens; see --max-tokens"
        )


def _searched(planner, settings, made, max_tokens: bool, max_batch: bool, max_resolution: bool) -> dict[str, object]:
    """Return the largest values that fit, of those that were asked for."""
    found = _longest(planner, made) if max_tokens else {}
    if max_batch:
        found["max_batch"] = _or_none(planner.max_batch, made)
    if max_resolution:
        found["max_resolution"] = planner.largest_resolution(settings, made.machine, made.budget_bytes)
    return found


def _longest(planner, made) -> dict:
    """Return the largest data.max_tokens that fits, and what it takes of the host and of time."""
    longest = _or_none(planner.longest_pack, made)
    if longest is None:
        return {"max_tokens": None}
    tokens, candidate = longest
    found, on_cpu = candidate.prediction, made.machine.device_type == "cpu"
    host_bytes = made.machine.base_bytes + found.peak_bytes if on_cpu else found.host_bytes
    return {
        "max_tokens": tokens,
        "max_tokens_host_bytes": host_bytes,
        "max_tokens_step_seconds": candidate.step_seconds,
    }


def _or_none(solve, made):
    try:
        return solve(made)
    except QloraLiteError:
        return None


def _print(text: str) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    with console.capture() as printed:  # by itself it ends the process where nobody reads
        console.print(printable(text))
    echo_styled(printed.get(), nl=False)


def _show(found: dict, most_packs: int, html: Path | None, trains_base: bool = False) -> None:
    if shared := found.get("shared"):
        faster = f", {shared['speed_up']:.2f} times as fast as one" if shared["speed_up"] else ""
        wire = f"{format_bytes(shared['wire_bytes'])} of gradients a step over {shared['slowest_link']}"
        if shared["weight_bytes"]:
            of = "weights and their gradients" if trains_base else "weights"
            wire = f"{format_bytes(shared['weight_bytes'])} of {of} from the others, {wire}"
        nodes = f" on {shared['nodes']} machines" if shared["nodes"] > 1 else ""
        each = f"each {shared['packs']} of a step's packs" if shared["packs"] else "each its share of a step's packs"
        echo(
            f"{shared['gpus'] * shared['nodes']} GPUs{nodes}, {each}: about "
            f"{format_seconds(shared['step_seconds'])} a step{faster}; {wire}, "
            f"{format_seconds(shared['wire_seconds'])} ({shared['wire_seconds'] / shared['step_seconds']:.1%}), "
            "calculated from the link's rate"
        )
    saving = ", with all options that save memory"
    if "max_tokens" in found:
        price = ""
        if found["max_tokens"]:
            host, seconds = found["max_tokens_host_bytes"], found["max_tokens_step_seconds"]
            price = f" ({format_bytes(host)} of host memory, about {format_seconds(seconds)} a step)"
        echo(f"largest data.max_tokens that fits{saving}: {found['max_tokens'] or 'none'}{price}")
    if "max_batch" in found:
        more = " or more" if found["max_batch"] == most_packs else ""
        echo(f"largest micro-batch that fits{saving}: {found['max_batch'] or 'none'}{more}")
    if "max_resolution" in found:
        echo(f"largest data.resolution that fits: {found['max_resolution'] or 'none'}")
    if html is not None:
        echo(f"timeline: {html}")


def _table_of_gpus() -> str:
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    lines = [f"{'GPU':20} {'usable':>9}  {'TFLOP/s':>12}  {'GB/s':>5}  memory as"] + [
        f"{known.name:20} {format_bytes(known.memory_bytes):>9}  "
        f"{known.flops_per_second / 1e12:>7.1f} {short[known.trains_in]}  "
        f"{known.bandwidth_bytes_per_second / 1e9:>5.0f}  {known.memory_source}"
        for known in GPUS
    ]
    return "\n".join(lines)
