"""The page of a comparison: a table of figures, and the answers to every example side by side.

Shares are from 0 to 1, losses in nats per target token. Needs the standard library only.
"""

from qlora_lite.units import format_bytes, format_score

from .page import page, section, table, text

SHOWN_ANSWERS = 8  # on the page; the JSON file has all
NOT_THE_SAME = "The models were measured on different examples or tokens; their losses cannot be ranked."


def render_comparison(result: dict) -> str:
    """Return the page's HTML for what ``compare_runs`` returns."""
    names = ", ".join(model["name"] for model in result["models"])
    head = f'<div class="head"><h1>{text(names)}</h1></div><p class="facts">over {text(result["base_model"])}</p>'
    note = f"Evaluation examples of {result['rows_of']}, each run with its own template."
    if not result["same_tokens"]:
        note += f" {NOT_THE_SAME}"
    figures = section("Figures", _figures(result["models"], result["same_tokens"]), note)
    shown = result["answers"][:SHOWN_ANSWERS]
    marked = f"The first {len(shown)} of {len(result['answers'])}, greedy; matches with the reference are marked."
    answers = section("Answers", "".join(map(_card, shown)), marked)
    return page(f"{names} - qlora-lite", head + figures + answers)


def figures_of(model: dict) -> dict[str, str]:
    """Write a model's figures for people, by name."""
    scores = model.get("metrics", {})
    return {
        "examples": f"{model['rows']:,}",
        "target tokens": f"{model['target_tokens']:,}",
        "loss": f"{model['eval_loss']:.4f}",
        "perplexity": f"{model['perplexity']:.4g}",
        **{
            name.replace("_", " "): f"{format_score(name, score)} of {score['examples']}"
            for name, score in scores.items()
        },
        "adapter": format_bytes(model["adapter_bytes"]) if model["adapter_bytes"] else "",
    }


def _figures(models: list[dict], same_tokens: bool) -> str:
    best = min(model["eval_loss"] for model in models) if same_tokens else None
    rows = [
        (model["name"] + (" (lowest loss)" if model["eval_loss"] == best else ""), *figures_of(model).values())
        for model in models
    ]
    return table(("model", *figures_of(models[0])), rows, numeric=1)


def _card(row: dict) -> str:
    cells = [("Prompt", row["prompt"], "prompt"), ("Reference", row["reference"], "")]
    for name, answer in row["answers"].items():
        cells.append((f"{name} ✓" if row["matches"][name] else name, answer, ""))
    parts = "".join(
        f"<h3>{text(title)}</h3><pre{f' class={chr(34)}{style}{chr(34)}' if style else ''}>{text(content)}</pre>"
        for title, content, style in cells
    )
    return f'<div class="card sample">{parts}</div>'
