"""A ledger for plans: it adds the scratch memory that a GPU's kernels state, and runs none of them."""

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map_only

from qlora_lite.kernels import flex_attention, fused_attention, packed_attention
from qlora_lite.memory.ledger import Ledger

ALLOCATION_BYTES = {"cuda": 512, "cpu": 1}  # CUDA's caching allocator rounds up (c10/cuda/CUDACachingAllocator.cpp)
# Bytes of scratch memory that an operator takes on a GPU, given its arguments.
GPU_SCRATCH: dict[object, Callable[..., int]] = {
    **dict.fromkeys(fused_attention.BACKWARDS, fused_attention.scratch_bytes),
    packed_attention.BACKWARD: packed_attention.scratch_bytes,
    flex_attention.VALUES: flex_attention.scratch_bytes,
    flex_attention.GRADIENTS: flex_attention.gradients_scratch_bytes,
}
_GPU_ONLY = {torch.ops.aten._scaled_dot_product_flash_attention, fused_attention.BACKWARDS[1]}


class PlanLedger(Ledger):
    """A ledger of a step that is planned for a device.

    Args:
        device_type: "cpu" or "cuda".
        settings: further arguments of ``Ledger``.
    """

    def __init__(self, device_type: str, **settings):
        super().__init__(**{"allocation_bytes": ALLOCATION_BYTES[device_type]} | settings)
        self._scratch = GPU_SCRATCH if device_type == "cuda" else {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch's own name: nothing here is compiled, and not to ask takes less time
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        scratch_bytes = self._scratch.get(func._overloadpacket)
        if scratch_bytes is None:
            return self.follow(func, args, kwargs)
        with self.holding(scratch_bytes(*args, **kwargs)):
            return self.follow(func, args, kwargs)


def on_real_tensors(func, args: tuple, kwargs: dict):
    """Run an operator of a plan that needs real tensors, whose values mean nothing.

    Of operators that only a GPU has, and of this package's own, the results are allocated and not computed.
    """
    if func.namespace != "qlora_lite" and func._overloadpacket not in _GPU_ONLY:
        return func(*args, **kwargs)
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    return tree_map_only(torch.Tensor, lambda tensor: torch.empty_like(tensor, device="cpu"), func(*args, **kwargs))
