"""Check rows whose answers the model gives itself. Needs no torch."""

from collections.abc import Iterator

from qlora_lite.data.readers.problems import RowProblem
from qlora_lite.data.tokens.examples import Dataset
from qlora_lite.data.tokens.storage import prompt_tokens
from qlora_lite.prepare.method import virtual_tokens
from qlora_lite.recipe.schema import Recipe

LONG_GROUP = "group of answers longer than data.max_tokens"
NO_PROMPT = "no prompt before the answer"


def faults(recipe: Recipe, *parts: Dataset | None) -> Iterator[RowProblem]:
    """Yield the row whose answers by the model may take more room than there is, and rows without a prompt."""
    o, most = recipe.objective, recipe.data.max_tokens
    for part in filter(None, parts):
        prompts = [prompt_tokens(example) for example in part.examples]
        if not prompts:
            continue
        longest, tokens = max(enumerate(prompts), key=lambda pair: pair[1])
        if (group := o.group_size * (virtual_tokens(recipe) + tokens + o.max_completion_tokens)) > most:
            message = (
                f"objective.group_size {o.group_size} answers of up to {o.max_completion_tokens:,} tokens to a "
                f"prompt of {tokens:,} take {group:,}, and data.max_tokens is {most:,}; write at least "
                f"{group:,} there, or lower one of the two"
            )
            yield RowProblem(part.examples[longest].where, LONG_GROUP, message)
        if 0 in prompts:
            message = "there is no prompt before the answer; give rows with a prompt, or remove this one"
            yield RowProblem(part.examples[prompts.index(0)].where, NO_PROMPT, message)
