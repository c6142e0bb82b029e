"""Markdown tables of what the measuring tools wrote: printed by each, and put into tools/results by render_results."""

from collections.abc import Mapping, Sequence

from qlora_lite.units import format_bytes

TARGET_SHARE = 0.8  # of the limit that a step's own products set
KINDS = {"block": "recomputed", "none": "kept"}
NAMES = {"smollm2-135m": "SmolLM2-135M", "gemma3-270m": "Gemma-3-270M"}


def limit_table(result: Mapping) -> list[str]:
    """Return the lines of the table of ``tools/bench/limit``, a column for each case and a row for each part."""
    cases = result["cases"]
    titles = [f"{name_of(case)}, {case['tokens']} tokens, blocks {KINDS[case['checkpointing']]}" for case in cases]
    large = result["large_product_flops_per_second"] / 1e9
    lines = [
        f"One product of two 4,096 x 4,096 matrices: {large:.0f} GFLOP/s.",
        "",
        f"| ms of a step | {' | '.join(titles)} |",
        "|---" * (len(cases) + 1) + "|",
    ]

    def add(label: str, cells: Sequence[str]) -> None:
        lines.append(f"| {label} | {' | '.join(cells)} |")

    add("**a step**", [f"**{_ms(case['step_seconds'])}**" for case in cases])
    for place in cases[0]["products"]:
        found = [case["products"][place] for case in cases]
        add(f"products alone: {place}", [f"{_ms(p['alone_seconds'])} ({_rate(p)})" for p in found])
    add("products, slower in the step than alone", [_ms(case["products_slower_seconds"]) for case in cases])
    for place in cases[0]["others_seconds"]:
        add(f"beside products: {place}", [_ms(case["others_seconds"][place]) for case in cases])
    add("Python, views, autograd", [_ms(case["rest_seconds"]) for case in cases])
    add("**share of the limit of its own products**", [f"**{case['share']:.1%}**" for case in cases])
    add("share of the limit of the products needed", [f"{case['needed_share']:.1%}" for case in cases])
    if all("compiled_share" in case for case in cases):
        steps = [f"**{_ms(case['compiled_step_seconds'])}**" for case in cases]
        add("**a step, `train.compile` and `cache_dequantized`**", steps)
        add("**share of the limit of the same products**", [f"**{case['compiled_share']:.1%}**" for case in cases])
    return lines


def limit_sentence(cases: Sequence[Mapping]) -> str:
    """Return the target for a step's share of its limit, and each model's best share, plain and compiled, beside it."""
    found = []
    for name in dict.fromkeys(map(name_of, cases)):
        own = [case for case in cases if name_of(case) == name]
        ways = [
            f"{way} {_best(own, key)}"
            for way, key in (("plain", "share"), ("compiled", "compiled_share"))
            if all(key in case for case in own)
        ]
        found.append(f"{name} {', '.join(ways)}")
    return (
        f"The target is {TARGET_SHARE:.0%} of the limit of a step's own products. Reached, by the better of blocks "
        f"recomputed and kept: {'; '.join(found)}."
    )


def _best(cases: Sequence[Mapping], key: str) -> str:
    best = max(cases, key=lambda case: case[key])
    short = TARGET_SHARE - best[key]
    missed = f"{100 * short:.1f} points short" if short > 0 else "the target is met"
    return f"{best[key]:.1%} ({KINDS[best['checkpointing']]}; {missed})"


def scaling_table(rows: Sequence[Mapping]) -> list[str]:
    """Return the lines of the table of what ``bench.scaling`` calculates."""
    lines = [
        "| recipe, GPU | GPUs | link | packs each, a step | gradients sent by each | on the wire "
        "| step | tokens/s | of so many times one GPU |",
        "|---" * 9 + "|",
    ]
    shown = set()
    for row in rows:
        key = row["recipe"], row["gpu"], row["ranks"], row["link"]
        if key in shown:  # inside a machine, whatever joins machines
            continue
        shown.add(key)
        packs = f"{row['packs_each']}" + (", weak scaling" if row["weak"] else "")
        lines.append(
            f"| `{row['recipe']}`, {row['gpu']} | {row['ranks']:,} | {row['link']} | {packs} "
            f"| {format_bytes(row['wire_bytes'])} | {_ms(row['wire_seconds'])} ms | {row['step_seconds']:.2f} s "
            f"| {row['tokens_per_second']:,.0f} | {row['of_linear']:.0%} |"
        )
    return lines


# The result's name -> what stands above its table, and the function that makes the table's lines.
TABLES = {
    "limit": (
        "A training step beside the limit that its own matrix products set: each distinct product timed alone, "
        "warm, times its count. What the rest of the step takes is told by place.",
        limit_table,
    ),
    "limit_no_amx": ("The same without the processor's matrix unit, as on one that has none:", limit_table),
}


def name_of(row: Mapping) -> str:
    """Return a model's name as it is written."""
    return NAMES.get(row["model"], row["model"])


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"


def _rate(products: Mapping) -> str:
    if not products["alone_seconds"]:
        return "none"
    return f"{products['flops'] / products['alone_seconds'] / 1e9:.0f} GFLOP/s"
