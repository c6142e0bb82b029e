"""Write safetensors files so that a full disk is seen as one, whole or one tensor at a time.

safetensors reports every failure to write as its own ``SafetensorError`` with the system's error number in the
text; ``files.explain_write_errors`` needs the ``OSError``. And it takes all tensors of a file at once; where they are
made one by one (a merge), ``stream_tensors`` writes the same format with one of them alive. ``bit_sums`` and
``file_sum`` find out whether a tensor or a file is still what it was.

Source of the format: 8 bytes with the header's length, the JSON header, then the tensors' bytes in its order
(https://github.com/huggingface/safetensors#format).
"""

import errno
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}
Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape by name
HASHED_WORDS = 1 << 18  # at once: 2 MiB
# 5 modulo 8, so that any two of so many powers differ in one of their last 20 bits: no product of their difference
# with that of two words that differ in their last 45 bits is a multiple of 2**64.
ODD_NUMBER = 0x9E3779B97F4A7C15 - (1 << 64)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous host tensors to a safetensors file, with the rights that any new file of the user's gets.

    Args:
        metadata: more for its header.

    Raises:
        OSError: it cannot be written.
    """
    path.touch()
    rights = path.stat().st_mode  # safetensors 0.8 lets nobody else read its files
    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
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
            values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(values)
            del tensor, values  # before the next one is made


def bit_sums(tensor: torch.Tensor) -> list[int]:
    """Return a number for every 2 MiB of a tensor's bits, computed where it lies and the same on every device.

    A sum, modulo 2**64, of 64-bit words, each times its own power of an odd number. It changes with any one word, with
    two that change places (unless they differ in their first 19 bits only), and with the one that fills all places.
    (``torch.hash_tensor`` XORs values: it is blind to their order, and an even number of equal ones is nothing to it.)
    """
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    words = torch.empty(min(HASHED_WORDS, -(-len(raw) // 8)), dtype=torch.int64, device=raw.device)
    powers = torch.full_like(words, ODD_NUMBER).cumprod(0)
    sums = []
    for part in raw.split(8 * HASHED_WORDS):
        words[len(part) // 8 :] = 0
        words.view(torch.uint8)[: len(part)].copy_(part)
        sums.append(words.mul_(powers).sum())
    return torch.stack(sums).tolist()


def file_sum(path: Path) -> str:
    """Return 64 hexadecimal digits that change with any one bit of a file, sooner than its SHA-256 would be known.

    They are a check against an accident, not a forger.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    content = torch.from_file(str(path), size=size, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
    return hashlib.sha256(f"{size} {bit_sums(content)}".encode()).hexdigest()
