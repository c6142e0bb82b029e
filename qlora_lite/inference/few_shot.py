"""Evaluation examples with training examples before their prompts: what a model does that is shown a task in context.

The shots are the first exchanges of a conversation whose last one is the example's own, and run through the chat
template like any other: what a user would send. They are drawn once, the same for every example.
(lm-evaluation-harness draws them anew for each, so that no draw can be shown to a person.)
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from qlora_lite.data.chat.conversation import Prompt, Turn, as_message
from qlora_lite.data.chat.prompts import read_prompts
from qlora_lite.data.readers.problems import read_place
from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens.examples import Dataset, read_examples
from qlora_lite.data.tokens.statistics import ReadSettings
from qlora_lite.errors import DataError
from qlora_lite.prepare.datasets import build_sources
from qlora_lite.recipe.schema import Recipe


def with_shots(recipe: Recipe, tokenizer, data: Dataset, shots: int) -> Dataset:
    """Return evaluation examples with so many training examples before each, of which the last answer is the target.

    Args:
        recipe: names the rows and the template; its train.seed decides which training examples are drawn.
        data: its evaluation examples.
        shots: at least 1.

    Raises:
        DataError: there are too few training examples without tools, or evaluation examples are plain text.
    """
    asked = {example.where for example in data.examples}
    rows = [row for row in _rows(recipe, "eval") if row.where in asked]
    if not rows:
        raise DataError(f"--shots {shots}: the evaluation data has no prompts with answers")
    known = [row for row in _rows(recipe, "train") if row.where not in asked and _is_plain(row)]
    if len(known) < shots:
        raise DataError(f"--shots {shots}: data.train has {len(known)} examples with answers and without tools")
    before = [turn for row in random.Random(recipe.train.seed).sample(known, shots) for turn in _exchanges(row)]
    places = [row.where for row in rows]
    written = [
        {"messages": [as_message(turn) for turn in _joined(before, row)]}
        | ({"tools": list(row.tools)} if row.tools else {})
        for row in rows
    ]
    d, name = recipe.data, "few-shot"
    longest = (shots + 1) * d.max_tokens
    found = read_examples(
        [Source(name, "messages", rows=written)],
        tokenizer,
        ReadSettings(d.template, "last", longest, "drop", d.train_on_end),
    )
    found.problems.raise_if_any()
    examples = []
    for example in found.examples:
        _, line, _ = read_place(example.where)
        examples.append(replace(example, where=places[line - 1]))
    return replace(found, examples=examples)


def _rows(recipe: Recipe, part: str) -> Sequence[Prompt]:
    return [row for source in build_sources(recipe, part) for row in read_prompts(source) if row.reference]


def _is_plain(row: Prompt) -> bool:
    return not row.tools and all(turn.role in ("system", "user", "assistant") and not turn.calls for turn in row.turns)


def _exchanges(row: Prompt) -> list[Turn]:
    return [*(turn for turn in row.turns if turn.role != "system"), Turn("assistant", row.reference)]


def _joined(shots: Sequence[Turn], row: Prompt) -> list[Turn]:
    """Put shots behind the system turn of a row that has one."""
    system = [turn for turn in row.turns if turn.role == "system"]
    return [*system, *shots, *(turn for turn in row.turns if turn.role != "system"), Turn("assistant", row.reference)]
