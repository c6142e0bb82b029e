"""Walk the header of a GGUF file without believing any number in it.

``gguf.GGUFReader``, which transformers reads such files with, takes counts and lengths as they stand: a header of
fifty bytes that announces 2**60 numbers keeps it busy for good. Here every step is checked against the bytes that
are left, so the time is at most proportional to the file's size, and a file that passes holds no such surprise.

Source: the GGUF specification, versions 2 and 3, little-endian:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

MAGIC, VERSIONS, ALIGNMENT, DEFAULT_ALIGNMENT = 0x46554747, (2, 3), "general.alignment", 32
MAX_DIMENSIONS, DEEPEST_ARRAY = 8, 4
_PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by type
_UINT32, _STRING, _ARRAY = 4, 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class SplitFile(ValueError):
    """Report a file that holds a part of a model."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file's header says.

    Args:
        values: of all keys but those of arrays.
        tensors: where each begins in the file, in bytes, its type and its shape [out, in], by name.
        end: size in bytes that the file must have for all tensors.
        sha256: of the header's bytes, 64 hexadecimal digits.
    """

    values: dict[str, object]
    tensors: dict[str, tuple[int, int, tuple[int, ...]]]
    end: int
    sha256: str


def read_header(path: Path) -> Header:
    """Read a file's header, once per process while the file's size, modification time and inode stay the same.

    Raises:
        ValueError: it is not a GGUF file, or its header is cut short or contradicts itself.
        OSError: it cannot be read.
    """
    stat = path.stat()
    return _read(path.absolute(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=8)
def _read(path: Path, *_state: int) -> Header:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Walk(content).whole()


def end_of_tensors(path: Path) -> int:
    """Return the size in bytes that a file must have; see ``read_header``."""
    return read_header(path).end


class _Walk:
    def __init__(self, content: mmap.mmap):
        self.content, self.size, self.place = content, len(content), 0

    def whole(self) -> Header:
        if self.u32() != MAGIC:
            raise ValueError("it does not begin as GGUF files do")
        if (version := self.u32()) not in VERSIONS:
            raise ValueError(f"its version is {version}, or it is big-endian")
        tensors, keys = self.u64(), self.u64()
        values = self.values(keys)
        parts = values.get("split.count")
        if isinstance(parts, int) and parts > 1:
            raise SplitFile(f"it is one of {parts} parts of a GGUF file")
        found = self.tensors(tensors)
        digest = hashlib.sha256(self.content[: self.place]).hexdigest()
        alignment = values.get(ALIGNMENT, DEFAULT_ALIGNMENT)
        start = -(-self.place // alignment) * alignment
        end = start + max(offset + size for offset, size, *_ in found.values())
        places = {name: (start + offset, kind, shape) for name, (offset, _, kind, shape) in found.items()}
        return Header(values, places, end, digest)

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

    def values(self, keys: int) -> dict[str, Any]:
        """Walk over the metadata and return what is no array."""
        values: dict[str, Any] = {}
        seen: set[str] = set()
        for _ in range(keys):
            key, kind = self.text(), self.u32()
            if key in seen:
                raise ValueError(f"its key {key[:80]!r} is there twice")
            seen.add(key)
            if key == ALIGNMENT and kind != _UINT32:
                raise ValueError(f"its {key} is not a power of two")
            if kind == _STRING:
                values[key] = self.text()
            elif kind in _PLAIN:
                values[key] = struct.unpack_from(f"<{_PLAIN[kind]}", self.content, self.skip(_size(kind)))[0]
            else:
                self.value(kind)
        if values.get(ALIGNMENT, DEFAULT_ALIGNMENT).bit_count() != 1:
            raise ValueError(f"its {ALIGNMENT} is not a power of two")
        return values

    def value(self, kind: int, depth: int = 0) -> None:
        """Walk over a string or an array."""
        if kind == _STRING:
            self.skip(self.u64())
        elif kind == _ARRAY and depth < DEEPEST_ARRAY:
            self.array(self.u32(), self.u64(), depth)
        else:
            raise ValueError(f"it has a value of the unknown type {kind}")

    def array(self, kind: int, count: int, depth: int) -> None:
        if kind in _PLAIN:
            self.skip(_size(kind) * count)
        elif kind in (_STRING, _ARRAY):
            for _ in range(count):  # each takes at least 8 bytes, or there are none left
                self.value(kind, depth + 1)
        else:
            raise ValueError(f"it has an array of the unknown type {kind}")

    def tensors(self, count: int) -> dict[str, tuple[int, int, int, tuple[int, ...]]]:
        """Walk over the list of tensors; return their offsets and sizes in bytes, types and shapes."""
        from gguf.constants import GGML_QUANT_SIZES

        found = {}
        for _ in range(count):
            name, dimensions = self.text(), self.u32()
            if name in found or dimensions > MAX_DIMENSIONS:
                raise ValueError(f"its tensor {name[:80]!r} is there twice, or has {dimensions} dimensions")
            shape = tuple(self.u64() for _ in range(dimensions))[::-1]
            elements = prod(shape)
            kind, offset = self.u32(), self.u64()
            if kind not in GGML_QUANT_SIZES:
                raise ValueError(f"its tensor {name[:80]!r} is of the unknown type {kind}")
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if not elements or (shape or (1,))[-1] % block:
                raise ValueError(f"its tensor {name[:80]!r} has {elements} values, not rows of whole blocks of {block}")
            found[name] = offset, elements // block * block_bytes, kind, shape
        if not found:
            raise ValueError("it has no tensors")
        return found


def _size(kind: int) -> int:
    return struct.calcsize(f"<{_PLAIN[kind]}")
