"""A recipe's denoiser: its pipeline, what it learns, and the shapes of its examples."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.data.captions import Fit, rectangles
from qlora_lite.errors import ModelError
from qlora_lite.recipe.schema import Recipe
from qlora_lite.train.workload import Workload

from .denoisers import TIMESTEPS, DenoiserModel, DenoiserSpec, skeleton_of
from .denoising import EPSILON, FLOW, DenoisingLoss, LatentBatches, V, denoiser
from .latents import LatentShapes
from .pipelines import Pipeline, open_pipeline, spec_in

_PREDICTIONS = {"epsilon": EPSILON, "v_prediction": V, "flow_prediction": FLOW}  # by diffusers' words
_SCHEDULES = "linear", "scaled_linear"
LORA_RATE, FULL_RATE = 1e-4, 1e-5  # train.learning_rate auto: what diffusers' scripts recommend


def recipe_pipeline(recipe: Recipe, with_weights: bool = False) -> Pipeline:
    """Return the pipeline that a recipe's model.path names.

    Raises:
        ModelError: see ``open_pipeline``.
    """
    return open_pipeline(recipe.model.path, recipe.model.revision, with_weights)


def recipe_spec(recipe: Recipe, dtype: torch.dtype) -> DenoiserSpec:
    """Return how a recipe's denoiser is computed."""
    m = recipe.model
    return spec_in(recipe_pipeline(recipe), quant=m.quant, double_quant=m.double_quant, compute_dtype=dtype)


def resolution_multiple(recipe: Recipe) -> int:
    """Return what ``data.resolution`` has to be a multiple of; 0 where the denoiser takes one size alone."""
    pipeline = recipe_pipeline(recipe)
    model = skeleton_of(spec_in(pipeline))
    return pipeline.pixels_per_latent * model.multiple if model.takes_rectangles else 0


def largest_edge(recipe: Recipe) -> float:
    """Return how many pixels high and wide a picture may be: as far as the model's position embeddings reach."""
    pipeline = recipe_pipeline(recipe)
    model = skeleton_of(spec_in(pipeline))
    return pipeline.pixels_per_latent * model.multiple * getattr(model.config, "pos_embed_max_size", math.inf)


