"""Measure a model on evaluation rows: loss, perplexity, and the scores of its greedy answers."""

import json
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import compress
from math import fsum
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from torch import nn

from qlora_lite.adapters.lora.inject import merged_once, put_merged_in_place
from qlora_lite.adapters.prompt import count_virtual
from qlora_lite.data.checks.matching import WHOLE, Matching
from qlora_lite.data.checks.metrics import (
    Measures,
    Score,
    by_prompt,
    check_packages,
    check_references,
    choice_of,
    mean,
    numbers_of_prompts,
    score_texts,
)
from qlora_lite.data.picture_grids import grids_of
from qlora_lite.data.picture_reader import PictureReader
from qlora_lite.data.readers.data_files import local_files
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import DataError, DoesNotFitError, ModelError, RecipeError
from qlora_lite.files import explain_write_errors, require_another, require_writable, write_text
from qlora_lite.memory.meter import free_bytes, held_bytes
from qlora_lite.memory.process import CUDA_CONTEXT_BYTES
from qlora_lite.models.anatomy import device_of, position_limit
from qlora_lite.models.memory_options import stream_of
from qlora_lite.planning.answering import MAX_PROMPTS, prompts_at_once
from qlora_lite.prepare.datasets import build_data, measures_of, warn_of_other_rows
from qlora_lite.prepare.job import likelihood_workload
from qlora_lite.prepare.model import build_skeleton, build_to_use
from qlora_lite.prepare.moment import Measured, Watch
from qlora_lite.prepare.objective import find_objective
from qlora_lite.prepare.settings import train_settings
from qlora_lite.prepare.task import find_task
from qlora_lite.quant.linear import arrange_weights
from qlora_lite.recipe.load import require_recipe
from qlora_lite.recipe.schema import Recipe
from qlora_lite.train.causal_lm import answer_losses
from qlora_lite.train.loop import eval_batches
from qlora_lite.train.processes import ALONE, Processes
from qlora_lite.train.settings import TrainSettings
from qlora_lite.train.step import evaluate_loss
from qlora_lite.train.workload import Workload

from .generate import Answer, Shown, answers, stop_ids

log = logging.getLogger("qlora_lite")
CUT = " […]"  # behind an answer that did not end where its reference could have
SPARE_TOKENS = 8  # beyond the longest answer of the rows: enough to see that an answer did not stop
EXACT_MATCH = Measures()

Losses = Callable[[Sequence[Example]], list[list[float]]]  # of each example's target tokens, in nats


def watching(watch: Watch | None, what: str, total: int) -> Callable[[int], None] | None:
    """Return a function that is told how many are done; None where nobody watches."""
    if watch is None:
        return None
    watch(what, 0, total)
    return lambda done: watch(what, done, total)


def measure(
    model: nn.Module,
    tokenizer,
    examples: Sequence[Example],
    end_token_ids: Iterable[int],
    losses: Losses | None = None,
    at_once: Callable[[int], int] = lambda _tokens: MAX_PROMPTS,
    measures: Measures = EXACT_MATCH,
    new_tokens: int | None = None,
    watch: Watch | None = None,
    processes: Processes = ALONE,
    reader: PictureReader | None = None,
) -> Measured:
    """Answer every prompt greedily, once for all metrics and all examples that have it, and score the answers.

    A reference is compared as it comes back from the tokenizer, which may write some letters otherwise.

    Args:
        examples: with a prompt; those whose answer was cut off, or has nothing to compare, are left out.
        end_token_ids: the tokens that end an answer in these rows.
        losses: returns the losses of each example's target tokens, for metrics of likelihood.
        at_once: returns how many prompts are answered together, given the tokens of the longest with its answer.
        measures: what is measured.
        new_tokens: most tokens of an answer; None is a few more than the longest reference has.
        watch: told of the answers so far.
        processes: those that share the answers, and have the same model and examples; all measure at the same time.
        reader: reads the examples' pictures.

    Raises:
        DataError: a row is plain text and has no answer, there is nothing to compare in any, or the references are not
            what a metric needs.
        DoesNotFitError, ModelError: see ``answers``; of several processes, all raise one.
    """
    problems, is_error = check_references(examples, measures)
    if is_error:
        raise DataError(str(problems[-1]))
    is_asked = [measures.can_compare(example) for example in examples]
    asked, ends = list(compress(examples, is_asked)), frozenset(end_token_ids)
    prompts = numbers_of_prompts(asked)
    scores: dict[str, dict[str, Score]] = {}
    records: list[dict] = [{"where": example.where, "prompt": example.prompt} for example in asked]
    shown: tuple = ()
    matches: tuple = ()
    if measures.needs_answers:
        references, said = _answered(model, tokenizer, asked, ends, at_once, new_tokens, watch, processes, reader)
        compared = zip(asked, references, said, strict=True)
        records = [_record(*each, measures.matching) for each in compared]
        texts = references, [answer.text for answer in said], prompts
        scores = {name: score_texts(name, *texts) for name in measures.names}
        scores["exact_match"] = {"exact_match": mean(list(map(any, by_prompt([r["match"] for r in records], prompts))))}
        in_order = ((shown_answer(record), record["match"]) for record in records)
        shown, matches = zip(*(next(in_order) if each else ("", False) for each in is_asked), strict=True)
    if "answer_loss" in measures.names:
        own = losses([_answer_alone(example, _prompt_tokens(tokenizer, example), ends) for example in asked])
        found = [fmean(each) for each in own]
        records = [record | {"answer_loss": loss} for record, loss in zip(records, found, strict=True)]
        scores["answer_loss"] = {"answer_loss": mean(found)}
    if "accuracy" in measures.names:
        likeliest = _likeliest(tokenizer, asked, measures.closed_set(asked), ends, losses)
        records = [record | {"likeliest": choice} for record, choice in zip(records, likeliest, strict=True)]
        right = [choice == choice_of(example.answer) for choice, example in zip(likeliest, asked, strict=True)]
        scores["accuracy"] = {"accuracy_likelihood": mean(right), **scores["accuracy"]}
    named = {key: score for name in measures.names for key, score in scores[name].items()}
    return Measured(named, shown, matches, tuple(records), len({*prompts}))


