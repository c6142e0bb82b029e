"""diffusers' denoisers: built without memory, loaded from a folder with their blocks in 4 bit, called in one way.

A denoiser is told how noisy latents are and what the picture shows, and predicts the noise, or what leads away from it.
The modules are diffusers' own. Around them stands a ``DenoiserModel``, which says which the blocks are, in the order in
which they run, and turns latents and conditions into the arguments of that class. The attribute that holds the inner
model has the name that pipelines have for it ("unet", "transformer"), so that paths of layers are those of their LoRA
files.

Packed are the linear layers inside of blocks, which hold nearly all weights of a transformer. Convolutions, norms and
what stands outside of blocks (patches, time, text, the last projection) stay in 16 bit. diffusers' own loader would
hold the whole model in 16 bit first, or pack it with bitsandbytes' layers; here one weight is read at a time.

Shapes: N pictures; latents [N, C, H, W]; timesteps [N], from 0 to 1000; text [N, T, D], mask [N, T]; pooled text
[N, P]; sizes [N, 6].
Sources: SDXL, arXiv 2307.01952; PixArt-alpha, arXiv 2310.00426; SD3, arXiv 2403.03206; FLUX and FLUX.2 as diffusers'
pipelines call them.
"""

import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn

from qlora_lite.adapters.lora.inject import in_blocks, linear_layers
from qlora_lite.errors import ModelError, first_line, how_to_install
from qlora_lite.models.pretrained import BUILD_ERRORS, refuse_sizes
from qlora_lite.models.quantizer import replace_weights
from qlora_lite.models.skeleton import copied
from qlora_lite.offload.own_blocks import BlockCalls, OwnBlocks
from qlora_lite.quant.linear import QuantLinear
from qlora_lite.quant.nf4 import quantize

log = logging.getLogger("qlora_lite")
WEIGHTS, CONFIG = "diffusion_pytorch_model", "config.json"
TIMESTEPS = 1000
_SHOWN = 3  # names in an error
_MAX_BUILT = 8  # skeletons that are kept to be copied


