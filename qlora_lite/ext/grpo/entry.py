"""GRPO as a recipe names it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from qlora_lite.ext.preferences.entry import NEEDS, RATE_SHARE
from qlora_lite.prepare.objective import ObjectiveEntry
from qlora_lite.recipe.combinations import refused
from qlora_lite.recipe.part import Found, Needs, Value
from qlora_lite.recipe.schema import Recipe

if TYPE_CHECKING:
    from qlora_lite.adapters.method import AdapterMethod
    from qlora_lite.data.readers.problems import RowProblem
    from qlora_lite.data.tokens.examples import Dataset
    from qlora_lite.train.model_spec import ModelSpec
    from qlora_lite.train.workload import Workload

_NEEDS: Needs = {
    **NEEDS,
    ("task", "kind"): ("language-model",),
    ("adapter", "method"): ("lora", "dora", "full"),
    ("lora", "dropout"): (0,),
    ("train", "merge_aware"): ("off",),
    ("memory", "stream_from"): ("auto", "host", "disk"),
}


class PolicyEntry(ObjectiveEntry):
    """Group-relative policy optimization."""

    settings = tuple(
        f"objective.{name}"
        for name in (
            "rewards",
            "group_size",
            "max_completion_tokens",
            "sampling_temperature",
            "policy_loss",
            "scale_rewards",
        )
    )
    answers = True
    rate_share = RATE_SHARE

    def workload(self, recipe: Recipe, method: AdapterMethod, spec: ModelSpec | None = None) -> Workload:
        """Return the language model that answers."""
        from .policy import GroupPolicy, policy_lm

        o = recipe.objective
        policy = GroupPolicy(
            group_size=o.group_size,
            max_completion_tokens=o.max_completion_tokens,
            temperature=o.sampling_temperature,
            policy_loss=o.policy_loss,
            scale_rewards=o.scale_rewards,
        )
        return policy_lm(method, policy, spec)

    def ready(self, work: Workload, recipe: Recipe, tokenizer: Any, end_token_ids: Collection[int]) -> Workload:
        """Return the workload with what answers and what judges."""
        from .rewards import with_answers

        return with_answers(work.read_by(tokenizer), recipe.objective.rewards, tokenizer, end_token_ids)

    def row_faults(self, recipe: Recipe, *parts: Dataset | None) -> Iterator[RowProblem]:
        """See ``rows.faults``."""
        from .rows import faults

        return faults(recipe, *parts)

    def identity(self, recipe: Recipe) -> dict[str, str]:
        """Return a digest of the functions that judge."""
        from .rewards import digest_of

        return digest_of(recipe.objective.rewards)

    def check(self, recipe: Recipe) -> None:
        """See ``rewards.judges_of``."""
        from .rewards import judges_of

        judges_of(recipe.objective.rewards)

    def conflicts(self, value: Value) -> Found:
        """Yield what does not go with answers of the model's own."""
        if not value("objective", "rewards"):
            message = "train.objective = grpo: there is nothing to judge answers by"
            yield ("train", "objective"), f"{message}; write objective.rewards: FILE.py:FUNCTION"
        yield from refused(value, _NEEDS, "train.objective grpo")
        measured = value("train", "metrics") or ()
        measured = (measured,) if isinstance(measured, str) else measured
        if isinstance(measured, list | tuple) and (wrong := {"accuracy", "answer_loss"}.intersection(measured)):
            message = f"train.metrics = {', '.join(sorted(wrong))}: not measured with train.objective grpo"
            yield ("train", "metrics"), f"{message}; remove it, and measure with qlora-lite evaluate"


GRPO = PolicyEntry()