def _answered(
    model: nn.Module,
    tokenizer,
    asked: Sequence[Example],
    ends: Collection[int],
    at_once: Callable[[int], int],
    new_tokens: int | None,
    watch: Watch | None,
    processes: Processes,
    reader: PictureReader | None,
) -> tuple[list[str], list[Answer]]:
    """Return the references as the tokenizer gives them back, and the greedy answers, one for equal prompts."""
    numbers = numbers_of_prompts(asked)
    prompts = [
        Shown(example.prompt, partial(reader.of_examples, [example]), grids_of(example.pictures))
        if reader and example.pictures
        else example.prompt
        for example, *_ in by_prompt(asked, numbers)
    ]
    prompt, new = _most_tokens(model, tokenizer, asked, new_tokens)
    done, ranks = watching(watch, "answers", len(prompts)), processes.world_size
    ask = partial(
        answers,
        model,
        tokenizer,
        max_new_tokens=new,
        stop=stop_ids(model, tokenizer, ends),
        batch_size=at_once(prompt + new),
        done=done and (lambda count: done(min(ranks * count, len(prompts)))),
    )
    with merged_once(model):
        answered = _shared_answers(ask, prompts, processes)
    said = [answered[number] for number in numbers]
    written = tokenizer([example.answer for example in asked], add_special_tokens=False).input_ids
    return tokenizer.batch_decode(written, skip_special_tokens=True), said


def _shared_answers(
    ask: Callable[[Sequence[str | Shown]], list[Answer]], prompts: Sequence[str | Shown], processes: Processes
) -> list[Answer]:
    """Return the answers to all prompts, of which each process makes its share."""
    own: list[Answer] = []
    error: DoesNotFitError | ModelError | None = None
    try:
        own = ask(processes.share(prompts))
    except (DoesNotFitError, ModelError) as caught:
        error = caught
    found = 0 if error is None else 1 if isinstance(error, DoesNotFitError) else 2
    if worst := int(processes.largest(found)):
        raise error or (DoesNotFitError, ModelError)[worst - 1]("another rank could not make its answers")
    told = (json.loads(processes.tell(json.dumps(own), rank)) for rank in range(processes.world_size))
    return [Answer(*each) for part in told for each in part]


def _prompt_tokens(tokenizer, example: Example) -> list[int]:
    """Return the tokens that an example begins with, which are those of its prompt alone (``data.tokens.mask``)."""
    return tokenizer(example.prompt, add_special_tokens=False).input_ids


def _answer_alone(example: Example, prompt: Sequence[int], ends: Collection[int]) -> Example:
    """Return an example of which nothing but the last answer is a target, with its end token if that is one."""
    ids, first = example.token_ids, len(prompt)
    found = np.flatnonzero(np.isin(ids[first:], list(ends)))
    last = first + int(found[0]) if len(found) else len(ids)
    is_target = np.arange(len(ids)) >= first
    is_target[last : last + 1] = example.is_target[last : last + 1]
    return replace(example, token_ids=ids[: last + 1], is_target=is_target[: last + 1])