def library():
    """Return diffusers.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ModelError(f"denoisers need diffusers: {how_to_install('diffusion')}") from error
    return diffusers


class Conditions(NamedTuple):
    """What a denoiser is told beside latents and timestep; what its class has no use for is None.

    Args:
        text: embeddings of the tokens, [N, T, D].
        pooled: embeddings of the whole texts, [N, P]: SDXL, SD3, FLUX.1.
        mask: 1 for tokens of the text and 0 for padding, [N, T]: PixArt.
        sizes: heights and widths, original and of the target, and where it was cut, [N, 6]: SDXL, PixArt-alpha.
        labels: numbers of classes, int64 [N]: DiT, UNet2DModel.
        guidance: scale for models that were distilled with it, [N]; None is 1, which is none: FLUX.
    """

    text: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    sizes: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    guidance: torch.Tensor | None = None


class DenoiserModel(OwnBlocks):
    """A denoiser of diffusers, called as ``model(latents, timesteps, conditions)``; predicts [N, C, H, W]."""

    part: ClassVar[str] = "transformer"
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    takes_text: ClassVar[bool] = True  # else numbers of classes, or nothing
    takes_rectangles: ClassVar[bool] = True  # of several sizes
    can_stream: ClassVar[bool] = True  # no block's weights are used outside of it

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.add_module(self.part, denoiser)

    @property
    def denoiser(self) -> nn.Module:
        """The model of diffusers."""
        return self.get_submodule(self.part)

    @property
    def config(self):
        """Its configuration."""
        return self.denoiser.config

    @property
    def dtype(self) -> torch.dtype:
        """The type that it computes in."""
        return self.denoiser.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes: what is last stands outside of blocks, which may lie elsewhere."""
        return list(self.parameters())[-1].device

    @property
    def latent_channels(self) -> int:
        """Channels of its latents."""
        return self.config.in_channels

    @property
    def multiple(self) -> int:
        """What height and width of latents are multiples of: of patches."""
        return self.config.patch_size

    @property
    def classes(self) -> int:
        """How many classes it tells apart beside the neutral one, whose number this is; 0 where it knows none."""
        return 0

    def attention_outside(self) -> list[nn.Module]:
        """Return the attention layers that are in no block."""
        return []

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one picture's ``Conditions``, by name.

        Args:
            tokens: of its text.
        """
        return {"text": (tokens, self.config.joint_attention_dim)}

    def get_input_embeddings(self) -> None:
        """Return none: there are no tokens."""

    def get_output_embeddings(self) -> None:
        """Return none."""

    def block_paths(self) -> list[str]:
        """See ``OwnBlocks``."""
        lists = ((name, self.denoiser.get_submodule(name)) for name in self.block_lists)
        return [f"{self.part}.{name}.{number}" for name, blocks in lists for number in range(len(blocks))]

    def run_blocks(self, calls: Mapping[nn.Module, Callable]) -> None:
        """See ``OwnBlocks``."""
        if calls:
            self.denoiser.enable_gradient_checkpointing(BlockCalls(calls))
        else:
            self.denoiser.disable_gradient_checkpointing()

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """Return what the model predicts."""
        raise NotImplementedError


class UNet(DenoiserModel):
    """Stable Diffusion 1.5, 2 and SDXL. Blocks are residual ones of convolutions and transformer blocks in turn.

    The first residual block in the middle is none of them: diffusers never recomputes it.
    """

    part = "unet"

    @property
    def multiple(self) -> int:
        """See ``DenoiserModel``: it is halved at each level but the first."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """See ``DenoiserModel``."""
        found: dict[str, tuple[int, ...]] = {"text": (tokens, self.config.cross_attention_dim)}
        if self.config.addition_embed_type == "text_time":
            pooled = self.config.projection_class_embeddings_input_dim - 6 * self.config.addition_time_embed_dim
            found |= {"pooled": (pooled,), "sizes": (6,)}
        return found

    def block_paths(self) -> list[str]:
        """See ``OwnBlocks``."""
        unet = self.denoiser
        down = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
        up = [f"up_blocks.{i}" for i in range(len(unet.up_blocks))]
        middle = [] if unet.mid_block is None else ["mid_block"]
        return [f"{self.part}.{path}" for stage in (*down, *middle, *up) for path in self._of_stage(stage)]

    def _of_stage(self, path: str) -> Iterator[str]:
        stage = self.denoiser.get_submodule(path)
        attentions = getattr(stage, "attentions", None) or ()
        in_middle = path == "mid_block"
        for i in range(len(stage.resnets)):
            if not in_middle or i:
                yield f"{path}.resnets.{i}"
            if i < len(attentions):
                blocks = getattr(attentions[i], "transformer_blocks", ())
                yield from (f"{path}.attentions.{i}.transformer_blocks.{j}" for j in range(len(blocks)))

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """See ``DenoiserModel``."""
        added = None
        if self.config.addition_embed_type == "text_time":
            added = {"text_embeds": conditions.pooled, "time_ids": conditions.sizes}
        return self.denoiser(latents, timesteps, conditions.text, added_cond_kwargs=added, return_dict=False)[0]


class ClassUNet(UNet):
    """A U-Net of pixels or latents that knows classes, the last one the neutral, or nothing."""

    takes_text = False

    @property
    def classes(self) -> int:
        """See ``DenoiserModel``."""
        return max(0, (self.config.num_class_embeds or 0) - 1)

    def attention_outside(self) -> list[nn.Module]:
        """See ``DenoiserModel``: all of them."""
        return [m for m in self.modules() if isinstance(m, library().models.attention_processor.Attention)]

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """See ``DenoiserModel``."""
        return {"labels": ()} if self.config.num_class_embeds else {}

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """See ``DenoiserModel``."""
        return self.denoiser(latents, timesteps, conditions.labels, return_dict=False)[0]


class DiT(DenoiserModel):
    """DiT: transformer blocks that are told a class. Half of the channels that it may predict are variances.

    diffusers draws anew in each block which classes are left out in training. Here that is the caption's to be, for the
    whole model (``diffusion.caption_dropout``). The first block's embedding of the class is used behind the last block
    once more, so that blocks cannot be streamed.
    """

    takes_text = False
    takes_rectangles = False
    can_stream = False

    @property
    def classes(self) -> int:
        """See ``DenoiserModel``."""
        return self.config.num_embeds_ada_norm

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """See ``DenoiserModel``."""
        return {"labels": ()}

    def train(self, mode: bool = True) -> Self:
        """Set the mode, but for embeddings of classes, which leave out none."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, library().models.embeddings.LabelEmbedding):
                module.eval()
        return self

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """See ``DenoiserModel``."""
        return self.denoiser(latents, timesteps, conditions.labels, return_dict=False)[0][:, : latents.shape[1]]


