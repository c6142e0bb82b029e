"""Split the weights of a 16-bit model in place, and keep what the LoRA weights begin as beside the cached model.

See ``adapters.lora.start``. Of a model that stays in 16 bit the cache has those LoRA weights alone: the base is what
they leave of the files' weights.
"""

import logging
from pathlib import Path

from torch import nn

from qlora_lite.adapters.lora.start import First, Start, load_first, without_update, write_first
from qlora_lite.errors import ModelError, OutputError
from qlora_lite.files import replacing_folder
from qlora_lite.quant.linear import is_conv1d

from .cache import check_sums, write_sums
from .progress import Progress
from .quantizer import InFiles

log = logging.getLogger("qlora_lite")


def split_in_place(model: nn.Module, start: Start, first: First | None = None, files: InFiles | None = None) -> First:
    """Put what is left of the weights of a model in 16 bit or more in their place, one at a time.

    Args:
        first: what the LoRA weights begin as; None finds it.
        files: what is left is put there; in memory pages of the model's own files would be copied when written to.

    Returns:
        It.
    """
    found: First = {}
    ranks = start.ranks(model)
    progress = Progress("splitting weights", len(ranks))
    for path, (rank, scale) in ranks.items():
        layer = model.get_submodule(path)
        if files:
            layer.weight.data = files.put(layer.weight.data)
        weight = layer.weight.detach()
        weight = weight.t() if is_conv1d(layer) else weight
        if first is None:
            lora_a, lora_b, left = start.split(weight, rank, scale)
        else:
            lora_a, lora_b = first[path]
            left = without_update(weight, lora_a.to(weight.device), lora_b.to(weight.device), scale)
        weight.copy_(left)
        found[path] = lora_a.cpu(), lora_b.cpu()
        progress.step()
    return found


def save_first(folder: Path, first: First) -> None:
    """Write a folder of the cache that holds what LoRA weights begin as, and nothing else, if that is possible."""
    try:
        with replacing_folder(folder) as new:
            write_first(new, first)
            write_sums(new)
    except OutputError as error:
        log.warning("what the LoRA weights begin as is not cached: %s", error)


def read_first(folder: Path) -> First | None:
    """Read what a model's LoRA weights begin as from a folder of the cache; None if it is not there whole."""
    try:
        check_sums(folder)
        return load_first(folder)
    except ModelError:
        return None
