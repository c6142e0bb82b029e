"""Run a model whose weights are never in memory together: those of a block are read for its forward, and dropped.

For a few forwards of a model of any size, such as the check after an export: the memory is that of the largest block
or of the embeddings. (Loading a 7B model in float32 takes 28 GiB. transformers can keep weights on disk, but writes
them there once more first.) Every forward reads the whole file again: this is not for training.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate import init_empty_weights
from torch import nn

from .anatomy import blocks
from .load import adopt
from .pretrained import model_from

Read = Callable[[str], torch.Tensor]


def streamed_model(config, read: Read, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a model that reads its weights when they are needed; adapters may be attached to it.

    Args:
        config: transformers configuration.
        read: returns the weight of a parameter's name; a tied head's is asked for under the embeddings' name.
        dtype: of the weights.
    """
    with init_empty_weights(include_buffers=False):
        model = model_from(config, dtype=dtype)
    model.tie_weights()
    adopt(model)
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():  # the first name of each
        names[id(parameter)] = name
    inside: set[int] = set()
    for block in blocks(model):
        parts = list(block.modules())
        inside.update(map(id, parts))
        _read_around_forward(block, parts, names, read)
    for module in model.modules():
        if id(module) not in inside and module._parameters:
            _read_around_forward(module, [module], names, read)
    return model


def _read_around_forward(module: nn.Module, parts: Sequence[nn.Module], names: dict[int, str], read: Read) -> None:
    """Give the own parameters of some parts of a module values before its forward, and take them away behind it."""
    taken: list[tuple[dict, str, nn.Parameter]] = []

    def fill(_module, _arguments) -> None:
        for registry, leaf, empty in _empty_parameters(parts):
            taken.append((registry, leaf, empty))
            registry[leaf] = nn.Parameter(read(names[id(empty)]), requires_grad=False)

    def drop(_module, _arguments, _output) -> None:
        for registry, leaf, empty in taken:
            registry[leaf] = empty
        taken.clear()

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop)


def _empty_parameters(parts: Sequence[nn.Module]) -> Iterator[tuple[dict, str, nn.Parameter]]:
    """Yield where each parameter without a value is registered, its last name, and itself."""
    for part in parts:
        for leaf, parameter in list(part._parameters.items()):
            if parameter is not None and parameter.is_meta:
                yield part._parameters, leaf, parameter