class PixArt(DenoiserModel):
    """PixArt-alpha and -sigma. Half of the channels that it predicts are variances, which are not trained."""

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """See ``DenoiserModel``."""
        found: dict[str, tuple[int, ...]] = {"text": (tokens, self.config.caption_channels), "mask": (tokens,)}
        return found | ({"sizes": (6,)} if self.denoiser.use_additional_conditions else {})

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """See ``DenoiserModel``."""
        added = {"resolution": None, "aspect_ratio": None}
        if conditions.sizes is not None:  # of PixArt-alpha for pictures of 1,024 pixels
            target = conditions.sizes[:, 4:].to(latents.dtype)
            added = {"resolution": target, "aspect_ratio": target[:, :1] / target[:, 1:]}
        predicted = self.denoiser(
            latents,
            conditions.text,
            timesteps,
            added,
            encoder_attention_mask=conditions.mask,
            return_dict=False,
        )[0]
        return predicted[:, : latents.shape[1]]


class StableDiffusion3(DenoiserModel):
    """SD3 and SD3.5: blocks with two streams, of which the last one ends the text's."""

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """See ``DenoiserModel``."""
        return {**super().condition_shapes(tokens), "pooled": (self.config.pooled_projection_dim,)}

    def idle_layers(self) -> list[str]:
        """See ``OwnBlocks``: what the last block's text attends to is not used."""
        return [f"{self.block_paths()[-1]}.attn.add_q_proj"]

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """See ``DenoiserModel``."""
        return self.denoiser(latents, conditions.text, conditions.pooled, timesteps, return_dict=False)[0]


