"""The objectives that compare answers, or judge them, as a recipe names them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_lite.prepare.objective import ObjectiveEntry
from qlora_lite.recipe.combinations import refused
from qlora_lite.recipe.part import Found, Needs, Value
from qlora_lite.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import nn

    from qlora_lite.adapters.method import AdapterMethod
    from qlora_lite.train.model_spec import ModelSpec
    from qlora_lite.train.settings import TrainSettings
    from qlora_lite.train.workload import Workload

PAIRS, LABELS = "pairs", "labels"
NEEDS: Needs = {
    ("data", "streaming"): (False,),
    ("data", "overflow"): ("error", "drop"),
    ("data", "train_on"): ("assistant", "completion", "last"),
}
WHY = ": an example has two answers, or one that is judged"
# Of the rate of fine-tuning. LoRA's usual 5e-6 to 1e-5 of DPO is a sixtieth to a thirtieth of a 7B model's. Single runs
# of the recipe preferences, of one seed: short answers were learned at a sixteenth, none at a fortieth, and at a fifth
# all margins were reached in answers of 2.6 words. tools/experiments/preferences measures this one.
RATE_SHARE = 0.05


class PreferenceEntry(ObjectiveEntry):
    """An objective of ``ext.preferences.objective``.

    Args:
        kind: its name.
        preference, needs_reference: see ``ObjectiveEntry``.
        settings: of the section objective, beside beta.
    """

    rate_share = RATE_SHARE

    def __init__(self, kind: str, preference: str, needs_reference: bool, *settings: str) -> None:
        self.kind, self.preference, self.needs_reference = kind, preference, needs_reference
        self.settings = "objective.beta", *(f"objective.{name}" for name in settings)

    def workload(self, recipe: Recipe, method: AdapterMethod, spec: ModelSpec | None = None) -> Workload:
        """Return the language model that compares or judges."""
        from .objective import BETAS, SFT_WEIGHTS, USUAL_BETA, Preference, preference_lm

        o, kind = recipe.objective, self.kind
        preference = Preference(
            kind=kind,
            beta=BETAS.get(kind, USUAL_BETA) if o.beta == "auto" else o.beta,
            label_smoothing=o.label_smoothing,
            gamma=o.gamma,
            sft_weight=SFT_WEIGHTS.get(kind, 0.0) if o.sft_weight == "auto" else o.sft_weight,
            desirable_weight=o.desirable_weight,
            undesirable_weight=o.undesirable_weight,
        )
        return preference_lm(method, preference, spec)

    def attach(
        self, recipe: Recipe, model: nn.Module, adapter: Path, tokenizer: Any, settings: TrainSettings
    ) -> dict[str, float]:
        """See ``judge.attach_and_judge``."""
        from .judge import attach_and_judge

        return attach_and_judge(recipe, model, adapter, tokenizer, settings)

    def conflicts(self, value: Value) -> Found:
        """Yield what would take an example's answers apart."""
        yield from refused(value, NEEDS, f"train.objective {self.kind}", WHY)


DPO = PreferenceEntry("dpo", PAIRS, True, "sft_weight", "label_smoothing")
IPO = PreferenceEntry("ipo", PAIRS, True, "sft_weight")
HINGE = PreferenceEntry("hinge", PAIRS, True, "sft_weight")
ORPO = PreferenceEntry("orpo", PAIRS, False, "sft_weight")
SIMPO = PreferenceEntry("simpo", PAIRS, False, "sft_weight", "label_smoothing", "gamma")
CPO = PreferenceEntry("cpo", PAIRS, False, "sft_weight", "label_smoothing")
KTO = PreferenceEntry("kto", LABELS, True, "desirable_weight", "undesirable_weight")
