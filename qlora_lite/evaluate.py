"""Measure a model on evaluation rows: loss, perplexity, and the share of rows answered word for word."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from .build import build_skeleton, build_to_use, train_settings
from .data.check import check_answers
from .data.stored import Example
from .errors import DataError, ModelError, RecipeError
from .generate import answers, stop_ids
from .lora.adapter import load_adapter
from .memory.meter import held_bytes
from .memory.process import CUDA_CONTEXT_BYTES
from .models.anatomy import device_of, position_limit
from .models.tokenizer import load_tokenizer
from .planning.answering import MOST_PROMPTS, prompts_at_once
from .quant.linear import arrange_weights
from .recipe.load import require_recipe
from .recipe.schema import Recipe
from .rows import build_data
from .train.guards import check_embeddings, check_forward
from .train.loop import eval_batches
from .train.step import evaluate_loss

log = logging.getLogger("qlora_lite")
CUT = " […]"  # behind an answer that did not end where its reference could have
SPARE_TOKENS = 8  # beyond the longest answer of the rows: enough to see that an answer did not stop


class ExactMatch(NamedTuple):
    """Share of answers equal to their reference, and the answers, in the order of the examples; "" for one left out.

    Behind an answer that had to be cut stands CUT.
    """

    score: float
    answers: tuple[str, ...]


def rows_compared(examples: Sequence[Example]) -> int:
    """Return how many rows have an answer to compare with."""
    return sum(bool(example.answer) for example in examples)


def exact_match(
    model: nn.Module, tokenizer, examples: Sequence[Example], end_token_ids: Iterable[int],
    at_once: Callable[[int], int] = lambda _tokens: MOST_PROMPTS,
) -> ExactMatch:  # fmt: skip
    """Answer every example's prompt greedily and compare with what its row writes there, white space at the ends apart.

    That is compared as it comes back from the tokenizer, which may write some letters otherwise.

    Args:
        examples: rows with a prompt; those whose answer was cut off are left out.
        end_token_ids: the tokens that end an answer in these rows.
        at_once: returns how many prompts are answered together, given the tokens of the longest with its answer.

    Raises:
        DataError: a row is plain text and has no answer, or all answers were cut off.
    """
    problem, is_error = check_answers(examples)
    if is_error:
        raise DataError(str(problem))
    asked = [example for example in examples if example.answer]
    prompts, (prompt, new) = [example.prompt for example in asked], _most_tokens(model, tokenizer, asked)
    stop = stop_ids(model, tokenizer, end_token_ids)
    said = answers(model, tokenizer, prompts, new, stop, at_once(prompt + new))
    written = tokenizer([example.answer for example in asked], add_special_tokens=False).input_ids
    references = tokenizer.batch_decode(written, skip_special_tokens=True)
    is_right = [each.text.strip() == reference.strip() for each, reference in zip(said, references, strict=True)]
    shown = (
        f"{each.text.strip()}{CUT}" if each.finish == "length" and not right else each.text.strip()
        for each, right in zip(said, is_right, strict=True)
    )
    in_order = tuple(next(shown) if example.answer else "" for example in examples)
    return ExactMatch(sum(is_right) / len(asked), in_order)


def _most_tokens(model: nn.Module, tokenizer, asked: Sequence[Example]) -> tuple[int, int]:
    """Return the tokens of the longest prompt, and the most that are generated for any.

    Raises:
        ModelError: together they are more than the model can compute.
    """
    given = tokenizer([example.prompt for example in asked], add_special_tokens=False).input_ids
    answers = [len(example.token_ids) - len(ids) for example, ids in zip(asked, given, strict=True)]
    prompt, new = max(map(len, given)), max(answers) + SPARE_TOKENS
    limit = position_limit(model)
    if limit is not None and prompt + max(answers) > limit:
        raise ModelError(
            f"train.exact_match_rows (--rows): prompts of {prompt} tokens with answers of {max(answers)} are more than "
            f"the {limit} positions that the model has embeddings of; set it to 0"
        )
    return prompt, new if limit is None else min(new, limit - prompt)


def answered_at_once(recipe: Recipe, model: nn.Module, budget_bytes: int, tokens: int) -> int:
    """Return how many prompts a budget has room for at once, beside the model as it is loaded now.

    Args:
        tokens: of the longest prompt with its answer.
    """
    device = device_of(model)
    context = CUDA_CONTEXT_BYTES if device.type == "cuda" else 0
    return prompts_at_once(build_skeleton(recipe), tokens, budget_bytes - context - held_bytes(device), device.type)


def evaluate_recipe(recipe: Recipe, adapter: str | Path | None, exact_match_rows: int, tokenizer=None) -> dict:
    """Measure a recipe's model on its evaluation rows, with an adapter or without.

    Args:
        adapter: adapter folder; None measures the base model.
        exact_match_rows: rows to answer, 0 for none.
        tokenizer: the model's, with another chat template than its own; None loads it.

    Returns:
        eval_loss, perplexity, labelled_tokens, rows and, if asked for, exact_match and exact_match_rows, the rows that
        were compared.

    Raises:
        RecipeError: it is no recipe, or names no evaluation rows.
    """
    require_recipe(recipe)
    if not recipe.data.has_eval:
        raise RecipeError("there are no evaluation rows; name some, as in data.eval=rows.jsonl")
    adapter = adapter and Path(adapter)
    tokenizer = tokenizer or load_tokenizer(recipe.model.path, recipe.model.revision)
    data, settings = build_data(recipe, tokenizer, "eval"), train_settings(recipe)
    model = build_to_use(recipe, [adapter] if adapter else [])
    if adapter:
        load_adapter(model, adapter)
    check_forward(model, settings.max_tokens)
    check_embeddings(model, data.examples)
    result = evaluate_loss(model, eval_batches(data.examples, settings), settings.levers.loss_chunk_tokens)
    measured = {
        "adapter": str(adapter) if adapter else None, "rows": len(data.examples),
        "labelled_tokens": result.labelled_tokens, "eval_loss": result.loss, "perplexity": result.perplexity,
    }  # fmt: skip
    if exact_match_rows:
        rows = data.examples[:exact_match_rows]
        arrange_weights(model)
        match = exact_match(model, tokenizer, rows, data.end_token_ids)
        if left_out := check_answers(rows)[0]:
            log.warning("%s", left_out)
        measured |= {"exact_match": match.score, "exact_match_rows": rows_compared(rows)}
    return measured
