"""Small tensors on their way from the host to a device, which the host neither waits for nor asks back.

A plain copy to a GPU waits until the GPU has done all that it was given before, and so does one back. Here the copy
is made from pinned memory, in the order of the GPU's work; torch's pool keeps that memory until it has been read. And
what a device's tensor was on the host is remembered for as long as that tensor lives, for code that needs its values
there: the rows of a table that stays in host memory (``models.host_tables``).
"""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .offload import host_memory

_on_host = WeakTensorKeyDictionary()  # of a GPU's tensor, the host's and the version that it is


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host on a device; a GPU's arrives before the work that it is given from here on."""
    if device.type != "cuda":
        return tensor.to(device)
    pinned = host_memory(tensor.nbytes, device).view(tensor.dtype).view(tensor.shape)
    return pinned.copy_(tensor).to(device, non_blocking=True)


def remembered(there: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """Return a device's tensor, whose values on the host are known from here on."""
    if there.is_cuda and not there.is_inference():
        _on_host[there] = here, there._version
    return there


def on_host(tensor: torch.Tensor, host: torch.device) -> torch.Tensor:
    """Return a tensor's values on the host: those that are remembered, unless it was written to; else a copy.

    Args:
        host: where they are wanted, which for a plan is no memory at all.
    """
    here = _known(tensor)
    return tensor.to(host) if here is None else here


def part(tensor: torch.Tensor, index) -> torch.Tensor:
    """Return ``tensor[index]``, of slices, with what is known of it."""
    there = tensor[index]
    here = _known(tensor)
    return there if here is None else remembered(there, here[index])


def _known(tensor: torch.Tensor) -> torch.Tensor | None:
    here, version = _on_host.get(tensor, (None, 0)) if tensor.is_cuda else (None, 0)
    return here if here is not None and tensor._version == version else None
