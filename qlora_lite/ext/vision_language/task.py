"""The task of a vision-language model, which learns to write about pictures in chats: task.kind image-text-to-text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora_lite.prepare.task import Task
from qlora_lite.recipe.part import Found, Needs, Value
from qlora_lite.recipe.schema import Recipe

if TYPE_CHECKING:
    from pathlib import Path

    from qlora_lite.adapters.method import AdapterMethod
    from qlora_lite.data.picture_reader import PictureReader
    from qlora_lite.data.readers.sources import Source
    from qlora_lite.data.tokens.examples import Dataset
    from qlora_lite.prepare.moment import Measured, Moment, Watch
    from qlora_lite.train.model_spec import ModelSpec, TransformerSpec
    from qlora_lite.train.workload import Workload


_NEEDS: Needs = {
    ("adapter", "method"): ("lora", "dora"),
    ("adapter", "train_tokens"): ([],),
    ("lora", "start"): ("kaiming",),
    ("model", "quant"): ("nf4", "fp4", "none"),
    ("data", "overflow"): ("error", "drop"),
    ("data", "streaming"): (False,),
    ("train", "objective"): ("sft",),
    ("train", "compile"): (False,),
    ("train", "merge_aware"): ("off",),
}


class PictureChats(Task):
    """Chats with pictures."""

    multimodal = True
    settings = ("data.resolution",)

    def conflicts(self, value: Value) -> Found:
        """Yield what does not go with pictures in chats."""
        from qlora_lite.ext.pictures.rules import no_tokens

        return no_tokens(value, _NEEDS, "has pictures")

    def workload(self, recipe: Recipe, method: AdapterMethod, spec: ModelSpec | None = None) -> Workload:
        """Return the vision-language model."""
        from .chats import picture_chat_lm

        return picture_chat_lm(method, self.picture_reader(recipe), spec)

    def spec_type(self) -> type[TransformerSpec]:
        """See ``Task``."""
        from .chats import VisionLanguageSpec

        return VisionLanguageSpec

    def likelihood_workload(self, recipe: Recipe, virtual_tokens: int) -> Workload:
        """Return the same workload."""
        from qlora_lite.prepare.method import build_method

        return self.workload(recipe, build_method(recipe))

    def picture_reader(self, recipe: Recipe) -> PictureReader:
        """See ``reader.build_reader``."""
        from .reader import build_reader

        return build_reader(recipe)

    def reader(self, recipe: Recipe) -> Any:
        """Return the tokenizer, if the model reads pictures as the recipe asks."""
        self.picture_reader(recipe)
        return super().reader(recipe)

    def read(
        self, recipe: Recipe, sources: Sequence[Source], reader: Any, preference: str | None, max_rows: int | None
    ) -> Dataset:
        """Read chats with their pictures."""
        from qlora_lite.prepare.text_rows import read_texts

        return read_texts(recipe, sources, reader, preference, max_rows, pictures=self.picture_reader(recipe))

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


PICTURE_CHATS = PictureChats()
