"""Encode a run's pictures and captions, once: by the pipeline's own encoders, before the denoiser is loaded.

What an encoder makes of a picture or a text never changes, so that it is kept in the cache, named by all that it
depends on: the content of the picture and what it is cut to, or the text, and the encoder's files. The next run of the
same pictures loads no encoder. (Encoding in each step, as scripts for small sets do, takes the encoders' memory and
time in each.)
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from qlora_lite.data.captions import Fit
from qlora_lite.data.labels import ONE_LABEL, label_names
from qlora_lite.data.picture_files import decode
from qlora_lite.data.tokens.examples import Dataset
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import DataError, ModelError, OutputError
from qlora_lite.files import cache_root, explain_write_errors
from qlora_lite.memory.meter import free_bytes
from qlora_lite.models.load import resolve_device
from qlora_lite.prepare.moment import Watch
from qlora_lite.prepare.task import Encoded
from qlora_lite.quant.tensor_file import write_tensors
from qlora_lite.recipe.schema import Recipe
from qlora_lite.units import counted, format_bytes

from .denoisers import DenoiserModel, skeleton_of
from .latents import LatentSet, LatentShapes, Stored, checksum_of, read_checked
from .pipelines import AUTOENCODER, Autoencoder, Pipeline, TextEncoders, encoder_parts, freed, part_digest, spec_in
from .spec import recipe_pipeline, recipe_shapes, with_classes

log = logging.getLogger("qlora_lite")
NEUTRAL = ""  # the prompt that leaves all open
_TEXTS_AT_ONCE = 16
_BESIDE_WEIGHTS = 4 * 2**30  # that an encoder's activations may take


def encode(recipe: Recipe, fit: Fit, parts: Sequence[Dataset], watch: Watch | None = None) -> Encoded:
    """Return data sets whose examples are latents and encoded texts, and what was computed of each prompt.

    Args:
        parts: pictures with captions.
        watch: told how far this is.

    Raises:
        DataError: a picture is broken by now, or a caption is no class of a denoiser that knows classes.
        ModelError: an encoder cannot be loaded.
    """
    pipeline = recipe_pipeline(recipe, with_weights=True)
    model = skeleton_of(spec_in(pipeline))
    shapes = recipe_shapes(recipe, model, fit)
    rows: list[list[Example]] = [list(part.examples) for part in parts]
    captions = [example.answer for examples in rows for example in examples]
    prompts = NEUTRAL, *recipe.diffusion.sample_prompts
    if not model.takes_text and model.classes:
        _check_classes(recipe, model, [each for examples in rows for each in examples])
    texts = encode_texts(recipe, [*captions, *prompts], watch)
    pictures = _pictures(recipe, pipeline, fit, shapes, [each for examples in rows for each in examples], watch)
    sets, first = [], 0
    for part, examples in zip(parts, rows, strict=True):
        stored = [(pictures[first + i], texts[example.answer]) for i, example in enumerate(examples)]
        places = [example.where for example in examples]
        sets.append(replace(part, examples=LatentSet(stored, places, texts[NEUTRAL])))  # type: ignore[arg-type]
        first += len(examples)
    return Encoded(recipe, tuple(sets), {prompt: texts[prompt] for prompt in prompts})


def named_classes(recipe: Recipe, data: Dataset) -> Recipe:
    """Return a recipe of a denoiser that knows classes with their names: its own, the pipeline's, or the captions.

    Raises:
        ModelError: there are more than the denoiser tells apart.
    """
    model = skeleton_of(spec_in(recipe_pipeline(recipe)))
    if not model.classes:
        if recipe.task.labels is not None:
            raise ModelError(
                f"task.labels are names of classes, and the denoiser in {recipe.model.path} knows none; remove them"
            )
        return recipe
    recipe = with_classes(recipe)
    if recipe.task.labels is None:
        names = label_names((each for each in data.examples if each.answer != NEUTRAL), ONE_LABEL)
        recipe = recipe.model_copy(update={"task": recipe.task.model_copy(update={"labels": names})})
    if (count := len(recipe.task.labels or ())) > model.classes:
        raise ModelError(
            f"{count} different captions are more than the {model.classes} classes of the denoiser in "
            f"{recipe.model.path}; write task.labels, and captions that are among them"
        )
    return recipe


def encode_texts(recipe: Recipe, texts: Iterable[str], watch: Watch | None = None) -> dict[str, Stored]:
    """Return what texts are to a recipe's denoiser: embeddings, or numbers of classes.

    Raises:
        DataError: a text is no class of a denoiser that knows classes.
        ModelError: an encoder cannot be loaded.
    """
    pipeline = recipe_pipeline(recipe, with_weights=True)
    model, distinct = skeleton_of(spec_in(pipeline)), list(dict.fromkeys(texts))
    if not model.takes_text:
        return {text: _class_of(text, recipe, model) for text in distinct}
    device = _where(recipe, pipeline, parts := encoder_parts(pipeline))
    settings = part_digest(pipeline, *parts), pipeline.kind, pipeline.text_tokens, device.type
    names = {text: _path("texts", text, *settings) for text in distinct}
    intact = _intact(names.values())
    found: dict[str, Stored] = {text: path for text, path in names.items() if path in intact}
    missing = [text for text in distinct if text not in found]
    if missing:
        started, encoders = time.monotonic(), TextEncoders(pipeline, device)
        for first in range(0, len(missing), _TEXTS_AT_ONCE):
            group = missing[first : first + _TEXTS_AT_ONCE]
            for text, tensors in zip(group, encoders.encode(group), strict=True):
                found[text] = _kept(names[text], tensors)
            if watch:
                watch("captions", min(first + _TEXTS_AT_ONCE, len(missing)), len(missing))
        del encoders
        freed(device)
        log.info(
            "captions: %d of %d encoded in %.0f s, others from the cache",
            len(missing),
            len(distinct),
            time.monotonic() - started,
        )
    return found


def _check_classes(recipe: Recipe, model: DenoiserModel, examples: Iterable[Example]) -> None:
    """Check that captions and prompts of a denoiser that knows classes are some, and say where one is not.

    Raises:
        DataError: one is not.
    """
    prompts = (("diffusion.sample_prompts", text) for text in recipe.diffusion.sample_prompts)
    for where, text in (*((each.where, each.answer) for each in examples), *prompts):
        try:
            _class_of(text, recipe, model)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None


def _class_of(text: str, recipe: Recipe, model: DenoiserModel) -> Stored:
    if not model.classes:
        return {"labels": torch.tensor(0)} if "labels" in model.condition_shapes(0) else {}
    labels = recipe.task.labels or ()
    if text != NEUTRAL and text not in labels:
        raise DataError(f"{text!r} is no class of the model: {', '.join(labels)}"[:500] + '; write one of these, or ""')
    return {"labels": torch.tensor(model.classes if text == NEUTRAL else labels.index(text))}


def _pictures(
    recipe: Recipe,
    pipeline: Pipeline,
    fit: Fit,
    shapes: LatentShapes,
    examples: Sequence[Example],
    watch: Watch | None,
) -> list[Stored]:
    """Return the latents of each picture."""
    is_told_sizes = shapes.sizes is not None
    if pipeline.autoencoder is None:
        return [_pixels(each, fit, is_told_sizes) for each in examples]
    device = _where(recipe, pipeline, [AUTOENCODER])
    settings = part_digest(pipeline, AUTOENCODER), is_told_sizes, fit.digest, device.type
    paths = [_path("pictures", _digest(example), *settings) for example in examples]
    found: dict[Path, Stored] = {path: path for path in _intact(paths)}
    encoder, started, count = None, time.monotonic(), 0
    for number, (path, example) in enumerate(zip(paths, examples, strict=True), 1):
        if path not in found:
            encoder, count = encoder or Autoencoder(pipeline, device), count + 1
            tensors = dict(_pixels(example, fit, is_told_sizes))
            tensors["latents"] = encoder.encode(tensors["latents"][None])[0].contiguous()
            found[path] = _kept(path, tensors)
            if watch:
                watch("pictures", number, len(examples))
    if encoder:
        del encoder
        freed(device)
        log.info(
            "pictures: %d of %d encoded in %.0f s, others from the cache",
            count,
            len(examples),
            time.monotonic() - started,
        )
    return [found[path] for path in paths]


def _digest(example: Example) -> str:
    try:
        return hashlib.sha256(Path(example.prompt).read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{example.where}: the picture cannot be read any more ({error})") from None


def _pixels(example: Example, fit: Fit, is_told_sizes: bool) -> dict[str, torch.Tensor]:
    try:
        pixels, sizes = fit.cut(decode(example.prompt))
    except DataError as error:
        raise DataError(f"{example.where}: {error}", error.rule) from None
    found = {"latents": torch.from_numpy(pixels)}
    return found | ({"sizes": torch.from_numpy(sizes)} if is_told_sizes else {})


def _where(recipe: Recipe, pipeline: Pipeline, parts: Sequence[str]) -> torch.device:
    """Return where encoders run: on the run's device, if its budget has room for them."""
    device = resolve_device(recipe.model.device)
    files = [file for part in parts for file in (pipeline.folder / part).glob("*.safetensors")]
    needed = sum(file.stat().st_size for file in files) + _BESIDE_WEIGHTS
    budget = min(recipe.memory.budget_bytes or needed, free_bytes(device))
    if device.type == "cpu" or needed <= budget:
        return device
    log.info(
        "%s: encoded on the CPU, for they may need %s of the GPU, and %s are free to use",
        " and ".join(parts),
        format_bytes(needed),
        format_bytes(budget),
    )
    return torch.device("cpu")


def _path(kind: str, *content: object) -> Path:
    """Return where what depends on some content is kept."""
    name = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return cache_root() / "latents" / kind / name[:2] / f"{name}.safetensors"


def _intact(paths: Iterable[Path]) -> set[Path]:
    """Return the files that are in the cache as they were written, with one line where others are there."""
    intact, damaged = set(), set()
    for path in dict.fromkeys(paths):
        try:
            read_checked(path)
        except FileNotFoundError:
            continue
        except (OSError, SafetensorError):  # an earlier version wrote no checksum
            damaged.add(path)
        else:
            intact.add(path)
    if damaged:
        what = counted(len(damaged), "cached file")
        log.warning("%s damaged, or of an earlier version: encoded anew, first %s", what, min(damaged))
    return intact


def _kept(path: Path, tensors: dict[str, torch.Tensor]) -> Stored:
    """Write tensors into the cache; where that is not possible, keep them in memory."""
    try:
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
            write_tensors(partial, tensors, checksum_of(tensors))
            partial.replace(path)
    except OutputError as error:
        log.warning("what was encoded is kept in memory: %s", error)
        return tensors
    return path
