"""Virtual tokens: adapter.method prompt (prompt tuning and p-tuning) and prefix (prefix tuning)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qlora_lite.errors import ModelError
from qlora_lite.prepare.method import MethodEntry
from qlora_lite.recipe.part import Found, Value
from qlora_lite.recipe.schema import SHORTEST_ROW, Data, Prompt, Recipe

if TYPE_CHECKING:
    from qlora_lite.adapters.method import AdapterMethod


class VirtualEntry(MethodEntry):
    """Tokens that are trained, before every row.

    Args:
        name: of the method.
        rate: a learning rate to begin with, as a recipe would write it: no rule is known.
    """

    settings = ("prompt",)

    def __init__(self, name: str, label: str, rate: str, peft_types: tuple[str, ...]) -> None:
        self.name, self.label, self.rate, self.peft_types = name, label, rate, peft_types

    def read(self, config: Mapping) -> AdapterMethod:
        """See ``adapters.saved.SavedMethod``."""
        from qlora_lite.adapters.prefix import PrefixTuning
        from qlora_lite.adapters.prompt import PromptTuning

        return (PrefixTuning if self.name == "prefix" else PromptTuning).described_by(config)

    def build(self, recipe: Recipe) -> AdapterMethod:
        """See ``adapters.prompt.PromptTuning`` and ``adapters.prefix.PrefixTuning``."""
        from qlora_lite.adapters.prefix import PrefixTuning
        from qlora_lite.adapters.prompt import PromptTuning

        p, initial = recipe.prompt, _initial_tokens(recipe)
        if self.name == "prefix":
            return PrefixTuning(p.virtual_tokens, initial)
        return PromptTuning(p.virtual_tokens, initial, p.encoder_width)

    def virtual_tokens(self, recipe: Recipe) -> int:
        """Return ``prompt.virtual_tokens``."""
        return recipe.prompt.virtual_tokens

    def size(self, recipe: Recipe) -> str:
        """Return how many tokens there are."""
        return f"{recipe.prompt.virtual_tokens} virtual tokens"

    def conflicts(self, value: Value) -> Found:
        """Yield a rate that is left open, and more tokens than there is room for."""
        if value("train", "learning_rate") in (None, "auto"):
            message = f"adapter.method = {self.name}: train.learning_rate auto is not known for virtual tokens"
            yield ("adapter", "method"), f"{message}; write a number there, such as {self.rate}"
        if self.name == "prefix" and value("prompt", "encoder_width") is not None:
            message = "prompt.encoder_width: only with adapter.method prompt"
            yield ("prompt", "encoder_width"), f"{message}; remove one of the two"
        own = value("prompt", "virtual_tokens"), value("data", "max_tokens")
        defaults = Prompt.model_fields["virtual_tokens"].default, Data.model_fields["max_tokens"].default
        tokens, room = (default if given is None else given for given, default in zip(own, defaults, strict=True))
        if isinstance(tokens, int) and isinstance(room, int) and room - tokens < SHORTEST_ROW:
            message = f"prompt.virtual_tokens = {tokens}: leaves {room - tokens} of data.max_tokens {room} for a row"
            yield ("prompt", "virtual_tokens"), f"{message}; raise data.max_tokens"


def _initial_tokens(recipe: Recipe) -> tuple[int, ...]:
    """Return the tokens of ``prompt.init_text``; none without a tokenizer, in a plan of what is not there yet."""
    from qlora_lite.models.tokenizer import load_tokenizer

    text, m = recipe.prompt.init_text, recipe.model
    if not text:
        return ()
    try:
        return tuple(load_tokenizer(m.path, m.revision)(text, add_special_tokens=False).input_ids)
    except ModelError:
        return ()


PROMPT = VirtualEntry("prompt", "prompt tuning", "2e-2", ("PROMPT_TUNING", "P_TUNING"))
PREFIX = VirtualEntry("prefix", "prefix tuning", "5e-2", ("PREFIX_TUNING",))