def build_fit(recipe: Recipe) -> Fit:
    """Return how a recipe's pictures become pixels.

    Raises:
        ModelError: ``data.resolution`` is not one that the denoiser can compute.
    """
    pipeline = recipe_pipeline(recipe)
    model = skeleton_of(spec_in(pipeline))
    scale, own = pipeline.pixels_per_latent, getattr(model.config, "sample_size", None)
    size = own[0] if isinstance(own, list | tuple) else own
    resolution = recipe.data.resolution or (None if size is None else size * scale)
    if resolution is None:
        raise ModelError(f"{recipe.model.path} does not say the size of its pictures; write data.resolution")
    multiple = scale * model.multiple
    if resolution % multiple:
        near = sorted({max(multiple, resolution // multiple * multiple), -(-resolution // multiple) * multiple})
        raise ModelError(
            f"data.resolution {resolution} is no multiple of the model's {multiple} pixels; write "
            f"{' or '.join(map(str, near))}"
        )
    if not model.takes_rectangles and resolution != (size or 0) * scale:
        raise ModelError(
            f"data.resolution {resolution}: {type(model).__name__} takes pictures of its own size alone; "
            f"write {(size or 0) * scale}, or remove it"
        )
    if resolution > (edge := largest_edge(recipe)):
        raise ModelError(
            f"data.resolution {resolution}: the model's position embeddings reach {edge} pixels; write at most {edge}"
        )
    sizes = rectangles(resolution, multiple, recipe.data.buckets and model.takes_rectangles)
    sizes = tuple(size for size in sizes if max(size) <= edge)
    channels = model.latent_channels if pipeline.autoencoder is None else pipeline.picture_channels
    if channels not in (1, 3):
        raise ModelError(
            f"{recipe.model.path} takes latents of {channels} channels and has no autoencoder (vae) that "
            "makes some of pictures; fetch the whole pipeline"
        )
    return Fit(sizes, channels, recipe.data.caption)


def recipe_shapes(recipe: Recipe, model: DenoiserModel, fit: Fit) -> LatentShapes:
    """Return the shapes of a recipe's examples, with the largest latents."""
    pipeline = recipe_pipeline(recipe)
    height, width = (edge // pipeline.pixels_per_latent for edge in fit.largest)
    tokens = pipeline.text_tokens if model.takes_text else 0
    return LatentShapes((model.latent_channels, height, width), **model.condition_shapes(tokens))


def build_loss(recipe: Recipe) -> DenoisingLoss:
    """Return what a recipe's denoiser minimises, as far as the recipe leaves it open by its scheduler.

    Raises:
        ModelError: the scheduler is not one that training here has the formulas of, or a setting does not go with it.
    """
    d, said = recipe.diffusion, recipe_pipeline(recipe).scheduler
    name = str(said.get("_class_name"))
    is_flow = name.startswith("FlowMatch") or bool(said.get("use_flow_sigmas"))
    if (steps := said.get("num_train_timesteps", TIMESTEPS)) != TIMESTEPS:
        raise ModelError(
            f"the scheduler has {steps} timesteps (num_train_timesteps); training here draws from "
            f"{TIMESTEPS:,}, which all published models have"
        )
    kind = _PREDICTIONS.get(str(said.get("prediction_type", "epsilon")))
    prediction: str = d.prediction
    if prediction == "auto":
        if kind is None:
            raise ModelError(
                f"the scheduler's prediction_type is {said.get('prediction_type')}; write "
                "diffusion.prediction: epsilon, v or flow"
            )
        prediction = FLOW if is_flow else kind
    how: dict[str, Any] = {"sampling": d.timestep_sampling, "weighting": d.weighting, "min_snr_gamma": d.min_snr_gamma}
    if d.weighting not in (fitting := ("none", *(("sigma_sqrt", "cosmap") if prediction == FLOW else ("min_snr",)))):
        raise ModelError(
            f"diffusion.weighting {d.weighting} is not for prediction {prediction}, which the model's "
            f"scheduler says; write {' or '.join(fitting)}"
        )
    if prediction == FLOW:
        own = 1.0 if said.get("use_dynamic_shifting") else _number(said, "shift", 1.0)
        return DenoisingLoss(prediction, **how, shift=own if d.shift == "auto" else d.shift)
    if d.shift not in ("auto", 1):
        raise ModelError(f"diffusion.shift is for prediction flow, and the model's is {prediction}; remove it")
    schedule = str(said.get("beta_schedule", "linear"))
    if schedule not in _SCHEDULES or said.get("rescale_betas_zero_snr") or said.get("trained_betas"):
        raise ModelError(
            f"the scheduler's betas ({schedule}"
            f"{', rescaled to zero SNR' if said.get('rescale_betas_zero_snr') else ''}) are not known "
            f"here; {' and '.join(_SCHEDULES)} are"
        )
    start, end = _number(said, "beta_start", 1e-4), _number(said, "beta_end", 0.02)
    return DenoisingLoss(prediction, **how, schedule=schedule, beta_start=start, beta_end=end)


def _number(said: Mapping[str, Any], name: str, unset: float) -> float:
    value = said.get(name, unset)
    if not isinstance(value, int | float):
        raise ModelError(f"the scheduler's {name} is {value!r}, which is no number; fetch the pipeline again")
    return float(value)


def build_denoiser(recipe: Recipe, method: AdapterMethod, dtype: torch.dtype) -> Workload:
    """Return what a recipe trains.

    Raises:
        ModelError: see ``build_fit`` and ``build_loss``.
    """
    spec = recipe_spec(recipe, dtype)
    shapes = recipe_shapes(recipe, skeleton_of(spec), build_fit(recipe))
    scale = recipe_pipeline(recipe).pixels_per_latent
    return denoiser(spec, shapes, build_loss(recipe), method, recipe.diffusion.caption_dropout, scale)


def with_classes(recipe: Recipe) -> Recipe:
    """Return a recipe with the names of the classes that its pipeline says, if it asks for those."""
    names = recipe_pipeline(recipe).labels
    if recipe.task.labels is not None or names is None:
        return recipe
    return recipe.model_copy(update={"task": recipe.task.model_copy(update={"labels": names})})


def in_float32_or_bfloat16(dtype: torch.dtype) -> torch.dtype:
    """Return the type that a denoiser computes in where a language model would compute in another."""
    return torch.float32 if dtype == torch.float16 else dtype


def with_neutral(work: Workload, rows) -> Workload:
    """Return a workload that knows what the empty text is, for captions that are left out.

    Args:
        rows: ``latents.LatentSet``.
    """
    batches = work.batches
    assert isinstance(batches, LatentBatches)
    return replace(work, batches=replace(batches, neutral=rows.neutral_example())) if batches.caption_dropout else work
