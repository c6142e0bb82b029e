"""What reads the pictures of a recipe's chats, as its vision-language model's own processor does."""

from functools import cache, partial

from qlora_lite.data.picture_grids import GridReader
from qlora_lite.data.picture_reader import PictureReader
from qlora_lite.errors import ModelError, first_line
from qlora_lite.models.locate import locate
from qlora_lite.models.pretrained import BUILD_ERRORS, processor_of
from qlora_lite.models.skeleton import read_part
from qlora_lite.models.vision_language import FAMILIES, token_pixels
from qlora_lite.prepare.transformer import read_config
from qlora_lite.recipe.schema import Recipe


def build_reader(recipe: Recipe) -> PictureReader:
    """Return what reads the pictures of a recipe's chats.

    Raises:
        ModelError: the model is of no family that is known, or sees no pictures of ``data.resolution``.
    """
    m, wanted = recipe.model, recipe.data.resolution
    config = read_config(recipe, multimodal=True)
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
    load = partial(load_processor, *of_model)
    if not issubclass(family.reader, GridReader):
        return family.reader(*said, load)
    return family.reader(*said, load, token_pixels(config))


@cache
def load_processor(path: str, revision: str | None):
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
