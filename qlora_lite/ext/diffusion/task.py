"""The task of a denoiser, which learns to draw pictures with captions: task.kind image-generation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_lite.errors import RecipeError
from qlora_lite.models.locate import ModelFiles
from qlora_lite.prepare.task import Encoded, Labels, ReportPart, Task
from qlora_lite.recipe.part import Found, Value
from qlora_lite.recipe.schema import Recipe

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from qlora_lite.adapters.method import AdapterMethod
    from qlora_lite.data.captions import Fit
    from qlora_lite.data.readers.sources import Source
    from qlora_lite.data.tokens.examples import Dataset
    from qlora_lite.models.memory_options import MemoryOptions
    from qlora_lite.offload.stream import Ranks
    from qlora_lite.planning.machine import Machine
    from qlora_lite.prepare.moment import Measured, Moment, Watch
    from qlora_lite.train.model_spec import ModelSpec
    from qlora_lite.train.workload import Workload

    from .denoisers import DenoiserModel

LORA_RATE, FULL_RATE = 1e-4, 1e-5  # train.learning_rate auto: what diffusers' scripts recommend


class Drawing(Task):
    """Pictures with captions."""

    has_tokens = False
    writes_text = False
    draws = True
    settings = "task.labels", "data.resolution", "data.buckets", "data.caption", "diffusion"
    labels = Labels("captions")

    def conflicts(self, value: Value) -> Found:
        """See ``rules``."""
        from .rules import conflicts

        return conflicts(value)

    def locate(self, recipe: Recipe) -> ModelFiles:
        """Return the files of the pipeline."""
        from .spec import recipe_pipeline

        return recipe_pipeline(recipe, with_weights=True).files(recipe.model.path)

    def skeleton(self, recipe: Recipe, dtype: torch.dtype) -> DenoiserModel:
        """Return the denoiser on the meta device."""
        from .denoisers import meta_denoiser
        from .spec import recipe_spec

        return meta_denoiser(recipe_spec(recipe, dtype))

    def load(
        self, recipe: Recipe, device: torch.device | str, dtype: torch.dtype, in_files: bool, use_cache: bool = True
    ) -> DenoiserModel:
        """Load the denoiser into host memory."""
        from .denoisers import load_denoiser
        from .spec import recipe_pipeline, recipe_spec

        return load_denoiser(recipe_pipeline(recipe, with_weights=True).denoiser, recipe_spec(recipe, dtype))

    def place(
        self,
        recipe: Recipe,
        model: nn.Module,
        device: torch.device,
        options: MemoryOptions,
        trains_base: bool = False,
        ranks: Ranks | None = None,
    ) -> nn.Module:
        """Move the denoiser to its device."""
        from qlora_lite.models.memory_options import place

        blocks = [model.get_submodule(path) for path in model.block_paths()]
        return place(model, device, options, blocks, trains_base=trains_base)

    def compute_dtype(self, recipe: Recipe, device: torch.device) -> torch.dtype:
        """Return bfloat16 or float32."""
        from qlora_lite.models.load import resolve_compute_dtype

        from .spec import in_float32_or_bfloat16

        return in_float32_or_bfloat16(resolve_compute_dtype(recipe.model.compute_dtype, device))

    def auto_learning_rate(self, recipe: Recipe) -> float:
        """Return what is usual for denoisers of any width."""
        return FULL_RATE if recipe.adapter.method == "full" else LORA_RATE

    def workload(self, recipe: Recipe, method: AdapterMethod, spec: ModelSpec | None = None) -> Workload:
        """Return the denoiser with its loss."""
        from qlora_lite.models.load import resolve_device

        from .spec import build_denoiser

        return build_denoiser(recipe, method, self.compute_dtype(recipe, resolve_device(recipe.model.device)))

    def plan_workload(self, recipe: Recipe, method: AdapterMethod, machine: Machine) -> Workload:
        """See ``Task``."""
        import torch

        from .spec import build_denoiser, in_float32_or_bfloat16

        stated = recipe.model.compute_dtype
        dtype = in_float32_or_bfloat16(machine.dtype) if stated == "auto" else getattr(torch, stated)
        return build_denoiser(recipe, method, dtype)

    def picture_size(self, recipe: Recipe) -> tuple[int, int]:
        """Return height and width of the largest picture."""
        return self.reader(recipe).largest

    def resolution_multiple(self, recipe: Recipe) -> int:
        """See ``spec.resolution_multiple``."""
        from .spec import resolution_multiple

        return resolution_multiple(recipe)

    def max_resolution(self, recipe: Recipe) -> float:
        """See ``spec.largest_edge``."""
        from .spec import largest_edge

        return largest_edge(recipe)

    def reader(self, recipe: Recipe) -> Fit:
        """Return what cuts the pictures."""
        from .spec import build_fit

        return build_fit(recipe)

    def read(
        self, recipe: Recipe, sources: Sequence[Source], reader: Fit, preference: str | None, max_rows: int | None
    ) -> Dataset:
        """Read pictures with their captions."""
        from qlora_lite.data.tokens.examples import read_examples
        from qlora_lite.ext.pictures.examples import LabelledPictureReader

        return read_examples(sources, None, reader=LabelledPictureReader(self.labels.kind, reader))

    def fits_model(self, path: str) -> bool:
        """Return whether it is a pipeline's folder, or a known pipeline."""
        from qlora_lite.models.families import known_pipelines

        if Path(path).is_dir():
            return (Path(path) / "model_index.json").is_file()
        return not Path(path).exists() and path in known_pipelines()

    def check_first_row(self, recipe: Recipe, source: Source) -> str:
        """See ``pictures.rows.check_first_row``."""
        from qlora_lite.ext.pictures.examples import with_metadata
        from qlora_lite.ext.pictures.rows import check_first_row

        return check_first_row(with_metadata(source), self.labels.kind, recipe.data.caption is None)

    def describe_source(self, recipe: Recipe, source: Source, unused: Mapping[str, Counter[str]]) -> dict:
        """See ``pictures.rows.describe_source``."""
        from qlora_lite.ext.pictures.rows import describe_source

        return describe_source(source, unused, self.labels.kind)

    def encode(self, recipe: Recipe, reader: Fit, parts: Sequence[Dataset], watch: Watch | None = None) -> Encoded:
        """Return latents and encoded captions, with prompts to draw pictures of; see ``encode``."""
        from .encode import encode, named_classes

        recipe = named_classes(recipe, parts[0])
        return encode(recipe, reader, parts, watch)

    def ready(
        self, work: Workload, recipe: Recipe, reader: Fit, rows: Sequence, end_token_ids: Collection[int]
    ) -> Workload:
        """Return the denoiser with what the empty caption is."""
        from .spec import with_neutral

        return with_neutral(work, rows)

    def illustrate(self, moment: Moment, result: Measured | None) -> Measured | None:
        """Draw pictures of the recipe's prompts; the first rank does, and the others wait."""
        if prompts := moment.recipe.diffusion.sample_prompts:
            processes = moment.trainer.processes
            if processes.is_first:
                from .draw import draw_samples

                draw_samples(moment, prompts)
            processes.wait(long=True)
        return result

    def save_model(
        self,
        recipe: Recipe,
        model: nn.Module,
        folder: Path,
        reader: Fit,
        end_token_ids: Collection[int],
        elsewhere: Mapping[str, Any],
    ) -> None:
        """Write the pipeline with the denoiser that was trained."""
        from .pipelines import save_pipeline
        from .spec import recipe_pipeline

        save_pipeline(recipe_pipeline(recipe), model, folder, recipe.task.labels)

    def save_beside(self, model: nn.Module, folder: Path) -> None:
        """Write the LoRA weights under diffusers' names."""
        from qlora_lite.adapters.diffusers_files import save_for_diffusers

        save_for_diffusers(model, folder)

    def evaluate(
        self, recipe: Recipe, adapter: Path | None, rows: int, reader: Fit, watch: Watch | None, held_out: str | None
    ) -> tuple[dict[str, Any], Sequence[dict]]:
        """Refuse: a denoiser is not evaluated by itself.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(
            "a denoiser (task.kind image-generation) is not evaluated by itself: its run measures the "
            "loss on data.eval before and after training"
        )

    def draw(
        self,
        recipe: Recipe,
        adapter: Path | None,
        device: torch.device,
        prompts: Sequence[str],
        seed: int,
        changed: Mapping[str, float],
    ) -> list[np.ndarray]:
        """See ``draw.draw_prompts``."""
        from .draw import draw_prompts

        return draw_prompts(recipe, adapter, device, prompts, seed, changed)

    def report(self, folder: Path, summary: Mapping[str, Any]) -> list[ReportPart]:
        """Return what was drawn of the recipe's prompts."""
        from qlora_lite.artifacts.run_files import SAMPLES, SAMPLES_INDEX, read_object

        from .report import NOTE, samples

        return [ReportPart("Samples before and after", samples(read_object(folder / SAMPLES / SAMPLES_INDEX)), NOTE)]

    def summary(self, recipe: Recipe, reader: Fit) -> dict[str, Any]:
        """Return height and width of the largest pictures, and names of classes."""
        return {"picture_size": [*reader.largest], "classes": [*(recipe.task.labels or ())]}


DRAWING = Drawing()
