"""Several runs over one base model in memory: their adapters, templates and stop tokens, swapped by name.

tasks = open_tasks(["runs/summaries", "runs/translations"])
tasks.answer(["summaries", "translations", None], [turns, turns, turns], max_new_tokens=64)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qlora_lite.adapters.lora.start import first_sum_of
from qlora_lite.adapters.lora.switch import add_switch
from qlora_lite.adapters.prompt import SwitchedTokens, virtual_tokens
from qlora_lite.adapters.read import Adapter, warn_of_other_split
from qlora_lite.adapters.saved import Saved
from qlora_lite.adapters.switch import Switch
from qlora_lite.artifacts.trained_run import TrainedRun, open_model
from qlora_lite.data.chat.conversation import Turn
from qlora_lite.data.chat.render import render_prompt
from qlora_lite.data.chat.template import Template
from qlora_lite.errors import DataError, ModelError, RecipeError
from qlora_lite.models.memory_options import stream_of
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.prepare.model import build_to_use
from qlora_lite.quant.linear import arrange_weights

from .evaluate import context_tokens_of
from .generate import Sampling, answer, stop_ids

BASE = "base"  # what the bare model is called beside the runs


@dataclass(frozen=True, slots=True)
class Task:
    """What one run adds to the base: its template, the tokens that end an answer, and the run itself.

    Of a bare base it is that one's template, and no adapter.
    """

    run: TrainedRun
    template: Template
    stop: tuple[int, ...]
    adapter_bytes: int


@dataclass(frozen=True, slots=True)
class Tasks:
    """A base model with the adapters of several runs.

    Args:
        model: the base, its adapted layers wrapped.
        tokenizer: the base's.
        switch: says which adapter is used.
        by_name: the tasks in the order they were given.
    """

    model: nn.Module
    tokenizer: object
    switch: Switch
    by_name: dict[str, Task]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the tasks."""
        return tuple(self.by_name)

    @property
    def has_base(self) -> bool:
        """Whether the base model is there without what was trained."""
        return all(task.run.has_base for task in self.by_name.values())

    def task(self, name: str | None) -> Task:
        """Return a task; None is the bare base, prompted as the first task is.

        Raises:
            ModelError: there is none of this name.
        """
        if name is None:
            return next(iter(self.by_name.values()))
        if name not in self.by_name:
            raise ModelError(f"there is no adapter {name!r}; there are {', '.join(self.names)}")
        return self.by_name[name]

    def virtual_tokens(self, name: str | None) -> int:
        """Return how many virtual tokens an adapter puts before every row; another one may be in use."""
        part = virtual_tokens(self.model)
        return part.counts.get(name or "", 0) if isinstance(part, SwitchedTokens) else 0

    @contextmanager
    def using(self, name: str | None) -> Iterator[Task]:
        """Use one task's adapter inside the block."""
        task = self.task(name)
        with self.switch.using(name):
            yield task

    def answer(
        self,
        names: Sequence[str | None],
        conversations: Sequence[Sequence[Turn]],
        max_new_tokens: int,
        batch_size: int = 32,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """Answer conversations in common batches, each with the adapter of its own name; None is the bare base.

        Raises:
            ModelError: a name is not there, the tasks of a call end their answers with different tokens, or the model
                cannot compute rows with different adapters together.
            DataError: a conversation is invalid, or a template refuses it.
        """
        if len(names) != len(conversations):
            raise ModelError(f"{len(names)} names are given for {len(conversations)} conversations; give one each")
        if not all(isinstance(turn, Turn) for turns in conversations for turn in turns):
            raise DataError('a conversation is a list of turns, such as [qlora_lite.Turn("user", "Hello")]')
        tasks = [self.task(name) for name in names]
        if len({task.stop for task in tasks}) > 1:
            raise ModelError("these adapters end their answers with different tokens; answer them separately")
        alike = names[0] if len(set(names)) == 1 else None
        if alike is None and any(map(self.virtual_tokens, set(names))):
            raise ModelError("an adapter with virtual tokens shares no batch with another one; answer them separately")
        prompts = [render_prompt(task.template, turns) for task, turns in zip(tasks, conversations, strict=True)]
        stop = tasks[0].stop if tasks else ()

        def choose(rows: list[int]) -> None:
            self.switch.use_rows([names[row] for row in rows])

        with self.switch.using(alike):
            return answer(
                self.model, self.tokenizer, prompts, max_new_tokens, stop, batch_size, sampling, before_batch=choose
            )


def open_tasks(
    runs: str | Path | Sequence[str | Path | TrainedRun],
    model_path: str | None = None,
    unfinished: bool = False,
    context_tokens: int | None = None,
    template: str | None = None,
) -> Tasks:
    """Load the base model that runs share, with all their adapters.

    Args:
        runs, model_path, unfinished, template: see ``open_runs``.
        context_tokens: see ``load_tasks``.

    Raises:
        RecipeError: a run cannot be used.
        ModelError: the runs do not share a base, or an adapter does not fit it.
    """
    return load_tasks(open_runs(runs, model_path, unfinished, template), context_tokens)


def open_runs(
    runs: str | Path | Sequence[str | Path | TrainedRun],
    model_path: str | None = None,
    unfinished: bool = False,
    template: str | None = None,
    with_pictures: bool = False,
) -> dict[str, TrainedRun]:
    """Open runs over one base model by the names of their tasks; nothing of the model is loaded.

    Args:
        runs: one or more run folders, or adapters' in the PEFT format, or recipes or models for their bare base; a
            task's name is its folder's or file's, or the path as given where two have the same. Some may be open
            already.
        model_path, unfinished, template, with_pictures: see ``artifacts.trained_run.open_model``.

    Raises:
        RecipeError: a run cannot be used.
        ModelError: the runs do not share a base.
    """
    runs = [runs] if isinstance(runs, str | Path) else runs
    if not runs:
        raise RecipeError("no run is given; name a run folder, or an adapter's")
    how = model_path, unfinished, template, (), with_pictures
    opened = [run if isinstance(run, TrainedRun) else open_model(run, *how) for run in runs]
    _check_one_base(opened)
    plain = [run.name for run in opened]
    names = [run.name if plain.count(run.name) == 1 else str(path) for run, path in zip(opened, runs, strict=True)]
    if len(set(names)) < len(names):
        raise ModelError(f"the same run is given twice: {', '.join(names)}")
    return dict(zip(names, opened, strict=True))


def load_tasks(opened: dict[str, TrainedRun], context_tokens: int | None = None) -> Tasks:
    """Load the base model of open runs, with all their adapters.

    Args:
        opened: by the names of the tasks.
        context_tokens: of the longest prompt with its answer that a GPU must have room for, before weights; None is
            the longest row that one of the runs may have.

    Raises:
        ModelError: an adapter does not fit the base model.
    """
    model, switch, adapters = load_switched(opened, context_tokens)
    first = next(iter(opened.values()))
    m, new_tokens = first.recipe.model, {run.recipe.adapter.train_tokens for run in opened.values()} - {()}
    if len(new_tokens) > 1:
        raise ModelError(
            "these runs have different adapter.train_tokens, and one tokenizer cannot serve them: use each alone"
        )
    tokenizer = load_tokenizer(m.path, m.revision, *new_tokens)
    tasks = {
        name: Task(
            run,
            run.template(tokenizer),
            tuple(stop_ids(model, tokenizer, run.end_token_ids)),
            adapters[name].nbytes,
        )
        for name, run in opened.items()
    }
    return Tasks(model, tokenizer, switch, tasks)


def load_switched(
    opened: dict[str, TrainedRun], context_tokens: int | None = None
) -> tuple[nn.Module, Switch, dict[str, Adapter | Saved]]:
    """Return the base model of open runs with all their adapters, their switch and the adapters; see ``load_tasks``."""
    first = next(iter(opened.values()))
    skeleton = first.skeleton()
    adapters = {name: run.read_adapter(skeleton) for name, run in opened.items()}
    longest = max(context_tokens_of(run.recipe) for run in opened.values())
    with_adapter = [run.adapter for run in opened.values() if run.adapter]
    model = build_to_use(first.recipe, with_adapter, context_tokens or longest)
    for folder in with_adapter:
        warn_of_other_split(folder, first_sum_of(model))
    switch = add_switch(model, adapters, in_place=stream_of(model) is None)
    arrange_weights(model)
    return model, switch, adapters


def _check_one_base(runs: Sequence[TrainedRun]) -> None:
    """Raise unless all runs were trained on the same weights, quantised in the same way."""

    def words(found: tuple) -> str:
        fingerprint, quant, double_quant, kept, head, dtype = found
        return (
            f"fingerprint {fingerprint}, model.quant {quant}{' with double_quant' if double_quant else ''}"
            f"{f', keep_16bit {list(kept)}' if kept else ''}{', 4-bit head' if head else ''}, computed in "
            f"{str(dtype).removeprefix('torch.')}"
        )

    def base(run: TrainedRun) -> tuple:
        quant, double_quant = run.quantization
        m, double_quant = run.recipe.model, double_quant if quant != "none" else None
        kept = tuple(sorted(m.keep_16bit))
        return run.fingerprint, quant, double_quant, kept, m.quant_head, run.compute_dtype

    first = runs[0]
    for run in runs[1:]:
        if base(run) != base(first):
            said = [f"{each.name} on {each.files.name}, {words(base(each))}" for each in (first, run)]
            raise ModelError(f"these runs were trained on different bases and cannot share one: {'; '.join(said)}")