def _likeliest(
    tokenizer, asked: Sequence[Example], choices: Sequence[str], ends: Collection[int], losses: Losses
) -> list[str]:
    """Return the answer of a closed set that is likeliest for each example, by the sum over its tokens.

    Raises:
        DataError: the tokens of a prompt are others before another answer.
    """
    variants = []
    for example in asked:
        prompt = _prompt_tokens(tokenizer, example)
        own = _answer_alone(example, prompt, ends)
        variants += [
            own if choice == choice_of(example.answer) else _with_choice(tokenizer, own, prompt, choice, ends)
            for choice in choices
        ]
    sums = np.array([fsum(each) for each in losses(variants)]).reshape(len(asked), len(choices))
    return [choices[index] for index in sums.argmin(axis=1)]


def _with_choice(tokenizer, own: Example, prompt: list[int], choice: str, ends: Collection[int]) -> Example:
    """Return an example with another answer of the closed set in place of its own, and the same end."""
    begin = own.answer.rindex(replaced := choice_of(own.answer))
    before, after = own.answer[:begin], own.answer[begin + len(replaced) :]
    ids = tokenizer(own.prompt + before + choice + after, add_special_tokens=False).input_ids
    if ids[: len(prompt)] != prompt:
        raise DataError(
            f"{own.where}: before the answer {choice!r} of the closed set, the prompt has other tokens "
            "than alone; choose another data.template"
        )
    ids += [token for token in own.token_ids[-1:].tolist() if token in ends]
    is_target = np.arange(len(ids)) >= len(prompt)
    is_target[-1] = own.is_target[-1]
    return replace(own, token_ids=np.array(ids, np.int32), is_target=is_target)


def shown_answer(record: dict) -> str:
    """Return the answer of a record for a person, marked where it was cut before it matched."""
    is_cut = record["finish"] == "length" and not record["match"]
    return record["answer"] + CUT * is_cut


def _record(example: Example, reference: str, answer: Answer, matching: Matching) -> dict[str, Any]:
    """Compare an answer; what is compared is named only where it is not the whole text."""
    expected = found = None
    try:
        expected, found = matching.extract(reference), matching.extract(answer.text)
    except TimeoutError:
        log.warning(
            "%s: a regular expression of exact match takes too long on its answer, which counts as wrong", example.where
        )
    record = {
        "where": example.where,
        "prompt": example.prompt,
        "reference": reference.strip(),
        "answer": answer.text.strip(),
        "match": found is not None and found == expected,
        "finish": answer.finish,
    }
    return record if matching == WHOLE else record | {"compared_reference": expected, "compared_answer": found}


def _most_tokens(model: nn.Module, tokenizer, asked: Sequence[Example], new_tokens: int | None) -> tuple[int, int]:
    """Return the tokens of the longest prompt, and the most that are generated for any.

    Raises:
        ModelError: together they are more than the model can compute.
    """
    given = tokenizer([example.prompt for example in asked], add_special_tokens=False).input_ids
    answers = [len(example.token_ids) - len(ids) for example, ids in zip(asked, given, strict=True)]
    prompt, needed = count_virtual(model) + max(map(len, given)), new_tokens or max(answers)
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
    recipe: Recipe,
    adapter: str | Path | None,
    metrics_rows: int,
    tokenizer=None,
    out: str | Path | None = None,
    watch: Watch | None = None,
    held_out: str | None = None,
) -> dict[str, Any]:
    """Measure a recipe's model on its evaluation rows, with an adapter or without.

    Args:
        adapter: adapter folder; None measures the base model.
        metrics_rows: rows to measure train.metrics on, 0 for none.
        tokenizer: the model's, with another chat template than its own; None loads it.
        out: JSONL file for the answers, one object for each compared example: where, prompt, reference, answer, match,
            finish, what was compared where that is not the whole text, and what a metric of likelihood found.
        watch: told how far the evaluation is.
        held_out: of a run's recipe, ``TrainedRun.held_out``: a warning says if the rows are others by now.

    Returns:
        eval_loss, perplexity, target_tokens, rows and, if asked for, metrics (value, standard_error and examples of
        each score, signature of sacrebleu's), and of exact match also exact_match and exact_match_rows, the rows that
        were compared; of a run on preferences, whose rows are pairs or judgements, eval_metrics, its objective's loss
        and rewards.

    Raises:
        RecipeError: it is no recipe, names no evaluation rows, or a metric's package is not installed.
        OutputError: ``out`` cannot be written.
    """
    measured, found = measure_recipe(recipe, adapter, metrics_rows, tokenizer, out, watch, held_out)
    if out and found:
        write_answers(out, found)
    return measured


