"""The head that a recipe's task section asks for, and the model with it; what reads its pictures."""

from dataclasses import replace
from functools import cache, partial

from qlora_lite.data import picture_processor as of_encoders
from qlora_lite.data.labels import NUMBER
from qlora_lite.data.picture_grids import GridReader
from qlora_lite.data.picture_processor import Processor
from qlora_lite.data.picture_reader import PictureReader
from qlora_lite.errors import ModelError, first_line
from qlora_lite.models.heads import MARKS, Head, with_head
from qlora_lite.models.locate import folder_of, locate, read_json
from qlora_lite.models.nested import LanguagePart, of_blocks
from qlora_lite.models.pretrained import BUILD_ERRORS, processor_of
from qlora_lite.models.skeleton import read_config, read_part
from qlora_lite.models.vision_language import FAMILIES, token_pixels
from qlora_lite.recipe.schema import REWARD_LABEL, Recipe

PLANNED_LABELS = ("0", "1")  # where no row is known yet; others take a few hundred bytes each


def head_of(recipe: Recipe) -> Head | None:
    """Return the head that a recipe asks for; None of a language model."""
    if recipe.problem is None:
        return None
    if recipe.task.kind == "reward":
        labels: tuple[str, ...] = (REWARD_LABEL,)
    else:
        labels = ("number",) if recipe.problem == NUMBER else recipe.task.labels or PLANNED_LABELS
    return Head(recipe.problem, labels, recipe.train.seed, recipe.of_pictures, MARKS.get(recipe.task.kind))


def resolution_multiple(recipe: Recipe) -> int:
    """Return what ``data.resolution`` of a vision encoder has to be a multiple of."""
    return of_blocks(read_config(recipe.model.path, recipe.model.revision)).patch_size


def picture_processor(recipe: Recipe) -> Processor:
    """Return how a recipe's pictures become pixels, as its model's files say; without them ImageNet's colours.

    Raises:
        ModelError: the model is not one of pictures, or ``data.resolution`` is no multiple of its patches.
        DataError: see ``data.picture_processor.processor_of``.
    """
    m, wanted = recipe.model, recipe.data.resolution
    config = of_blocks(read_config(m.path, m.revision))
    size, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
    if size is None or not isinstance(patch, int):
        raise ModelError(
            f"{m.path} ({config.model_type}) is no vision encoder of patches, which task.kind "
            f"{recipe.task.kind} needs; choose DINOv2, ViT, SigLIP or CLIP"
        )
    if wanted and wanted % patch:
        near = sorted({max(patch, wanted // patch * patch), -(-wanted // patch) * patch})
        raise ModelError(
            f"data.resolution {wanted} is no multiple of the model's patches of {patch} pixels; write "
            f"{' or '.join(map(str, near))}"
        )
    folder = folder_of(m.path, m.revision)
    said = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if folder and (folder / name).is_file():
            said = read_json(folder / name)
            break
    found = of_encoders.processor_of(said.get("image_processor", said), size, wanted, recipe.data.augment)
    # all of a picture is to be segmented, and not its middle alone
    return replace(found, resize=(found.height, found.width)) if recipe.has_masks else found


def picture_reader(recipe: Recipe) -> PictureReader | None:
    """Return what reads the pictures of a recipe's chats; None where they have none.

    Raises:
        ModelError: the model is of no family that is known, or sees no pictures of ``data.resolution``.
    """
    if not recipe.with_vision:
        return None
    m, wanted = recipe.model, recipe.data.resolution
    config = config_of(recipe)
    family = FAMILIES[config.model_type]
    edge, is_free = family.edge(config), family.cuts or family.keeps_shape
    if wanted and not is_free and wanted != edge:
        raise ModelError(
            f"data.resolution {wanted}: a model of the type {config.model_type} sees pictures of {edge} x "
            f"{edge} pixels alone; remove it"
        )
    if wanted and wanted % edge:
        near = sorted({max(edge, wanted // edge * edge), -(-wanted // edge) * edge})
        what = "of what a token stands for" if family.keeps_shape else "of the parts that the model cuts a picture into"
        raise ModelError(
            f"data.resolution {wanted} is no multiple of {edge} pixels, the edge {what}; write "
            f"{' or '.join(map(str, near))}"
        )
    of_model = m.path, m.revision
    said = config.image_token_id, family.tokens(config), edge, wanted if is_free else None, of_model
    load = partial(loaded_processor, *of_model)
    if not issubclass(family.reader, GridReader):
        return family.reader(*said, load)
    return family.reader(*said, load, token_pixels(config))


@cache
def loaded_processor(path: str, revision: str | None):
    """Return transformers' processor of a vision-language model.

    Raises:
        ModelError: it cannot be read.
    """
    config = read_part(path, revision, with_vision=True).config
    folder, family = locate(path, revision, with_weights=False).folder, FAMILIES[config.model_type]
    image_token = config.image_token_id if family.keeps_shape else None
    try:
        found = processor_of(folder, config.model_type, family.tokens(config), image_token)
    except (OSError, *BUILD_ERRORS) as error:
        raise ModelError(f"cannot load the processor of {path}'s pictures: {first_line(error)}") from error
    if not family.keeps_shape and not hasattr(found, "get_text_with_replacements"):
        raise ModelError(
            "this version of transformers does not say which tokens stand for a picture: update it (pip "
            "install -U transformers)"
        )
    return found


def config_of(recipe: Recipe):
    """Return the configuration of a recipe's model: the language model's inside a larger one, unless it reads pictures.

    Raises:
        ModelError: see ``read_part``.
    """
    return read_part(recipe.model.path, recipe.model.revision, recipe.with_vision).config


def part_of(recipe: Recipe) -> LanguagePart:
    """Return a recipe's model without its weights, with the head that it asks for; see ``models.skeleton.read_part``.

    Raises:
        ModelError: see ``read_part`` and ``models.heads.with_head``.
    """
    m = recipe.model
    return with_head(read_part(m.path, m.revision, recipe.with_vision), head_of(recipe))
