"""Vision-language models: a vision tower, a projector, and a language model that reads what comes of them.

A picture stands in the text as tokens of one kind. Their embeddings are replaced by what the projector makes of the
picture, and from there on they are tokens like others. transformers does so with a mask, whose result has a shape that
follows from values; here the positions are known beforehand, so that a plan runs the same code.

Families differ in what the tower is given and in what is taken of it. Here are those whose pictures all have one size
(of some a larger picture is cut into several): LLaVA, Idefics3 and SmolVLM, whose language model sees them as it sees
words, and Gemma 3, in which the tokens of a picture see all of it. The tower computes ``AT_ONCE`` pictures at a time
where nothing in it is trained: what they need then does not grow with their number.

Shapes: N pictures of one size, [N, 3, H, W], K tokens each, hidden states [N * K, D].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from qlora_lite.errors import ModelError

from .anatomy import device_of

AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Family:
    """How pictures become tokens.

    Args:
        features: returns hidden states [N, K, D] of a model's pictures.
        arguments: returns the pictures of one row as transformers' own forward takes them.
        tokens: returns K by a configuration.
        tower: path of the tower in the model.
        cuts: whether a picture may be cut into several of one size.
        towers: transformers' names of the towers that are known; any where there are none.
        sees_whole: whether a picture's tokens see all of it (``ops.picture_attention``), which transformers' own
            forward is told by their types.
    """

    features: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    arguments: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    tokens: Callable[[object], int]
    tower: str
    cuts: bool = False
    towers: tuple[str, ...] = ()
    sees_whole: bool = False


def _of_llava(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    config, inner = model.config, model.base_model
    numbers = config.vision_feature_layer
    outputs = inner.vision_tower(pixels, output_hidden_states=True)
    taken = [outputs.hidden_states[number] for number in ([numbers] if isinstance(numbers, int) else numbers)]
    if config.vision_feature_select_strategy == "default":  # without the token of the whole picture
        taken = [each[:, 1:] for each in taken]
    return inner.multi_modal_projector(torch.cat(taken, dim=-1))


def _tokens_of_llava(config) -> int:
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + (vision.model_type == "clip_vision_model")
    return tokens - (config.vision_feature_select_strategy == "default")


def _of_idefics(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Return the tokens of whole pictures: nothing of them is padding, so that none is hidden."""
    inner, tower = model.base_model, model.base_model.vision_model
    patches = [edge // tower.patch_size for edge in pixels.shape[2:]]
    whole = torch.ones(len(pixels), *patches, dtype=torch.bool, device=pixels.device)
    embedded = tower.embeddings(pixel_values=pixels, patch_attention_mask=whole)
    hidden = tower.encoder(inputs_embeds=embedded, attention_mask=None).last_hidden_state
    return inner.connector(tower.post_layernorm(hidden))


def _tokens_of_idefics(config) -> int:
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2


def _of_gemma(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    inner = model.base_model
    return inner.multi_modal_projector(inner.vision_tower(pixel_values=pixels).last_hidden_state)


_IDEFICS = Family(
    _of_idefics, lambda pixels: {"pixel_values": pixels[None]}, _tokens_of_idefics, "model.vision_model", cuts=True
)
FAMILIES: Mapping[str, Family] = MappingProxyType({
    "llava": Family(_of_llava, lambda pixels: {"pixel_values": pixels}, _tokens_of_llava, "model.vision_tower",
                    towers=("clip_vision_model", "siglip_vision_model")),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "gemma3": Family(_of_gemma, lambda pixels: {"pixel_values": pixels}, lambda config: config.mm_tokens_per_image,
                     "model.vision_tower", sees_whole=True),
})  # fmt: skip


def check_family(config) -> None:
    """Check that a configuration is that of a family whose pictures are understood.

    Raises:
        ModelError: it is not; the message names those that are.
    """
    if config.model_type not in FAMILIES:
        raise ModelError(f"a model of the type {config.model_type} cannot be trained on pictures in chats; choose a "
                         f"model of the types {', '.join(FAMILIES)}, or train on text alone (task.kind "
                         "language-model)")  # fmt: skip
    tower, known = config.vision_config.model_type, FAMILIES[config.model_type].towers
    if known and tower not in known:
        raise ModelError(f"a {config.model_type} with a vision tower of the type {tower} cannot be trained on pictures "
                         f"in chats, but one with {' or '.join(known)}; choose another model")  # fmt: skip


def family_of(model: nn.Module) -> Family:
    """Return the family of a model; see ``check_family``."""
    return FAMILIES[model.config.model_type]


def arguments_of(model: nn.Module, pixels: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the pictures [N, 3, H, W] of one row of tokens [1, T] as arguments of transformers' own forward."""
    family = family_of(model)
    found = family.arguments(pixels.to(device_of(model), model.dtype))
    if family.sees_whole:
        found["token_type_ids"] = (ids == model.config.image_token_id).long()
    return found


def picture_tokens(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Return the hidden states [N * K, D] that stand for pictures [N, 3, H, W], of the model's device and type."""
    family = family_of(model)
    device = device_of(model)
    learns = any(p.requires_grad for p in model.get_submodule(family.tower).parameters())
    parts = []
    for part in (pixels,) if learns else pixels.split(AT_ONCE):
        parts.append(family.features(model, part.to(device, model.dtype)).flatten(0, 1))
    return torch.cat(parts)


def embedded(model: nn.Module, ids: torch.Tensor, pixels: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the embeddings [1, T, D] of tokens, those of pictures in their places.

    Args:
        ids: int64 [1, T].
        pixels: float32 [N, 3, H, W].
        places: int64 [N * K], the positions of the tokens that stand for pictures.
    """
    embeddings = model.get_input_embeddings()(ids)
    found = picture_tokens(model, pixels).to(embeddings.dtype)
    return embeddings[0].index_copy(0, places, found)[None]
