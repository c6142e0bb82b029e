"""The task of a language model, which learns to write text: task.kind language-model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_lite.prepare.task import Task
from qlora_lite.recipe.schema import GRPO, Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qlora_lite.adapters.method import AdapterMethod
    from qlora_lite.prepare.moment import Measured, Moment, Watch
    from qlora_lite.train.transformer import ModelSpec
    from qlora_lite.train.workload import Workload


class Text(Task):
    """A causal language model."""

    def workload(self, recipe: Recipe, method: AdapterMethod, spec: ModelSpec | None = None) -> Workload:
        """Return the language model with the objective of the recipe."""
        from qlora_lite.train.causal_lm import CausalLM
        from qlora_lite.train.policy import GroupPolicy, PolicyLM
        from qlora_lite.train.preference import BETAS, SFT_WEIGHTS, USUAL_BETA, Preference, PreferenceLM

        o, kind = recipe.objective, recipe.train.objective
        if kind == GRPO:
            policy = GroupPolicy(
                group_size=o.group_size,
                max_completion_tokens=o.max_completion_tokens,
                temperature=o.sampling_temperature,
                policy_loss=o.policy_loss,
                scale_rewards=o.scale_rewards,
            )
            return PolicyLM(policy, method=method, spec=spec)
        if recipe.preference is None:
            return CausalLM(method=method, spec=spec)
        preference = Preference(
            kind=kind,
            beta=BETAS.get(kind, USUAL_BETA) if o.beta == "auto" else o.beta,
            label_smoothing=o.label_smoothing,
            gamma=o.gamma,
            sft_weight=SFT_WEIGHTS.get(kind, 0.0) if o.sft_weight == "auto" else o.sft_weight,
            desirable_weight=o.desirable_weight,
            undesirable_weight=o.undesirable_weight,
        )
        return PreferenceLM(objective=preference, method=method, spec=spec)

    def metrics(self, moment: Moment) -> Measured | None:
        """See ``inference.course.text_metrics``."""
        from qlora_lite.inference.course import text_metrics

        return text_metrics(moment)

    def evaluate(
        self, recipe: Recipe, adapter: Path | None, rows: int, reader: Any, watch: Watch | None, held_out: str | None
    ) -> tuple[dict[str, Any], Sequence[dict]]:
        """See ``inference.evaluate.measure_text``."""
        from qlora_lite.inference.evaluate import measure_text

        return measure_text(recipe, adapter, rows, reader, watch, held_out)


TEXT = Text()
