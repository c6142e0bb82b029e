"""Score answers against their references, each score with its standard error.

All scores of a measurement are over the same examples and the same greedy answers, so that they can be read side by
side: an example that one of them cannot compare is left out of all. Examples with equal prompts have one answer, and
all their references count for it: BLEU takes them together, the other scores the best one. Accuracy and likelihoods are
of each example by itself.

A mean over n prompts has the sample standard error, s / sqrt(n), as lm-evaluation-harness gives it. BLEU and chrF of a
corpus are no means: their standard error is the deviation over 1,000 resamples of the prompts, with a fixed seed.
sacrebleu and rouge-score are imported where they are used: few runs need them.

Units: shares and ROUGE from 0 to 1, BLEU and chrF from 0 to 100, losses in nats per token.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib.util import find_spec
from itertools import zip_longest
from math import fsum, sqrt
from statistics import stdev
from typing import NamedTuple, TypeVar

import numpy as np

from qlora_lite.data.readers.problems import RowProblem
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import RecipeError, how_to_install

from .matching import NO_ANSWER, WHOLE, Matching, can_match, check_answers

OF_ANSWERS = "exact_match", "number_match", "accuracy", "bleu", "chrf", "rouge"  # which have to be generated
MAX_CHOICES = 32  # that are taken for a closed set where the recipe names none
_PACKAGES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score"}
_RESAMPLES, _SEED = 1000, 0
_MARK = "####"  # before the result in GSM8K
_CURRENCY = "[$€£¥]\\s?"
_SEPARATOR = re.compile(r"(?<=\d),(?=(?:\d\d,)*(?:\d{3},)*\d{3}(?!\d))")  # 1,200,000 and 12,00,000
_NUMBER = re.compile(r"(?:(?<![\w)])[-+])?(?:(?<!\w)(?<!\d\.)\d+(?:\.\d+)?|(?<![\w.])\.\d+)")
T = TypeVar("T")


class Score(NamedTuple):
    """A score, its standard error (None of a single example), how many examples (of equal prompts: one) it is over, and
    sacrebleu's signature."""

    value: float
    standard_error: float | None
    examples: int
    signature: str = ""

    def as_dict(self) -> dict[str, float | int | str | None]:
        """Return what stands in JSON."""
        return {key: value for key, value in self._asdict().items() if value != ""}


@dataclass(frozen=True, slots=True)
class Measures:
    """Say what is measured.

    Args:
        names: of metrics, as in train.metrics.
        matching: what of an answer exact match compares.
        choices: the closed set of answers for accuracy; None is that of the references.
    """

    names: tuple[str, ...] = ("exact_match",)
    matching: Matching = WHOLE
    choices: tuple[str, ...] | None = None

    @property
    def needs_answers(self) -> bool:
        """Whether a metric is of generated answers, and not of the references' likelihood alone."""
        return not {*self.names}.isdisjoint(OF_ANSWERS)

    @property
    def compared(self) -> Matching:
        """What of a reference must be there."""
        return self.matching if "exact_match" in self.names else WHOLE

    def can_compare(self, example: Example) -> bool:
        """Return whether an example has a reference that every metric can compare."""
        return can_match(example, self.compared) and (
            "number_match" not in self.names or number_of(example.answer) is not None
        )

    def closed_set(self, examples: Sequence[Example]) -> tuple[str, ...]:
        """Return the answers that accuracy chooses from.

        Args:
            examples: those that are compared.
        """
        return self.choices or tuple(sorted({choice_of(example.answer) for example in examples}))


def check_packages(names: Collection[str]) -> None:
    """Check that the packages of metrics are installed.

    Raises:
        RecipeError: one is not.
    """
    missing = {name: package for name, package in _PACKAGES.items() if name in names and find_spec(package) is None}
    if missing:
        packages = " and ".join(sorted({package.replace("_", "-") for package in missing.values()}))
        raise RecipeError(
            f"train.metrics: {', '.join(missing)} needs {packages}, which is not installed; {how_to_install('metrics')}"
        )


