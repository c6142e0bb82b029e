"""Bottleneck adapters: adapter.method bottleneck."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qlora_lite.prepare.method import MethodEntry
from qlora_lite.recipe.schema import Recipe

if TYPE_CHECKING:
    from qlora_lite.adapters.method import AdapterMethod


class BottleneckEntry(MethodEntry):
    """Small networks behind the parts of each block."""

    label = "bottleneck adapters"
    settings = ("bottleneck",)
    rate_share = 1.5  # from sweeps of both demo models, 40 steps of E2E and SST-2 (tools/experiments/study)

    peft_types = ("BOTTLENECK",)

    def read(self, config: Mapping) -> AdapterMethod:
        """See ``adapters.saved.SavedMethod``."""
        from qlora_lite.adapters.bottleneck import Bottleneck

        return Bottleneck.described_by(config)

    def build(self, recipe: Recipe) -> AdapterMethod:
        """See ``adapters.bottleneck.Bottleneck``."""
        import torch

        from qlora_lite.adapters.bottleneck import Bottleneck

        b = recipe.bottleneck
        return Bottleneck(b.width, b.placement, b.activation, getattr(torch, b.dtype))

    def size(self, recipe: Recipe) -> str:
        """Return the width."""
        return f"width {recipe.bottleneck.width}"


BOTTLENECK = BottleneckEntry()
