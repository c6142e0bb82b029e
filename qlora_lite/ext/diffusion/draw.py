"""Draw pictures with a denoiser, by its pipeline's own scheduler.

diffusers' pipelines each call their denoiser in a loop of the same kind; here it is one loop over
``denoisers``' one way to call them, so that weights in 4 bit, streamed blocks and LoRA layers are those of
training. Guidance is classifier-free (arXiv 2207.12598): the prompt's prediction, less the neutral prompt's, counts
several times. Models that were distilled with guidance are told its scale and called once.

Shapes: latents [N, C, H, W]; pictures uint8 [N, H, W, C].
"""

import base64
import inspect
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_lite.adapters.files import load_adapter
from qlora_lite.artifacts.run_files import SAMPLES, SAMPLES_INDEX
from qlora_lite.errors import DataError, DoesNotFitError, ModelError, OutputError
from qlora_lite.files import explain_write_errors, write_text
from qlora_lite.inference.draw import write_pictures
from qlora_lite.models.memory_options import MemoryOptions, place, set_memory_options
from qlora_lite.prepare.job import build_workload
from qlora_lite.prepare.moment import Moment
from qlora_lite.prepare.settings import fixed_options
from qlora_lite.recipe.schema import Recipe
from qlora_lite.train.out_of_memory import explaining_memory
from qlora_lite.train.step import evaluating
from qlora_lite.train.workload import Workload

from .denoisers import Conditions, DenoiserModel, Flux, Flux2, library, load_denoiser
from .denoising import DiffusersSpec, LatentBatches, conditions_of
from .encode import NEUTRAL, encode_texts
from .latents import LatentExample, Stored, arrays_in
from .pipelines import Autoencoder, Pipeline, explaining
from .spec import recipe_pipeline

log = logging.getLogger("qlora_lite")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    Args:
        steps: of the scheduler.
        guidance: scale of classifier-free guidance; 1 is none.
        seed: of the first picture; each further one counts up.
        at_once: pictures that go through the model together.
    """

    steps: int = 30
    guidance: float = 4.0
    seed: int = 0
    at_once: int = 1


def scheduler_of(pipeline: Pipeline) -> Any:
    """Return a pipeline's scheduler.

    Raises:
        ModelError: diffusers has no such scheduler, or cannot make it of its configuration.
    """
    name = str(pipeline.scheduler.get("_class_name"))
    kind = getattr(library(), name, None) if name.endswith("Scheduler") else None
    if kind is None:
        raise ModelError(f"{pipeline.folder}: diffusers has no scheduler {name}")
    with _working(kind):
        return kind.from_config(dict(pipeline.scheduler))


def _working(kind: type) -> AbstractContextManager[None]:
    return explaining(kind.__name__, "follow its scheduler_config.json")


def draw(
    work: Workload, model: DenoiserModel, pipeline: Pipeline, prompts: Sequence[Stored], neutral: Stored, how: Drawing
) -> list[np.ndarray]:
    """Return a picture for each prompt, of the run's largest size, uint8 [H, W, C].

    Args:
        prompts: what was computed of each; see ``encode``.
        neutral: what was computed of the empty text.
    """
    found, latents_of = [], work.batches
    assert isinstance(latents_of, LatentBatches)
    size, dtype = latents_of.shapes.latents, work.spec.compute_dtype
    with torch.no_grad(), evaluating(model):
        for first in range(0, len(prompts), how.at_once):
            group = prompts[first : first + how.at_once]
            seeds = [how.seed + first + number for number in range(len(group))]
            noise = torch.stack([torch.randn(size, generator=_generator(seed)) for seed in seeds])
            conditions = _conditions(latents_of, group), _conditions(latents_of, [neutral] * len(group))
            found.append(denoise(model, scheduler_of(pipeline), noise, *conditions, how, dtype).cpu())
    latents = torch.cat(found) if found else torch.zeros(0)
    return pictures_of(latents, pipeline)


def pictures_of(latents: torch.Tensor, pipeline: Pipeline) -> list[np.ndarray]:
    """Return the pictures of latents, uint8 [H, W, C]; the autoencoder runs on the CPU, one picture at a time."""
    decoder = None if pipeline.autoencoder is None or not len(latents) else Autoencoder(pipeline, CPU)
    result = []
    for one in latents:
        pixels = one if decoder is None else decoder.decode(one[None])[0]
        values = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        result.append(values.permute(1, 2, 0).numpy())
    return result


def denoise(
    model: DenoiserModel,
    scheduler: Any,
    noise: torch.Tensor,
    told: Conditions,
    neutral: Conditions,
    how: Drawing,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the latents that become of noise, float32 [N, C, H, W].

    Args:
        scheduler: diffusers'.
        told, neutral: what the prompts and the neutral prompt are to the model.
        dtype: that the model computes in.
    """
    device = model.device
    told, neutral = (_moved(each, device) for each in (told, neutral))
    is_told_guidance = bool(getattr(model.config, "guidance_embeds", False))
    if is_told_guidance:
        told = told._replace(guidance=torch.full((len(noise),), how.guidance, device=device))
    with _working(type(scheduler)):
        _set_steps(scheduler, how.steps, model, noise.shape, device)
    latents = noise.to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
    chance = {"generator": _generator(how.seed)} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, time) if hasattr(scheduler, "scale_model_input") else latents
        times = time.to(device, torch.float32).expand(len(noise))
        predicted = model(scaled.to(dtype), times, told).float()
        if how.guidance != 1 and not is_told_guidance:
            base = model(scaled.to(dtype), times, neutral).float()
            predicted = base + how.guidance * (predicted - base)
        with _working(type(scheduler)):
            latents = scheduler.step(predicted, time, latents, return_dict=False, **chance)[0]
    return latents


