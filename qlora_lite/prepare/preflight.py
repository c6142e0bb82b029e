"""Look at a recipe's rows before anything is trained: what they are, what became of them, what is wrong.

The result is one plain dict, the report: `qlora-lite data` prints it, `train` writes it into the run folder, and
the page shows it, so that the three can never disagree. All problems are in it, not only the first.

Lengths and counts are in tokens and rows; shares go from 0 to 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice, zip_longest

import numpy as np
import torch

from qlora_lite.data.chat.conversation import ROW_DAY
from qlora_lite.data.chat.row_formats import LABELS, PAIRS, answer_beside_text
from qlora_lite.data.chat.template import special_ids_of
from qlora_lite.data.checks.metrics import check_references
from qlora_lite.data.checks.overlap import check_overlap, check_prompts
from qlora_lite.data.labels import NUMBER, names_of
from qlora_lite.data.readers.problems import Problems, RowProblem, read_place, write_place
from qlora_lite.data.readers.sources import read_rows
from qlora_lite.data.tokens.batch import collate, packing_efficiency, pieces_of, plan_epoch
from qlora_lite.data.tokens.example_checks import count_special_tokens, histogram
from qlora_lite.data.tokens.examples import Dataset
from qlora_lite.data.tokens.preferences import answer_tokens, check_labels
from qlora_lite.data.tokens.storage import Example, Examples, row_lengths, sequences_of
from qlora_lite.errors import DataError, ModelError
from qlora_lite.recipe.schema import Recipe
from qlora_lite.units import format_bytes, format_count

from .datasets import STREAM_SAMPLE_ROWS, build_sources, measures_of, read_data
from .method import build_method, find_method, virtual_tokens
from .objective import find_objective
from .task import find_preference, find_task, packs
from .text_rows import format_of_row

_SHOWN_PER_RULE = 5
_SAMPLED_ROWS = 20  # of each source
RENDERED = "rendered chat in a document"
UNUSED_ANSWER = "answer beside plain text"
FEW_TOKENS = 10_000  # fewer than the LoRA weights of any model worth training
CAPACITY = "more target tokens than LoRA weights"
ABSENT = "tokens of adapter.train_tokens that no row has"
SEAM = "line end before an answer that begins with white space"


@dataclass(frozen=True, slots=True)
class Preflight:
    """Hold the rows of a run and the report about them.

    Args:
        data: the training rows.
        eval_data: the evaluation rows, if the recipe names any.
        report: see `empty_report` for the keys that are always there.
    """

    data: Dataset
    eval_data: Dataset | None
    report: dict

    def raise_if_unusable(self) -> None:
        """Raise a DataError that names what is wrong, if training on these rows would be a mistake."""
        errors = [problem for problem in self.report["problems"] if problem["severity"] == "error"]
        if not errors:
            return
        seen: Counter[str] = Counter()
        shown = []
        for problem in errors:
            seen[problem["rule"]] += 1
            if seen[problem["rule"]] <= _SHOWN_PER_RULE:
                shown.append(line_of_problem(problem))
        if rest := self.report["errors"] - len(shown):
            shown.append(f"... and {rest:,} more problems; qlora-lite data --json lists them")
        if any(part.problems.count and not part.problems.fatal for part in (self.data, self.eval_data) if part):
            shown.append("correct these rows, or let some be left out and counted with data.max_bad_rows")
        raise DataError("\n".join(shown))


def problem_entry(problem: RowProblem, is_error: bool) -> dict:
    """Return a problem as the report has it, its place taken apart."""
    file, line, row = read_place(problem.where) or (problem.where, 0, 0)
    severity = "error" if is_error else "warning"
    return {
        "file": file or None,
        "line": line or None,
        "row": row or None,
        "rule": problem.rule,
        "message": problem.message,
        "severity": severity,
    }


def empty_report(problems: list[dict]) -> dict:
    """Return the report of rows that could not be looked at."""
    return {
        "ok": False,
        "rows_read": 0,
        "rows_kept": 0,
        "dropped": {},
        "dropped_at": {},
        "tokens": 0,
        "target_tokens": 0,
        "packing_efficiency": None,
        "problems": problems,
        "errors": len(problems),
    }


def first_places(counts: dict, reason: str) -> str:
    """Name the first rows that were left out for a reason, as "a.jsonl:1, a.jsonl:7, ..."; "" if no place is known."""
    places = counts["dropped_at"].get(reason, [])
    return ", ".join(places) + (", ..." if 0 < len(places) < counts["dropped"][reason] else "")


def what_was_read(report: dict) -> str:
    """Say which rows a report is about, where it is not about all of them."""
    rows = report.get("sample_rows")
    return f"the first {rows:,} rows of each source; the rest is checked while training" if rows else ""


def line_of_template(template: dict) -> str:
    """Write what the report says of the chat template, its text apart."""
    name = "the model's own" if template["name"] == "model" else template["name"]
    begin = f"rows begin with {template['begin_token']}" if template["begin_token"] else "rows have no begin token"
    day = f"; today is {template['day']} in all rows" if template["day"] else ""
    return f"{name}; {begin}; answers end with {' or '.join(template['end_tokens'])}{day}"


def facts_of_row(row: dict) -> str:
    """Write how long an example of the report is, and what it is to teach."""
    target = f" -> {row['label']}" if "label" in row else f", {row['target_tokens']:,} of them targets"
    return f"{row['tokens']:,} tokens{target}"


def line_of_problem(problem: dict) -> str:
    """Write a problem of the report as "file:line: message"."""
    file, line = problem["file"], problem["line"]
    place = write_place(file, line, problem["row"] or 0) if line else file
    return f"{place}: {problem['message']}" if place else problem["message"]


def preflight(recipe: Recipe, tokenizer, rows_to_show: int = 4) -> Preflight:
    """Read a recipe's training and evaluation rows and report on them; nothing is raised for bad rows.

    Args:
        recipe: says where the rows are and how they become tokens.
        tokenizer: the model's.
        rows_to_show: rows whose text goes into the report.
    """
    task, parts = find_task(recipe), read_data(recipe, tokenizer)
    labels = task.labels
    data, eval_data = parts["train"], parts.get("eval")
    problems, error_count = _problems(recipe, data, eval_data)
    faults = (
        *find_objective(recipe).row_faults(recipe, data, eval_data),
        *(labels.faults(labels.name(recipe, data), data, eval_data) if labels else ()),
    )
    for fault in faults:
        problems.append(problem_entry(fault, True))
        error_count += 1
    problems += [problem_entry(problem, False) for problem in _rendered_chats(recipe, tokenizer)]
    warned = (
        *_broken_seams(data),
        *_unused_answers(recipe),
        *_more_than_weights_hold(recipe, data),
        *_absent_tokens(recipe, tokenizer, data),
        *(labels.warnings(recipe, data) if labels else ()),
    )
    problems += [problem_entry(problem, False) for problem in warned]
    report = empty_report(problems) | {
        "ok": error_count == 0,
        "errors": error_count,
        **_counts(recipe, data),
        "sample_rows": STREAM_SAMPLE_ROWS if recipe.data.streaming else None,
        **_lengths(recipe, data),
        "answer_tokens": _answer_tokens(recipe, data),
        "sources": _sources(recipe, data, "train"),
        "template": _describe_template(data, tokenizer),
        "special_tokens": _special_tokens(data, tokenizer) if task.has_tokens else [],
        "eval": eval_data
        and {
            **_counts(recipe, eval_data),
            "sources": _sources(recipe, eval_data, "eval"),
        },
        "rows": _rows(data, tokenizer, task.label_kind, rows_to_show) if task.has_tokens else [],
        **({"labels": balance} if labels and (balance := labels.balance(recipe, data, eval_data)) else {}),
    }
    return Preflight(data, eval_data, report)


def _problems(recipe: Recipe, data: Dataset, eval_data: Dataset | None) -> tuple[list[dict], int]:
    """Return every problem of both parts, errors first, and how many errors there are in all."""
    listed, error_count = [], 0
    for part in filter(None, (data, eval_data)):
        is_error = part.problems.too_many(recipe.data.max_bad_rows)
        new = [problem_entry(problem, is_error) for problem in part.problems.found]
        known = [problem for problem in new if problem in listed]  # what is wrong with the template, twice
        listed += [problem for problem in new if problem not in known]
        error_count += part.problems.count - len(known) if is_error else 0
        listed += [problem_entry(problem, False) for problem in part.problems.warnings]
    if find_preference(recipe) == LABELS and (alike := check_labels(data.examples)):
        listed.append(problem_entry(alike, True))
        error_count += 1
    for problem, is_error in _faults_of_evaluation(recipe, data, eval_data) if eval_data else ():
        listed.append(problem_entry(problem, is_error))
        error_count += is_error
    return sorted(listed, key=lambda problem: problem["severity"] != "error"), error_count


def _rendered_chats(recipe: Recipe, tokenizer) -> Iterator[RowProblem]:
    """Yield the first document of each source that holds a special token as text, as a chat that was rendered does."""
    if find_task(recipe).labels:
        return
    ids = special_ids_of(tokenizer) - {tokenizer.unk_token_id, tokenizer.mask_token_id}
    tokens = tokenizer.convert_ids_to_tokens(sorted(ids))
    for source in build_sources(recipe, "train"):
        with suppress(DataError, OSError):  # the rows were read before: what is wrong is among the problems
            for where, row in islice(read_rows(source, Problems()), _SAMPLED_ROWS):
                if format_of_row(row, where, source, find_preference(recipe)) != "text":
                    break
                text = str(row.get("text"))
                held = next((token for token in tokens if len(token) > 3 and token in text), None)  # not "<s>"
                if held is not None:
                    message = (
                        f"the text holds {held!r}, which stays plain letters in a document, and is learned as "
                        "those; give chats as messages, not as text that a template made of them"
                    )
                    yield RowProblem(where, RENDERED, message)
                    break


def _unused_answers(recipe: Recipe) -> Iterator[RowProblem]:
    """Yield the first row of each source that was taken for plain text and has a column named like an answer."""
    for source in () if find_task(recipe).labels else build_sources(recipe, "train"):
        with suppress(DataError, StopIteration, OSError):  # as above
            where, row = next(read_rows(source, Problems()))
            is_text = source.format is None and format_of_row(row, where, source, find_preference(recipe)) == "text"
            if is_text and (message := answer_beside_text(row, source)):
                yield RowProblem(where, UNUSED_ANSWER, message)


def _broken_seams(data: Dataset) -> Iterator[RowProblem]:
    """Yield the first row whose answer begins with white space, behind the line end that the template plain writes."""
    if data.template is None or data.template.name != "plain":
        return
    for example in islice(data.examples, _SAMPLED_ROWS):
        if example.answer[:1].isspace():
            message = (
                "the answer begins with white space, and data.template plain writes a line end before it; "
                "joined writes prompt and answer as they are"
            )
            yield RowProblem(example.where, SEAM, message)
            return


def _more_than_weights_hold(recipe: Recipe, data: Dataset) -> Iterator[RowProblem]:
    """Yield a warning if the LoRA weights are fewer than the target tokens of an epoch, with the rank that suffices.

    With fewer, LoRA falls behind full fine-tuning, more so the longer the training ("LoRA Without Regret", Thinking
    Machines, 2025).
    """
    tokens, x, optimizer = data.target_tokens, recipe.lora, recipe.train.optimizer
    if (
        recipe.data.streaming
        or tokens < FEW_TOKENS
        or find_task(recipe).labels
        or not find_method(recipe).has_targets
        or not x.targets
    ):
        return
    from qlora_lite.adapters.lora.inject import lora_parameters

    from .model import build_skeleton  # and with it the libraries that a model needs

    with suppress(ModelError):  # a model that cannot be had, or not adapted so: for the plan to say
        model = build_skeleton(recipe)
        build_method(recipe).apply(model)
        weights = sum(parameter.numel() for _, parameter in lora_parameters(model))
        if tokens <= weights:
            return
        factor = 2 ** math.ceil(math.log2(tokens / weights))
        states = (1 if "8bit" in optimizer else 4) * (1 if "lion" in optimizer else 2)
        more = (factor - 1) * weights * (2 * getattr(torch, x.dtype).itemsize + states)
        message = (
            f"{format_count(tokens)} target tokens are more than {format_count(weights)} LoRA weights can "
            f"learn; rank {factor * x.rank} suffices, and takes {format_bytes(more)} more for weights, "
            "gradients and optimizer states"
        )
        yield RowProblem("lora.rank", CAPACITY, message)


def _absent_tokens(recipe: Recipe, tokenizer, data: Dataset) -> Iterator[RowProblem]:
    """Yield a warning of tokens whose rows are to be trained and that no training row has."""
    if not recipe.adapter.train_tokens:
        return
    wanted = {tokenizer.convert_tokens_to_ids(token): token for token in recipe.adapter.train_tokens}
    if recipe.data.streaming:
        return
    for example in data.examples:
        if not wanted:
            return
        for token_id in wanted.keys() & set(example.token_ids.tolist()):
            del wanted[token_id]
    if wanted:
        message = (
            f"no training row has {', '.join(map(repr, wanted.values()))}, so that nothing is learned of "
            f"{'it' if len(wanted) == 1 else 'them'}"
        )
        yield RowProblem("adapter.train_tokens", ABSENT, message)


def _faults_of_evaluation(recipe: Recipe, data: Dataset, eval_data: Dataset) -> Iterator[tuple[RowProblem, bool]]:
    """Yield what is wrong with good evaluation rows for this run, each with whether it is an error."""
    if not recipe.data.eval_share:  # which leaves no row on both sides
        overlap, is_error = check_overlap(data.examples, eval_data.examples)
        if overlap:
            yield overlap, is_error
    if prompts := check_prompts(data.examples, eval_data.examples, bool(recipe.data.eval_share)):
        yield prompts, False
    found, is_error = check_references(eval_data.examples[: recipe.train.metrics_examples], measures_of(recipe))
    yield from ((problem, is_error) for problem in found)


def _counts(recipe: Recipe, data: Dataset) -> dict:
    tokens, targets = (data.tokens, data.target_tokens) if find_task(recipe).has_tokens else (0, 0)
    return {
        "rows_read": data.rows_read,
        "rows_kept": data.rows_kept,
        "dropped": data.dropped,
        "dropped_at": data.dropped_at,
        "truncated": data.truncated,
        "split": data.split,
        "tokens": tokens,
        "target_tokens": targets,
    }


def _lengths(recipe: Recipe, data: Dataset) -> dict:
    d = recipe.data
    lengths = row_lengths(data.examples) if find_task(recipe).has_tokens else []
    virtual = virtual_tokens(recipe) * (2 if find_preference(recipe) else 1)  # before both sequences
    taken = [length + virtual for length in lengths]
    packs_examples = packs(recipe)
    found = plan_epoch(taken, d.max_tokens, packs_examples, 1, d.order, recipe.train.seed, 0)
    return {
        "max_tokens": d.max_tokens,
        "packs": len(found) if packs_examples else None,
        "packing_efficiency": packing_efficiency(taken, d.max_tokens, found) if packs_examples else None,
        "longest_tokens": max(lengths, default=0),
        "lengths": [{"from": first, "to": last, "rows": count} for first, last, count in histogram(lengths)],
    }


def _answer_tokens(recipe: Recipe, data: Dataset) -> dict[str, float] | None:
    """Return how long answers are on average that are compared or judged: what separates them may be length alone."""
    if (preference := find_preference(recipe)) is None or not len(data.examples):
        return None
    first, second = answer_tokens(data.examples)
    if preference == PAIRS:
        return {"chosen": first, "rejected": second}
    good, bad = (data.examples.rows[data.examples.order + 1, 7] == label for label in (1, 0))
    order = data.examples.order
    return {
        name: answer_tokens(replace(data.examples, order=order[which]))[0]
        for name, which in (("good", good), ("bad", bad))
        if which.any()
    }


def _sources(recipe: Recipe, data: Dataset, which: str) -> list[dict]:
    """Describe each source, and count what it gives: examples, their tokens and those that are learned."""
    task, described = find_task(recipe), []
    for source, part, unused in zip(build_sources(recipe, which), _parts(data), data.unused, strict=True):
        counts = {"examples": len(part), "tokens": int(part.lengths.sum())}
        counts["target_tokens"] = int(part.target_counts.sum())
        described.append(task.describe_source(recipe, source, unused) | counts)
    return described


def _parts(data: Dataset) -> Iterator[Examples]:
    """Yield the examples of each source."""
    end = 0
    for count in data.examples_of:
        start, end = end, end + count
        yield data.examples[start:end]


def _distinct(examples: Examples) -> Iterator[Example]:
    """Yield examples without those that a weight repeats."""
    is_new = np.diff(examples.order, prepend=-1) != 0
    return (examples[int(index)] for index in np.flatnonzero(is_new))


def _describe_template(data: Dataset, tokenizer) -> dict | None:
    """Describe the chat template, and what begins and ends a row; None if every row is a plain document."""
    if data.template is None:
        return None
    first = next((int(example.token_ids[0]) for example in data.examples), None)
    begins = first is not None and first == tokenizer.bos_token_id
    return {
        "name": data.template.name,
        "text": data.template.source,
        "begin_token": tokenizer.bos_token if begins else None,
        "day": f"{ROW_DAY:%d %b %Y}" if "strftime_now" in data.template.source else None,
        "end_tokens": tokenizer.convert_ids_to_tokens(sorted(data.end_token_ids)),
    }


def _special_tokens(data: Dataset, tokenizer) -> list[dict]:
    found = count_special_tokens(data.examples, special_ids_of(tokenizer))
    names = tokenizer.convert_ids_to_tokens([token.token_id for token in found])
    return [
        {"token": name, "id": token.token_id, "count": token.count, "targets": token.targets}
        for name, token in zip(names, found, strict=True)
    ]


def _rows(data: Dataset, tokenizer, problem: str | None, count: int) -> list[dict]:
    """Return the text of rows of each source in turn, the first ones first, as the collator hands them to the model."""
    in_turn = chain.from_iterable(zip_longest(*map(_distinct, _parts(data))))
    kept = islice((row for row in in_turn if row is not None and row.is_target.any()), count)
    examples = [sequence for row in kept for sequence in sequences_of(row)]
    if not examples:
        return []
    shown = pieces_of(collate(examples), tokenizer, special_ids_of(tokenizer))
    return [
        {
            "where": example.where,
            "tokens": len(example.token_ids),
            **_target_of(example, problem),
            "pieces": [asdict(piece) | ({"is_target": False} if problem else {}) for piece in pieces],
        }
        for example, pieces in zip(examples, shown, strict=True)
    ]


def _target_of(example: Example, problem: str | None) -> dict:
    """Return what an example is to teach: its number of target tokens, or what a head is to give for it."""
    if problem is None:
        return {"target_tokens": int(example.is_target.sum())}
    names = [example.answer] if problem == NUMBER else names_of(example, problem)
    return {"target_tokens": 0, "label": ", ".join(names) or "no label"}
