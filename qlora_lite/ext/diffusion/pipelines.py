"""A diffusion pipeline's folder: where its denoiser, scheduler, autoencoder and text encoders lie, and what they give.

diffusers' ``model_index.json`` names the parts. A folder without an autoencoder is one of a denoiser of pixels; a bare
denoiser's folder is a pipeline with diffusers' own scheduler and nothing else. Nothing here loads a whole pipeline:
the autoencoder and the text encoders are loaded one after the other, used, and freed before the denoiser is there.

Shapes: pictures float32 [N, C, H, W], from -1 to 1; latents [N, C, H, W], as ``denoisers`` wants them.
"""

import gc
import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import CLIPTokenizer
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from qlora_lite.errors import ModelError, first_line
from qlora_lite.files import cache_root, content_digest, replacing_folder
from qlora_lite.models.families import known_pipelines
from qlora_lite.models.locate import ModelFiles, download, read_json
from qlora_lite.models.pretrained import BUILD_ERRORS, text_encoder_of, tokenizer_of
from qlora_lite.units import counted

from .denoisers import (
    CONFIG,
    DENOISERS,
    WEIGHTS,
    DenoiserModel,
    DenoiserSpec,
    library,
    meta_denoiser,
    spec_of,
    weight_files,
)

INDEX, SCHEDULER_CONFIG = "model_index.json", "scheduler_config.json"
PARTS = "transformer", "unet"  # folders of denoisers
# Beside the parts' folders many hold all of it again in one file, and other types.
HUB_WEIGHTS = "*/*.safetensors", f"{WEIGHTS}*.safetensors"
HUB_DOUBLES = "*.fp16.*", "*.fp16-*", "*.non_ema.*"
AUTOENCODER, SCHEDULER = "vae", "scheduler"
DDPM = {"_class_name": "DDPMScheduler"}  # diffusers' own defaults, where a folder has no scheduler
_CLIP = 77  # tokens of its texts
# How long the texts of each pipeline are, in tokens, beside CLIP's, and what its encode_prompt gives, by the names of
# Conditions.
_TEXT: dict[str, tuple[int, tuple[str, ...]]] = {
    "StableDiffusionPipeline": (0, ("text",)),
    "StableDiffusionXLPipeline": (0, ("text", "", "pooled")),
    "PixArtAlphaPipeline": (120, ("text", "mask")),
    "PixArtSigmaPipeline": (300, ("text", "mask")),
    "StableDiffusion3Pipeline": (256, ("text", "", "pooled")),
    "FluxPipeline": (512, ("text", "pooled")),
    "Flux2Pipeline": (512, ("text",)),
    "Flux2KleinPipeline": (512, ("text",)),
}
_TAKES_THREE = "StableDiffusion3Pipeline"  # texts, for its encoders
_GUIDED = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
    ("StableDiffusion3Pipeline"),
)


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's folder.

    Args:
        folder: of the pipeline, or of a bare denoiser.
        index: what ``model_index.json`` says; nothing of a bare denoiser.
        part: the denoiser's folder below, "" of a bare one.
    """

    folder: Path
    index: Mapping[str, Any]
    part: str

    @property
    def denoiser(self) -> Path:
        """The denoiser's folder."""
        return self.folder / self.part

    @property
    def kind(self) -> str:
        """The pipeline's class in diffusers."""
        return str(self.index.get("_class_name", "no pipeline"))

    @cached_property
    def scheduler(self) -> Mapping[str, Any]:
        """The scheduler's configuration."""
        path = self.folder / SCHEDULER / SCHEDULER_CONFIG
        return read_json(path) if path.is_file() else DDPM

    @cached_property
    def autoencoder(self) -> Mapping[str, Any] | None:
        """The autoencoder's configuration; None of a denoiser of pixels."""
        return read_json(self.folder / AUTOENCODER / CONFIG) if self.has(AUTOENCODER) else None

    def has(self, part: str) -> bool:
        """Return whether there is a part: one that ``model_index.json`` names, with a folder."""
        return self.index.get(part, [None, None]) != [None, None] and (self.folder / part).is_dir()

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes that a denoiser knows, in order, where the pipeline says them."""
        names = self.index.get("id2label")
        if not isinstance(names, dict) or not names:
            return None
        return tuple(str(names[key]) for key in sorted(names, key=int))

    @property
    def pixels_per_latent(self) -> int:
        """Pixels of a latent's edge."""
        if self.autoencoder is None:
            return 1
        patches = 2 if self._packs_latents else 1
        return patches * 2 ** (len(self.autoencoder.get("block_out_channels", ())) - 1)

    @property
    def picture_channels(self) -> int:
        """Channels of pictures; the caller knows those of a denoiser of pixels."""
        return 3 if self.autoencoder is None else self.autoencoder.get("in_channels", 3)

    @property
    def _packs_latents(self) -> bool:
        return self.kind.startswith("Flux2")

    @property
    def text_tokens(self) -> int:
        """Tokens of a text.

        Raises:
            ModelError: the pipeline is of no class that is known here.
        """
        if self.kind not in _TEXT:
            raise ModelError(
                f"{self.folder} is {self.kind}, whose texts are not known here; known are: {', '.join(_TEXT)}"
            )
        length, _ = _TEXT[self.kind]
        if not self.kind.startswith("StableDiffusion"):
            return length
        return length + min(self.length_in("tokenizer") or _CLIP, _CLIP)

    def length_in(self, tokenizer: str) -> int | None:
        """Return the most tokens that a tokenizer's folder sets."""
        said = self.folder / tokenizer / "tokenizer_config.json"
        found = read_json(said).get("model_max_length") if said.is_file() else None
        return found if isinstance(found, int) and found > 0 else None

    def files(self, name: str) -> ModelFiles:
        """Return the denoiser's files.

        Raises:
            ModelError: there are no weights.
        """
        return ModelFiles(name, self.denoiser, tuple(weight_files(self.denoiser)))


