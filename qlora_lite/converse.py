"""A conversation with a run's adapter: the run's own base model, template and stop tokens."""

from dataclasses import dataclass, field

from torch import nn
from transformers import TextStreamer

from .build import build_model
from .data.formats import Turn
from .data.render import render_prompt
from .data.template import Template, choose_template
from .generate import Sampling, answer, stop_ids
from .models.tokenizer import load_tokenizer
from .runs import open_run


@dataclass(slots=True)
class Session:
    """A model and the turns so far."""

    model: nn.Module
    tokenizer: object
    template: Template
    stop: list[int]
    max_new_tokens: int
    sampling: Sampling
    turns: list[Turn] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Add what the user says."""
        self.turns.append(Turn("user", text))

    def reply(self, show: bool = False) -> str:
        """Answer the turns so far, and remember the answer; ``show`` prints it word by word as it comes."""
        prompt = render_prompt(self.template, self.turns)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
        (text,) = answer(
            self.model,
            self.tokenizer,
            [prompt],
            self.max_new_tokens,
            self.stop,
            sampling=self.sampling,
            streamer=streamer,
        )
        self.turns.append(Turn("assistant", text))
        return text


def open_session(run, system: str | None = None, max_new_tokens: int = 256, temperature: float = 0.0) -> Session:
    """Load a run's base model and best adapter for a conversation.

    Args:
        run: a run folder.
        system: the system message, if any.

    Raises:
        RecipeError: it is not a run folder, or has no adapter.
        ModelError: the base model is gone, or the adapter does not fit it.
    """
    opened = open_run(run)
    recipe = opened.recipe
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision)
    template = choose_template(tokenizer, recipe.data.template)
    turns = [Turn("system", system)] if system else []
    model = build_model(recipe, opened.adapter)
    stop = stop_ids(model, tokenizer, opened.end_token_ids)
    return Session(model, tokenizer, template, stop, max_new_tokens, Sampling(temperature), turns)