class Flux(DenoiserModel):
    """FLUX.1: blocks with two streams, then with one. 2 x 2 latents are a token.

    Models that were distilled with guidance are told to have a guidance of 1 in training: none.
    """

    block_lists = "transformer_blocks", "single_transformer_blocks"

    @property
    def latent_channels(self) -> int:
        """See ``DenoiserModel``."""
        return self.config.in_channels // 4

    @property
    def multiple(self) -> int:
        """See ``DenoiserModel``."""
        return 2

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """See ``DenoiserModel``."""
        return {**super().condition_shapes(tokens), "pooled": (self.config.pooled_projection_dim,)}

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """See ``DenoiserModel``."""
        n, c, h, w = latents.shape
        tokens = latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)
        places = _grid(h // 2, w // 2, 3, latents)
        assert conditions.text is not None
        predicted = self.denoiser(
            tokens,
            conditions.text,
            conditions.pooled,
            timesteps / TIMESTEPS,
            places,
            places.new_zeros(conditions.text.shape[1], 3),
            _guidance(self, timesteps, conditions),
            return_dict=False,
        )[0]
        return predicted.view(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


class Flux2(DenoiserModel):
    """FLUX.2: as FLUX.1 with other blocks. Latents come in tokens already, [N, 128, H, W] of 2 x 2 of the encoder's."""

    block_lists = "transformer_blocks", "single_transformer_blocks"

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """See ``DenoiserModel``."""
        n, c, h, w = latents.shape
        places = _grid(h, w, 4, latents)
        assert conditions.text is not None
        of_text = places.new_zeros(conditions.text.shape[1], 4)
        of_text[:, 3] = torch.arange(len(of_text), device=latents.device)
        predicted = self.denoiser(
            latents.flatten(2).transpose(1, 2),
            conditions.text,
            timesteps / TIMESTEPS,
            places,
            of_text,
            _guidance(self, timesteps, conditions),
            return_dict=False,
        )[0]
        return predicted.transpose(1, 2).reshape(n, c, h, w)


def _grid(height: int, width: int, numbers: int, like: torch.Tensor) -> torch.Tensor:
    """Return the place of each token, [height * width, numbers]: the second is its row, the third its column."""
    places = like.new_zeros(height, width, numbers, dtype=torch.float32)
    places[..., 1] = torch.arange(height, device=like.device)[:, None]
    places[..., 2] = torch.arange(width, device=like.device)
    return places.view(height * width, numbers)


def _guidance(model: DenoiserModel, timesteps: torch.Tensor, conditions: Conditions) -> torch.Tensor | None:
    if not model.config.guidance_embeds:
        return None
    return torch.ones_like(timesteps) if conditions.guidance is None else conditions.guidance


DENOISERS: dict[str, type[DenoiserModel]] = {
    "UNet2DConditionModel": UNet,
    "PixArtTransformer2DModel": PixArt,
    "SD3Transformer2DModel": StableDiffusion3,
    "FluxTransformer2DModel": Flux,
    "Flux2Transformer2DModel": Flux2,
    "DiTTransformer2DModel": DiT,
    "UNet2DModel": ClassUNet,
}
_ALIKE = PixArt, Flux, Flux2


@dataclass(frozen=True)
class DenoiserSpec:
    """A denoiser as it is to be computed.

    Args:
        config: content of diffusers' ``config.json``; see ``spec_of``.
        quant: "nf4" or "fp4" for linear layers inside of blocks, "none".
    """

    config: str
    quant: str = "none"
    double_quant: bool = True
    compute_dtype: torch.dtype = torch.bfloat16


def spec_of(config: Mapping | str | Path, **how) -> DenoiserSpec:
    """Return the spec of a configuration, or of the folder that holds one.

    Args:
        how: other fields of ``DenoiserSpec``.

    Raises:
        ModelError: there is none, it is not of a class in ``DENOISERS``, or it has sizes of no model.
    """
    said = dict(config) if isinstance(config, Mapping) else _read_config(Path(config))
    if (kind := said.get("_class_name")) not in DENOISERS:
        raise ModelError(f"{kind} is no denoiser that is known here; these are: {', '.join(DENOISERS)}")
    return DenoiserSpec(json.dumps(said, sort_keys=True), **how)


def _read_config(folder: Path) -> dict:
    try:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} has no {CONFIG} of a denoiser ({error}); give the folder transformer or unet of a pipeline"
        ) from error
    refuse_sizes(folder, said)
    return said


def _build(spec: DenoiserSpec) -> DenoiserModel:
    """Build the model where the caller's context puts it, its packed layers on the meta device."""
    config = json.loads(spec.config)
    kind = config["_class_name"]
    try:
        inner = _of_config(getattr(library(), kind), config)
    except (IndexError, *BUILD_ERRORS) as error:
        raise ModelError(f"no {kind} can be built from this configuration: {first_line(error)}") from error
    model = DENOISERS[kind](inner)
    stored = model.state_dict().keys()
    for path, module in model.named_modules():
        for registry in (module._parameters, module._buffers):
            for leaf, tensor in registry.items():
                name = f"{path}.{leaf}"
                if tensor is not None and tensor.is_floating_point() and name in stored:
                    tensor.data = tensor.data.to(spec.compute_dtype)
    if spec.quant != "none":
        inside = in_blocks(model)
        kept = {path for path in linear_layers(model) if path not in inside}
        replace_weights(model, spec.quant, spec.double_quant, kept)
    return model.requires_grad_(False)


def _of_config(kind: type[nn.Module], config: Mapping) -> nn.Module:
    """Build a model of the arguments that its class has; others are said to be left out, as diffusers does."""
    known = inspect.signature(kind.__init__).parameters.keys()
    if unknown := sorted(key for key in config if key not in known and not key.startswith("_")):
        log.warning("%s has no %s, which its configuration sets: left out", kind.__name__, ", ".join(unknown))
    return kind(**{key: value for key, value in config.items() if key in known})


@lru_cache(_MAX_BUILT)
def _skeleton(spec: DenoiserSpec) -> DenoiserModel:
    with torch.device("meta"):
        return _build(spec)


def skeleton_of(spec: DenoiserSpec) -> DenoiserModel:
    """Return a model on the meta device to be asked and not to be changed: it is everybody's.

    Raises:
        ModelError: see ``meta_denoiser``.
    """
    return _skeleton(spec)


