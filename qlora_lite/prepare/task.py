"""A kind of thing that is trained, as everything that is not its own asks for it: the interface, and its one lookup.

``task.kind`` of a recipe is a task's name in the group ``qlora_lite.tasks`` (``registry``); the package's own are found
the same way. No module of the core asks which task it has: what differs between tasks is a member here.

Recipes and rows are checked without torch, so a module that defines a task imports it within methods alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_lite.errors import RecipeError
from qlora_lite.models.locate import ModelFiles, locate
from qlora_lite.recipe.part import Part
from qlora_lite.recipe.schema import Recipe
from qlora_lite.registry import find

from .objective import find_objective

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from qlora_lite.adapters.method import AdapterMethod
    from qlora_lite.data.picture_reader import PictureReader
    from qlora_lite.data.readers.problems import RowProblem
    from qlora_lite.data.readers.sources import Source
    from qlora_lite.data.tokens.examples import Dataset
    from qlora_lite.data.tokens.storage import Example
    from qlora_lite.models.heads import Head
    from qlora_lite.models.memory_options import MemoryOptions
    from qlora_lite.models.nested import LanguagePart
    from qlora_lite.offload.stream import Ranks
    from qlora_lite.planning.machine import Machine
    from qlora_lite.train.model_spec import ModelSpec, TransformerSpec
    from qlora_lite.train.workload import Workload

    from .moment import LabelledRows, Measured, Moment, Watch


@dataclass(frozen=True)
class Encoded:
    """A run's data sets as its model takes them.

    Args:
        recipe: with what the data says of it.
        parts: the data sets, in order.
        kept: what the task needs later, while it trains.
    """

    recipe: Recipe
    parts: tuple[Dataset, ...]
    kept: Mapping[str, Any]


class ReportPart(NamedTuple):
    """A part of a run's page: HTML, none where there is nothing to show, and a line about it."""

    title: str
    html: str
    note: str