def check_references(examples: Sequence[Example], measures: Measures) -> tuple[list[RowProblem], bool]:
    """Look for examples that cannot be compared, among those that were asked for.

    Returns:
        What is wrong, and whether nothing can be measured, or not what was asked for. Otherwise examples that cannot
        be compared are left out.
    """
    found, is_error = check_answers(examples, measures.compared)
    if is_error:
        return found, True
    answered = [example for example in examples if can_match(example, measures.compared)]
    compared = [example for example in answered if measures.can_compare(example)]
    if lacking := len(answered) - len(compared):
        first = next(example for example in answered if not measures.can_compare(example))
        message = (
            f"the answers of {lacking} of {len(examples)} examples, this one's ending {first.answer[-40:]!r}, hold no "
            "number, and number match leaves those out"
        )
        found.append(RowProblem(first.where, NO_ANSWER, message))
    if examples and not compared:
        return found, True
    for name, look in (("accuracy", _fault_of_choices), ("rouge", _fault_of_letters)):
        if compared and name in measures.names and (fault := look(compared, measures)):
            return [*found, RowProblem(compared[0].where, NO_ANSWER, fault)], True
    return found, False


def _fault_of_choices(examples: Sequence[Example], measures: Measures) -> str | None:
    """Say why the references are not answers of a closed set."""
    choices, cure = measures.closed_set(examples), "or remove accuracy from train.metrics"
    if measures.choices is None and len(choices) > MAX_CHOICES:
        return (
            f"the {len(examples)} compared answers are {len(choices)} different ones, not a closed set; name its "
            f"answers in train.metrics_choices, {cure}"
        )
    if len(choices) < 2:
        return f"every compared answer is {choices[0]!r}; name the closed set in train.metrics_choices, {cure}"
    if len({_loosely(choice) for choice in choices}) < len(choices):
        return f"two answers of the closed set differ only in case or in a dot at their end: {', '.join(choices)}"
    other = next((example for example in examples if choice_of(example.answer) not in choices), None)
    return (
        None
        if other is None
        else (
            f"the answer {choice_of(other.answer)!r} of {other.where} is not in train.metrics_choices "
            f"({', '.join(choices)}); add it there, {cure}"
        )
    )


def _fault_of_letters(examples: Sequence[Example], _measures: Measures) -> str | None:
    if not any(re.search("[a-z0-9]", example.answer.lower()) for example in examples):
        return "ROUGE compares words of the letters a to z and digits, which no compared answer has; use chrf"
    return None


def mean(values: Sequence[float]) -> Score:
    """Return the mean of values, at least one, with its standard error."""
    count = len(values)
    return Score(fsum(values) / count, stdev(values) / sqrt(count) if count > 1 else None, count)


