"""Write safetensors files so that a full disk is seen as one, whole or one tensor at a time.

safetensors reports every failure to write as its own ``SafetensorError`` with the system's error number in the
text; ``files.explain_write_errors`` needs the ``OSError``. And it takes all tensors of a file at once; where they are
made one by one (a merge), ``stream_tensors`` writes the same format with one of them alive.

Source of the format: 8 bytes with the header's length, the JSON header, then the tensors' bytes in its order
(https://github.com/huggingface/safetensors#format).
"""

import errno
import json
import re
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape by name


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write contiguous host tensors to a safetensors file, with the rights that any new file of the user's gets.

    Raises:
        OSError: it cannot be written.
    """
    path.touch()
    rights = path.stat().st_mode  # safetensors 0.8 lets nobody else read its files
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(rights)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error


def stream_tensors(path: Path, entries: Entries, make: Callable[[str], torch.Tensor]) -> None:
    """Write a safetensors file whose tensors are made one after the other.

    Args:
        entries: the tensors, in the order of the file.
        make: returns the tensor of a name, on the host; asked once per name.

    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    names = {dtype: name for name, dtype in DTYPES.items()}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in entries.items():
            tensor = make(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
            del tensor  # before the next one is made
