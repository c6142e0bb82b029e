"""The page of what four bits cost: what each kind of layer and each block gives back, and what to leave in 16 bit.

Losses and KL are in nats per target token; "closed" is the share of the 4-bit model's KL from the 16-bit one, or of its
loss beyond, that a model has not. Layer L0: the standard library only.
"""

from collections.abc import Sequence

from qlora_lite.units import format_bytes

from .charts import Series, line_chart
from .page import figure, page, section, table, text

GROUPS = {
    "type": "The whole model",
    "kind": "One kind of layer in 16 bit, the others in 4",
    "block": "One block in 16 bit, the others in 4",
}
HEAD = "", "KL to 16 bit", "closed", "loss", "closed", "more bytes", "of the 4-bit layers"


def render_damage(result: dict) -> str:
    """Return the page's HTML of what ``inference.damage.measure_damage`` returns."""
    models = {model["name"]: model for model in result["models"]}
    plain, four = models["16 bit"], models[result["quant"]]
    figures = figure("16 bit", f"{plain['loss']:.4f}", detail="answer loss, nats") + figure(
        f"4 bit ({result['quant']})", f"{four['loss']:.4f}", detail=f"{four['loss'] - plain['loss']:+.4f}"
    )
    for each in result["sets"]:
        figures += figure(each["asked"], f"{each['loss']:.4f}", detail=f"{closed(each)}, {bytes_of(result, each)}")
    facts = f"{result['rows']} rows, {result['target_tokens']:,} target tokens, computed in {result['compute_dtype']}"
    body = (
        '<div class="head"><h1>What four bits cost</h1></div>'
        f'<p class="facts">{text(result["model"])}: {text(facts)}</p>'
        f'<div class="figures">{figures}</div>'
        + section("What to leave in 16 bit", "".join(f"<pre>{text(line)}</pre>" for line in set_lines(result)))
    )
    for group, title in GROUPS.items():
        rows = [model for model in result["models"] if model["group"] == group]
        body += section(title, _picture(group, rows) + table(HEAD, [row_of(result, row) for row in rows], range(1, 7)))
    return page("What four bits cost - qlora-lite", body)


def row_of(result: dict, model: dict) -> tuple[str, ...]:
    """Return the cells of a model, as ``HEAD`` names them."""
    more = model["more_bytes"]
    return (
        model["name"],
        f"{model['kl']:.4f}",
        _share(model["closed"]),
        f"{model['loss']:.4f}",
        _share(model["loss_closed"]),
        format_bytes(more) if more else "",
        f"{more / result['packed_bytes']:.1%}" if more else "",
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def closed(each: dict) -> str:
    """Return what a set closes of the divergence, and of the loss where four bits cost some."""
    of_loss = f", {each['loss_closed']:.0%} of the loss" if each["loss_closed"] is not None else ""
    return f"{each['closed']:.0%} of the divergence closed{of_loss}"


def bytes_of(result: dict, each: dict) -> str:
    """Return the bytes that a set takes more, and of what they are which share."""
    more = each["more_bytes"]
    return (
        f"{format_bytes(more)} more, {more / result['packed_bytes']:.1%} of the layers in 4 bit, "
        f"{more / result['base_bytes']:.1%} of the whole base"
    )


def set_lines(result: dict) -> list[str]:
    """Return what is recommended, as lines of a recipe with a comment above each."""
    if not result["sets"]:
        return ["# four bits change nothing on these rows: leave model.keep_16bit empty"]
    lines = []
    for each in result["sets"]:
        lines.append(f"# {each['asked']}: KL {each['kl']:.4f}, loss {each['loss']:.4f}, {closed(each)}")
        lines.append(f"# {bytes_of(result, each)}")
        lines.append(f"model.keep_16bit: [{', '.join(map(_quoted, each['keep_16bit']))}]")
    lines.append("# without extra memory: lora.start: qera initializes LoRA so that it makes up for most of the loss")
    return lines


def _quoted(pattern: str) -> str:
    return pattern if pattern.replace("_", "").isalnum() else f'"{pattern}"'


def _picture(group: str, rows: Sequence[dict]) -> str:
    points = [(number, row["closed"]) for number, row in enumerate(rows) if row["closed"] is not None]
    if group == "type" or not points:
        return ""
    names = {float(number): row["name"] for number, row in enumerate(rows)} if group == "kind" else None
    series = [Series("share of the divergence closed", points, 2, dots=True, line=group == "block")]
    title = f"Share of the divergence that one {group} closes"
    chart = line_chart(series, title=title, width=1000, height=240, across=group, names=names)
    return f'<div class="card plot">{chart}</div>'
