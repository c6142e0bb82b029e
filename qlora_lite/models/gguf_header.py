"""Walk the header of a GGUF file without believing any number in it.

``gguf.GGUFReader``, which transformers reads such files with, takes counts and lengths as they stand: a header of
fifty bytes that announces 2**60 numbers keeps it busy for good. Here every step is checked against the bytes that
are left, so the time is at most proportional to the file's size, and a file that passes holds no such surprise.

Source: the GGUF specification, versions 2 and 3, little-endian:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from pathlib import Path

MAGIC, VERSIONS, DEFAULT_ALIGNMENT = 0x46554747, (2, 3), 32
MOST_DIMENSIONS, DEEPEST_ARRAY = 8, 4
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type of a plain value
_UINT32, _STRING, _ARRAY = 4, 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


def end_of_tensors(path: Path) -> int:
    """Return the size in bytes that a file must have for all tensors that its header announces.

    Raises:
        ValueError: it is not a GGUF file, or its header is cut short or contradicts itself.
        OSError: it cannot be read.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Walk(content).whole()


class _Walk:
    def __init__(self, content: mmap.mmap):
        self.content, self.size, self.place = content, len(content), 0

    def whole(self) -> int:
        if self.u32() != MAGIC:
            raise ValueError("it does not begin as GGUF files do")
        if (version := self.u32()) not in VERSIONS:
            raise ValueError(f"its version is {version}, or it is big-endian")
        tensors, keys = self.u64(), self.u64()
        alignment = self.alignment(keys)
        ends = self.tensor_ends(tensors)
        start = -(-self.place // alignment) * alignment
        return start + max(ends)

    def skip(self, size: int) -> int:
        """Go on by some bytes; return where they began."""
        if size > self.size - self.place:
            raise ValueError(f"its header ends within {size} bytes at {self.place}")
        self.place += size
        return self.place - size

    def u32(self) -> int:
        return _U32.unpack_from(self.content, self.skip(4))[0]

    def u64(self) -> int:
        return _U64.unpack_from(self.content, self.skip(8))[0]

    def text(self) -> str:
        length = self.u64()
        start = self.skip(length)
        return self.content[start : start + length].decode()

    def alignment(self, keys: int) -> int:
        """Walk over the metadata and return what it says of the alignment of tensors."""
        alignment, seen = DEFAULT_ALIGNMENT, set()
        for _ in range(keys):
            key, kind = self.text(), self.u32()
            if key in seen:
                raise ValueError(f"its key {key[:80]!r} is there twice")
            seen.add(key)
            if key == "general.alignment":
                alignment = self.u32() if kind == _UINT32 else 0
                if alignment.bit_count() != 1:
                    raise ValueError("its general.alignment is not a power of two")
            else:
                self.value(kind)
        return alignment

    def value(self, kind: int, depth: int = 0) -> None:
        if kind in _SIZES:
            self.skip(_SIZES[kind])
        elif kind == _STRING:
            self.skip(self.u64())
        elif kind == _ARRAY and depth < DEEPEST_ARRAY:
            self.array(self.u32(), self.u64(), depth)
        else:
            raise ValueError(f"it has a value of the unknown type {kind}")

    def array(self, kind: int, count: int, depth: int) -> None:
        if kind in _SIZES:
            self.skip(_SIZES[kind] * count)
        elif kind in (_STRING, _ARRAY):
            for _ in range(count):  # each takes at least 8 bytes, or there are none left
                self.value(kind, depth + 1)
        else:
            raise ValueError(f"it has an array of the unknown type {kind}")

    def tensor_ends(self, count: int) -> list[int]:
        """Walk over the list of tensors; return where each ends, from the first tensor's place on."""
        from gguf.constants import GGML_QUANT_SIZES

        ends, seen = [], set()
        for _ in range(count):
            name, dimensions = self.text(), self.u32()
            if name in seen or dimensions > MOST_DIMENSIONS:
                raise ValueError(f"its tensor {name[:80]!r} is there twice, or has {dimensions} dimensions")
            seen.add(name)
            elements = 1
            for _ in range(dimensions):
                elements *= self.u64()
            kind, offset = self.u32(), self.u64()
            if kind not in GGML_QUANT_SIZES:
                raise ValueError(f"its tensor {name[:80]!r} is of the unknown type {kind}")
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if elements % block:
                raise ValueError(f"its tensor {name[:80]!r} has {elements} values, not whole blocks of {block}")
            ends.append(offset + elements // block * block_bytes)
        if not ends:
            raise ValueError("it has no tensors")
        return ends
