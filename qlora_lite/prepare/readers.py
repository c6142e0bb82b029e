"""What makes a model's inputs of a recipe's rows.

Apart from ``recipe_head``, because a tokenizer needs no model code, see ``datasets``.
"""

from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.recipe.schema import Recipe


def reader_of(recipe: Recipe):
    """Return a recipe's tokenizer, or the processor of its pictures, or what cuts them for a denoiser.

    Raises:
        ModelError: see ``load_tokenizer``, ``recipe_head.picture_processor`` and ``recipe_denoiser.fit_of``.
    """
    if recipe.generates_pictures:
        from .recipe_denoiser import fit_of

        return fit_of(recipe)
    if recipe.of_pictures:
        from .recipe_head import picture_processor  # and with it the libraries that a model needs

        return picture_processor(recipe)
    if recipe.with_vision:
        from .recipe_head import picture_reader

        picture_reader(recipe)  # stops at once where the model reads no pictures
    return load_tokenizer(recipe.model.path, recipe.model.revision, recipe.adapter.train_tokens)
