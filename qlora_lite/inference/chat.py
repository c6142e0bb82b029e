"""A conversation with the adapters of one or more runs: the runs' own base model, templates and stop tokens."""

import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TextStreamer

from qlora_lite.adapters.prompt import count_virtual
from qlora_lite.artifacts.trained_run import TrainedRun
from qlora_lite.data.chat.conversation import Turn
from qlora_lite.data.chat.render import render_prompt
from qlora_lite.data.chat.template import Template
from qlora_lite.data.picture_files import decode
from qlora_lite.data.picture_reader import PictureReader
from qlora_lite.data.picture_turns import MARK
from qlora_lite.data.readers import hub
from qlora_lite.errors import DataError, tokenizer_faults
from qlora_lite.models.anatomy import position_limit, text_config
from qlora_lite.prepare.task import find_task
from qlora_lite.terminal import printable

from .generate import Sampling, answer, shown_prompt, text_of_prompt
from .multi_adapter import Tasks, load_tasks, open_runs

log = logging.getLogger("qlora_lite")
SHOWN_LETTERS = 200  # of a system message


@dataclass(slots=True)
class Session:
    """The tasks that can be used, the one in use, and the turns so far."""

    tasks: Tasks
    task: str | None  # None is the bare base
    max_new_tokens: int
    sampling: Sampling
    turns: list[Turn] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)  # files, of the turns in order
    attached: list[str] = field(default_factory=list)  # files that the next message is about

    @property
    def template(self) -> Template:
        """Return the template of the task in use."""
        return self.tasks.task(self.task).template

    def use(self, name: str) -> None:
        """Go on to another adapter; the turns stay.

        Raises:
            ModelError: there is none of this name.
        """
        self.tasks.task(name)
        self.task = name

    def attach(self, picture: str) -> None:
        """Add a picture to the next message.

        Raises:
            DataError: the model reads no pictures, or the file is none.
        """
        if self._reader is None:
            raise DataError(
                "pictures are for a run, or a recipe, of task.kind image-text-to-text; `generate --image` "
                "asks a model's folder about them too, and a recipe may name it as model.path"
            )
        decode(picture)
        self.attached.append(picture)

    def say(self, text: str) -> None:
        """Add what the user says, about the pictures that are attached, which come first."""
        self.turns.append(Turn("user", MARK * len(self.attached) + text))
        self.pictures += self.attached
        self.attached = []

    def take_back(self) -> None:
        """Forget what the user said last, with its pictures: they may be why it could not be answered."""
        self.turns.pop()
        del self.pictures[sum(turn.content.count(MARK) for turn in self.turns) :]

    def begin_again(self) -> None:
        """Forget all but the system message."""
        self.turns = [turn for turn in self.turns if turn.role == "system"]
        self.pictures, self.attached = [], []

    @property
    def _reader(self) -> PictureReader | None:
        return find_task(self.tasks.task(self.task).run.recipe).picture_reader(self.tasks.task(self.task).run.recipe)

    def reply(self, show: bool = False) -> str:
        """Answer the turns so far, and remember the answer; ``show`` prints it word by word as it comes."""
        tokenizer = self.tasks.tokenizer
        with self.tasks.using(self.task) as task:
            text = render_prompt(task.template, self.turns)
            prompt = shown_prompt(text, self.pictures, task.template, self._reader)
            room = self._room(text_of_prompt(prompt))
            streamer = _Shown(tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
            (text,) = answer(
                self.tasks.model,
                tokenizer,
                [prompt],
                room,
                task.stop,
                sampling=self.sampling,
                streamer=streamer,
            )
        self.turns.append(Turn("assistant", text))
        return text

    @tokenizer_faults()
    def _room(self, prompt: str) -> int:
        """Return how many tokens an answer may have.

        Raises:
            DataError: the model's table of positions has none left.
        """
        made_for = getattr(text_config(self.tasks.model), "max_position_embeddings", None)
        limit = position_limit(self.tasks.model)
        tokens = len(self.tasks.tokenizer(prompt, add_special_tokens=False).input_ids)
        tokens += count_virtual(self.tasks.model)
        if limit is not None and tokens >= limit:
            raise DataError(
                f"the prompt has {tokens:,} tokens, and the model has {limit:,} position embeddings: "
                "shorten it, or in a chat begin again with /new"
            )
        if made_for and tokens >= made_for:
            log.warning(
                "the prompt has %s tokens, and the model supports %s (max_position_embeddings): its answer may "
                "be useless or empty",
                f"{tokens:,}",
                f"{made_for:,}",
            )
        return self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - tokens)


class _Shown(TextStreamer):
    """Print an answer as it comes: into a pipe or a file as it is, on a terminal without what that would obey."""

    @tokenizer_faults()
    def put(self, value) -> None:
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text) if sys.stdout.isatty() else text, stream_end)


def open_session(
    runs: str | Path | Sequence[str | Path],
    system: str | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    model_path: str | None = None,
    context_tokens: int | None = None,
    template: str | None = None,
    base: bool = False,
    with_pictures: bool = False,
) -> Session:
    """Load the base model of one or more runs and their adapters for a conversation.

    Args:
        runs: run folders, adapters', recipes or models, see ``multi_adapter.open_tasks``; the first is used at first.
        system: the system message, if any.
        model_path, template, with_pictures: see ``artifacts.trained_run.open_model``.
        context_tokens: see ``inference.multi_adapter.open_tasks``.
        base: leave the adapters out at first.

    Raises:
        RecipeError: one is no such folder, or has no adapter.
        ModelError: the base model is gone, or an adapter does not fit it.
    """
    opened = open_runs(runs, model_path, unfinished=True, template=template, with_pictures=with_pictures)
    for run in opened.values() if base else ():
        run.require_base()
    tasks = load_tasks(opened, context_tokens)
    turns = [Turn("system", system)] if system else []
    if system is None:
        tell_of_system(opened)
    return Session(tasks, None if base else tasks.names[0], max_new_tokens, sampling or Sampling(), turns)


def tell_of_system(
    runs: Mapping[str, TrainedRun], lacking: str = "this conversation has none; to add it: --system"
) -> None:
    """Warn of runs whose training always had a system message.

    Args:
        runs: by name.
        lacking: what has none, and how it is added; the message follows.
    """
    for name, run in runs.items():
        if run.adapter is None:
            continue
        if any(source.path.startswith(hub.PREFIX) for source in run.recipe.data.train):
            continue  # those may have to be downloaded
        try:
            system = run.shared_system()
        except DataError:  # the rows are needed for nothing else
            continue
        if system:
            shown = shlex.quote(system) if len(system) <= SHOWN_LETTERS else f"{system[:SHOWN_LETTERS]!r}..."
            log.warning("%s: the training examples share a system message, and %s %s", name, lacking, shown)