def meta_denoiser(spec: DenoiserSpec) -> DenoiserModel:
    """Return a frozen model on the meta device, its layers as loading would leave them.

    Raises:
        ModelError: diffusers is missing, or cannot build it.
    """
    return copied(_skeleton(spec))


def count_blocks(spec: DenoiserSpec) -> int:
    """Return how many blocks a model has."""
    return len(_skeleton(spec).block_paths())


def blocks_alike(spec: DenoiserSpec) -> dict[str, int]:
    """Return how many blocks are before each list of equal ones, by the list's path, of models made of such lists.

    Those of a U-Net have many shapes, and SD3's last block has no second stream.
    """
    kind = type(_skeleton(spec))
    if kind not in _ALIKE:
        return {}
    paths = [path.rpartition(".")[0] for path in _skeleton(spec).block_paths()]
    return {path: paths.index(path) for path in dict.fromkeys(paths)}


def with_depth(spec: DenoiserSpec, depth: int) -> DenoiserSpec:
    """Return the spec with so many blocks, of the last kind fewer."""
    config, *lists = json.loads(spec.config), *blocks_alike(spec).values()
    config["num_single_layers" if len(lists) > 1 else "num_layers"] = depth - lists[-1]
    return replace(spec, config=json.dumps(config, sort_keys=True))


def load_denoiser(folder: str | Path, spec: DenoiserSpec) -> DenoiserModel:
    """Load a frozen model from a folder with safetensors files, weight by weight.

    Args:
        spec: of the folder, see ``spec_of``.

    Raises:
        ModelError: there are no such files, or they hold other tensors than the model has.
    """
    with init_empty_weights(include_buffers=False):  # some buffers are computed, and in no file
        model = _build(spec)
    files, missing, wrong = weight_files(Path(folder)), set(model.state_dict()), []
    packed = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, QuantLinear)}
    missing = {name for name in missing if not _is_of_packed(name, packed)} | packed
    for name, tensor in _tensors(files, f"{model.part}."):
        if name not in missing:
            wrong.append(f"{name}, which the model has not")
            continue
        missing.discard(name)
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        shape = tuple(module.shape if name in packed else getattr(module, leaf).shape)
        if tuple(tensor.shape) != shape:
            wrong.append(f"{name} of the shape {tuple(tensor.shape)}, where {shape} is needed")
        elif name in packed:
            module.set_packed(quantize(tensor.to(spec.compute_dtype), spec.quant, spec.double_quant))
        else:
            _put(module, leaf, tensor)
    if missing or wrong:
        listed = wrong + [f"no {name}" for name in sorted(missing)]
        more = f" and {len(listed) - _SHOWN} others" if len(listed) > _SHOWN else ""
        raise ModelError(
            f"the files of {folder} are not those of its {CONFIG}: they hold "
            f"{'; '.join(listed[:_SHOWN])}{more}; fetch the folder again"
        )
    return model.eval()


def _is_of_packed(name: str, packed: set[str]) -> bool:
    """Return whether a tensor of the state is a part of a packed weight."""
    path, _, leaf = name.rpartition(".")
    return leaf != "bias" and f"{path}.weight" in packed


def _put(module: nn.Module, leaf: str, tensor: torch.Tensor) -> None:
    if leaf in module._parameters:
        dtype = module._parameters[leaf].dtype
        module._parameters[leaf] = nn.Parameter(tensor.to(dtype, copy=True), False)
    else:
        module._buffers[leaf] = tensor.to(module._buffers[leaf].dtype, copy=True)


def weight_files(folder: Path) -> list[Path]:
    """Return a denoiser's safetensors files: one, or shards; those in float16 only where there are no others.

    Raises:
        ModelError: there are none.
    """
    for variant in ("", ".fp16"):
        if (whole := folder / f"{WEIGHTS}{variant}.safetensors").is_file():
            return [whole]
        if shards := sorted(folder.glob(f"{WEIGHTS}{variant}-?????-of-?????.safetensors")):
            return shards
    raise ModelError(f"{folder} has no {WEIGHTS}.safetensors; fetch the model's safetensors files")


def _tensors(files: list[Path], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    yield prefix + name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {path}: {error}; fetch it again") from error
