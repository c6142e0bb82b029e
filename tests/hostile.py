"""Strategies that spoil good files: bytes changed at places that matter, and JSON with anything put anywhere."""

import copy
import json
import struct

from hypothesis import strategies as st

NUMBERS = [0, 1, 2, 7, 8, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
WORDS = [
    "",
    "a",
    "..",
    "../x",
    "/etc/passwd",
    "\x00",
    "é",
    "x" * 3000,
    "(a+)+$",
    "[",
    "nan",
    "__metadata__",
    "F32",
    "BF16",
]
LEAVES = (
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.integers(-5, 5) | st.floats() | st.sampled_from(WORDS)
    | st.text(max_size=6)
)  # fmt: skip
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


def places_of(value, here=()):
    """Return the place of every value inside a JSON value, as a path of keys and indices."""
    found = [here]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places_of(inner, (*here, key))
    return found


@st.composite
def spoiled(draw, good):
    """Draw a JSON value that has up to three places changed, removed, or filled with something else."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places_of(value)))
        if not place:
            if draw(st.integers(0, 9)) == 0:
                return draw(ANYTHING)
            continue
        inner = value
        for key in place[:-1]:
            inner = inner[key]
        action = draw(st.sampled_from(["set", "set", "remove", "rename"]))
        if action == "set":
            inner[place[-1]] = draw(ANYTHING)
        elif action == "remove" or isinstance(inner, list):
            del inner[place[-1]]
        else:
            inner[draw(st.sampled_from(WORDS))] = inner.pop(place[-1])
    return value


@st.composite
def spoiled_bytes(draw, good, header=None):
    """Draw bytes with up to four edits: most of them in the header, where every byte means something."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        end = min(len(content), header or len(content)) if draw(st.integers(0, 9)) else len(content)
        place = draw(st.integers(0, max(0, end - 1)))
        action = draw(st.sampled_from(["flip", "number", "long", "cut", "insert", "remove", "random"]))
        if action == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif action == "number":
            content[place : place + 4] = struct.pack("<I", draw(st.sampled_from(NUMBERS)) & 0xFFFFFFFF)
        elif action == "long":
            content[place : place + 8] = struct.pack("<Q", draw(st.sampled_from(NUMBERS)))
        elif action == "cut":
            del content[place:]
        elif action == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=9))
        elif action == "remove":
            del content[place : place + draw(st.integers(1, 9))]
        else:
            content[place : place + 3] = draw(st.binary(min_size=3, max_size=3))
    return bytes(content)


def with_header(header: object, tensors: bytes) -> bytes:
    """Return a safetensors file with a JSON value as its header."""
    text = json.dumps(header).encode("utf-8", "replace")
    return struct.pack("<Q", len(text)) + text + tensors
