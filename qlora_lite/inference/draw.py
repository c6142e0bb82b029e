"""Draw pictures of prompts with a run whose model draws."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qlora_lite.artifacts.trained_run import open_trained
from qlora_lite.prepare.task import find_task


def draw_prompts(
    run: str | Path,
    prompts: Sequence[str],
    seed: int = 0,
    changed: Mapping[str, float] | None = None,
    base: bool = False,
    model_path: str | None = None,
    unfinished: bool = False,
) -> list[np.ndarray]:
    """Return a picture of each prompt by a run's model, uint8 [H, W, C].

    Args:
        run: a run folder of a task that draws.
        prompts: texts or names of classes; "" is the neutral prompt.
        seed: of the first picture; each further one counts up.
        changed: steps and guidance in place of those of the run's recipe.
        base: leave out what was trained.
        model_path, unfinished: see ``artifacts.trained_run.open_trained``.

    Raises:
        RecipeError: it is no such run.
        DataError: a prompt cannot be drawn.
    """
    trained = open_trained(run, model_path, unfinished, draws=True)
    if base:
        trained.require_base()
    adapter = None if base else trained.adapter
    return find_task(trained.recipe).draw(trained.recipe, adapter, trained.device, prompts, seed, changed or {})


def write_pictures(pictures: Sequence[np.ndarray], paths: Sequence[Path]) -> None:
    """Write pictures as PNG files into folders that are there."""
    from PIL import Image

    for picture, path in zip(pictures, paths, strict=True):
        Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(path, "png")
