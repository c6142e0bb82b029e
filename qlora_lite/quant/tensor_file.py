"""Write safetensors files so that a full disk is seen as one.

safetensors reports every failure to write as its own ``SafetensorError`` with the system's error number in the
text; ``files.explain_write_errors`` needs the ``OSError``.
"""

import errno
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write contiguous host tensors to a safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