class Labels:
    """What examples are labelled with. The defaults are those of labels that nothing is to be known of beforehand.

    Args:
        kind: see ``data.labels``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def name(self, recipe: Recipe, data: Dataset) -> Recipe:
        """Return a recipe with the names of its labels, where it leaves them to its training rows."""
        return recipe

    def content(self, label: str) -> str:
        """Return what tells a label from others, wherever its files lie."""
        return label

    def faults(self, recipe: Recipe, data: Dataset, eval_data: Dataset | None) -> Iterator[RowProblem]:
        """Yield what makes labels useless for training.

        Args:
            recipe: with the names of its labels.
        """
        return iter(())

    def warnings(self, recipe: Recipe, data: Dataset) -> Iterator[RowProblem]:
        """Yield what of labels is worth a warning."""
        return iter(())

    def balance(self, recipe: Recipe, data: Dataset, eval_data: Dataset | None) -> dict | None:
        """Return how labels are spread over training and evaluation rows, for the report on data; None says nothing."""
        return None


class Task(Part):
    """A kind of thing that is trained. What raises here is a task's own; the rest is that of a language model of text.

    Args:
        has_tokens: whether examples are sequences of tokens, which are packed, and not each of one size.
        has_head: whether a head labels what the model reads.
        writes_text: whether models of the kind answer prompts.
        multimodal: whether the vision tower of a model is loaded with it.
        draws: whether models of the kind draw pictures of prompts.
        quantizes: whether the model is stored in 4 bit where a recipe does not say how.
        labels: what examples are labelled with; None of examples that are texts to write.
        preference: of examples that are always compared or judged, see ``ObjectiveEntry``.
    """

    has_tokens: bool = True
    has_head: bool = False
    writes_text: bool = True
    multimodal: bool = False
    draws: bool = False
    quantizes: bool = True
    labels: Labels | None = None
    preference: str | None = None

    @property
    def label_kind(self) -> str | None:
        """What labels are, see ``data.labels``; None where there are none."""
        return self.labels.kind if self.labels else None

    # The model.

    def locate(self, recipe: Recipe) -> ModelFiles:
        """Return the files of a recipe's base model.

        Raises:
            ModelError: they are not there.
        """
        return locate(recipe.model.path, recipe.model.revision)

    def head(self, recipe: Recipe) -> Head | None:
        """Return the head that labels what the model reads; None of a model that writes or draws."""
        return None

    def describe_model(self, recipe: Recipe) -> LanguagePart:
        """Return a recipe's model without weights: its configuration, and where it stands within a larger one.

        Raises:
            ModelError: it cannot be read, or is not of the kind.
        """
        from .transformer import describe_model

        return describe_model(recipe, self.head(recipe), self.multimodal)

    def skeleton(self, recipe: Recipe, dtype: torch.dtype) -> nn.Module:
        """Return a recipe's base model on the meta device, its layers stored as those of the loaded one are.

        Raises:
            ModelError: a pattern of model.keep_16bit matches no layer, or the model has one in 4 bit only.
        """
        from .transformer import build_skeleton

        return build_skeleton(recipe, self.describe_model(recipe), dtype)

    def load(
        self, recipe: Recipe, device: torch.device | str, dtype: torch.dtype, in_files: bool, use_cache: bool = True
    ) -> nn.Module:
        """Load a recipe's base model.

        Args:
            device: where it is to be, as far as it can be loaded there.
            in_files: leave blocks that are quantized in the file of the prepared model.
            use_cache: keep and reuse the quantized model on disk.
        """
        from .transformer import load

        return load(recipe, device, dtype, in_files, use_cache, self.head(recipe), self.multimodal)

    def place(
        self,
        recipe: Recipe,
        model: nn.Module,
        device: torch.device,
        options: MemoryOptions,
        trains_base: bool = False,
        ranks: Ranks | None = None,
    ) -> nn.Module:
        """Move a loaded model to its device, but for what memory options keep elsewhere; return it.

        Args:
            trains_base, ranks: see ``models.memory_options.place``.
        """
        from .transformer import place

        return place(recipe, model, device, options, trains_base, ranks, self.multimodal)

    def compute_dtype(self, recipe: Recipe, device: torch.device) -> torch.dtype:
        """Return the type that a recipe's model computes in on a device of this machine."""
        from .transformer import compute_dtype

        return compute_dtype(recipe, device, self.multimodal)

    def auto_learning_rate(self, recipe: Recipe) -> float:
        """Return the peak learning rate that auto means for a recipe.

        Raises:
            ModelError: the model's configuration is not known here, or says no hidden size.
        """
        from .transformer import auto_learning_rate

        return auto_learning_rate(recipe, self.multimodal)

    def fits_model(self, path: str) -> bool:
        """Return whether a model that is named without a recipe is one of the kind, and of no other."""
        return False

    def trained(self, adapter: Mapping, model: Mapping, labels: Sequence[str] | None) -> bool:
        """Return whether an adapter that lies alone in its folder is one of the kind, and no language model's.

        Args:
            adapter: what ``adapter_config.json`` says.
            model: what ``config.json`` beside it says; empty without one.
            labels: those that it names.
        """
        return False

    # What is trained.

    def workload(self, recipe: Recipe, method: AdapterMethod, spec: ModelSpec | None = None) -> Workload:
        """Return what a recipe trains.

        Args:
            spec: of the model, for a plan.
        """
        raise NotImplementedError

    def spec_type(self) -> type[TransformerSpec]:
        """Return the kind of model of transformers that a plan is made of."""
        from qlora_lite.train.causal_lm import TextSpec

        return TextSpec

    def likelihood_workload(self, recipe: Recipe, virtual_tokens: int) -> Workload:
        """Return what computes the likelihood of a recipe's answers, whatever it learns them by.

        Args:
            virtual_tokens: that the model puts before each row.
        """
        from qlora_lite.train.causal_lm import causal_lm

        work = causal_lm()
        return replace(work, batches=work.batches.behind(virtual_tokens))

    def plan_workload(self, recipe: Recipe, method: AdapterMethod, machine: Machine) -> Workload:
        """Return what a recipe trains for a plan on a machine, with the model that it would have there.

        Raises:
            ModelError: the machine or the model cannot do what the recipe asks for.
        """
        from .transformer import plan_spec

        spec = plan_spec(self.spec_type(), recipe, self.describe_model(recipe).config, method, machine)
        return self.workload(recipe, method, spec)

    def picture_size(self, recipe: Recipe) -> tuple[int, int] | None:
        """Return height and width of the largest picture in pixels, where examples are pictures."""
        return None

    def resolution_multiple(self, recipe: Recipe) -> int:
        """Return what ``data.resolution`` has to be a multiple of; 0 where pictures have one size alone."""
        return 0

    def max_resolution(self, recipe: Recipe) -> float:
        """Return the largest ``data.resolution`` that the model can compute, in pixels."""
        return float("inf")

    # Rows.

    def reader(self, recipe: Recipe) -> Any:
        """Return what makes a model's inputs of rows: a tokenizer, or the processor of pictures.

        Raises:
            ModelError: it cannot be loaded, or the model is not of the kind.
        """
        from qlora_lite.models.tokenizer import load_tokenizer

        return load_tokenizer(recipe.model.path, recipe.model.revision, recipe.adapter.train_tokens)

    def picture_reader(self, recipe: Recipe) -> PictureReader | None:
        """Return what reads the pictures of chats; None where they have none.

        Raises:
            ModelError: the model is of no family that is known, or sees no pictures of ``data.resolution``.
        """
        return None

    def read(
        self, recipe: Recipe, sources: Sequence[Source], reader: Any, preference: str | None, max_rows: int | None
    ) -> Dataset:
        """Read rows; what is wrong with them is noted, not raised.

        Args:
            reader: of ``reader``.
            preference: "pairs" or "labels" where answers are compared or judged.
            max_rows: of each source; None reads all.
        """
        from .text_rows import read_texts

        return read_texts(recipe, sources, reader, preference, max_rows, self.label_kind)

    def check_first_row(self, recipe: Recipe, source: Source) -> str:
        """Check the first row of a source as ``read`` would read it, and return its format.

        Raises:
            DataError: a file cannot be read, its columns are not known, or the row does not fit them.
        """
        from qlora_lite.data.chat.row_formats import check_first_row

        return check_first_row(source, find_preference(recipe))

    def describe_source(self, recipe: Recipe, source: Source, unused: Mapping[str, Counter[str]]) -> dict:
        """Return what the report on data says of a source: path, format, weight and notes.

        Args:
            unused: what its rows hold that is not looked at.
        """
        from .text_rows import describe_source

        return describe_source(source, unused, find_preference(recipe))

    # A run, and what is trained by it.

    def encode(self, recipe: Recipe, reader: Any, parts: Sequence[Dataset], watch: Watch | None = None) -> Encoded:
        """Compute once what every step would compute of the rows again.

        Args:
            parts: training rows, then others.
            watch: told how far this is.
        """
        return Encoded(recipe, tuple(parts), {})

    def ready(
        self, work: Workload, recipe: Recipe, reader: Any, rows: Sequence[Example], end_token_ids: Collection[int]
    ) -> Workload:
        """Return the workload of a plan with what training needs and a plan does not."""
        return work.read_by(reader)

    def metrics(self, moment: Moment) -> Measured | None:
        """Return the scores of the model on evaluation rows at a moment of a run; None where none are asked for.

        Raises:
            DoesNotFitError, ModelError: it cannot be measured, and training has not begun.
        """
        return None

    def illustrate(self, moment: Moment, result: Measured | None) -> Measured | None:
        """Write down for the report, before and after training, what scores do not show; return the scores.

        What hinders it is a warning.
        """
        return result

    def save_model(
        self,
        recipe: Recipe,
        model: nn.Module,
        folder: Path,
        reader: Any,
        end_token_ids: Collection[int],
        elsewhere: Mapping[str, Any],
    ) -> None:
        """Write a whole model that was trained.

        Args:
            elsewhere: tensors that are not in the model's memory, by name.
        """
        from qlora_lite.models.save import save_model

        save_model(model, folder, reader, end_token_ids, elsewhere)

    def save_beside(self, model: nn.Module, folder: Path) -> None:
        """Write beside a saved adapter what programs for models of the kind ask for."""

    def evaluate(
        self, recipe: Recipe, adapter: Path | None, rows: int, reader: Any, watch: Watch | None, held_out: str | None
    ) -> tuple[dict[str, Any], Sequence[dict]]:
        """Measure a recipe's model on its evaluation rows, see ``inference.evaluate.measure_recipe``.

        Raises:
            RecipeError: models of the kind are not evaluated by themselves.
        """
        raise RecipeError(f"task.kind {recipe.task.kind}: the run itself measures the loss on data.eval")

    def label(self, recipe: Recipe, adapter: Path | None, reader: Any, rows: str | Path, out: Path) -> LabelledRows:
        """Label the rows of a file, see ``inference.label.label_rows``; of a task that has a head.

        Args:
            recipe: with the names of its labels.
        """
        raise NotImplementedError

    def draw(
        self,
        recipe: Recipe,
        adapter: Path | None,
        device: torch.device,
        prompts: Sequence[str],
        seed: int,
        changed: Mapping[str, float],
    ) -> list[np.ndarray]:
        """Draw prompts, see ``inference.draw.draw_prompts``; of a task that draws."""
        raise NotImplementedError

    def report(self, folder: Path, summary: Mapping[str, Any]) -> list[ReportPart]:
        """Return what a run's page shows of the task's own.

        Args:
            folder: of the run, whose files may be cut short or missing.
            summary: of the run, likewise.
        """
        return []

    def summary(self, recipe: Recipe, reader: Any) -> dict[str, Any]:
        """Return what the summary of a run says of the task's own, in JSON's terms."""
        return {}


def find_task(recipe: Recipe) -> Task:
    """Return the task of a recipe.

    Raises:
        ExtensionError, ModelError: see ``registry.find``.
    """
    return find("tasks", recipe.task.kind, Task)


def find_preference(recipe: Recipe) -> str | None:
    """Return what preferences are told by, "pairs" or "labels"; None where answers are imitated."""
    return find_task(recipe).preference or find_objective(recipe).preference


def name_labels(recipe: Recipe, data: Dataset) -> Recipe:
    """Return a recipe with the names of its labels, where it leaves them to its training rows."""
    labels = find_task(recipe).labels
    return labels.name(recipe, data) if labels else recipe


def sequence_tokens(recipe: Recipe) -> int:
    """Return the length of a packed sequence; where examples have no tokens and each counts as one, how many of them
    are evaluated at once."""
    return recipe.data.max_tokens if find_task(recipe).has_tokens else recipe.train.micro_batch_size


def packs(recipe: Recipe) -> bool:
    """Return whether a sequence holds several examples."""
    return recipe.data.packing and find_task(recipe).has_tokens