def open_pipeline(path: str | Path, revision: str | None = None, with_weights: bool = True) -> Pipeline:
    """Open a pipeline's folder, or a bare denoiser's; a hub model is downloaded on first use.

    Args:
        with_weights: False downloads no weights, and of known models nothing.

    Raises:
        ModelError: it is neither, or has no denoiser that is known here.
    """
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir() and not with_weights and revision is None and _only_known(str(path)):
        folder = _configurations(str(path))
    elif not folder.is_dir():
        folder = download(str(path), revision, with_weights, HUB_WEIGHTS, HUB_DOUBLES)
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        part = next((part for part in PARTS if (folder / part / CONFIG).is_file()), None)
        if part is None:
            raise ModelError(
                f"{folder} is {index.get('_class_name')}, without a folder {' or '.join(PARTS)} that has "
                f"a {CONFIG}; fetch the whole pipeline"
            )
        return Pipeline(folder, index, part)
    if (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("_class_name") in DENOISERS:
        return Pipeline(folder, {}, "")
    raise ModelError(
        f"{folder} is no diffusion pipeline: it has neither {INDEX} nor the {CONFIG} of a denoiser "
        f"({', '.join(DENOISERS)}); task.kind image-generation needs one"
    )


def _only_known(name: str) -> bool:
    """Return whether nothing of a model but what is known here is on this machine."""
    return name in known_pipelines() and not isinstance(try_to_load_from_cache(name, INDEX), str)


def _configurations(name: str) -> Path:
    """Write the configurations of a known model into the cache, as a folder of a pipeline without weights."""
    files = known_pipelines()[name]
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_root() / "pipelines" / f"{name.replace('/', '--')}-{digest}"
    if not (folder / INDEX).is_file():
        with replacing_folder(folder) as new:
            for file, content in files.items():
                (new / file).parent.mkdir(parents=True, exist_ok=True)
                (new / file).write_text(json.dumps(content), encoding="utf-8")
            for part in _parts_of(files[INDEX]):
                (new / part).mkdir(exist_ok=True)
    return folder


def _parts_of(index: Mapping[str, Any]) -> list[str]:
    """Return the folders that a ``model_index.json`` names."""
    return [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]


def spec_in(pipeline: Pipeline, **how) -> DenoiserSpec:
    """Return the spec of a pipeline's denoiser; see ``denoisers.spec_of``."""
    return spec_of(pipeline.denoiser, **how)


def part_digest(pipeline: Pipeline, *parts: str) -> str:
    """Return what names parts of a pipeline by their content: configurations, vocabularies, weights."""
    files = [file for part in parts for file in sorted((pipeline.folder / part).rglob("*")) if file.is_file()]
    digests = [(str(file.relative_to(pipeline.folder)), content_digest(file)) for file in files]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def save_pipeline(pipeline: Pipeline, model: DenoiserModel, folder: Path, labels: Sequence[str] | None = None) -> None:
    """Write a folder like a pipeline's with another denoiser, all or nothing; its other parts are linked or copied.

    Args:
        labels: names of its classes.

    Raises:
        ModelError: a weight is not finite.
        OutputError: the folder cannot be written.
    """
    if broken := next((name for name, each in model.named_parameters() if not each.isfinite().all()), None):
        raise ModelError(f"the model is not saved: its weight {broken} is not finite")
    with replacing_folder(folder) as new:
        for file in sorted(pipeline.folder.rglob("*")) if pipeline.part else ():
            place = file.relative_to(pipeline.folder)
            if file.is_file() and place.parts[0] != pipeline.part and place.parts[0] in (INDEX, *pipeline.index):
                (new / place).parent.mkdir(parents=True, exist_ok=True)
                _linked(file, new / place)
        model.denoiser.save_pretrained(new / pipeline.part)
        if labels and pipeline.part:
            index = {**pipeline.index, "id2label": {str(number): name for number, name in enumerate(labels)}}
            (new / INDEX).unlink()
            (new / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _linked(file: Path, place: Path) -> None:
    try:
        os.link(file.resolve(), place)
    except OSError:  # another file system
        shutil.copyfile(file, place)


class Autoencoder:
    """A pipeline's autoencoder, in float32: some do not survive float16."""

    def __init__(self, pipeline: Pipeline, device: torch.device):
        diffusers, said = library(), pipeline.autoencoder
        assert said is not None
        name = str(said.get("_class_name"))
        kind = getattr(diffusers, name, None) if name.startswith("Autoencoder") else None
        if kind is None:
            raise ModelError(f"{pipeline.folder / AUTOENCODER} is {name}, which diffusers does not have")
        self._folder, self._device, self._packs = pipeline.folder / AUTOENCODER, device, pipeline._packs_latents
        how = {
            "dtype": torch.float32,
            "use_safetensors": True,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }
        model = _complete(self._folder, lambda: kind.from_pretrained(self._folder, **how))
        weights = model.state_dict().items()
        if broken := next((name for name, each in weights if not each.isfinite().all()), None):
            raise ModelError(f"{self._folder}: the weight {broken} holds NaN or infinity; fetch it again")
        scaling = [getattr(model.config, f"{name}_factor", None) or 0 for name in ("scaling", "shift")]
        if not self._packs and (not all(isinstance(each, int | float) for each in scaling) or not scaling[0] > 0):
            raise ModelError(
                f"{self._folder / CONFIG}: the scaling_factor {scaling[0]!r} is no number above 0, or the "
                f"shift_factor {scaling[1]!r} no number; fetch it again"
            )
        self._scale, self._shift = scaling
        self._model = model.to(device).eval()

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return the latents of pictures: the mean of their distribution, so that they are always the same.

        Raises:
            ModelError: there are none, or they are not finite.
        """
        with explaining(self._folder, "encode a picture"):
            latents = self._model.encode(pictures.to(self._device)).latent_dist.mode()
            if self._packs:
                mean, std = self._statistics(latents)
                latents = (_packed(latents) - mean) / std
            else:
                latents = (latents - self._shift) * self._scale
        return _finite(self._folder, latents.cpu(), "a picture")

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the pictures of latents.

        Raises:
            ModelError: there are none.
        """
        latents = latents.to(self._device, torch.float32)
        with explaining(self._folder, "decode latents"):
            if self._packs:
                mean, std = self._statistics(latents)
                latents = _unpacked(latents * std + mean)
            else:
                latents = latents / self._scale + self._shift
            return self._model.decode(latents, return_dict=False)[0].cpu()

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of FLUX.2's latents by channel, [1, C, 1, 1]."""
        norm = self._model.bn
        std = torch.sqrt(norm.running_var + self._model.config.batch_norm_eps)
        return norm.running_mean.view(1, -1, 1, 1).to(latents), std.view(1, -1, 1, 1).to(latents)


def _packed(latents: torch.Tensor) -> torch.Tensor:
    """Return 2 x 2 latents as one with four times the channels, as FLUX.2 has them."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


def _unpacked(latents: torch.Tensor) -> torch.Tensor:
    n, c, h, w = latents.shape
    return latents.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


class TextEncoders:
    """A pipeline's tokenizers and text encoders, called by the pipeline's own code."""

    def __init__(self, pipeline: Pipeline, device: torch.device):
        kind = getattr(library(), pipeline.kind)
        library().utils.logging.disable_progress_bar()  # beside a run's own
        self._folder, self._device, self._kind = pipeline.folder, device, pipeline.kind
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        wanted = encoder_parts(pipeline)
        without: dict[str, Any] = {
            name: None
            for name, each in inspect.signature(kind).parameters.items()
            if name not in (SCHEDULER, *wanted) and each.default in (None, each.empty)
        }
        # some read its configuration; without memory it costs none
        without[pipeline.part] = meta_denoiser(spec_in(pipeline)).denoiser
        parts = {name: part for name in wanted if (part := self._part(pipeline, kind, name)) is not None}
        how = {"dtype": self._dtype, "use_safetensors": True, "trust_remote_code": False}
        with explaining(pipeline.folder, "load this folder"):
            self._pipeline = kind.from_pretrained(pipeline.folder, **how, **parts, **without)

    def _part(self, pipeline: Pipeline, kind: type, name: str) -> Any:
        """Return an encoder with all its weights, or a tokenizer that its folder sets no length for; None leaves a part
        to diffusers.

        Raises:
            ModelError: it is of another class than the pipeline's code is for, or weights are missing.
        """
        folder, named = pipeline.folder / name, pipeline.index[name][1]
        wanted = get_type_hints(kind.__init__).get(name)  # type: ignore[misc]  # of the class itself
        if not name.startswith("text_encoder"):
            has_length = (pipeline.length_in(name) or VERY_LARGE_INTEGER) < VERY_LARGE_INTEGER
            if wanted is not CLIPTokenizer or has_length:
                return None
            return tokenizer_of(folder, CLIPTokenizer, model_max_length=_CLIP)
        if wanted is None or named != wanted.__name__:
            takes = getattr(wanted, "__name__", "none")
            raise ModelError(
                f"{pipeline.folder / INDEX}: {name} is {named}, and {pipeline.kind} takes {takes} there; fetch it again"
            )
        how = {"dtype": self._dtype, "use_safetensors": True, "ignore_mismatched_sizes": True}
        return _complete(folder, lambda: text_encoder_of(wanted, folder, **how)).to(self._device)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """Return what each text is to the denoiser: ``text`` [T, D], ``pooled`` [P], ``mask`` [T]."""
        texts, said = list(texts), {"device": self._device, "num_images_per_prompt": 1}
        given: dict[str, Any] = {"prompt": texts}
        if self._kind == _TAKES_THREE:
            given |= {"prompt_2": texts, "prompt_3": texts}
        if self._kind in _GUIDED:
            given["do_classifier_free_guidance"] = False
        with explaining(self._folder, "encode a caption"):
            found = self._pipeline.encode_prompt(**given, **said)
        _, names = _TEXT[self._kind]
        named = {name: each for name, each in zip(names, found, strict=False) if name}
        for each in named.values():
            _finite(self._folder, each, "a caption")
        return [{name: each[row].cpu().contiguous() for name, each in named.items()} for row in range(len(texts))]


def encoder_parts(pipeline: Pipeline) -> list[str]:
    """Return the folders of tokenizers and text encoders.

    Raises:
        ModelError: there are none.
    """
    names = "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"
    found = [name for name in names if pipeline.has(name)]
    if not found:
        raise ModelError(
            f"{pipeline.folder} has no text_encoder, and its denoiser takes texts: fetch the whole "
            "pipeline, not the denoiser alone"
        )
    return found


def _complete(folder: Path, load: Callable[[], tuple[nn.Module, Mapping[str, Any]]]) -> nn.Module:
    """Return a model that was loaded; what is missing in its files the libraries would leave untrained.

    Args:
        load: returns it with ``from_pretrained``'s loading info.

    Raises:
        ModelError: it cannot be loaded, or weights are missing or of other shapes.
    """
    with explaining(folder, "load this folder"):
        model, info = load()
    if missing := sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}):
        what = counted(len(missing), "weight")
        raise ModelError(
            f"the files of {folder} lack {what} that its {CONFIG} asks for, or have them in other shapes, "
            f"first {missing[0]}; fetch it again"
        )
    return model


def _finite(folder: Path, tensor: torch.Tensor, what: str) -> torch.Tensor:
    if not tensor.isfinite().all():
        raise ModelError(f"{folder} encodes {what} to NaN or infinity: its weights are damaged; fetch it again")
    return tensor


@contextmanager
def explaining(what: object, action: str) -> Iterator[None]:
    """Report in one line what diffusers raises over a folder, or a part of one, that contradicts itself.

    Raises:
        ModelError: it cannot do what it is to do. Memory may run out as anywhere.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, IndexError, *BUILD_ERRORS) as error:
        raise ModelError(
            f"{what}: diffusers cannot {action} ({first_line(error)}); fetch the pipeline again, with its "
            "safetensors files"
        ) from error


def freed(device: torch.device) -> None:
    """Give back what an encoder took, once nothing refers to it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