def _set_steps(scheduler: Any, steps: int, model: DenoiserModel, shape: torch.Size, device: torch.device) -> None:
    """Set the steps of a scheduler: of FLUX even ones, as in its pipelines, shifted by the picture's size if asked."""
    said = scheduler.config
    is_flux = isinstance(model, Flux | Flux2)
    if not (is_flux or said.get("use_dynamic_shifting")):
        scheduler.set_timesteps(steps, device=device)
        return
    even = {} if not is_flux or said.get("use_flow_sigmas") else {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    flux = library().pipelines
    tokens = math.prod(shape[2:]) // (1 if isinstance(model, Flux2) else 4)
    if isinstance(model, Flux2):
        mu = flux.flux2.pipeline_flux2.compute_empirical_mu(tokens, steps)
    else:
        names = "base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"
        mu = flux.flux.pipeline_flux.calculate_shift(tokens, *(said[name] for name in names if name in said))
    scheduler.set_timesteps(num_inference_steps=steps, device=device, mu=mu, **even)


def _conditions(batches: LatentBatches, stored: Sequence[Stored]) -> Conditions:
    """Return what prompts are to the denoiser; SDXL is told of pictures of the whole size, not cut."""
    sizes: dict[str, np.ndarray] = {}
    if batches.shapes.sizes is not None:
        height, width = (edge * batches.pixels_per_latent for edge in batches.shapes.latents[1:])
        sizes = {"sizes": np.array((height, width, 0, 0, height, width), np.float32)}
    empty: dict[str, Any] = {"text": None, "latents": np.zeros(0, np.float32), "number": 0}
    examples = [LatentExample(**(empty | sizes | arrays_in(each))) for each in stored]
    return conditions_of(examples, batches.dtype)


def _moved(conditions: Conditions, device: torch.device) -> Conditions:
    return Conditions(*(None if each is None else each.to(device) for each in conditions))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write_samples(folder: Path, when: str, prompts: Sequence[str], pictures: Sequence[np.ndarray]) -> None:
    """Write the pictures of some prompts into a folder of a run, and what its report shows of them.

    Args:
        when: "before" or "after" training.

    Raises:
        OutputError: they cannot be written.
    """
    paths = [folder / f"{when}-{number:02}.png" for number in range(1, len(pictures) + 1)]
    with explain_write_errors(folder):
        folder.mkdir(exist_ok=True)
        write_pictures(pictures, paths)
    index = folder / SAMPLES_INDEX
    known = json.loads(index.read_text(encoding="utf-8")) if when == "after" and index.is_file() else {}
    found = {"prompts": [*prompts], when: [_shown(path) for path in paths]}
    write_text(index, json.dumps(known | found) + "\n")


def _shown(path: Path) -> str:
    """Return a picture as a data URI for a page, small ones enlarged so that they can be seen."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(path) as file:
        image: Image.Image = file
        if (factor := 96 // max(image.size)) > 1:
            image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
        image.thumbnail((256, 256))
        image.save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def draw_prompts(
    recipe: Recipe,
    adapter: Path | None,
    device: torch.device,
    prompts: Sequence[str],
    seed: int,
    changed: Mapping[str, Any],
) -> list[np.ndarray]:
    """Return a picture of each prompt by a recipe's denoiser; see ``inference.draw.draw_prompts``.

    Raises:
        DataError: a prompt is no class of a denoiser that knows classes.
    """
    known = encode_texts(recipe, [NEUTRAL, *prompts])
    pipeline, options = recipe_pipeline(recipe, with_weights=True), MemoryOptions(**fixed_options(recipe))
    work = build_workload(recipe)
    assert isinstance(work.spec, DiffusersSpec)
    model = load_denoiser(pipeline.denoiser, work.spec.base)
    if adapter:
        load_adapter(model, adapter)
    place(model, device, options, work.spec.blocks(model))
    set_memory_options(model, options, work.spec.blocks(model))
    d = recipe.diffusion
    how = replace(Drawing(d.sample_steps, d.guidance_scale, seed), **changed)
    return draw(work, model, pipeline, by_prompt(prompts, known), known[NEUTRAL], how)


def draw_samples(moment: Moment, prompts: Sequence[str]) -> None:
    """Write pictures of prompts for the report of a run; what hinders it is a warning."""
    recipe, trainer = moment.recipe, moment.trainer
    d = recipe.diffusion
    how = Drawing(d.sample_steps, d.guidance_scale, recipe.train.seed)
    try:
        with moment.at_once(), explaining_memory("lower data.resolution", "memory ran out over a picture"):
            stored = by_prompt(prompts, moment.kept)
            pipeline = recipe_pipeline(recipe)
            pictures = draw(trainer.workload, trainer.model, pipeline, stored, moment.kept[NEUTRAL], how)
        write_samples(moment.folder / SAMPLES, moment.when, prompts, pictures)
    except (DataError, ModelError, OutputError, DoesNotFitError) as error:
        log.warning("the report shows no pictures %s: %s", str(moment), error)


def by_prompt(prompts: Sequence[str], known: Mapping[str, Stored]) -> list[Stored]:
    """Return what was computed of prompts."""
    return [known[prompt] for prompt in prompts]
