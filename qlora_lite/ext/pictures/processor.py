"""How a recipe's pictures become pixels, as the files of its vision encoder say."""

from dataclasses import replace

from qlora_lite.errors import ModelError
from qlora_lite.models.locate import folder_of, read_json
from qlora_lite.models.nested import of_blocks
from qlora_lite.models.skeleton import read_config
from qlora_lite.recipe.schema import Recipe

from .pixels import Processor
from .pixels import processor_of as encoder_processor


def patch_size(recipe: Recipe) -> int:
    """Return the edge of a patch of a recipe's vision encoder, in pixels."""
    return of_blocks(read_config(recipe.model.path, recipe.model.revision)).patch_size


def build_processor(recipe: Recipe, has_masks: bool) -> Processor:
    """Return how a recipe's pictures become pixels, as its model's files say; without them ImageNet's colours.

    Raises:
        ModelError: the model is not one of pictures, or ``data.resolution`` is no multiple of its patches.
        DataError: see ``pixels.processor_of``.
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
    found = encoder_processor(said.get("image_processor", said), size, wanted, recipe.data.augment)
    # all of a picture is to be segmented, and not its middle alone
    return replace(found, resize=(found.height, found.width)) if has_masks else found


def check_deterministic(recipe: Recipe, pixels: Processor, trains_base: bool, has_masks: bool) -> None:
    """Check that torch has deterministic operators on a GPU for pictures and their labels.

    source: torch.use_deterministic_algorithms, which names the loss of two dimensions and bicubic interpolation.

    Raises:
        ModelError: it has not.
    """
    tower = of_blocks(read_config(recipe.model.path, recipe.model.revision))
    is_resized = (pixels.height, pixels.width) != (tower.image_size, tower.image_size)
    if has_masks or (is_resized and trains_base):
        what = "the loss of masks" if has_masks else "position embeddings of another size that are trained"
        raise ModelError(f"train.deterministic: torch has no deterministic gradients for {what} on a GPU; remove it")
