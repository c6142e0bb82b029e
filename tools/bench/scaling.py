"""What 2 to 1,024 GPUs would do for a recipe, calculated: each one's plan, bytes of gradients, and link rates.

Nothing here was measured. ``planning.shared_step`` takes each GPU's plan and a ring's bytes over its slowest link. The
recipe's packs of a step are divided among the GPUs as long as they divide (the same step, in less time: strong
scaling); beyond, each GPU has one pack, and the step grows with them (weak scaling).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from qlora_lite.reporting.charts import Series, line_chart

RANKS = 2, 4, 8, 64, 1024
ONE_MACHINE = 8  # GPUs
WIDTH, HEIGHT, HEAD, LEGEND = 760, 300, 40, 20  # pixels
COLOURS = "#2f6fb0", "#c4662d", "#3f8f5f", "#8a5fb0", "#a03a4f", "#6b7280"
STYLE = (
    "text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#1f2328}.title{font-size:15px;"
    "font-weight:600}.grid{stroke:#d8dee4}.tick{fill:#57606a}[class^=line]{fill:none;stroke-width:2}"
    + "".join(f".line-{n}{{stroke:{c}}}.dot-{n}{{fill:{c}}}" for n, c in enumerate(COLOURS, 1))
)


class Scaled(NamedTuple):
    """GPUs of one kind, with the links inside a machine of eight and between machines."""

    recipe: str
    gpu: str
    inside: str
    between: str


CLUSTERS = (
    Scaled("llama3.1-8b", "rtx-4090", "pcie4", "ethernet-10g"),
    Scaled("llama3.1-8b", "rtx-4090", "pcie4", "ethernet-100g"),
    Scaled("llama3.1-8b", "h100", "nvlink-h100", "infiniband-400g"),
    Scaled("llama3.3-70b", "h100", "nvlink-h100", "infiniband-400g"),
)


def scaling_rows(clusters: Sequence[Scaled] = CLUSTERS, ranks: Sequence[int] = RANKS) -> list[dict]:
    """Return a row for each cluster and number of GPUs: packs, bytes, seconds and tokens a second."""
    plans: dict[tuple, object] = {}
    return [row for cluster in clusters for row in _cluster_rows(cluster, ranks, plans)]


def _cluster_rows(cluster: Scaled, ranks: Sequence[int], plans: dict) -> list[dict]:
    from qlora_lite.memory.gpus import find_gpu
    from qlora_lite.planning.machine import machine_of_gpu
    from qlora_lite.planning.shared_step import Cluster, shared_step
    from qlora_lite.prepare.plan import plan_recipe
    from qlora_lite.prepare.ranks import share_of
    from qlora_lite.recipe.catalog import recipes_folder
    from qlora_lite.recipe.load import load_recipe

    gpu = find_gpu(cluster.gpu)

    def planned(packs: int):
        if (cluster.recipe, gpu.name, packs) not in plans:
            plans[cluster.recipe, gpu.name, packs] = plan_recipe(
                share_of(recipe, whole // packs), machine_of_gpu(gpu), gpu.memory_bytes
            )
        return plans[cluster.recipe, gpu.name, packs]

    recipe = load_recipe(recipes_folder() / f"{cluster.recipe}.yaml", check_files=False)
    whole = recipe.train.micro_batch_size * recipe.train.gradient_accumulation_steps
    alone = planned(whole)
    if not alone.fits:
        raise SystemExit(f"error: {cluster.recipe} does not fit on one {gpu.name}")
    tokens = sum(alone.step.pack.lengths)
    speed = whole * tokens / alone.chosen.step_seconds
    rows = []
    for count in ranks:
        is_divided = whole % count == 0
        share = planned(whole // count if is_divided else 1)
        gpus = min(count, ONE_MACHINE)
        all_of_them = Cluster(gpus, count // gpus, cluster.inside, cluster.between if count > gpus else None)
        step, link = shared_step(alone.chosen, share.chosen, all_of_them), all_of_them.slowest
        found = count * step.packs * tokens / step.step_seconds
        rows.append(
            {
                "recipe": cluster.recipe,
                "gpu": gpu.name,
                "between": cluster.between,
                "ranks": count,
                "link": link,
                "packs_each": step.packs,
                "packs": count * step.packs,
                "weak": not is_divided,
                "wire_bytes": step.wire_bytes,
                "wire_seconds": step.wire_seconds,
                "step_seconds": step.step_seconds,
                "alone_tokens_per_second": speed,
                "tokens_per_second": found,
                "of_linear": found / (count * speed),
            }
        )
        print(f"{cluster.recipe} on {count} {gpu.name} by {link}: {found:,.0f} tokens/s", flush=True)
    return rows


def name_of(row: Mapping) -> str:
    """Return what a row's line is called."""
    return f"{row['recipe']}, {row['gpu']}, {row['between']} between machines"


def scaling_plot(rows: Sequence[Mapping]) -> str:
    """Return an SVG: tokens a second of so many GPUs as a share of as many times one GPU's."""
    counts = {count: place for place, count in enumerate(sorted({row["ranks"] for row in rows}))}
    lines = dict.fromkeys(map(name_of, rows))
    series = [
        Series(name, [(counts[row["ranks"]], row["of_linear"]) for row in rows if name_of(row) == name], style, True)
        for style, name in enumerate(lines, 1)
    ]
    title = "Calculated, not measured: tokens a second per GPU, of what one GPU alone does"
    names = {place: f"{count:,} GPUs" for count, place in counts.items()}
    chart = line_chart(series, title=title, width=WIDTH, height=HEIGHT, across="GPUs", names=names)
    chart = re.sub(' data-points="[^"]*"', f' y="{HEAD}"', chart)  # which a page's script reads
    legend = "".join(
        f'<circle class="dot-{style}" cx="66" cy="{(top := HEAD + HEIGHT + LEGEND * style) - 4}" r="4"/>'
        f'<text x="78" y="{top}">{escape(name)}</text>'
        for style, name in enumerate(lines, 1)
    )
    total = HEAD + HEIGHT + LEGEND * (len(lines) + 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" width="{WIDTH}" height="{total}" '
        f'role="img" aria-label="{title}"><style>{STYLE}</style><rect width="{WIDTH}" height="{total}" fill="#ffffff"/>'
        f'<text class="title" x="12" y="22">{title}</text>{chart}{legend}</svg>\n'
    )
