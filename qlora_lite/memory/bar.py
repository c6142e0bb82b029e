"""The categories of memory, their colours, and a breakdown as one stacked bar for the terminal.

Three families of hue, so that thirteen colours stay readable: blues for the frozen model, greens for what is
trained, warm colours for what a step needs. Neighbours differ in lightness as well, which is what people with
any kind of colour blindness still see. In the terminal's bar each category has a letter too, for those without colours.
"""

from collections.abc import Mapping

from qlora_lite.units import format_bytes

# Category and its colours on white and on black paper, in the order they are stacked.
COLOURS = {
    "base weights": ("#2b5c9e", "#4a7fc4"),
    "quantisation constants": ("#86b3e0", "#9cc3ea"),
    "embeddings": ("#4d88c9", "#2f5f9b"),
    "head": ("#bcd8f3", "#c9e0f6"),
    "adapter": ("#0b6e5a", "#1f8f76"),
    "trained weights": ("#3c9778", "#55b594"),
    "gradients": ("#6fceb1", "#86dcc2"),
    "optimizer": ("#2a957b", "#136450"),
    "saved activations": ("#e8873a", "#f0944a"),
    "offloaded": ("#f8cf9e", "#f9d9b2"),
    "logits": ("#ad3b2e", "#c9523f"),
    "workspace": ("#e9c840", "#f0d45c"),
    "on disk": ("#c98a4b", "#d99a5b"),
}
CATEGORIES = tuple(COLOURS)
TRAINED = "adapter", "trained weights"  # categories of what learns: an adapter, or all weights of a model
BESIDE = "non-tensor memory"  # what a device or process needs besides, at all times
BESIDE_COLOURS = ("#8b929b", "#8b929b")
OTHER = "other"  # a category that is not in the table: shown, never dropped
OTHER_COLOURS = ("#c5cad0", "#5d646d")
_ALL_COLOURS = COLOURS | {BESIDE: BESIDE_COLOURS, OTHER: OTHER_COLOURS}
LETTERS = dict(zip(_ALL_COLOURS, "BQEHATGOSFLWDX?", strict=True))


def in_order(breakdown: Mapping[str, int]) -> dict[str, int]:
    """Return the categories that hold anything, in the order they are stacked; unknown ones summed as "other"."""
    known = {name: breakdown.get(name, 0) for name in (*CATEGORIES, BESIDE)}
    unknown = sum(size for name, size in breakdown.items() if name not in known)
    return {name: size for name, size in (known | {OTHER: unknown}).items() if size > 0}


def memory_bar(breakdown: Mapping[str, int], budget_bytes: int | None = None, width: int = 80) -> str:
    """Draw a breakdown as a stacked bar with a legend, in rich's markup.

    Args:
        breakdown: bytes per category.
        budget_bytes: memory there is; the bar's length is then the larger of the two, with a mark at the budget.
        width: of the bar and of the legend's lines, characters.

    Returns:
        Lines of markup: the bar, its total, the legend. `rich.text.Text.from_markup(...).plain` has no colours.
    """
    parts = in_order(breakdown)
    total_bytes = sum(parts.values())
    scale_bytes = max(total_bytes, budget_bytes or 0, 1)
    edge = mark = round(width * (budget_bytes or 0) / scale_bytes)
    bar, below_bytes, column = "", 0, 0
    for name, size in parts.items():
        below_bytes += size
        end = round(width * below_bytes / scale_bytes)
        cells = LETTERS[name] * (end - column)
        if budget_bytes and column < mark <= end and total_bytes > budget_bytes:
            cells = cells[: mark - column - 1] + "┃" + cells[mark - column :]
        bar, column = bar + _coloured(name, cells), end
    if budget_bytes and total_bytes <= budget_bytes:
        bar += "[dim]" + "·" * max(edge - column - 1, 0) + "[/dim]" + "┃" * (column < edge)
    return "\n".join([bar, _total(total_bytes, budget_bytes), *_legend(parts, total_bytes, width)])


def _total(total_bytes: int, budget_bytes: int | None) -> str:
    if not budget_bytes:
        return format_bytes(total_bytes)
    room = budget_bytes - total_bytes
    end = f"{format_bytes(room)} left" if room >= 0 else f"[bold]{format_bytes(-room)} too much[/bold]"
    return f"{format_bytes(total_bytes)} of {format_bytes(budget_bytes)}, {end}"


def _legend(parts: Mapping[str, int], total_bytes: int, width: int) -> list[str]:
    """Return the legend in as many equal columns as fit."""
    labels = [(name, f" {name} {format_bytes(size)}, {100 * size / total_bytes:.0f} %") for name, size in parts.items()]
    column = max((len(label) for _, label in labels), default=0) + 1
    per_line = max((width + 2) // (column + 2), 1)
    cells = [_coloured(name, LETTERS[name]) + label.ljust(column - 1) for name, label in labels]
    return ["  ".join(cells[start : start + per_line]).rstrip() for start in range(0, len(cells), per_line)]


def _coloured(name: str, text: str) -> str:
    colour = _ALL_COLOURS[name][1]  # most terminals are dark, and the lighter set reads on white too
    return f"[black on {colour}]{text}[/]" if text else ""