def check_out(out: Path, recipe: Recipe) -> None:
    """Check, before anything is answered, that answers can be written and that no rows would be overwritten.

    Raises:
        OutputError: the file cannot be written, or is one of the recipe's data.
    """
    with explain_write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    require_writable(out)
    sources = *recipe.data.train, *(recipe.data.eval or ())
    require_another(out, *local_files(source.path for source in sources))


def write_answers(out: str | Path, records: Iterable[dict]) -> None:
    """Write the answers that ``measure_recipe`` found, one JSON object a line.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(Path(out), "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records))


def measure_recipe(
    recipe: Recipe,
    adapter: str | Path | None,
    metrics_rows: int,
    tokenizer=None,
    out: str | Path | None = None,
    watch: Watch | None = None,
    held_out: str | None = None,
) -> tuple[dict[str, Any], Sequence[dict]]:
    """Do what ``evaluate_recipe`` does, and return the answers beside its figures, for ``write_answers``.

    ``out`` is checked, and not written yet: who has the figures first can show them where the disk is full by then.

    Raises:
        RecipeError, OutputError: see ``evaluate_recipe``.
    """
    require_recipe(recipe)
    if not recipe.data.has_eval:
        raise RecipeError("there is no evaluation data; name some, as in data.eval=rows.jsonl")
    if metrics_rows:
        check_packages(recipe.train.metrics)
    adapter = adapter and Path(adapter)
    if out:
        check_out(Path(out), recipe)
    task = find_task(recipe)
    return task.evaluate(recipe, adapter, metrics_rows, tokenizer or task.reader(recipe), watch, held_out)


def measure_text(
    recipe: Recipe, adapter: Path | None, metrics_rows: int, tokenizer, watch: Watch | None, held_out: str | None
) -> tuple[dict[str, Any], Sequence[dict]]:
    """Measure a language model; see ``measure_recipe``."""
    data, settings = build_data(recipe, tokenizer, "eval"), train_settings(recipe)
    warn_of_other_rows(recipe, data, held_out)
    rows = measurable(data.examples[:metrics_rows], measures_of(recipe))
    model = build_to_use(recipe, [adapter] if adapter else [], context_tokens_of(recipe))
    judged = find_objective(recipe).attach(recipe, model, adapter, tokenizer, settings) if adapter else {}
    if stream_of(model) is None:
        put_merged_in_place(model)
    work = likelihood_workload(recipe, count_virtual(model)).with_options(settings.options)
    work.check_examples(model, data.examples)
    work.spec.check_forward(model, settings.max_tokens, work.batches)
    settings = replace(settings, max_tokens=max(settings.max_tokens, *work.batches.lengths(data.examples)))
    batches = eval_batches(work, data.examples, settings, watching(watch, "evaluation", len(data.examples)))
    result = evaluate_loss(work, model, batches)
    measured = {
        "adapter": str(adapter) if adapter else None,
        "rows": len(data.examples),
        "target_tokens": result.target_tokens,
        "eval_loss": result.loss,
        "perplexity": result.perplexity,
        **({"eval_metrics": judged} if judged else {}),
    }
    records: Sequence[dict] = ()
    if rows:
        arrange_weights(model)
        at_once = partial(answered_at_once, recipe, model, recipe.memory.budget_bytes)
        found = measure(
            model,
            tokenizer,
            rows,
            data.end_token_ids,
            losses_by(work, model, settings),
            at_once,
            measures_of(recipe),
            new_tokens_of(recipe),
            watch,
            reader=find_task(recipe).picture_reader(recipe),
        )
        measured |= found.figures()
        records = found.records
    return measured, records


def measurable(examples: Sequence[Example], measures: Measures) -> Sequence[Example]:
    """Return examples that metrics are asked for; which of them cannot be compared is logged.

    Raises:
        DataError: none can be, or the references are not what a metric needs.
    """
    problems, is_error = check_references(examples, measures)
    if is_error:
        raise DataError(str(problems[-1]))
    for problem in problems:
        log.warning("%s", problem)
    return examples


def losses_by(work: Workload, model: nn.Module, settings: TrainSettings) -> Losses:
    """Return what computes the losses of examples outside of training."""
    return lambda examples: answer_losses(work, model, eval_batches(work, examples, settings))
