"""Check before torch is imported, which takes seconds, what a run would otherwise end with after them."""

from importlib.util import find_spec
from pathlib import Path

from qlora_lite.data.checks.metrics import check_packages
from qlora_lite.errors import ModelError, RecipeError, matches_nothing
from qlora_lite.files import require_writable
from qlora_lite.models.locate import layer_names
from qlora_lite.recipe.schema import Recipe

from .method import find_method
from .task import find_task

_OTHER_PACKAGES = {"tensorboard": "tensorboardX"}  # that serve as well


def check_run(recipe: Recipe) -> None:
    """Check what a run of a recipe needs of this machine.

    Raises:
        RecipeError: a package is not installed.
        ModelError: see ``check_layers``.
        OutputError: its folder cannot be written.
    """
    t = recipe.train
    packages = {name: (name, _OTHER_PACKAGES.get(name, name)) for name in t.trackers}
    # accelerate leaves out those that are not installed, without a word
    if missing := sorted(name for name, these in packages.items() if not any(map(find_spec, these))):
        raise RecipeError(f"train.trackers: {', '.join(missing)} is not installed; pip install it, or leave it out")
    if t.metrics_examples:
        check_packages(t.metrics)
    check_layers(recipe)
    require_writable(Path(recipe.output.dir or "runs"))


def check_layers(recipe: Recipe) -> None:
    """Check that names of layers are those of the model, where its files show for certain which it has.

    Patterns, paths and other models wait until the model is built.

    Raises:
        ModelError: they are not.
    """
    m, problems = recipe.model, []
    targets = [t.pattern for t in recipe.lora.targets] if find_method(recipe).has_targets else []
    named = {"lora.targets": targets, "model.keep_16bit": m.keep_16bit}
    plain = {key: [name for name in names if name.isidentifier()] for key, names in named.items()}
    known = layer_names(m.path, m.revision) if any(plain.values()) and find_task(recipe).has_tokens else ()
    for key, names in plain.items():
        if known and (unknown := [name for name in names if name not in known]):
            problems.append(f"{key}: {matches_nothing(unknown, known)}")
    if problems:
        raise ModelError("\n".join(problems))
