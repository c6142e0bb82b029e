"""The tasks of vision encoders: a label for each picture, a class for each pixel, or embeddings for searches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qlora_lite.ext.heads.task import ONE_LABEL, PLANNED_LABELS, HeadLabels
from qlora_lite.prepare.task import Labels, ReportPart, Task
from qlora_lite.recipe.part import Found, Value
from qlora_lite.recipe.schema import Recipe

if TYPE_CHECKING:
    from qlora_lite.adapters.method import AdapterMethod
    from qlora_lite.data.readers.sources import Source
    from qlora_lite.data.tokens.examples import Dataset
    from qlora_lite.ext.heads.measure import Scorer
    from qlora_lite.models.heads import Head
    from qlora_lite.planning.machine import Machine
    from qlora_lite.prepare.moment import LabelledRows, Measured, Moment, Watch
    from qlora_lite.train.model_spec import ModelSpec, TransformerSpec
    from qlora_lite.train.workload import Workload

    from .pixels import Processor

MASKS = "segmentation"


class MaskLabels(HeadLabels):
    """A class for each pixel, which a picture of its own says."""

    def content(self, label: str) -> str:
        """Return the digest of the file."""
        return json.loads(label)["sha256"]


class PictureClasses(Task):
    """Pictures with one label each, or with one for each of their pixels.

    Args:
        name: of the task.
        labels: of its pictures.
    """

    has_tokens = False
    has_head = True
    writes_text = False
    quantizes = False
    implied = MappingProxyType({("model", "quant"): "none"})  # 4 bits save little of them
    settings = "task.labels", "data.resolution", "data.augment"
    labels: Labels

    def __init__(self, name: str, labels: Labels) -> None:
        self.name, self.labels = name, labels

    @property
    def has_masks(self) -> bool:
        """Whether each pixel has a label."""
        return self.labels.kind == MASKS

    def conflicts(self, value: Value) -> Found:
        """See ``rules``."""
        from qlora_lite.ext.heads.rules import labels, no_text

        from .rules import no_tokens

        yield from labels(value, are_exclusive=True)
        yield from no_text(value)
        yield from no_tokens(value)

    def head(self, recipe: Recipe) -> Head:
        """Return the head, with the labels of the recipe or those that stand for them in a plan."""
        from qlora_lite.models.heads import MARKS, Head

        labels = recipe.task.labels or PLANNED_LABELS
        return Head(ONE_LABEL, labels, recipe.train.seed, of_pictures=True, mark=MARKS.get(self.name))

    def workload(self, recipe: Recipe, method: AdapterMethod, spec: ModelSpec | None = None) -> Workload:
        """Return the encoder with its head."""
        from .head import picture_head
        from .mask_head import mask_head

        labels, processor = self.head(recipe).labels, self.reader(recipe)
        if self.has_masks:
            return mask_head(method, labels, processor, spec)
        return picture_head(method, labels, processor, spec)

    def spec_type(self) -> type[TransformerSpec]:
        """See ``Task``."""
        from .head import VisionSpec
        from .mask_head import MaskSpec

        return MaskSpec if self.has_masks else VisionSpec

    def plan_workload(self, recipe: Recipe, method: AdapterMethod, machine: Machine) -> Workload:
        """See ``Task``.

        Raises:
            ModelError: torch has no deterministic operators on the GPU for what the recipe asks.
        """
        if machine.device_type == "cuda" and recipe.train.deterministic:
            from .processor import check_deterministic

            check_deterministic(recipe, self.reader(recipe), method.trains_base, self.has_masks)
        return super().plan_workload(recipe, method, machine)

    def picture_size(self, recipe: Recipe) -> tuple[int, int]:
        """Return height and width of all pictures."""
        processor = self.reader(recipe)
        return processor.height, processor.width

    def resolution_multiple(self, recipe: Recipe) -> int:
        """Return the patch size."""
        from .processor import patch_size

        return patch_size(recipe)

    def reader(self, recipe: Recipe) -> Processor:
        """Return how the pictures become pixels."""
        from .processor import build_processor

        return build_processor(recipe, self.has_masks)

    def read(
        self, recipe: Recipe, sources: Sequence[Source], reader: Any, preference: str | None, max_rows: int | None
    ) -> Dataset:
        """Read pictures with their labels."""
        from qlora_lite.data.tokens.examples import read_examples

        from .examples import LabelledPictureReader

        return read_examples(sources, None, reader=LabelledPictureReader(self.labels.kind))

    def trained(self, adapter: Mapping, model: Mapping, labels: Sequence[str] | None) -> bool:
        """See ``Task``."""
        from qlora_lite.models.heads import MARKS

        marks = [name for name, mark in MARKS.items() if model.get(mark)] or ["image-classification"]
        return str(model.get("architectures")).endswith("ForImageClassification']") and self.name in marks

    def check_first_row(self, recipe: Recipe, source: Source) -> str:
        """See ``rows.check_first_row``."""
        from .rows import check_first_row

        return check_first_row(source, self.labels.kind)

    def describe_source(self, recipe: Recipe, source: Source, unused: Mapping[str, Counter[str]]) -> dict:
        """See ``rows.describe_source``."""
        from .rows import describe_source

        return describe_source(source, unused, self.labels.kind)

    @property
    def _score(self) -> Scorer:
        from qlora_lite.ext.heads.measure import score_labels

        from .mask_head import score_masks

        return score_masks if self.has_masks else score_labels

    def metrics(self, moment: Moment) -> Measured | None:
        """See ``heads.measure.head_metrics``."""
        from qlora_lite.ext.heads.measure import head_metrics

        return head_metrics(moment, self._score)

    def illustrate(self, moment: Moment, result: Measured | None) -> Measured | None:
        """See ``shown.show_pictures``."""
        from .shown import show_pictures

        return result if self.has_masks else show_pictures(moment, result)

    def evaluate(
        self, recipe: Recipe, adapter: Path | None, rows: int, reader: Any, watch: Watch | None, held_out: str | None
    ) -> tuple[dict[str, Any], Sequence[dict]]:
        """See ``heads.measure.evaluate_head``."""
        from qlora_lite.ext.heads.measure import evaluate_head

        return evaluate_head(recipe, adapter, reader, watch, held_out, self._score)

    def label(self, recipe: Recipe, adapter: Path | None, reader: Any, rows: str | Path, out: Path) -> LabelledRows:
        """See ``predict.label_pictures`` and ``predict.write_masks``."""
        from .predict import label_pictures, write_masks

        return (write_masks if self.has_masks else label_pictures)(recipe, adapter, reader, rows, out)

    def report(self, folder: Path, summary: Mapping[str, Any]) -> list[ReportPart]:
        """Return confusion matrices, and held-out pictures with what the encoder sees in them."""
        from qlora_lite.artifacts.run_files import PICTURES, read_object
        from qlora_lite.ext.heads import report as labels

        from .report import NOTE, pictures

        return [
            ReportPart("Labels", labels.confusion(summary), labels.NOTE),
            ReportPart("Pictures before and after", pictures(read_object(folder / PICTURES)), NOTE),
        ]

    def summary(self, recipe: Recipe, reader: Any) -> dict[str, Any]:
        """Return the labels."""
        return {"labels": [*self.head(recipe).labels]}


class PictureEmbeddings(PictureClasses):
    """Pictures, of which those of one label are to lie together."""

    def spec_type(self) -> type[TransformerSpec]:
        """See ``Task``."""
        from .embedding import EmbeddingSpec

        return EmbeddingSpec


CLASSIFICATION = PictureClasses("image-classification", HeadLabels(ONE_LABEL))
SEGMENTATION = PictureClasses("image-segmentation", MaskLabels(MASKS))
EMBEDDING = PictureEmbeddings("image-embedding", HeadLabels(ONE_LABEL))