def numbers_of_prompts(examples: Sequence[Example]) -> list[int]:
    """Return the number of each example's prompt, of different prompts in order from 0."""
    numbers: dict[tuple, int] = {}
    keys = ((example.prompt, *(each.digest for each in example.pictures)) for example in examples)
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def by_prompt(values: Sequence[T], prompts: Sequence[int]) -> list[list[T]]:
    """Return the values of each prompt's examples, see ``numbers_of_prompts``."""
    found: dict[int, list[T]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        found.setdefault(prompt, []).append(value)
    return list(found.values())


def score_texts(
    name: str, references: Sequence[str], answers: Sequence[str], prompts: Sequence[int] | None = None
) -> dict[str, Score]:
    """Return what a metric of texts gives, by name; nothing for another metric.

    Args:
        name: of the metric, as in train.metrics.
        references: at least one.
        answers: as many; those of one prompt are equal.
        prompts: of the examples, see ``numbers_of_prompts``; None where all differ.
    """
    if name == "accuracy":
        return _accuracy(references, answers)
    known = {"number_match": _number_match, "bleu": _bleu, "chrf": _chrf, "rouge": _rouge}
    if name not in known:
        return {}
    prompts = range(len(answers)) if prompts is None else prompts
    several = [list(dict.fromkeys(each)) for each in by_prompt(references, prompts)]
    return known[name](several, [first for first, *_ in by_prompt(answers, prompts)])


def _number_match(references: Sequence[Sequence[str]], answers: Sequence[str]) -> dict[str, Score]:
    """Compare numbers by their value: strictly the one behind the mark, flexibly the last one of the answer.

    Source: lm-evaluation-harness, tasks/gsm8k (strict-match, flexible-extract), which compares their letters.
    """
    pairs = [({*map(number_of, each)} - {None}, answer) for each, answer in zip(references, answers, strict=True)]
    ways = {"number_match_strict": marked_number, "number_match_flexible": last_number}
    return {name: mean([find(answer) in right for right, answer in pairs]) for name, find in ways.items()}


def number_of(reference: str) -> Decimal | None:
    """Return the number that a reference states: behind the mark if it has one, else its last."""
    return marked_number(reference) if _MARK in reference else last_number(reference)


def marked_number(text: str) -> Decimal | None:
    """Return the number right behind the first ``####``; None where there is none."""
    found = _NUMBER.match(_plain_numbers(text.partition(_MARK)[2]).lstrip())
    return Decimal(found[0]) if found else None


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text; None where there is none."""
    found = _NUMBER.findall(_plain_numbers(text))
    return Decimal(found[-1]) if found else None


def _plain_numbers(text: str) -> str:
    """Write numbers without currency signs and thousands separators, and minus signs as hyphens."""
    text = re.sub(f"(?<=[-+]){_CURRENCY}", "", text.replace("\N{MINUS SIGN}", "-"))
    return _SEPARATOR.sub("", re.sub(_CURRENCY, " ", text))


def choice_of(answer: str) -> str:
    """Return what of an answer is looked for in a closed set: its last line, behind whatever reasoning there is."""
    return answer.strip().rpartition("\n")[2].strip()


def _loosely(choice: str) -> str:
    return choice.rstrip(".").casefold()


def _accuracy(references: Sequence[str], answers: Sequence[str]) -> dict[str, Score]:
    pairs = zip(references, answers, strict=True)
    right = [_loosely(choice_of(answer)) == _loosely(choice_of(reference)) for reference, answer in pairs]
    return {"accuracy_generated": mean(right)}


def _bleu(references: Sequence[Sequence[str]], answers: Sequence[str]) -> dict[str, Score]:
    from sacrebleu.metrics import BLEU

    return {"bleu": _of_corpus(BLEU(), references, answers)}


def _chrf(references: Sequence[Sequence[str]], answers: Sequence[str]) -> dict[str, Score]:
    from sacrebleu.metrics import CHRF

    return {"chrf": _of_corpus(CHRF(), references, answers)}


def _of_corpus(metric, references: Sequence[Sequence[str]], answers: Sequence[str]) -> Score:
    """Score a corpus, and resample its examples with replacement for the standard error.

    sacrebleu 2.6's own resampling ends with a TypeError where one of the resamples has no match at all, and gives half
    of an interval; its methods for the counts of an example, and for the score of their sums, are not public.

    Args:
        metric: sacrebleu's.
    """
    columns = list(zip_longest(*references))  # the first reference of each answer, then the second, None where it ends
    found, error, count = metric.corpus_score(answers, columns), None, len(answers)
    if count > 1:
        counts = np.array(metric._extract_corpus_statistics(answers, columns))
        draw = np.random.default_rng(_SEED).integers
        sums = (counts[draw(count, size=count)].sum(axis=0).tolist() for _ in range(_RESAMPLES))
        error = stdev(float(metric._compute_score_from_stats(each).score) for each in sums)
    return Score(float(found.score), error, count, str(metric.get_signature()))


def _rouge(references: Sequence[Sequence[str]], answers: Sequence[str]) -> dict[str, Score]:
    """Return the means of ROUGE's F-measures with the best reference for each, words unstemmed."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names)
    found = [scorer.score_multi(each, answer) for each, answer in zip(references, answers, strict=True)]
    return {name: mean([each[name].fmeasure for each in found]) for name in names}
