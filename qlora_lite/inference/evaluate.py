"""Measure a model on evaluation rows: loss, perplexity, and the share of rows answered word for word."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from qlora_lite.adapters.files import load_adapter
from qlora_lite.data.example_checks import WHOLE, Matching, can_match, check_answers
from qlora_lite.data.storage import Example
from qlora_lite.errors import DataError, ModelError, RecipeError
from qlora_lite.files import explain_write_errors, write_text
from qlora_lite.memory.meter import free_bytes, held_bytes
from qlora_lite.memory.process import CUDA_CONTEXT_BYTES
from qlora_lite.models.anatomy import device_of, position_limit
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.planning.answering import MAX_PROMPTS, prompts_at_once
from qlora_lite.prepare.build import build_skeleton, build_to_use, train_settings
from qlora_lite.prepare.datasets import build_data, matching_of
from qlora_lite.quant.linear import arrange_weights
from qlora_lite.recipe.load import require_recipe
from qlora_lite.recipe.schema import Recipe
from qlora_lite.train.causal_lm import CausalLM
from qlora_lite.train.loop import eval_batches
from qlora_lite.train.step import evaluate_loss
from qlora_lite.train.text_guards import check_embeddings, check_forward

from .generate import Answer, answers, stop_ids

log = logging.getLogger("qlora_lite")
CUT = " […]"  # behind an answer that did not end where its reference could have
SPARE_TOKENS = 8  # beyond the longest answer of the rows: enough to see that an answer did not stop


Watch = Callable[[str, int, int], None]  # is told what is being done, how many are done, and of how many


def watching(watch: Watch | None, what: str, total: int) -> Callable[[int], None] | None:
    """Return a function that is told how many are done; None where nobody watches."""
    if watch is None:
        return None
    watch(what, 0, total)
    return lambda done: watch(what, done, total)


class ExactMatch(NamedTuple):
    """How many answers are those of their references.

    Args:
        score: share of the compared examples whose answer matches.
        answers: in the order of the examples; "" for one left out, and CUT behind one that had to be cut.
        matches: whether each answer does, in their order; None where a checkpoint of an earlier version did not say.
        records: of each compared example, see ``_record``.
    """

    score: float
    answers: tuple[str, ...]
    matches: tuple[bool | None, ...]
    records: tuple[dict, ...] = ()


def exact_match(
    model: nn.Module, tokenizer, examples: Sequence[Example], end_token_ids: Iterable[int],
    at_once: Callable[[int], int] = lambda _tokens: MAX_PROMPTS, matching: Matching = WHOLE,
    new_tokens: int | None = None, watch: Watch | None = None,
) -> ExactMatch:  # fmt: skip
    """Answer every example's prompt greedily and compare with what its row writes there.

    That is compared as it comes back from the tokenizer, which may write some letters otherwise.

    Args:
        examples: with a prompt; those whose answer was cut off, or has nothing to compare, are left out.
        end_token_ids: the tokens that end an answer in these rows.
        at_once: returns how many prompts are answered together, given the tokens of the longest with its answer.
        matching: what of an answer is compared.
        new_tokens: most tokens of an answer; None is a few more than the longest reference has.
        watch: told of the answers so far.

    Raises:
        DataError: a row is plain text and has no answer, or there is nothing to compare in any.
    """
    problems, is_error = check_answers(examples, matching)
    if is_error:
        raise DataError(str(problems[-1]))
    is_asked = [can_match(example, matching) for example in examples]
    asked = list(compress(examples, is_asked))
    prompts, (prompt, new) = [example.prompt for example in asked], _most_tokens(model, tokenizer, asked, new_tokens)
    stop = stop_ids(model, tokenizer, end_token_ids)
    done = watching(watch, "exact match", len(asked))
    said = answers(model, tokenizer, prompts, new, stop, at_once(prompt + new), done=done)
    written = tokenizer([example.answer for example in asked], add_special_tokens=False).input_ids
    references = tokenizer.batch_decode(written, skip_special_tokens=True)
    records = tuple(_record(*each, matching) for each in zip(asked, references, said, strict=True))
    in_order = ((shown_answer(record), record["match"]) for record in records)
    shown, matches = zip(*(next(in_order) if each else ("", False) for each in is_asked), strict=True)
    return ExactMatch(sum(matches) / len(records), shown, matches, records)


def shown_answer(record: dict) -> str:
    """Return the answer of a record for a person, marked where it was cut before it matched."""
    is_cut = record["finish"] == "length" and not record["match"]
    return record["answer"] + CUT * is_cut


def _record(example: Example, reference: str, answer: Answer, matching: Matching) -> dict:
    """Compare an answer; what is compared is named only where it is not the whole text."""
    expected = found = None
    try:
        expected, found = matching.extract(reference), matching.extract(answer.text)
    except TimeoutError:
        log.warning("%s: a regular expression of exact match takes too long on its answer, which counts as wrong",
                    example.where)  # fmt: skip
    record = {"where": example.where, "prompt": example.prompt, "reference": reference.strip(),
              "answer": answer.text.strip(), "match": found is not None and found == expected,
              "finish": answer.finish}  # fmt: skip
    return record if matching == WHOLE else record | {"compared_reference": expected, "compared_answer": found}


def _most_tokens(
    model: nn.Module, tokenizer, asked: Sequence[Example], new_tokens: int | None
) -> tuple[int, int]:  # fmt: skip
    """Return the tokens of the longest prompt, and the most that are generated for any.

    Raises:
        ModelError: together they are more than the model can compute.
    """
    given = tokenizer([example.prompt for example in asked], add_special_tokens=False).input_ids
    answers = [len(example.token_ids) - len(ids) for example, ids in zip(asked, given, strict=True)]
    prompt, needed = max(map(len, given)), new_tokens or max(answers)
    limit, new = position_limit(model), new_tokens or needed + SPARE_TOKENS
    if limit is not None and prompt + needed > limit:
        raise ModelError(
            f"train.metrics_examples (--rows): prompts of {prompt} tokens with answers of {needed} exceed the "
            f"model's {limit} position embeddings; set it to 0"
        )
    return prompt, new if limit is None else min(new, limit - prompt)


def answered_at_once(recipe: Recipe, model: nn.Module, budget_bytes: int | None, tokens: int) -> int:
    """Return how many prompts a budget has room for at once, beside the model as it is loaded now.

    Args:
        budget_bytes: most memory that the process may use; None is what the device has free.
        tokens: of the longest prompt with its answer.
    """
    device = device_of(model)
    context = CUDA_CONTEXT_BYTES if device.type == "cuda" else 0
    room = free_bytes(device) if budget_bytes is None else budget_bytes - context - held_bytes(device)
    return prompts_at_once(build_skeleton(recipe), tokens, room, device.type)


def new_tokens_of(recipe: Recipe) -> int | None:
    """Return the most tokens of an answer to be compared; None where the references decide."""
    stated = recipe.train.metrics_new_tokens
    return None if stated == "auto" else stated


def context_tokens_of(recipe: Recipe) -> int:
    """Return the tokens of the longest prompt with its answer."""
    return recipe.data.max_tokens + (new_tokens_of(recipe) or 0)


def evaluate_recipe(
    recipe: Recipe, adapter: str | Path | None, exact_match_rows: int, tokenizer=None, out: str | Path | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a recipe's model on its evaluation rows, with an adapter or without.

    Args:
        adapter: adapter folder; None measures the base model.
        exact_match_rows: rows to answer, 0 for none.
        tokenizer: the model's, with another chat template than its own; None loads it.
        out: JSONL file for the answers, one object for each compared example: where, prompt, reference, answer, match,
            finish, and what was compared where that is not the whole text.
        watch: told how far the evaluation is.

    Returns:
        eval_loss, perplexity, labelled_tokens, rows and, if asked for, exact_match and exact_match_rows, the rows that
        were compared.

    Raises:
        RecipeError: it is no recipe, or names no evaluation rows.
        OutputError: ``out`` cannot be written.
    """
    require_recipe(recipe)
    if not recipe.data.has_eval:
        raise RecipeError("there is no evaluation data; name some, as in data.eval=rows.jsonl")
    adapter = adapter and Path(adapter)
    if out:
        with explain_write_errors(Path(out)):  # now, and not when all is answered
            Path(out).parent.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or load_tokenizer(recipe.model.path, recipe.model.revision)
    data, settings = build_data(recipe, tokenizer, "eval"), train_settings(recipe)
    model = build_to_use(recipe, [adapter] if adapter else [], context_tokens_of(recipe))
    if adapter:
        load_adapter(model, adapter)
    check_forward(model, settings.max_tokens)
    check_embeddings(model, data.examples)
    work = CausalLM().with_options(settings.options)
    batches = eval_batches(work, data.examples, settings, watching(watch, "evaluation", len(data.examples)))
    result = evaluate_loss(work, model, batches)
    measured = {
        "adapter": str(adapter) if adapter else None, "rows": len(data.examples),
        "labelled_tokens": result.labelled_tokens, "eval_loss": result.loss, "perplexity": result.perplexity,
    }  # fmt: skip
    if exact_match_rows:
        rows = data.examples[:exact_match_rows]
        arrange_weights(model)
        matching = matching_of(recipe)
        at_once = partial(answered_at_once, recipe, model, recipe.memory.budget_bytes)
        match = exact_match(model, tokenizer, rows, data.end_token_ids, at_once, matching, new_tokens_of(recipe), watch)
        for left_out in check_answers(rows, matching)[0]:
            log.warning("%s", left_out)
        measured |= {"exact_match": match.score, "exact_match_rows": len(match.records)}
        if out:
            write_text(Path(out), "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in match.records))
    return measured
