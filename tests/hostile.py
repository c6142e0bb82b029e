"""Strategies that spoil good files: bytes changed at places that matter, and JSON with anything put anywhere.

``fuzz`` draws from them and counts what comes of each kind of input; tools/fuzz makes the README's table of the counts.
hypothesis and not atheris, which is guided by coverage: nearly all of the parsing is in C and Rust, which it does not
see, and it has no strategies for well-formed files with one thing wrong.
"""

import atexit
import copy
import json
import os
import struct
from collections import Counter, defaultdict
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_lite.errors import QloraLiteError

SLOW_FACTOR = 20  # times as many inputs in the tests marked slow
TIMES = pytest.mark.parametrize(
    "times", [1, pytest.param(SLOW_FACTOR, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
COUNTS = defaultdict(Counter)  # by kind of input: how many were accepted, and how many refused with a clean error


@atexit.register
def _write_counts() -> None:
    if path := os.environ.get("QLORA_LITE_FUZZ_COUNTS"):
        Path(path).write_text(json.dumps(COUNTS))


def fuzz(kind, strategy, count, check, seconds=5):
    """Call a check with so many values drawn from a strategy; each may take so many seconds.

    Args:
        check: returns "" where the input was accepted, else the text of the clean error.
    """

    @settings(
        max_examples=count,
        deadline=timedelta(seconds=seconds),
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(strategy)
    def drawn(value):
        COUNTS[kind]["refused" if check(value) else "accepted"] += 1

    drawn()


def clean(action, *arguments) -> str:
    """Return "" for success, or the text of a clean error; anything else is raised."""
    try:
        action(*arguments)
    except QloraLiteError as error:
        assert 0 < len(str(error)) < 20_000
        return str(error)
    return ""


class Trap:
    """A pickle of this makes a folder where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


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
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.integers(-5, 5)
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=6)
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=8,
)


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
