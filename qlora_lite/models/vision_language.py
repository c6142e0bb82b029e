"""Vision-language models: a vision tower, a projector, and a language model that reads what comes of them.

A picture stands in the text as tokens of one kind. Their embeddings are replaced by what the projector makes of the
picture, and from there on they are tokens like others. transformers does so with a mask, whose result has a shape that
follows from values; here the positions are known beforehand, so that a plan runs the same code.

Families differ in what the tower is given and in what is taken of it. Of most, pictures all have one size (of some a
larger picture is cut into several): LLaVA, Idefics3 and SmolVLM, whose language model sees them as it sees words, and
Gemma 3, in which the tokens of a picture see all of it. The others see each picture in its own shape, a grid of tokens:
Gemma 4, of whose pictures all have nearly as many, which see all of it in layers with a window alone; Mistral 3, where
tokens of the text end the rows of a grid; Qwen2-VL to Qwen3.5, whose positions have three axes. Of Qwen3-VL, features
of the tower's earlier blocks are added behind the first blocks of the language model, too (DeepStack). Qwen3.5's
language model has states, so that each row runs by itself (``packing``), behind the tower, which computes the pictures
of all.

Most blocks of Qwen2.5-VL's tower attend within windows of 4 x 4 tokens. transformers calls attention for one after the
other, which takes a plan three times as long as this: here one call is told of all, and takes those of one size out as
a batch (``kernels.encoder_attention``).

Where nothing in the tower is trained, it computes ``AT_ONCE`` pictures at a time, of those with shapes of their own as
many as have ``TOKENS_AT_ONCE`` tokens: what they need then does not grow with their number.

Shapes: pixels [N, ...] of N units, each of K tokens: a unit is a picture of one size, [3, H, W], or one token of a
picture with a shape of its own, whose N are the height times the width of its grid. P = N * K; hidden states [P, D].

Source: Qwen2-VL, arXiv 2409.12191; Qwen2.5-VL, 2502.13923; Qwen3-VL, 2511.21631; DeepStack, 2406.04334; Pixtral,
2410.07073.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isqrt, prod
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from qlora_lite.data.picture_grids import TOKENS_AT_ONCE, BudgetReader, GridReader, RowsReader
from qlora_lite.data.picture_reader import PictureReader
from qlora_lite.errors import ModelError
from qlora_lite.offload.transfer import sent

from .anatomy import decoder, device_of

AT_ONCE = 4
Grids = Sequence[tuple[int, int]]  # height and width in tokens of each picture with a shape of its own; none of others


@dataclass(frozen=True, slots=True)
class Family:
    """How pictures become tokens.

    Args:
        features: returns hidden states [P, D] of a model's pictures, and those that are added behind its first blocks.
        arguments: returns the pictures of one row as transformers' own forward takes them.
        tokens: returns K by a configuration.
        tower: path of the tower in the model.
        edge: returns the pixels of a unit's edge by a configuration.
        cuts: whether a picture may be cut into several of one size.
        reader: what makes pixels of pictures.
        towers: transformers' names of the towers that are known; any where there are none.
        sees_whole: returns by a configuration whether a picture's tokens see all of it (``kernels.picture_attention``).
        in_windows: whether they do so only in blocks whose tokens see a window of those before them.
        types: by which name transformers' own forward is told which tokens are of pictures, if it is.
    """

    features: Callable[[nn.Module, torch.Tensor, Grids], tuple[torch.Tensor, ...]]
    arguments: Callable[[torch.Tensor, Grids], dict[str, torch.Tensor]]
    tokens: Callable[[Any], int]
    tower: str
    edge: Callable[[Any], int] = lambda config: config.vision_config.image_size
    cuts: bool = False
    reader: type[PictureReader] = PictureReader
    towers: tuple[str, ...] = ()
    sees_whole: Callable[[Any], bool] = lambda config: False
    in_windows: bool = False
    types: str | None = None

    @property
    def keeps_shape(self) -> bool:
        """Whether each picture has a shape of its own."""
        return self.reader.keeps_shape


def _of_llava(model: nn.Module, pixels: torch.Tensor, _grids: Grids) -> tuple[torch.Tensor, ...]:
    config, inner = model.config, model.base_model
    numbers = config.vision_feature_layer
    outputs = inner.vision_tower(pixels, output_hidden_states=True)
    taken = [outputs.hidden_states[number] for number in ([numbers] if isinstance(numbers, int) else numbers)]
    if config.vision_feature_select_strategy == "default":  # without the token of the whole picture
        taken = [each[:, 1:] for each in taken]
    return (inner.multi_modal_projector(torch.cat(taken, dim=-1)).flatten(0, 1),)


def _tokens_of_llava(config) -> int:
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + (vision.model_type == "clip_vision_model")
    return tokens - (config.vision_feature_select_strategy == "default")


def _of_idefics(model: nn.Module, pixels: torch.Tensor, _grids: Grids) -> tuple[torch.Tensor, ...]:
    """Return the tokens of whole pictures: nothing of them is padding, so that none is hidden."""
    inner, tower = model.base_model, model.base_model.vision_model
    patches = [edge // tower.patch_size for edge in pixels.shape[2:]]
    whole = torch.ones(len(pixels), *patches, dtype=torch.bool, device=pixels.device)
    embedded = tower.embeddings(pixel_values=pixels, patch_attention_mask=whole)
    hidden = tower.encoder(inputs_embeds=embedded, attention_mask=None).last_hidden_state
    return (inner.connector(tower.post_layernorm(hidden)).flatten(0, 1),)


def _tokens_of_idefics(config) -> int:
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2


def _of_gemma(model: nn.Module, pixels: torch.Tensor, _grids: Grids) -> tuple[torch.Tensor, ...]:
    inner = model.base_model
    return (inner.multi_modal_projector(inner.vision_tower(pixel_values=pixels).last_hidden_state).flatten(0, 1),)


def _of_qwen(model: nn.Module, pixels: torch.Tensor, grids: Grids) -> tuple[torch.Tensor, ...]:
    """Return the tokens of pictures, and their features that are added behind the first blocks, if there are some.

    What follows from the grids is computed here, where their values are known whatever the tower computes on; ends of
    pictures are needed on the host alone.
    """
    tower = model.base_model.visual
    grid, merged = _in_patches(grids, tower.spatial_merge_size), tower.spatial_merge_size
    known = {"position_ids": get_vision_position_ids(grid, merged)}
    if hasattr(tower, "pos_embed"):
        known["interp_indices"], known["interp_weights"] = get_vision_interpolation_indices_and_weights(
            grid, tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners, merged
        )
    how = {"grid_thw": grid, "cu_seqlens": get_vision_cu_seqlens(grid)}
    if hasattr(tower, "fullatt_block_indexes"):
        known["window_index"], ends = get_vision_window_index(grid, merged, tower.window_size, tower.patch_size)
        layers = {block.attn for n, block in enumerate(tower.blocks) if n not in tower.fullatt_block_indexes}
        how |= {"cu_window_seqlens": ends[[0, -1]], "row_windows": (layers, ends.diff().tolist())}
    known = {name: sent(tensor, pixels.device) for name, tensor in known.items()}
    found = tower(pixels.flatten(0, 1), **how, **known)
    return found.pooler_output, *getattr(found, "deepstack_features", ())


def _in_patches(grids: Grids, merged: int) -> torch.Tensor:
    """Return grids as transformers takes them, int64 [pictures, 3]: one moment, height and width in patches.

    Args:
        merged: patches along each edge of a token.
    """
    return torch.tensor([(1, merged * height, merged * width) for height, width in grids])


def _arguments_of_qwen(pixels: torch.Tensor, grids: Grids) -> dict[str, torch.Tensor]:
    merged = isqrt(pixels.shape[1])
    return {"pixel_values": pixels.flatten(0, 1), "image_grid_thw": _in_patches(grids, merged).to(pixels.device)}


def _of_mistral(model: nn.Module, pixels: torch.Tensor, grids: Grids) -> tuple[torch.Tensor, ...]:
    """Return the tokens of pictures, none of which sees another: the tower computes those of one shape together, where
    transformers hides one from another by a mask that takes the square of all their patches."""
    inner, tower = model.base_model, model.base_model.vision_tower
    blocks, found = tower.transformer.layers, []
    blocks = blocks[: model.config.vision_feature_layer % (len(blocks) + 1)]
    for part, grid in _of_one_shape(pixels, grids):
        images = _images(part, grid)
        hidden = tower.ln_pre(tower.patch_conv(images).flatten(2).mT)
        edges = [torch.arange(edge // tower.patch_size, device=pixels.device) for edge in images.shape[2:]]
        rotations = tower.patch_positional_embedding(hidden, torch.cartesian_prod(*edges))
        for block in blocks:
            hidden = block(hidden, None, position_embeddings=rotations)
        found.append(inner.multi_modal_projector(hidden.flatten(0, 1), [images.shape[2:]] * len(images)))
    return (torch.cat(found),)


def _of_one_shape(pixels: torch.Tensor, grids: Grids) -> Iterator[tuple[torch.Tensor, tuple[int, int]]]:
    """Yield the pixels of pictures of one shape that follow one another, and their grid."""
    shapes = [(grid, prod(grid) * len([*alike])) for grid, alike in groupby(grids)]
    parts = pixels.split([tokens for _, tokens in shapes])
    return ((part, grid) for part, (grid, _) in zip(parts, shapes, strict=True))


def _images(pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return pictures [B, 3, H, W] of the pixels of their tokens, whose patches are squares."""
    along, edge = isqrt(pixels.shape[1]), isqrt(pixels.shape[2] // 3)
    parts = pixels.reshape(-1, *grid, along, along, 3, edge, edge).permute(0, 5, 1, 3, 6, 2, 4, 7)
    return parts.reshape(-1, 3, *(edge * along * tokens for tokens in grid))


def _arguments_of_mistral(pixels: torch.Tensor, grids: Grids) -> dict[str, torch.Tensor]:
    images = [image for part, grid in _of_one_shape(pixels, grids) for image in _images(part, grid)]
    sizes = torch.tensor([image.shape[1:] for image in images], device=pixels.device)
    height, width = sizes.amax(0).tolist()
    padded = [nn.functional.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in images]
    return {"pixel_values": torch.stack(padded), "image_sizes": sizes}


def _of_gemma4(model: nn.Module, pixels: torch.Tensor, grids: Grids) -> tuple[torch.Tensor, ...]:
    """Return the tokens of pictures, each of them the mean of a square of patches. The tower computes those of one
    shape together, where transformers pads all to one length, whose result has a shape that follows from values."""
    inner, tower = model.base_model, model.base_model.vision_tower
    along, found = isqrt(pixels.shape[1]), []
    for part, (rows, columns) in _of_one_shape(pixels, grids):
        patches, positions = _patches(part, (rows, columns))
        nothing = positions.new_zeros(positions.shape[:2], dtype=torch.bool)
        hidden = tower.patch_embedder(patches, positions, nothing)
        rotations = tower.encoder.rotary_emb(hidden, positions)
        for block in tower.encoder.layers:
            hidden = block(hidden, position_embeddings=rotations, position_ids=positions)
        squares = hidden.unflatten(1, (rows, along, columns, along)).float()
        pooled = squares.mean((2, 4)).flatten(0, 2).to(hidden.dtype)
        pooled = pooled.float() * tower.pooler.root_hidden_size
        if tower.config.standardize:
            pooled = (pooled - tower.std_bias.float()) * tower.std_scale.float()
        found.append(inner.embed_vision(pooled.to(hidden.dtype)))
    return (torch.cat(found),)


def _patches(pixels: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the patches of pictures of one shape row by row, [B, patches, numbers], and the column and row of each,
    int64 [B, patches, 2]."""
    along, numbers = isqrt(pixels.shape[1]), pixels.shape[2]
    patches = pixels.reshape(-1, *grid, along, along, numbers).transpose(2, 3)
    patches = patches.reshape(-1, prod(grid) * along**2, numbers)
    places = torch.cartesian_prod(*(torch.arange(edge * along, device=pixels.device) for edge in grid))
    return patches, places.flip(-1).expand(len(patches), -1, -1)


def _arguments_of_gemma4(pixels: torch.Tensor, grids: Grids) -> dict[str, torch.Tensor]:
    found = [_patches(part, grid) for part, grid in _of_one_shape(pixels, grids)]
    most = max(patches.shape[1] for patches, _ in found)

    def padded(tensors: Iterable[torch.Tensor], value: float) -> torch.Tensor:
        pad = nn.functional.pad
        return torch.cat([pad(each, (0, 0, 0, most - each.shape[1]), value=value) for each in tensors])

    patches, places = zip(*found, strict=True)
    return {"pixel_values": padded(patches, 0.0), "image_position_ids": padded(places, -1.0)}


def _edge_of_qwen(config) -> int:
    return config.vision_config.patch_size * config.vision_config.spatial_merge_size


_QWEN = Family(
    _of_qwen,
    _arguments_of_qwen,
    lambda _: 1,
    "model.visual",
    _edge_of_qwen,
    reader=GridReader,
    types="mm_token_type_ids",
)
_IDEFICS = Family(
    _of_idefics, lambda pixels, _: {"pixel_values": pixels[None]}, _tokens_of_idefics, "model.vision_model", cuts=True
)
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llava": Family(
            _of_llava,
            lambda pixels, _: {"pixel_values": pixels},
            _tokens_of_llava,
            "model.vision_tower",
            towers=("clip_vision_model", "siglip_vision_model"),
        ),
        "idefics3": _IDEFICS,
        "smolvlm": _IDEFICS,
        "gemma3": Family(
            _of_gemma,
            lambda pixels, _: {"pixel_values": pixels},
            lambda config: config.mm_tokens_per_image,
            "model.vision_tower",
            sees_whole=lambda config: True,
            types="token_type_ids",
        ),
        "gemma4": Family(
            _of_gemma4,
            _arguments_of_gemma4,
            lambda _: 1,
            "model.vision_tower",
            lambda config: config.vision_config.patch_size * config.vision_config.pooling_kernel_size,
            reader=BudgetReader,
            in_windows=True,
            types="mm_token_type_ids",
            sees_whole=lambda config: config.text_config.use_bidirectional_attention == "vision",
        ),
        "mistral3": Family(
            _of_mistral,
            _arguments_of_mistral,
            lambda _: 1,
            "model.vision_tower",
            lambda config: config.vision_config.patch_size * config.spatial_merge_size,
            reader=RowsReader,
            towers=("pixtral",),
        ),
        **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _QWEN),
    }
)


def check_family(config) -> None:
    """Check that a configuration is that of a family whose pictures are understood.

    Raises:
        ModelError: it is not; the message names those that are.
    """
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"a model of the type {config.model_type} cannot be trained on pictures in chats; choose a "
            f"model of the types {', '.join(FAMILIES)}, or train on text alone (task.kind "
            "language-model)"
        )
    tower, known = config.vision_config.model_type, FAMILIES[config.model_type].towers
    if known and tower not in known:
        raise ModelError(
            f"a {config.model_type} with a vision tower of the type {tower} cannot be trained on pictures "
            f"in chats, but one with {' or '.join(known)}; choose another model"
        )


def family_of(model: nn.Module) -> Family:
    """Return the family of a model; see ``check_family``."""
    return FAMILIES[model.config.model_type]


def sees_whole(model: nn.Module) -> bool:
    """Return whether the tokens of a picture see all of it in a model."""
    return family_of(model).sees_whole(model.config)


def of_each_block(model: nn.Module, ids: torch.Tensor, places: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the embeddings of tokens [1, T] that a decoder gives to its blocks one by one, where it has some, as its
    argument; at the ``places`` [P] of pictures they are those of padding.

    transformers looks them up by the tokens, which it is not given where there are embeddings of pictures.
    """
    text = decoder(model)
    if not getattr(text, "hidden_size_per_layer_input", 0):
        return {}
    return {"per_layer_inputs": text.get_per_layer_inputs(ids.index_fill(1, places, text.config.pad_token_id))}


def token_pixels(config) -> tuple[int, int]:
    """Return the shape of the pixels of a token, of a family whose pictures keep their shapes: patches, and numbers of
    each, which are there once for each moment of a video."""
    vision = config.vision_config
    along = FAMILIES[config.model_type].edge(config) // vision.patch_size
    return along**2, 3 * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2


def arguments_of(
    model: nn.Module, pixels: torch.Tensor, ids: torch.Tensor, grids: Grids = ()
) -> dict[str, torch.Tensor]:
    """Return the pictures [N, ...] of one row of tokens [1, T] as arguments of transformers' own forward."""
    family = family_of(model)
    found = family.arguments(pixels.to(device_of(model), model.dtype), grids)
    if family.types:
        found[family.types] = (ids == model.config.image_token_id).int()
    return found


def picture_tokens(model: nn.Module, pixels: torch.Tensor, grids: Grids = ()) -> tuple[torch.Tensor, ...]:
    """Return the hidden states [P, D] that stand for pictures [N, ...], of the model's device and type, and those that
    are added to theirs behind each of the language model's first blocks."""
    family = family_of(model)
    device = device_of(model)
    learns = any(p.requires_grad for p in model.get_submodule(family.tower).parameters())
    parts = []
    for part, its_grids in [(pixels, grids)] if learns else _in_turn(pixels, grids):
        parts.append(family.features(model, part.to(device, model.dtype), its_grids))
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def _in_turn(pixels: torch.Tensor, grids: Grids) -> Iterator[tuple[torch.Tensor, Grids]]:
    """Yield the pictures that a tower computes at a time: ``AT_ONCE``, or those of up to ``TOKENS_AT_ONCE`` tokens."""
    if not grids:
        return ((part, ()) for part in pixels.split(AT_ONCE))
    groups: list[list[tuple[int, int]]] = []
    tokens: list[int] = []
    for grid in grids:
        if groups and tokens[-1] + prod(grid) <= TOKENS_AT_ONCE:
            groups[-1].append(grid)
            tokens[-1] += prod(grid)
        else:
            groups.append([grid])
            tokens.append(prod(grid))
    return zip(pixels.split(tokens), groups, strict=True)


def embedded(
    model: nn.Module, ids: torch.Tensor, pixels: torch.Tensor, places: torch.Tensor, grids: Grids = ()
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return the embeddings [1, T, D] of tokens, those of pictures in their places, and what else pictures give the
    language model, see ``picture_tokens``.

    Args:
        ids: int64 [1, T].
        pixels: float32 [N, ...].
        places: int64 [P], the positions of the tokens that stand for pictures.
        grids: of the pictures, where they have shapes of their own.
    """
    embeddings = model.get_input_embeddings()(ids)
    found, *features = picture_tokens(model, pixels, grids)
    return embeddings[0].index_copy(0, places, found.to(embeddings.dtype))[None], tuple(features)


def decoded(
    decoder: nn.Module,
    inputs_embeds: torch.Tensor,
    position_ids: torch.Tensor,
    features: Sequence[torch.Tensor],
    places: torch.Tensor,
    use_cache: bool = False,
    **how,
) -> torch.Tensor:
    """Return the last hidden states [1, T, D] of a decoder that is given features of pictures between its blocks.

    It is the decoder's own forward but for one thing: that finds the places of pictures by a mask, so that shapes
    follow from values, and here they are known.

    Args:
        inputs_embeds: [1, T, D].
        position_ids: int64 [3, 1, T].
        features: [P, D] for each of the first blocks, added to what it gives.
        places: int64 [P].
        use_cache: none is kept.
        how: arguments of each block.
    """
    hidden, rotations = inputs_embeds, decoder.rotary_emb(inputs_embeds, position_ids)
    for number, block in enumerate(decoder.layers):
        hidden = block(hidden, position_embeddings=rotations, **how)
        if number < len(features):
            hidden = hidden.index_add(1, places, features[number].to(hidden.dtype)[None])
    return decoder.norm(hidden)
