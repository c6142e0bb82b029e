"""What adapter files call the layers of a language model that was taken out of a larger one.

Others load the adapter onto the model that transformers makes of the same files: for Gemma 3 of the hub that is the
whole, vision tower included, where ``model.layers.0`` is ``model.language_model.layers.0``. So files have the names of
the whole, while everything else has those of the language model; of other models both are the same.
"""

from weakref import WeakKeyDictionary

from torch import nn

_begins: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()  # by model, see ``set_checkpoint_name``


def set_checkpoint_name(model: nn.Module, begins: tuple[str, str] | None) -> nn.Module:
    """Say how the paths of a model's layers begin in it and in files; None if alike. Return the model."""
    _begins.pop(model, None)
    if begins is not None:
        _begins[model] = begins
    return model


def prefixes_of(model: nn.Module) -> tuple[str, str] | None:
    """Return how the paths of a model's layers begin in it and in files; None if alike."""
    return _begins.get(model)


def inside(model: nn.Module, path: str) -> str:
    """Return the path of the layer that files call by a name: the other way round of ``outside``."""
    here, there = prefixes_of(model) or ("", "")
    return here + path.removeprefix(there) if path.startswith(there) else path


def outside(model: nn.Module, path: str) -> str:
    """Return what files call the layer of a path."""
    here, there = prefixes_of(model) or ("", "")
    return there + path.removeprefix(here) if path.startswith(here) else path
