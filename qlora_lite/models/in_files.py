"""Keep tensors in files that the process sees as memory, for a model that the host's memory has no room for.

The operating system writes them to the disk and keeps of them in memory what it has room for.
"""

import torch

from qlora_lite.ops.offload import disk_memory

PART_BYTES = 1 << 28  # of a file: a process may have few open at one time
ALIGNMENT = 64  # bytes: what any type, and a processor's vectors, are content with


class InFiles:
    """Tensors in files without a name, which are gone when nobody holds the tensors, or the process ends.

    Args:
        folder: where the files are; it is there.
    """

    def __init__(self, folder: str):
        self._folder, self._room = folder, torch.empty(0, dtype=torch.uint8)
        self.is_full = False  # the disk, after which nothing else is put there

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor, without gaps, that lies in a file.

        Raises:
            OutputError: the disk has no room.
        """
        size = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if size > len(self._room):
            self.is_full = True
            self._room = disk_memory(max(size, PART_BYTES), self._folder, tensor.device, "QLORA_LITE_CACHE")
            self.is_full = False
        here, self._room = self._room[: tensor.nbytes], self._room[size:]
        return here.view(tensor.dtype).view(tensor.shape).copy_(tensor)
