"""Full fine-tuning, of all blocks at once or one after the other: adapter.method full."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.constraints import STREAMED_TRAINED, WITH_FULL
from qlora_lite.prepare.method import MethodEntry
from qlora_lite.recipe.part import Found, Value
from qlora_lite.recipe.reference import written
from qlora_lite.recipe.schema import Recipe

if TYPE_CHECKING:
    from qlora_lite.adapters.method import AdapterMethod


class FullEntry(MethodEntry):
    """All weights of the model, or of one block at a time."""

    label = "full fine-tuning"
    settings = ("adapter.switch_every",)
    trains_base = True
    rate_share = 0.1  # from LoRA Without Regret (Thinking Machines, 2025)

    def build(self, recipe: Recipe) -> AdapterMethod:
        """See ``adapters.full.Full``."""
        from qlora_lite.adapters.full import Full

        return Full(recipe.adapter.switch_every)

    def size(self, recipe: Recipe) -> str:
        """Return whether all is trained at once."""
        return "one block at a time trained" if recipe.adapter.switch_every else "all weights trained"

    def conflicts(self, value: Value) -> Found:
        """Yield what is for frozen weights."""
        yield from _conflicts(value)


def _conflicts(value: Value) -> Found:
    switches = value("adapter", "switch_every") not in (None, 0)
    if switches and value("train", "compile") is True:
        message = "adapter.switch_every: not possible with train.compile, which would compile every block once a turn"
        yield ("adapter", "switch_every"), f"{message}; remove one of the two"
    quant = value("model", "quant")
    if quant != "none":
        said = f"model.quant = {written(quant)}" if quant else "adapter.method = full"
        yield (
            ("model", "quant") if quant else ("adapter", "method"),
            f"{said}: full fine-tuning trains 16-bit weights; write model.quant: none",
        )
    resident, optimizer = value("memory", "resident_layers"), value("train", "optimizer")
    if switches and isinstance(resident, int) and resident > 0:
        message = f"memory.resident_layers = {resident}: with adapter.switch_every all blocks are streamed, or none"
        yield ("memory", "resident_layers"), f"{message}; write 0 or all"
    if switches and isinstance(optimizer, str) and optimizer.startswith("paged_"):
        message = (
            f"train.optimizer = {optimizer}: paged memory is never given back, and each block has states of its own"
        )
        yield ("train", "optimizer"), f"{message} (adapter.switch_every); write {optimizer.removeprefix('paged_')}"
    for (section, name), only in WITH_FULL.items():
        if (given := value(section, name)) not in (None, "auto", only):
            message = f"{section}.{name} = {written(given)}: not possible with adapter.method full"
            yield (section, name), f"{message}; write {written(only)}, or remove it"
    yield from _full_and_streamed(value, resident)
    if value("model", "compute_dtype") == "float16":
        message = "model.compute_dtype = float16: full fine-tuning has no updates of float16 weights"
        yield ("model", "compute_dtype"), f"{message}; write bfloat16 or float32"


def _full_and_streamed(value: Value, resident: object) -> Found:
    in_backward = value("memory", "optimizer_in_backward") is True
    if value("memory", "stream_from") == "ranks":
        if value("adapter", "switch_every") not in (None, 0):
            message = "adapter.switch_every: not possible with memory.stream_from ranks, where each rank has a part of"
            yield ("adapter", "switch_every"), f"{message} every block; remove one of the two"
        if resident not in (None, "auto", "all", 0):
            message = f"memory.resident_layers = {resident}: with adapter.method full ranks divide all blocks, or none"
            yield ("memory", "resident_layers"), f"{message}; write 0 or all"
    elif resident not in (None, "auto", "all") and not in_backward:
        message = f"memory.resident_layers: {STREAMED_TRAINED}"
        yield ("memory", "resident_layers"), f"{message}; write memory.optimizer_in_backward: true, or all here"


FULL = FullEntry()
